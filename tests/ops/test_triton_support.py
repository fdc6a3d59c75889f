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
from mambavision_backbone.ops.triton_support import launch


class Kernel:
    """Notes how it is started: through Triton's lookup or as a compiled kernel."""

    def __init__(self, compiled: Callable[..., None]) -> None:
        self.starts: list[str] = []
        self.compiled = compiled

    def __getitem__(self, _grid: Any) -> Callable[..., Any]:
        def start(x: torch.Tensor, *_: Any, num_warps: int) -> Any:
            self.starts.append(f"looked up, {num_warps} warps")
            x *= 2
            return _Compiled(self)

        return start


class _Compiled:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, _grid: Any) -> Callable[..., None]:
        return lambda *args: self.kernel.compiled(self.kernel, *args)


def works(kernel: Kernel, address: int, n: int, *_: Any) -> None:
    """Double n numbers at an address, which is what a compiled kernel gets of a tensor."""
    kernel.starts.append("compiled")
    numbers = (ctypes.c_float * n).from_address(address)
    numbers[:] = [2 * number for number in numbers]


def fails(_kernel: Kernel, *_: Any) -> None:
    raise TypeError("function takes exactly 9 arguments")


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_support, "_compiled", {})
    monkeypatch.setattr(triton_support, "_starts_compiled", [True])


def test_a_compiled_kernel_is_found_by_what_triton_specialises_on() -> None:
    kernel = Kernel(works)
    wide = torch.ones(64)
    for args in [(wide, 32), (wide, 48), (wide, 1), (wide, 7), (wide[1:], 32), (wide.half(), 32)]:
        launch(kernel, (1, 1, 1), args, (8,), warps=2)
    looked, compiled = "looked up, 2 warps", "compiled"
    assert kernel.starts == [looked, compiled, looked, looked, looked, looked]
    launch(kernel, (1, 1, 1), (wide, 32), (16,), warps=2)
    launch(kernel, (1, 1, 1), (wide, 32), (8,), warps=4)
    assert kernel.starts[6:] == [looked, "looked up, 4 warps"]


@pytest.mark.parametrize(
    ("compiled", "starts"),
    [
        (works, ["looked up, 1 warps", "compiled"]),
        (fails, ["looked up, 1 warps", "looked up, 1 warps"]),
    ],
)
def test_probe_finds_out_whether_compiled_kernels_can_be_started(
    compiled: Callable[..., None], starts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel(compiled)
    ones = torch.ones
    monkeypatch.setattr(triton_common, "double", kernel)
    monkeypatch.setattr(torch, "ones", lambda n, device: ones(n))  # noqa: ARG005
    triton_support._probe()
    assert kernel.starts == starts
    assert triton_support._starts_compiled == [compiled is works]


def test_a_wrong_result_of_the_probe_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    ones = torch.ones
    monkeypatch.setattr(triton_common, "double", Kernel(lambda *_: None))
    monkeypatch.setattr(torch, "ones", lambda n, device: ones(n))  # noqa: ARG005
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
