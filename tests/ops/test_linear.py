"""The linear layer whose bias has its own sum."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mambavision_backbone.ops import linear as package
from mambavision_backbone.ops.linear import linear
from tests.conftest import relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there the kernels are interpreted


def with_gradients(x: Tensor, layer: nn.Linear, dy: Tensor, part: slice | None) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = linear(x[..., 1:], layer, part)
    return [y, *torch.autograd.grad(y, [x, *layer.parameters()], dy.to(y.dtype))]


@pytest.mark.parametrize("part", [None, slice(2, None)], ids=str)
@pytest.mark.parametrize("shape", [(2, 7), (1, 1), (1, 70)], ids=str)
def test_linear(
    shape: tuple[int, int], part: slice | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    layer = nn.Linear(5, 9).to(DEVICE)
    x = torch.randn(*shape, 6, device=DEVICE)
    dy = torch.randn(*shape, 9, device=DEVICE)[..., part or slice(None)]
    with monkeypatch.context() as patch:
        patch.setattr(package, "fusible", lambda _: True)
        got = with_gradients(x, layer, dy, part)
    monkeypatch.setattr(package, "fusible", lambda _: False)
    exact = with_gradients(x.double(), layer.double(), dy.double(), part)
    for i, (a, b) in enumerate(zip(got, exact, strict=True)):
        assert relative_error(a, b) < 1e-5, i


def test_a_layer_that_stands_in_for_a_linear_one_is_called() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    layer, x = Doubled(3, 4), torch.randn(1, 2, 3)
    assert torch.equal(linear(x, layer, slice(1, 3)), layer(x)[..., 1:3])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_error_is_that_of_pytorch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 1.5 times the error of PyTorch's operators under autocast, against float64."""
    layer = nn.Linear(320, 960).cuda()
    x, dy = torch.randn(2, 4200, 321, device="cuda"), torch.randn(2, 4200, 960, device="cuda")
    x, dy = x.to(dtype), dy.to(dtype)
    with torch.autocast("cuda", dtype):
        got = with_gradients(x, layer, dy, None)
        monkeypatch.setattr(package, "fusible", lambda _: False)
        eager = with_gradients(x, layer, dy, None)
    exact = with_gradients(x.double(), layer.double(), dy.double(), None)
    for i, (a, e, b) in enumerate(zip(got, eager, exact, strict=True)):
        assert relative_error(a, b) <= 1.5 * max(relative_error(e, b), 1e-7), i
