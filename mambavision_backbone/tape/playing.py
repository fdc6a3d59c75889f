"""Calls out of slots: what is left of a computation when it is made again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Slots = list[Any]


class Call(NamedTuple):
    """A function, its arguments out of the slots, and where its results go.

    ``results`` is a slot, or pairs of an index and a slot. Then the ``dead`` slots are emptied,
    which no later call reads.
    """

    function: Callable[..., Any]
    arguments: Callable[[Slots], Sequence[Any]]
    results: int | tuple[tuple[int, int], ...]
    dead: tuple[int, ...]


class Part(NamedTuple):
    """Calls in a row, the slots of what they are given and of what is wanted of them."""

    calls: Sequence[Call]
    inputs: Sequence[int]
    outputs: Sequence[int | None]
    dead: frozenset[int]  # when all is done


class Tape:
    """Parts to be played one after the other, each on what those before it left in the slots.

    Args:
        slots: constants, and None where inputs and results come.
        parts: see above.
        shared: slots of memory that calls use one after the other.
        read_again: whether later parts read the first one's inputs.
    """

    def __init__(
        self, slots: Slots, parts: Sequence[Part], shared: Sequence[int], read_again: bool
    ) -> None:
        self.slots, self.parts, self._shared = slots, parts, shared
        self.read_again = read_again

    def start(self) -> Slots:
        """Slots for the first part."""
        return self.slots.copy()

    def play_again(self, part: int, slots: Slots, inputs: Sequence[Tensor]) -> list[Any]:
        """As ``play``, but leave slots and memory as they were, to be played on once more."""
        shared = [slots[slot] for slot in self._shared if slots[slot] is not None]
        memory = list({tensor.data_ptr(): tensor for tensor in shared}.values())
        values = [tensor.clone() for tensor in memory]
        try:
            return self.play(part, slots.copy(), inputs)
        finally:
            for tensor, value in zip(memory, values, strict=True):
                tensor.copy_(value)

    def play(self, part: int, slots: Slots, inputs: Sequence[Tensor]) -> list[Any]:
        """Make a part's calls, and return its outputs: tensors, None where that was recorded.

        Args:
            part: which one.
            slots: as the part before left them; what no later part reads is dropped.
            inputs: of the dtypes, shapes and strides of those recorded, at the start of storages.
        """
        calls, given, wanted, last = self.parts[part]
        for slot, tensor in zip(given, inputs, strict=True):
            slots[slot] = tensor
        with (
            torch.no_grad(),
            torch._C._DisableAutocast(),
            torch._C._AutoDispatchBelowADInplaceOrView(),
        ):
            for function, arguments, results, dead in calls:
                value = function(*arguments(slots))
                if results.__class__ is int:
                    slots[results] = value
                else:
                    for i, slot in results:  # type: ignore[union-attr]
                        slots[slot] = value[i]
                value = None
                for slot in dead:
                    slots[slot] = None
        outputs = [  # what is needed later, too, goes out as another tensor: it may get a history
            slot if slot is None else slots[slot] if slot in last else slots[slot].detach()
            for slot in wanted
        ]
        for slot in last:
            slots[slot] = None
        return outputs
