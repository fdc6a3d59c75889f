"""Many short-lived tensors in few pieces of memory: which of them can have the same place."""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from typing import NamedTuple

from ..ops.sizes import ceil_div

SLAB = 32 << 20  # bytes at most
ALIGNMENT = 512  # bytes, as that of PyTorch's allocator


class Need(NamedTuple):
    """Memory that is first written at one step and last read at another one."""

    first: int
    last: int
    nbytes: int


class Slab:
    """A piece of memory, from its first need until nothing in it is needed any more."""

    def __init__(self) -> None:
        self.nbytes = 0
        self._taken: list[tuple[int, int, int]] = []  # offset, end, last step

    def needed(self, step: int) -> bool:
        """Whether anything in it is needed at a step or later."""
        return any(last >= step for _, _, last in self._taken)

    def take(self, need: Need) -> int | None:
        """The lowest offset where a need fits in, from its first step on; None if nowhere."""
        self._taken = [taken for taken in self._taken if taken[2] >= need.first]
        length = ceil_div(need.nbytes, ALIGNMENT) * ALIGNMENT
        offset = 0
        for start, end, _ in self._taken:
            if offset + length <= start:
                break
            offset = end
        if offset + length > SLAB:
            return None
        insort(self._taken, (offset, offset + length, need.last))
        self.nbytes = max(self.nbytes, offset + length)
        return offset


def place(needs: Sequence[Need]) -> list[tuple[Slab, int]]:
    """A slab and an offset for each need; needs overlap in memory only if they do not in time.

    Args:
        needs: in the order of their first steps, none larger than a slab.
    """
    slabs: list[Slab] = []  # that are in use
    places = []
    for need in needs:
        slabs = [slab for slab in slabs if slab.needed(need.first)]
        for slab in [*slabs, Slab()]:
            offset = slab.take(need)
            if offset is not None:
                break
        if slab not in slabs:
            slabs.append(slab)
        assert offset is not None  # in a new slab there is room
        places.append((slab, offset))
    return places
