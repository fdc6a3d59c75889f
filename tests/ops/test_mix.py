"""The mixer's core as one step, against its operators one by one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from mambavision_backbone.ops import mix as package
from mambavision_backbone.ops.mix import mix
from tests.conftest import relative_error

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there the kernels are interpreted
NAMES = ("yz", "xz", "conv_x", "conv_z", "x_proj", "dt_proj", "dt_bias", "A_log", "D")


class Weights(nn.Module):
    """A mixer's between its first and its last projection."""

    def __init__(self, dim: int, rank: int, dstate: int) -> None:
        super().__init__()
        self.conv_x = nn.Parameter(torch.randn(dim, 1, 3))
        self.conv_z = nn.Parameter(torch.randn(dim, 1, 3))
        self.x_proj = nn.Linear(dim, rank + 2 * dstate, bias=False)
        self.dt_proj = nn.Linear(rank, dim)
        rates = torch.arange(1, dstate + 1, dtype=torch.float32).log()
        self.A_log = nn.Parameter(rates + 0.1 * torch.randn(dim, dstate))
        self.D = nn.Parameter(torch.randn(dim))

    def forward(self, xz: Tensor, backend: str) -> Tensor:
        own = (self.conv_x, self.conv_z, self.x_proj, self.dt_proj, self.A_log, self.D)
        return mix(xz, *own, backend)


def with_gradients(xz: Tensor, weights: Weights, dyz: Tensor, backend: str) -> list[Tensor]:
    """The output, and the gradients in the order of NAMES."""
    xz = xz.detach().requires_grad_()
    y = weights(xz, backend)
    w = weights
    leaves = [xz, w.conv_x, w.conv_z, w.x_proj.weight, *w.dt_proj.parameters(), w.A_log, w.D]
    return [y, *torch.autograd.grad(y, leaves, dyz.to(y.dtype))]


@pytest.mark.parametrize("shape", [(2, 7, 5), (1, 1, 3), (3, 70, 40)], ids=str)
def test_value_and_gradients(shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    batch, seqlen, dim = shape
    weights = Weights(dim, math.ceil(dim / 8), 8).to(DEVICE)
    xz = torch.randn(batch, seqlen, 2 * dim + 3, device=DEVICE)[..., 3:]
    dyz = torch.randn(batch, 2 * dim, seqlen, device=DEVICE).transpose(1, 2)
    with monkeypatch.context() as patch:
        patch.setattr(package, "fusible", lambda _: True)
        got = with_gradients(xz, weights, dyz, "triton")
        with torch.no_grad():
            assert torch.equal(weights(xz, "triton"), got[0])
    exact = with_gradients(xz.double(), weights.double(), dyz.double(), "chunked")
    for name, a, b in zip(NAMES, got, exact, strict=True):
        assert a.dtype == torch.float32
        assert relative_error(a, b) < 1e-5, name


@pytest.mark.parametrize("rank", [3, 4])
def test_scan_reads_B_and_C_where_they_are(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from mambavision_backbone.ops.mix import launch
    from mambavision_backbone.ops.selective_scan.triton.launch import _rows

    scanned: list[Tensor] = []
    original = launch.scan
    monkeypatch.setattr(launch, "scan", lambda *a: (scanned.extend(a[:4]), original(*a))[1])
    monkeypatch.setattr(package, "fusible", lambda _: True)
    with torch.no_grad():
        Weights(4, rank, 8).half().to(DEVICE)(torch.randn(2, 5, 8).half().to(DEVICE), "triton")
    assert len(scanned) == 4
    assert all(_rows(x) is x for x in scanned)


def test_other_backends_and_layers_that_stand_in_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    monkeypatch.setattr(package, "fusible", lambda _: True)
    monkeypatch.setattr(package, "call", lambda *_: pytest.fail("this is another computation"))
    xz = torch.randn(1, 5, 8, device=DEVICE)
    weights = Weights(4, 2, 8).to(DEVICE)
    wanted = weights(xz, "reference")
    weights.x_proj.register_forward_hook(lambda *_: None)
    assert relative_error(weights(xz, "triton"), wanted) < 1e-5
    doubled = Doubled(4, 18, bias=False)
    doubled.weight = nn.Parameter(weights.x_proj.weight.detach() / 2)
    weights.x_proj = doubled
    assert relative_error(weights(xz, "triton"), wanted) < 1e-5


def test_frozen_weights_and_a_backward_pass_under_autocast(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(package, "fusible", lambda _: True)
    weights = Weights(12, 3, 8).to(DEVICE)
    xz, dyz = torch.randn(2, 2, 9, 24, device=DEVICE)
    _, wanted, *grads = with_gradients(xz, weights, dyz, "triton")
    frozen = weights.x_proj.requires_grad_(False)
    leaf = xz.detach().requires_grad_()
    with torch.autocast(DEVICE, torch.bfloat16):
        with torch.autocast(DEVICE, enabled=False):
            y = weights(leaf, "triton")
        y.backward(dyz)
    assert torch.equal(leaf.grad, wanted)
    assert torch.equal(weights.D.grad, grads[-1])
    assert frozen.weight.grad is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_error_is_that_of_pytorch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 1.5 times the error of PyTorch's operators in the same dtype, against float64."""
    weights = Weights(160, 20, 8).cuda()
    xz, dyz = torch.randn(2, 2, 4200, 320, device="cuda").to(dtype)
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        got = with_gradients(xz, weights, dyz, "auto")
        monkeypatch.setattr(package, "fusible", lambda _: False)
        monkeypatch.setattr("mambavision_backbone.ops.conv_silu.fusible", lambda _: False)
        eager = with_gradients(xz, weights, dyz, "chunked")
    exact = with_gradients(xz.double(), weights.double(), dyz.double(), "chunked")
    for name, a, e, b in zip(NAMES, got, eager, exact, strict=True):
        assert relative_error(a, b) <= 1.5 * max(relative_error(e, b), 1e-6), name
