"""Layer norms: PyTorch's operators, and the kernels against them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mambavision_backbone.ops import layer_norm as package
from mambavision_backbone.ops.layer_norm import add, add_norm, map_norm, norm
from tests.conftest import relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there the kernels are interpreted
FLOAT32 = 1e-5
SHAPES = [(2, 7, 5), (1, 1, 3), (3, 2, 70)]


def make_layer(channels: int) -> nn.LayerNorm:
    layer = nn.LayerNorm(channels)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return layer


def with_gradients(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: list[Tensor | None],
    layer: nn.LayerNorm,
    dys: list[Tensor],
) -> list[Tensor]:
    """Outputs, and the gradients of the inputs that are float leaves, and of the layer's."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    factor = leaves[3] if len(leaves) > 3 else None
    if factor is not None:
        factor.requires_grad_(False)
    outs = (
        function(*leaves[:2], layer, *leaves[2:]) if len(leaves) > 1 else function(*leaves, layer)
    )
    outs = outs if isinstance(outs, tuple) else (outs,)
    wanted = [x for x in leaves if x is not None and x is not factor]
    wanted += [layer.weight, layer.bias]
    return [*outs, *torch.autograd.grad(outs, wanted, dys)]


def compare(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: list[Tensor | None],
    layer: nn.LayerNorm,
    dys: list[Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Kernels against PyTorch's operators in float64."""
    pytest.importorskip("triton")
    exact = with_gradients(
        function,
        [None if x is None else x.double() for x in inputs],
        _double(layer),
        [dy.double() for dy in dys],
    )
    monkeypatch.setattr(package, "fusible", lambda _: True)
    got = with_gradients(
        function,
        [None if x is None else x.to(DEVICE) for x in inputs],
        layer.to(DEVICE),
        [dy.to(DEVICE) for dy in dys],
    )
    for i, (a, b) in enumerate(zip(got, exact, strict=True)):
        assert relative_error(a, b) < FLOAT32, i


def cast(function: Callable[..., Any], dtype: torch.dtype) -> Callable[..., Any]:
    """The function with its outputs in a dtype."""

    def run(*args: Any) -> Any:
        out = function(*args)
        return tuple(o.to(dtype) for o in out) if isinstance(out, tuple) else out.to(dtype)

    return run


def _double(layer: nn.LayerNorm) -> nn.LayerNorm:
    exact = nn.LayerNorm(layer.normalized_shape).double()
    exact.load_state_dict(layer.state_dict())
    return exact


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm(shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    x, dy = torch.randn(2, *shape)
    compare(norm, [x], make_layer(shape[2]), [dy], monkeypatch)


def branch_of(
    shape: tuple[int, int, int], scaled: bool, drop_path: bool, biased: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Layer scale, drop path's factors and a bias, each where it is wanted."""
    gamma = torch.randn(shape[2]) if scaled else None
    factor = torch.rand(shape[0], 1, 1) if drop_path else None
    return gamma, factor, torch.randn(shape[2]) if biased else None


every_branch = pytest.mark.parametrize("given", list(product((False, True), repeat=3)), ids=str)


@every_branch
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_add_norm(
    shape: tuple[int, int, int],
    given: tuple[bool, bool, bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, y, *dys = torch.randn(4, *shape)
    x, dys[1] = x.transpose(0, 1).contiguous().transpose(0, 1), dys[1].flip(0)
    compare(add_norm, [x, y, *branch_of(shape, *given)], make_layer(shape[2]), dys, monkeypatch)


@every_branch
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_add(
    shape: tuple[int, int, int],
    given: tuple[bool, bool, bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, y, dy = torch.randn(3, *shape)
    x, dy = x.transpose(0, 1).contiguous().transpose(0, 1), dy.flip(0)

    def with_a_layer(x: Tensor, y: Tensor, layer: nn.LayerNorm, *others: Tensor | None) -> Tensor:
        return add(x, y, *others) * layer.weight + layer.bias

    compare(
        with_a_layer, [x, y, *branch_of(shape, *given)], make_layer(shape[2]), [dy], monkeypatch
    )


@pytest.mark.parametrize("change", ["hook", "forward", "no bias"])
def test_a_norm_that_does_something_else_is_called(
    change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(package, "fusible", lambda _: True)
    layer = make_layer(4) if change != "no bias" else nn.LayerNorm(4, bias=False)
    if change == "hook":
        layer.register_forward_hook(lambda _m, _x, y: 2 * y)
    elif change == "forward":
        layer.forward = lambda x: -x  # type: ignore[method-assign]
    x, y = torch.randn(2, 1, 2, 4)
    assert torch.equal(norm(x, layer), layer(x))
    total, normed = add_norm(x, y, layer, None, None)
    assert torch.equal(total, x + y)
    assert torch.equal(normed, layer(x + y))


def test_the_stream_keeps_float32_where_layer_scale_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer scale of 1e-5 adds nothing to a stream in half precision."""
    pytest.importorskip("triton")
    monkeypatch.setattr(package, "fusible", lambda _: True)
    x, y = (torch.ones(1, 2, 4, dtype=torch.float16, device=DEVICE) for _ in range(2))
    gamma = torch.full((4,), 1e-5, device=DEVICE)
    total, _ = add_norm(x, y, make_layer(4).to(DEVICE), gamma, None)
    assert total.dtype == torch.float32
    assert (total > 1).all()
    total, normed = add_norm(x, y, make_layer(4).to(DEVICE), None, None)
    assert total.dtype == normed.dtype == torch.float16


def test_a_bias_does_not_widen_the_stream() -> None:
    x, y = torch.ones(2, 1, 2, 4, dtype=torch.float16)
    assert add(x, y, None, None, torch.ones(4)).dtype == torch.float16


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels-last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "cropped": lambda x: nn.functional.pad(
        x.contiguous(memory_format=torch.channels_last), (0, 2, 0, 1)
    )[:, :, : x.shape[2], : x.shape[3]],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 5, 3, 4), (1, 3, 1, 1), (2, 70, 9, 13)], ids=str)
def test_map_norm(
    shape: tuple[int, int, int, int], layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = LAYOUTS[layout](torch.randn(shape))
    dy = torch.randn(shape).transpose(2, 3).contiguous().transpose(2, 3)
    dy = dy.contiguous() if layout == "cropped" else dy
    assert map_norm(x, make_layer(shape[1])).is_contiguous()
    compare(map_norm, [x], make_layer(shape[1]), [dy], monkeypatch)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["norm", "add_norm", "map_norm"])
def test_error_is_that_of_pytorch(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most 1.5 times the error of PyTorch's operators in the same dtype, against float64."""
    layer = make_layer(320).cuda()
    shape = (2, 320, 50, 84) if name == "map_norm" else (2, 4200, 320)
    x, y, *dys = torch.randn(4, *shape, device="cuda").to(dtype)
    function = {"norm": norm, "add_norm": add_norm, "map_norm": map_norm}[name]
    bias = torch.randn(320, device="cuda").to(dtype)
    inputs = [x, y, None, None, bias] if name == "add_norm" else [x]
    dys = dys if name == "add_norm" else dys[:1]
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        got = with_gradients(function, inputs, layer, dys)
        monkeypatch.setattr(package, "fusible", lambda _: False)
        eager = with_gradients(cast(function, dtype), inputs, layer, dys)
    inputs = [None if i is None else i.double() for i in inputs]
    exact = with_gradients(function, inputs, _double(layer).cuda(), [dy.double() for dy in dys])
    for i, (a, e, b) in enumerate(zip(got, eager, exact, strict=True)):
        assert relative_error(a, b) <= 1.5 * max(relative_error(e, b), 1e-7), i
