"""Operators and kernels as they are run, noted as steps."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import _disable_current_modes

from ..ops.triton_support import Launch, LaunchRecorder
from .assembling import assemble
from .playing import Tape
from .steps import Empty, Geometry, Listed, Operation, Section, Start, Step, Storage, View

aten = torch.ops.aten
_EMPTY = {aten.empty.memory_format, aten.empty_like.default, aten.empty_strided.default}
_EMPTY |= {aten.new_empty.default, aten.new_empty_strided.default}
# The same operators by functions that take their arguments apart in half the time.
_QUICK: dict[Any, Callable[..., Any]] = {
    aten.add.Tensor: torch.add,
    aten.addmm.default: torch.addmm,
    aten.addmm_.default: Tensor.addmm_,
    aten.cat.default: torch.cat,
    aten.convolution.default: torch.convolution,
    aten.copy_.default: Tensor.copy_,
    aten.gelu.default: torch.nn.functional.gelu,
    aten.mm.default: torch.mm,
    aten.mm.out: torch.mm,
}
_BY_VALUE = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}

Kept = dict[Any, list[Tensor]]


class Recorder(LaunchRecorder):
    """Notes operators and Triton kernels that are run in its parts; keeps none of their tensors.

    A tensor is noted as its storage and its geometry, wherever it is read or written, so operators
    that only make views are left out.

    Args:
        constants: tensors that will be where they are whenever the tape is played.
        kept: more of those, by their roles; new ones are added.

    Attributes:
        refusal: why what was recorded cannot be played, or None.
        done: whether ``tape`` was called.
    """

    def __init__(self, constants: Sequence[Tensor], kept: Kept | None = None) -> None:
        super().__init__()
        self.refusal: str | None = None
        self.done = False
        self._kept: Kept = {} if kept is None else kept
        self._storages: list[Storage] = []
        # By address. Nothing else gets a storage's while there is a weak reference to it.
        self._numbers: dict[int, tuple[StorageWeakRef, int]] = {}
        self._devices: set[torch.device] = set()
        self._steps: list[Step] = []
        self._sections: list[Section] = []
        for tensor in constants:
            self._hold(tensor)

    @contextmanager
    def part(self, inputs: Sequence[Tensor]) -> Iterator[list[Tensor | None]]:
        """Record what is run inside; its outputs are to be put into the list.

        Args:
            inputs: tensors at the start of their storages.
        """
        if any(self._number(tensor) is not None for tensor in inputs):
            self._refuse("an input lies on memory that was used before")
        given = [self._add(tensor) for tensor in inputs]
        outputs: list[Tensor | None] = []
        try:
            with self:
                yield outputs
        except BaseException:
            self._refuse("a part was not finished")
            raise
        wanted = [None if tensor is None else self._view(tensor) for tensor in outputs]
        self._sections.append(Section(self._steps, given, wanted))
        self._steps = []

    def tape(self) -> Tape:
        """All parts, to be played."""
        self.done = True
        return assemble(self._storages, self._sections)

    def kept(self, role: Any, make: Callable[[], list[Tensor]]) -> list[Tensor]:
        """The tensors of a role, constants from now on."""
        with _disable_current_modes():
            if role not in self._kept:
                self._kept[role] = make()
            for tensor in self._kept[role]:
                self._hold(tensor)
        return self._kept[role]

    def launched(self, launch: Launch, tensors: Sequence[Tensor | None]) -> None:
        """Note a kernel."""
        views = tuple(None if tensor is None else self._view(tensor) for tensor in tensors)
        self._steps.append(Start(launch, views))

    def __torch_dispatch__(
        self, function: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operator and note it."""
        kwargs = kwargs or {}
        value = function(*args, **kwargs)
        if not _BY_VALUE.isdisjoint(function.tags):
            self._refuse(f"what {function} gives depends on values")
        several = isinstance(value, tuple | list)
        results = value if several else (value,)
        new = any(isinstance(r, Tensor) and self._number(r) is None for r in results)
        if function in _EMPTY:
            self._devices.add(value.device)
            if len(self._devices - {torch.device("meta")}) > 1:
                self._refuse("memory is allocated on two devices")
            self._steps.append(Empty(self._add(value), value.device))
        elif new or function._schema.is_mutable:
            arguments = tuple(map(self._argument, (*args, *kwargs.values())))
            function = _with_keywords(function, len(args), tuple(kwargs))
            numbers = tuple(map(self._result, results))
            self._steps.append(Operation(function, arguments, numbers, several))
        return value

    def _argument(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._view(value)
        if isinstance(value, tuple | list) and any(isinstance(v, Tensor) for v in value):
            return Listed(tuple(map(self._argument, value)))
        return value

    def _result(self, value: Any) -> int | None:
        """The number of a new storage; two results may share one."""
        if isinstance(value, Tensor) and self._number(value) is None:
            return self._add(value)
        return None

    def _view(self, x: Tensor) -> View:
        number = self._number(x)
        if number is None:
            self._refuse("a tensor is read that was made outside")
            number = self._add(x)
        if x.dtype != self._storages[number].root.dtype:
            self._refuse("memory is read in two dtypes")
        return View(number, Geometry.of(x))

    def _number(self, x: Tensor) -> int | None:
        """A storage's number, if it is known."""
        known = self._numbers.get(x.untyped_storage()._cdata)
        return None if known is None or known[0].expired() else known[1]

    def _add(self, x: Tensor, constant: Tensor | None = None) -> int:
        """Number a storage."""
        storage = x.untyped_storage()
        self._numbers[storage._cdata] = StorageWeakRef(storage), len(self._storages)
        self._storages.append(Storage(Geometry.of(x), constant))
        return len(self._storages) - 1

    def _hold(self, x: Tensor) -> None:
        """Take a tensor as a constant."""
        if self._number(x) is None:
            self._add(x, x.detach())

    def _refuse(self, reason: str) -> None:
        self.refusal = self.refusal or reason


@functools.cache
def _with_keywords(function: Any, count: int, names: tuple[str, ...]) -> Callable[..., Any]:
    """An operator that takes all arguments in a row: ``count``, and those of the names."""
    operator = _QUICK.get(function) or function._op  # less Python than the operator itself
    if not names:
        return operator

    def call(*arguments: Any) -> Any:
        return operator(*arguments[:count], **dict(zip(names, arguments[count:], strict=True)))

    return call
