"""The launch of kernels, with stand-ins for Triton's objects."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton")
from mambavision_backbone.ops import triton_common, triton_support
from mambavision_backbone.ops.triton_support import Launch, launch


class Kernel:
    """Notes how it is started: through Triton's lookup or as a compiled kernel."""

    def __init__(self, compiled: Callable[..., None], launcher: type[_Launcher]) -> None:
        self.starts: list[str] = []
        self.compiled = compiled
        self.launcher = launcher

    def __getitem__(self, _grid: Any) -> Callable[..., Any]:
        def start(x: torch.Tensor, *_: Any, num_warps: int) -> Any:
            self.starts.append(f"looked up, {num_warps} warps")
            x *= 2
            return _Compiled(self)

        return start


class _Compiled:
    """What Triton returns: with the launcher's parts that ``launch`` uses."""

    function, packed_metadata = 11, (1, 0)

    def __init__(self, kernel: Kernel) -> None:
        self.run = kernel.launcher(kernel)


class _Launcher:
    """Of most versions of Triton: what it is called with comes between the grid and arguments."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __call__(self, *args: Any) -> None:
        grid, stream, fixed, rest = args[:3], args[3], args[4:9], args[9:]
        assert (grid, stream, fixed) == ((1, 1, 1), 0, (11, (1, 0), None, None, None))
        self.kernel.compiled(self.kernel, *rest)


class _Launcher36(_Launcher):
    """Of Triton 3.6, whose call adds scratch memory and flags to those of ``launch``."""

    global_scratch_size = profile_scratch_size = 0
    launch_cooperative_grid, launch_pdl = False, True

    def launch(self, *args: Any) -> None:
        assert args[4:9] == (11, False, True, None, None)
        super().__call__(*args[:4], args[4], *args[9:])

    def __call__(self, *_: Any) -> None:
        raise AssertionError("the long way")


class _WithScratch(_Launcher36):
    """A kernel that needs scratch memory, which the launcher's call allocates."""

    global_scratch_size = 16
    __call__ = _Launcher.__call__


class _Launcher37(_Launcher36):
    """Of Triton 3.7, whose ``launch`` takes other arguments, but whose call does not."""

    __call__ = _Launcher.__call__

    def launch(self, *_: Any) -> None:
        raise TypeError("argument 9 must be a sequence of length 3, not None")


class _Wrong(_Launcher36):
    """Takes the same arguments for something else."""

    __call__ = _Launcher.__call__

    def launch(self, *_: Any) -> None:
        pass


def works(kernel: Kernel, address: int, n: int, *_: Any) -> None:
    """Double n numbers at an address, which is what a compiled kernel gets of a tensor."""
    kernel.starts.append("compiled")
    numbers = (ctypes.c_float * n).from_address(address)
    numbers[:] = [2 * number for number in numbers]


def fails(_kernel: Kernel, *_: Any) -> None:
    raise TypeError("function takes exactly 9 arguments")


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_support, "_by_specialisation", {})
    monkeypatch.setattr(triton_support, "_by_arguments", {})
    monkeypatch.setattr(triton_support, "raw_stream", lambda _: 0)
    monkeypatch.setattr(triton_support, "_starter", [triton_support._by_call])


LOOKED, COMPILED = "looked up, 2 warps", "compiled"


@pytest.mark.parametrize(
    ("launcher", "starter"),
    [(_Launcher, "_by_call"), (_Launcher36, "_by_function"), (_WithScratch, "_by_function")],
)
def test_a_compiled_kernel_is_found_by_what_triton_specialises_on(
    launcher: type[_Launcher], starter: str
) -> None:
    triton_support._starter[:] = [getattr(triton_support, starter)]
    kernel = Kernel(works, launcher)
    wide = torch.ones(64)
    for x, n in [(wide, 32), (wide, 48), (wide, 1), (wide, 7), (wide[1:], 32), (wide.half(), 32)]:
        launch(kernel, (1, 1, 1), (x,), (n,), (8,), warps=2)
    assert kernel.starts == [LOOKED, COMPILED, LOOKED, LOOKED, LOOKED, LOOKED]
    launch(kernel, (1, 1, 1), (wide,), (32,), (16,), warps=2)
    launch(kernel, (1, 1, 1), (wide,), (32,), (8,), warps=4)
    assert kernel.starts[6:] == [LOOKED, "looked up, 4 warps"]


