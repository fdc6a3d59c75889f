"""Depthwise convolution with SiLU: PyTorch's operators, and the kernels against them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mambavision_backbone.ops import conv_silu as package
from mambavision_backbone.ops.conv_silu import conv_silu
from tests.conftest import relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there the kernels are interpreted
FLOAT32 = 1e-5
SHAPES = [(2, 7, 5), (1, 1, 3), (3, 2, 70), (1, 300, 3)]


def make_inputs(batch: int, seqlen: int, dim: int) -> list[Tensor]:
    xz = torch.randn(batch, seqlen, 2 * dim)
    return [xz, torch.randn(dim, 1, 3), torch.randn(dim, 1, 3)]


def with_gradients(inputs: list[Tensor], dys: list[Tensor]) -> list[Tensor]:
    """Both outputs and the gradients of the inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outs = conv_silu(*leaves)
    return [*outs, *torch.autograd.grad(outs, leaves, dys)]


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels, on a CPU too."""
    pytest.importorskip("triton")
    monkeypatch.setattr(package, "fusible", lambda _: True)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_a_convolution_and_silu(shape: tuple[int, int, int]) -> None:
    xz, wx, wz = (x.double() for x in make_inputs(*shape))
    x, z = conv_silu(xz, wx, wz)
    dim = shape[2]
    for y, part, w in ((x, xz[..., :dim], wx), (z, xz[..., dim:], wz)):
        wanted = F.silu(F.conv1d(part.transpose(1, 2), w, padding=1, groups=dim)).transpose(1, 2)
        torch.testing.assert_close(y, wanted)


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels(shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(*shape)
    dys = [torch.randn(*shape) for _ in range(2)]
    with monkeypatch.context() as plain:
        plain.setattr(package, "fusible", lambda _: False)
        wanted = with_gradients([x.double() for x in inputs], [dy.double() for dy in dys])
    got = with_gradients([x.to(DEVICE) for x in inputs], [dy.to(DEVICE) for dy in dys])
    for name, a, b in zip(("x", "z", "dxz", "dwx", "dwz"), got, wanted, strict=True):
        assert relative_error(a, b) < FLOAT32, name


@pytest.mark.usefixtures("fused")
def test_views_and_strided_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    xz, wx, wz = make_inputs(2, 9, 4)
    wide = torch.cat([torch.randn(2, 9, 3), xz], 2)[..., 3:]
    dys = [dy[..., :4] for dy in torch.randn(2, 2, 9, 6)]
    dys[1] = dys[1].transpose(1, 2).contiguous().transpose(1, 2)
    with monkeypatch.context() as plain:
        plain.setattr(package, "fusible", lambda _: False)
        wanted = with_gradients([xz, wx, wz], dys)
    got = with_gradients([x.to(DEVICE) for x in (wide, wx, wz)], [dy.to(DEVICE) for dy in dys])
    for a, b in zip(got, wanted, strict=True):
        assert relative_error(a, b) < FLOAT32


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_error_is_that_of_pytorch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 1.5 times the error of PyTorch's convolution in the same dtype, against float64."""
    inputs = [x.cuda() for x in make_inputs(2, 4200, 160)]
    inputs[0] = inputs[0].to(dtype)
    dys = [torch.randn(2, 4200, 160, dtype=dtype, device="cuda") for _ in range(2)]
    got = with_gradients(inputs, dys)
    with monkeypatch.context() as plain:
        plain.setattr(package, "fusible", lambda _: False)
        exact = with_gradients([x.double() for x in inputs], [dy.double() for dy in dys])
    leaves = [x.detach().requires_grad_() for x in inputs]
    weight = torch.cat(leaves[1:]).to(dtype)
    y = F.silu(F.conv1d(leaves[0].transpose(1, 2), weight, padding=1, groups=320))
    outs = y.transpose(1, 2).chunk(2, dim=2)
    eager = [*outs, *torch.autograd.grad(outs, leaves, dys)]
    for name, a, e, b in zip(("x", "z", "dxz", "dwx", "dwz"), got, eager, exact, strict=True):
        assert relative_error(a, b) <= 1.5 * max(relative_error(e, b), 1e-7), name
