"""From steps to calls: memory is shared out, views are made where they are read."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .kernels import KernelStart, Operand, empty, make_view
from .merging import merge_sums
from .playing import Call, Part, Slots, Tape
from .slabs import SLAB, Need, Slab, place
from .steps import (
    Empty,
    Listed,
    Section,
    Start,
    Step,
    Storage,
    View,
    nbytes,
    touched,
)

_Size = tuple[int, ...]
_numbers: list[int] = []  # of slots: tapes share what they can, since many are kept
_known_sizes: dict[tuple[_Size, _Size], tuple[_Size, _Size]] = {}


def assemble(storages: Sequence[Storage], sections: Sequence[Section]) -> Tape:
    """The tape of sections that were recorded one after the other."""
    sections = [merge_sums(section) for section in sections]
    assembly = _Assembly(storages, _places(storages, sections))
    parts = []
    for steps, inputs, outputs in sections:
        assembly.drafts = []
        given = [assembly.root(number) for number in inputs]
        for step in steps:
            assembly.add(step)
        wanted = [None if view is None else assembly.tensor(view) for view in outputs]
        parts.append((assembly.drafts, given, wanted))
    later = {
        number for section in sections[1:] for step in section.steps for number in touched(step)
    }
    read_again = not later.isdisjoint(sections[0].inputs)
    return Tape(assembly.slots, _finish(parts, assembly.slots), assembly.slabs(), read_again)


def _places(
    storages: Sequence[Storage], sections: Sequence[Section]
) -> dict[int, tuple[Slab, int]]:
    """Slabs and offsets of what is allocated, but for large tensors and the first part's outputs.

    The last part's have a slab of their own, as far as that goes, which is not used again.
    """
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for i, step in enumerate(step for section in sections for step in section.steps):
        if isinstance(step, Empty):
            first[step.storage] = i
        else:
            last.update(dict.fromkeys(touched(step), i))
    *before, results = ({view.storage for view in s.outputs if view} for s in sections)
    earlier = set().union(*before)
    results &= {step.storage for step in sections[-1].steps if isinstance(step, Empty)}
    end = sum(len(section.steps) for section in sections)
    own = Slab()
    places: dict[int, tuple[Slab, int]] = {}
    needs: dict[int, Need] = {}
    for number, start in first.items():
        size = nbytes(storages[number].root)
        if number not in last or number in earlier or not 0 < size <= SLAB // 2:
            continue
        if number not in results:
            needs[number] = Need(start, last[number], size)
            continue
        offset = own.take(Need(start, end, size))
        if offset is not None:
            places[number] = own, offset
    places.update(zip(needs, place(list(needs.values())), strict=True))
    return places


class _Draft(NamedTuple):
    """A call before it is known what later ones need."""

    function: Callable[..., Any]
    arguments: tuple[int, ...]
    results: tuple[int, ...]
    several: bool
    matters: bool  # also where nobody needs the results


class _Assembly:
    """Calls as they come, on slots."""

    def __init__(self, storages: Sequence[Storage], places: dict[int, tuple[Slab, int]]) -> None:
        self.slots: Slots = []
        self.drafts: list[_Draft] = []
        self._storages, self._places = storages, places
        self._roots: dict[int, int] = {}
        self._slabs: dict[Any, int] = {}
        self._views: dict[tuple[int, tuple[_Size, _Size], int], int] = {}

    def add(self, step: Step) -> None:
        """Add a step's calls."""
        if isinstance(step, Empty):
            self._add_empty(step)
        elif isinstance(step, Start):
            self._add_start(step)
        else:
            arguments = tuple(map(self._argument, step.arguments))
            results = tuple(
                self._slot(None) if number is None else self.root(number) for number in step.results
            )
            self.drafts.append(_Draft(step.function, arguments, results, step.several, True))

    def slabs(self) -> list[int]:
        """Slots of the slabs, some more than once as tensors of two dtypes."""
        return list(self._slabs.values())

    def root(self, number: int) -> int:
        """The slot of a storage's root."""
        if number not in self._roots:
            self._roots[number] = self._slot(self._storages[number].constant)
        return self._roots[number]

    def tensor(self, view: View) -> int:
        """The slot of a tensor, made here if it is not there yet."""
        base, shift = self._base(view)
        sizes = view.geometry.shape, view.geometry.strides
        if view.storage not in self._places and view.geometry == self._storages[view.storage].root:
            return base
        slot = self._views.get((base, sizes, shift))
        if slot is None:
            constant = self.slots[base]
            if constant is None:
                slot = self._draft(make_view, base, *self._sizes(*sizes), self._slot(shift))
            else:
                slot = self._slot(make_view(constant, *sizes, shift))
            self._views[base, sizes, shift] = slot
        return slot

    def _base(self, view: View) -> tuple[int, int]:
        """The slot of what a tensor is a view of, and elements from the start of that to its."""
        if view.storage not in self._places:
            first = self._storages[view.storage].root.offset
            return self.root(view.storage), view.geometry.offset - first
        slab, offset = self._places[view.storage]
        dtype = view.geometry.dtype
        return self._slabs[slab, dtype], view.geometry.offset + offset // dtype.itemsize

    def _add_empty(self, step: Empty) -> None:
        geometry = self._storages[step.storage].root
        if step.storage not in self._places:
            self._roots[step.storage] = self._empty(*geometry[:3], step.device)
            return
        slab, _ = self._places[step.storage]
        if slab not in self._slabs:
            self._slabs[slab] = self._empty(torch.uint8, (slab.nbytes,), (1,), step.device)
        if (slab, geometry.dtype) not in self._slabs:
            typed = self._draft(Tensor.view, self._slabs[slab], self._slot(geometry.dtype))
            self._slabs[slab, geometry.dtype] = typed

    def _add_start(self, step: Start) -> None:
        bases: list[int] = []
        operands: list[Operand | Tensor | None] = []
        for view in step.tensors:
            if view is None:
                operands.append(None)
                continue
            base, shift = self._base(view)
            if self.slots[base] is not None:  # a constant
                operands.append(self.slots[self.tensor(view)])
                continue
            if base not in bases:
                bases.append(base)
            operands.append(Operand(bases.index(base), view.geometry, shift))
        kernel = self._slot(KernelStart(step.launch, operands))
        self.drafts.append(
            _Draft(KernelStart.start, (kernel, *bases), (), several=True, matters=True)
        )

    def _argument(self, value: Any) -> int:
        if isinstance(value, View):
            return self.tensor(value)
        if isinstance(value, Listed):
            items = [self._argument(item) for item in value.items]
            values = [self.slots[item] for item in items]
            if all(isinstance(v, Tensor) for v in values):
                return self._slot(values)
            return self._draft(_listed, *items)
        return self._slot(value)

    def _draft(self, function: Callable[..., Any], *arguments: int) -> int:
        """Add a call that matters only if its result is needed: the slot of that."""
        slot = self._slot(None)
        self.drafts.append(_Draft(function, arguments, (slot,), several=False, matters=False))
        return slot

    def _empty(self, dtype: torch.dtype, shape: _Size, strides: _Size, device: Any) -> int:
        others = self._slot(dtype), self._slot(device)
        return self._draft(empty, *self._sizes(shape, strides), *others)

    def _sizes(self, shape: _Size, strides: _Size) -> tuple[int, int]:
        """The slots of both, which are kept once for all tapes."""
        known = _known_sizes.setdefault((shape, strides), (shape, strides))
        return self._slot(known[0]), self._slot(known[1])

    def _slot(self, value: Any) -> int:
        self.slots.append(value)
        if len(_numbers) < len(self.slots):
            _numbers.append(len(_numbers))
        return _numbers[len(self.slots) - 1]


