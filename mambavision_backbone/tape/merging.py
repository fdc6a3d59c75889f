"""Sums that nobody waits for are put off, to be computed together: fewer kernels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .steps import Section, Start, Step, nbytes, touched

WAITING = 32 << 20  # bytes of parts that are kept for sums put off, about


def merge_sums(section: Section) -> Section:
    """The section with launches of ``row_sum`` put off, and several made one; same results."""
    if not any(isinstance(step, Start) for step in section.steps):
        return section
    return section._replace(steps=list(_put_off(section.steps)))


def _put_off(steps: Sequence[Step]) -> Iterator[Step]:
    from ..ops.row_sum.launch import is_row_sum  # Triton is there: kernels were launched

    waiting: list[Start] = []
    used: set[int] = set()  # their storages
    size = 0
    for step in steps:
        free = used.isdisjoint(touched(step))
        if free and isinstance(step, Start) and is_row_sum(step.launch):
            waiting.append(step)
            used |= touched(step)
            size += max(nbytes(view.geometry) for view in step.tensors if view)
            if size <= WAITING:
                continue
        elif free:
            yield step
            continue
        yield from _joined(waiting)
        if step is not waiting[-1]:
            yield step
        waiting, used, size = [], set(), 0
    yield from _joined(waiting)


def _joined(starts: Sequence[Start]) -> Iterator[Start]:
    from ..ops.row_sum.launch import MANY, merge_launches

    by_dtypes: dict[object, list[Start]] = {}
    for start in starts:
        dtypes = tuple(view.geometry.dtype for view in start.tensors if view)
        by_dtypes.setdefault(dtypes, []).append(start)
    for alike in by_dtypes.values():
        for i in range(0, len(alike), MANY):
            some = alike[i : i + MANY]
            if len(some) == 1:
                yield some[0]
            else:
                launch, tensors = merge_launches(
                    [s.launch for s in some], [s.tensors for s in some]
                )
                yield Start(launch, tensors)