def test_arguments_are_remembered_and_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of images of many sizes only so many; compiled kernels are found all the same."""
    monkeypatch.setattr(triton_support, "_MAX_ARGUMENTS", 2)
    kernel = Kernel(works, _Launcher)
    x = torch.ones(64)
    for n in (16, 32, 48, 64, 16, 16):
        launch(kernel, (1, 1, 1), (x,), (n,), (8,), warps=2)
        assert len(triton_support._by_arguments) <= 2
    assert kernel.starts == [LOOKED, *[COMPILED] * 5]
    doubled = torch.tensor([6, 4, 3, 2]).repeat_interleave(16)  # the first start doubled all
    assert torch.equal(x, 2.0**doubled)


@pytest.mark.parametrize("starter", ["_by_call", None])
def test_launches_that_are_settled(starter: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """They look nothing up from the third time on, and follow their tensors."""
    triton_support._starter[:] = [starter and getattr(triton_support, starter)]
    kernel = Kernel(works, _Launcher)
    double = Launch(kernel, (1, 1, 1), (32,), (8,), warps=2)
    tensors = [torch.ones(32) for _ in range(4)]
    double(tensors[0])
    double(tensors[1])
    if starter:
        monkeypatch.delattr(triton_support, "launch")
    double(tensors[2])
    double(tensors[3])
    assert kernel.starts == ([LOOKED, *[COMPILED] * 3] if starter else [LOOKED] * 4)
    assert all(x.eq(2).all() for x in tensors)


def on_the_cpu(monkeypatch: pytest.MonkeyPatch, kernel: Kernel) -> None:
    ones = torch.ones
    monkeypatch.setattr(triton_common, "double", kernel)
    monkeypatch.setattr(torch, "ones", lambda n, device: ones(n))  # noqa: ARG005


@pytest.mark.parametrize(
    ("compiled", "launcher", "starter"),
    [
        (works, _Launcher36, "_by_function"),
        (works, _Launcher37, "_by_call"),
        (works, _Launcher, "_by_call"),
        (works, _Wrong, "_by_call"),
        (fails, _Launcher36, None),
        (lambda *_: None, _Launcher, None),
    ],
    ids=["3.6", "3.7", "others", "wrong result", "neither", "neither: wrong results"],
)
def test_probe_finds_out_how_compiled_kernels_can_be_started(
    compiled: Callable[..., None],
    launcher: type[_Launcher],
    starter: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernel = Kernel(compiled, launcher)
    on_the_cpu(monkeypatch, kernel)
    triton_support._probe()
    assert triton_support._starter == [starter and getattr(triton_support, starter)]
    del kernel.starts[:]
    x = torch.full((64,), 1.0)
    for _ in range(3):
        launch(kernel, (1, 1, 1), (x,), (32,), (8,), warps=2)
    if compiled is works:
        assert kernel.starts == [LOOKED, COMPILED, COMPILED]
    else:
        assert kernel.starts == [LOOKED] * 3
    assert x[:32].eq(8).all()


def test_a_wrong_result_of_the_probe_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Idle(Kernel):
        def __getitem__(self, _grid: Any) -> Callable[..., Any]:
            return lambda *_, **__: None

    on_the_cpu(monkeypatch, Idle(works, _Launcher))
    with pytest.raises(RuntimeError, match="wrong result"):
        triton_support._probe()


def test_traced_programs_are_known() -> None:
    seen = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append(triton_support.traced())
        return x + 1

    look(torch.ones(1))
    torch.jit.trace(look, torch.ones(1), check_trace=False)
    with FlopCounterMode(display=False):
        look(torch.ones(1))
    torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),))
    look(torch.ones(1))
    assert seen == [False, True, True, False]