def _finish(
    parts: Sequence[tuple[list[_Draft], list[int], list[int | None]]], slots: Slots
) -> list[Part]:
    """The parts' calls, without those whose results nobody needs."""
    finished: list[Part] = []
    needed: set[int] = set()  # by what comes later
    for drafts, inputs, outputs in reversed(parts):
        wanted = {slot for slot in outputs if slot is not None and slots[slot] is None}
        last = wanted - needed
        needed |= wanted
        calls = []
        for draft in reversed(drafts):
            if not draft.matters and needed.isdisjoint(draft.results):
                continue
            read = {slot for slot in draft.arguments if slots[slot] is None}
            kept = [(i, slot) for i, slot in enumerate(draft.results) if slot in needed]
            results = tuple(kept) if draft.several else kept[0][1] if kept else ()
            calls.append(_call(draft.function, draft.arguments, results, tuple(read - needed)))
            needed -= set(draft.results)
            needed |= read
        last |= set(inputs) - needed
        needed -= set(inputs)
        finished.append(Part(calls[::-1], inputs, outputs, frozenset(last)))
    return finished[::-1]


@functools.lru_cache(100_000)
def _call(
    function: Callable[..., Any], arguments: tuple[int, ...], results: Any, dead: tuple[int, ...]
) -> Call:
    """Calls of tapes for other shapes differ in the constants only, and are kept once."""
    if len(arguments) < 2:  # which itemgetter does not give as a sequence
        start = arguments[0] if arguments else 0
        return Call(function, itemgetter(slice(start, start + len(arguments))), results, dead)
    return Call(function, itemgetter(*arguments), results, dead)


def _listed(*values: Any) -> list[Any]:
    return list(values)
