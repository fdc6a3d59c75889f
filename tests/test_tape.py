"""Computations that are recorded and played: in general, on a CPU."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from mambavision_backbone.tape import Recorder, Tape
from mambavision_backbone.tape.slabs import ALIGNMENT, SLAB, Need, place


def recorded(function: Any, *inputs: Tensor, constants: Any = ()) -> tuple[Recorder, list[Tensor]]:
    recorder = Recorder(constants)
    with recorder.part(inputs) as outputs:
        outputs += function(*inputs)
    return recorder, outputs


def check(function: Any, *shapes: tuple[int, ...], constants: Any = ()) -> Tape:
    """Played twice, on other values, it gives what the function gives."""
    inputs = [torch.randn(shape) for shape in shapes]
    recorder, first = recorded(function, *inputs, constants=constants)
    assert recorder.refusal is None
    assert all(torch.equal(a, b) for a, b in zip(first, function(*inputs), strict=True))
    tape = recorder.tape()
    for _ in range(2):
        inputs = [torch.randn(shape) for shape in shapes]
        outputs = tape.play(0, tape.start(), inputs)
        for a, b in zip(outputs, function(*inputs), strict=True):
            assert torch.equal(a, b)
            assert a.stride() == b.stride()
    return tape


def test_operators_views_and_lists() -> None:
    def function(x: Tensor, y: Tensor) -> list[Tensor]:
        a, b = x.t().chunk(2, dim=1)
        z = torch.cat([a, b.contiguous(), y[:, 1:3]], dim=1)
        top = torch.topk(z, 2, dim=1)
        return [z, z[1], top.values, top.indices, x, torch.stack((a, b)).sum(0, keepdim=True)]

    check(function, (4, 6), (6, 4))


def test_in_place_out_and_keywords() -> None:
    def function(x: Tensor) -> list[Tensor]:
        y = torch.empty_like(x)
        torch.mul(x, 2, out=y)
        y[1:].add_(x[:-1], alpha=0.5)
        z = torch.zeros(3, 5, dtype=torch.float64)
        z.copy_(y)
        torch._foreach_add_([z[0], z[1]], 1.0)
        return [y, z, x.to(torch.float16)]

    check(function, (3, 5))


def test_memory_is_shared_and_not_mixed_up() -> None:
    """Many empty tensors, each read long after others were written."""

    def function(x: Tensor) -> list[Tensor]:
        kept = []
        for i in range(40):
            y = torch.empty(x.shape).copy_(x + i)
            if i % 3 == 0:
                kept.append(y)
            x = torch.empty_like(x).copy_(y.flip(0) + sum(k.mean() for k in kept[-4:]))
        return [x, *kept[::2]]

    check(function, (20, 30))


def test_constants_are_read_where_they_are() -> None:
    weight = torch.ones(3)
    tape = check(lambda x: [x * weight[1:]], (2,), constants=[weight])
    weight.fill_(5)
    assert tape.play(0, tape.start(), [torch.ones(2)])[0].tolist() == [5, 5]


def test_parts_go_on_from_each_other() -> None:
    recorder = Recorder([])
    x, g = torch.randn(4), torch.randn(4)
    with recorder.part([x]) as outputs:
        a = torch.empty(4).copy_(x.exp())
        b = x.sin()
        outputs += [a + b, a]
    with recorder.part([g]) as outputs:
        c = torch.empty(4).copy_(g * a)
        outputs += [c + b[1:].sum(), None]
    tape = recorder.tape()
    for _ in range(2):
        x, g = torch.randn(4), torch.randn(4)
        slots = tape.start()
        total, a = tape.play(0, slots, [x])
        assert torch.equal(total, x.exp() + x.sin())
        assert torch.equal(a, x.exp())
        for play in (tape.play_again, tape.play_again, tape.play):
            last, nothing = play(1, slots, [g])
            assert torch.equal(last, g * x.exp() + x.sin()[1:].sum())
            assert nothing is None
        variable = [slot for slot, fixed in zip(slots, tape.slots, strict=True) if fixed is None]
        assert not any(isinstance(value, Tensor) for value in variable)  # all are dropped


def test_a_failure_leaves_what_is_played_again() -> None:
    """Memory that was written to in the part that failed is as it was before it."""
    fail = False

    recorder = Recorder([])
    x, g = torch.randn(4), torch.randn(4)
    with recorder.part([x]) as outputs:
        a = torch.empty(4).copy_(x.exp())
        outputs += [a.sum()]
    with recorder.part([g]) as outputs:
        b = a * g
        c = torch.empty(4).copy_(b)
        outputs += [c + 1]
    tape = recorder.tape()
    slots = tape.start()
    tape.play(0, slots, [x])
    calls = list(tape.parts[1].calls)

    def out_of_memory(*_: Any) -> None:
        if fail:
            raise torch.OutOfMemoryError("none left")

    calls[-1] = calls[-1]._replace(function=_then(out_of_memory, calls[-1].function))
    tape.parts = [tape.parts[0], tape.parts[1]._replace(calls=calls)]
    for fail in (True, True, False):
        if fail:
            with pytest.raises(torch.OutOfMemoryError):
                tape.play_again(1, slots, [g])
        else:
            assert torch.equal(tape.play_again(1, slots, [g])[0], x.exp() * g + 1)


def _then(first: Any, second: Any) -> Any:
    return lambda *arguments: (first(), second(*arguments))[1]


def test_a_part_that_fails_is_refused() -> None:
    recorder = Recorder([])
    part = recorder.part([torch.ones(2)])
    part.__enter__()
    error = ZeroDivisionError()
    assert not part.__exit__(ZeroDivisionError, error, None)
    assert "not finished" in (recorder.refusal or "")


def test_random_numbers_are_drawn_anew() -> None:
    recorder, _ = recorded(lambda x: [x + torch.rand(8)], torch.zeros(8))
    tape = recorder.tape()
    torch.manual_seed(3)
    a, b = (tape.play(0, tape.start(), [torch.zeros(8)])[0] for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(a, torch.rand(8))
    assert torch.equal(b, torch.rand(8))


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: [x * x.sum().item()], "depends on values"),
        (lambda x: [x[x > 0]], "depends on values"),
        (lambda x: [x + OUTSIDE], "made outside"),
        (lambda x: [x.view(torch.int32) + 1], "two dtypes"),
    ],
)
def test_what_cannot_be_played_is_refused(function: Any, reason: str) -> None:
    recorder, _ = recorded(function, torch.randn(3))
    assert reason in recorder.refusal


OUTSIDE = torch.ones(3)


def test_outputs_of_the_last_part_share_memory() -> None:
    """Of two dtypes, one that is read later, and more of them than a slab holds."""
    recorder = Recorder([])
    x, g = torch.randn(4), torch.randn(4)
    with recorder.part([x]) as outputs:
        a = torch.empty(4).copy_(x + 1)
        outputs += [a]

    def last(a: Tensor, g: Tensor) -> list[Tensor]:
        b = torch.empty(4).copy_(a * g)
        c = torch.empty(3, dtype=torch.float16).copy_(b[1:])
        large = [torch.empty(SLAB // 2 // 4).fill_(0).add_(i + b.sum()) for i in range(3)]
        b.mul_(2)
        return [b, c, c[:2], *large]

    with recorder.part([g]) as outputs:
        outputs += last(a, g)
    tape = recorder.tape()
    slots = tape.start()
    x, g = torch.randn(4), torch.randn(4)
    tape.play(0, slots, [x])
    kept = []
    for play in (tape.play_again, tape.play_again, tape.play):
        got, wanted = play(1, slots, [g]), last(x + 1, g)
        kept.append((got, wanted))
        assert got[0].untyped_storage().data_ptr() == got[1].untyped_storage().data_ptr()
    for got, wanted in kept:  # each play's are its own
        assert all(map(torch.equal, got, wanted))


def test_no_tensors_are_kept() -> None:
    """Storages die while a recording goes on, and others may come to their addresses."""

    def function(x: Tensor) -> list[Tensor]:
        for i in range(50):
            x = (x + i).sin()
        return [x]

    check(function, (1000,))


def test_places_do_not_overlap() -> None:
    generator = random.Random(0)
    for _ in range(20):
        needs, now = [], 0
        for _ in range(300):
            now += generator.choice((0, 1, 2))
            nbytes = int(2 ** generator.uniform(0, 24))
            needs.append(Need(now, now + generator.choice((0, 1, 3, 10, 200)), nbytes))
        places = place(needs)
        for i, (need, (slab, offset)) in enumerate(zip(needs, places, strict=True)):
            assert offset % ALIGNMENT == 0
            assert offset + need.nbytes <= slab.nbytes <= SLAB
            for other, (its_slab, its_offset) in zip(needs[:i], places[:i], strict=True):
                if its_slab is slab and other.last >= need.first:
                    ends = its_offset + other.nbytes, offset + need.nbytes
                    assert ends[0] <= offset or ends[1] <= its_offset
        live = max(sum(n.nbytes for n in needs if n.first <= t <= n.last) for t in range(0, now, 7))
        used = {id(slab): slab for slab, _ in places}
        assert sum(s.nbytes for s in used.values()) < 20 * live  # of the past, too
