"""The MLP that computes its activation again, against PyTorch's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from timm.layers import Mlp
from torch import Tensor, nn

from mambavision_backbone.ops import mlp as package
from mambavision_backbone.ops.mlp import mlp
from tests.conftest import relative_error

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there the kernels are interpreted


def whole(parts: tuple[Tensor, Tensor | None]) -> Tensor:
    """The layer's output from a tensor and the bias to be added to it."""
    y, bias = parts
    return y if bias is None else y + bias


def with_gradients(x: Tensor, layer: Mlp, dy: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = whole(mlp(x, layer))
    return [y, *torch.autograd.grad(y, [x, *layer.parameters()], dy.to(y.dtype))]


@pytest.mark.parametrize("shape", [(2, 7, 5), (1, 1, 3), (1, 70, 40)], ids=str)
def test_value_and_gradients(shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Mlp(shape[2], 4 * shape[2]).to(DEVICE)
    x, dy = torch.randn(2, *shape, device=DEVICE)
    with monkeypatch.context() as patch:
        patch.setattr(package, "fusible", lambda _: True)
        got = with_gradients(x, layer, dy)
    monkeypatch.setattr(package, "fusible", lambda _: False)
    exact = with_gradients(x.double(), layer.double(), dy.double())
    for i, (a, b) in enumerate(zip(got, exact, strict=True)):
        assert relative_error(a, b) < 1e-5, i


def test_inference_gives_the_same_and_keeps_its_input() -> None:
    x = torch.randn(2, 7, 8)
    for fc1 in (torch.nn.Linear(8, 8), torch.nn.Identity()):  # one that returns its input itself
        layer = Mlp(8, 8).eval()
        layer.fc1 = fc1
        before = x.clone()
        with torch.no_grad():
            assert torch.equal(whole(mlp(x, layer)), layer(x))
        assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_inference_in_half_precision(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 1.5 times the error of PyTorch's operators, although a GPU's GELU is another form."""
    monkeypatch.setattr(package, "fusible", lambda _: True)
    layer = Mlp(32, 128).to(DEVICE).eval().requires_grad_(False)
    x = torch.randn(2, 70, 32, device=DEVICE)
    exact = Mlp(32, 128).to(DEVICE).double()
    exact.load_state_dict(layer.to(dtype).state_dict())
    wanted = exact(x.to(dtype).double())
    operator, calls = torch._addmm_activation, []
    monkeypatch.setattr(
        torch, "_addmm_activation", lambda *a, **k: calls.append(1) or operator(*a, **k)
    )
    with torch.no_grad():
        got, eager = whole(mlp(x.to(dtype), layer)), layer(x.to(dtype))
    assert calls
    assert relative_error(got, wanted) <= 1.5 * relative_error(eager, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_error_is_that_of_pytorch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 1.5 times the error of PyTorch's operators under autocast, against float64."""
    layer = Mlp(320, 1280).cuda()
    x, dy = torch.randn(2, 2, 4200, 320, device="cuda").to(dtype)
    with torch.autocast("cuda", dtype):
        got = with_gradients(x, layer, dy)
        monkeypatch.setattr(package, "fusible", lambda _: False)
        eager = with_gradients(x, layer, dy)
    exact = with_gradients(x.double(), layer.double(), dy.double())
    for i, (a, e, b) in enumerate(zip(got, eager, exact, strict=True)):
        assert relative_error(a, b) <= 1.5 * max(relative_error(e, b), 1e-7), i


def _relu(layer: Mlp) -> None:
    layer.act = nn.ReLU()


def _tanh(layer: Mlp) -> None:
    layer.act = nn.GELU(approximate="tanh")


def _normed(layer: Mlp) -> None:
    layer.norm = nn.LayerNorm(12)


def _dropped(layer: Mlp) -> None:
    layer.drop1 = nn.Dropout(1.0)


def _hooked(layer: Mlp) -> None:
    layer.register_forward_hook(lambda _m, _x, y: 2 * y)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("change", [_relu, _tanh, _normed, _dropped, _hooked])
def test_a_layer_that_does_something_else_is_called(
    change: Callable[[Mlp], None], training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(package, "fusible", lambda _: True)
    layer = Mlp(3, 12)
    change(layer)
    x = torch.randn(1, 2, 3)
    with torch.set_grad_enabled(training):
        if change is _dropped and not training:
            layer.eval()  # where it drops nothing
            monkeypatch.setattr(package, "fusible", lambda _: False)
        assert torch.allclose(whole(mlp(x, layer)), layer(x), atol=1e-6)
