"""Batch norms with what follows them: PyTorch's operators, and the kernels against them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from mambavision_backbone.ops import batch_norm as package
from mambavision_backbone.ops.batch_norm import conv_norm
from tests.conftest import relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there the kernels are interpreted
LAYOUT = torch.channels_last


def make_layers(channels: int, act: str, **settings: object) -> nn.Sequential:
    """A convolution, a batch norm with statistics of its own, and an activation."""
    conv = nn.Conv2d(3, channels, 3, 1, 1)
    norm = nn.BatchNorm2d(channels, **settings)  # type: ignore[arg-type]
    for weight in (norm.weight, norm.bias, conv.bias, norm.running_mean):
        if weight is not None:
            nn.init.normal_(weight)
    acts = {"relu": [nn.ReLU()], "gelu": [nn.GELU(approximate="tanh")], "none": []}
    return nn.Sequential(conv, norm, *acts[act])


def with_gradients(
    layers: nn.Sequential, x: Tensor, dy: Tensor, stream: Tensor | None, factor: Tensor | None
) -> list[Tensor]:
    """Output, gradients of x, the stream and the layers' weights, and statistics."""
    leaves = [leaf.detach().requires_grad_() for leaf in (x, stream) if leaf is not None]
    y = conv_norm(leaves[0], *layers, *[None] * (3 - len(layers)), *leaves[1:], factor=factor)
    grads = torch.autograd.grad(y, [*leaves, *layers.parameters()], dy.to(y.dtype))
    return [y, *grads, *(b.clone() for b in layers.buffers())]


def set_fused(monkeypatch: pytest.MonkeyPatch, fused: bool) -> None:
    monkeypatch.setattr(package, "fusible", lambda _: fused)


def inputs_of(
    shape: tuple[int, int, int, int], stream: bool, factor: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """x, the gradient, the stream and drop path's factors, for layers of so many channels."""
    batch, _, *hw = shape
    x = torch.randn(batch, 3, *hw).to(memory_format=LAYOUT)
    dy, added = (torch.randn(shape).to(memory_format=LAYOUT) for _ in range(2))
    factors = torch.tensor([0.0, 1.5, 1.25])[:batch].view(-1, 1, 1, 1)
    return x, dy, added if stream else None, factors if factor else None


@pytest.mark.parametrize("shape", [(2, 5, 9, 7), (3, 40, 1, 2), (1, 33, 24, 31)], ids=str)
@pytest.mark.parametrize(
    ("act", "stream", "factor"),
    [
        ("relu", False, False),
        ("gelu", False, False),
        ("none", False, False),
        ("none", True, False),
        ("none", True, True),
        ("gelu", True, True),
    ],
)
def test_kernels(
    shape: tuple[int, int, int, int],
    act: str,
    stream: bool,
    factor: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Float64's outputs, gradients and statistics; the bias's gradient is zero."""
    pytest.importorskip("triton")
    layers = make_layers(shape[1], act, momentum=0.3)
    inputs = inputs_of(shape, stream, factor)
    set_fused(monkeypatch, False)
    doubles = [None if i is None else i.double() for i in inputs]
    exact = with_gradients(copy.deepcopy(layers).double(), *doubles)
    set_fused(monkeypatch, True)
    moved = [None if i is None else i.to(DEVICE) for i in inputs]
    with torch.backends.cudnn.flags(allow_tf32=False):
        got = with_gradients(layers.to(DEVICE), *moved)
    assert got[0].is_contiguous(memory_format=LAYOUT)
    zero = 3 + stream  # y, dx, the stream's and dweight are before it
    assert (got[zero] == 0).all()
    for i, (a, b) in enumerate(zip(got, exact, strict=True)):
        if i != zero:
            assert a.dtype.is_floating_point == b.dtype.is_floating_point
            assert relative_error(a, b) < 1e-5, i


@pytest.mark.parametrize("corner", [0, 500])
def test_the_variance_is_not_lost_among_squares(
    corner: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a mean far from zero, and where the first pixel is far from that."""
    pytest.importorskip("triton")
    set_fused(monkeypatch, True)
    conv, norm = nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)
    nn.init.dirac_(conv.weight)
    x = 3000 + torch.randn(2, 3, 40, 30)
    x[0, :, 0, 0] += corner
    x = x.to(DEVICE)
    with torch.backends.cudnn.flags(allow_tf32=False):
        got = conv_norm(x, conv.to(DEVICE), norm.to(DEVICE))
    exact = copy.deepcopy(norm).double()(copy.deepcopy(conv).double()(x.double()))
    assert relative_error(got[:, :3], exact[:, :3]) < 1e-3  # x's own rounding: 1e-4


def test_a_stream_in_float32_stays_so(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    set_fused(monkeypatch, True)
    layers = make_layers(4, "none").to(DEVICE, torch.bfloat16)
    x, stream = torch.randn(2, 3, 3, 3, device=DEVICE), torch.randn(2, 4, 3, 3, device=DEVICE)
    stream.requires_grad_()
    y = conv_norm(x.bfloat16(), *layers, stream=stream)
    (grad,) = torch.autograd.grad(y.sum(), stream)
    assert y.dtype == grad.dtype == torch.float32


@pytest.mark.parametrize(("act", "stream"), [("relu", False), ("gelu", False), ("none", True)])
def test_half_precision(act: str, stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 1.5 times the error of PyTorch's operators; interpreted bfloat16 is cut off."""
    pytest.importorskip("triton")
    errors: dict[bool, list[float]] = {True: [], False: []}
    for draw in range(4):
        torch.manual_seed(draw)
        layers = make_layers(16, act)
        nn.init.dirac_(layers[0].weight)  # of the norm's error, not of the convolution's
        layers = layers.to(DEVICE, torch.float16)
        inputs = inputs_of((2, 16, 9, 7), stream, stream)
        inputs = tuple(None if i is None else i.to(DEVICE, torch.float16) for i in inputs)
        set_fused(monkeypatch, False)
        doubles = [None if i is None else i.double() for i in inputs]
        exact = with_gradients(copy.deepcopy(layers).double(), *doubles)
        for fused, found in errors.items():
            set_fused(monkeypatch, fused)
            got = with_gradients(copy.deepcopy(layers), *inputs)
            pairs = list(zip(got, exact, strict=True))
            del pairs[3 + stream]  # the bias's gradient
            found.append(torch.tensor([relative_error(a, b) for a, b in pairs]))  # type: ignore[arg-type]
    ours, eager = (sum(found) for found in errors.values())
    assert (ours <= 1.5 * eager + 1e-6).all(), (ours, eager)  # type: ignore[operator,union-attr]


def test_statistics_that_are_no_longer_tracked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though they are there: a way to freeze them."""
    pytest.importorskip("triton")
    set_fused(monkeypatch, True)
    layers = make_layers(4, "none").to(DEVICE)
    layers[1].track_running_stats = False
    before = [b.clone() for b in layers.buffers()]
    conv_norm(torch.randn(2, 3, 4, 4, device=DEVICE), *layers)
    assert all(map(torch.equal, before, layers.buffers()))


def test_hooks_of_all_modules_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    set_fused(monkeypatch, True)
    called: list[str] = []
    with nn.modules.module.register_module_forward_hook(
        lambda module, _x, _y: called.append(type(module).__name__)
    ):
        conv_norm(torch.randn(2, 3, 4, 4), *make_layers(4, "relu"))
    assert called == ["Conv2d", "BatchNorm2d", "ReLU"]


@pytest.mark.parametrize(
    "settings", [{"track_running_stats": False}, {"momentum": 0.0}, {"momentum": 1.0}], ids=str
)
def test_running_statistics(settings: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    layers = make_layers(6, "none", **settings).to(DEVICE)
    plain = copy.deepcopy(layers)
    x = torch.randn(2, 3, 5, 5, device=DEVICE).to(memory_format=LAYOUT)
    set_fused(monkeypatch, True)
    got = conv_norm(x, *layers)
    torch.testing.assert_close(got, plain(x), rtol=1e-3, atol=1e-3)
    for a, b in zip(layers.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("act", ["relu", "gelu", "none"])
def test_a_nan_is_seen(act: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the output, the gradients and the statistics, as PyTorch's: loss scaling looks for it."""
    pytest.importorskip("triton")
    set_fused(monkeypatch, True)
    layers = make_layers(5, act).to(DEVICE)
    x, dy, *_ = inputs_of((2, 5, 3, 3), False, False)
    x[0, 0, 0, 0] = torch.nan
    y, dx, _, _, dweight, _, mean, var, _ = with_gradients(
        layers, x.to(DEVICE), dy.to(DEVICE), None, None
    )
    assert all(t.isnan().all() for t in (y, dx, dweight, mean, var))


class _Doubled(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def _evaluated(layers: nn.Sequential) -> None:
    layers.eval()


def _hooked(layers: nn.Sequential) -> None:
    layers[1].register_forward_hook(lambda _m, _x, y: 2 * y)


def _averaged(layers: nn.Sequential) -> None:
    layers[1].momentum = None


def _patched(layers: nn.Sequential) -> None:
    norm = layers[1]
    norm.forward = lambda x: 2 * nn.BatchNorm2d.forward(norm, x)  # type: ignore[method-assign]


def _another(layers: nn.Sequential) -> None:
    layers[1] = _Doubled(4)


def _exact_gelu(layers: nn.Sequential) -> None:
    layers[2] = nn.GELU()


@pytest.mark.parametrize(
    "change", [_evaluated, _hooked, _averaged, _patched, _another, _exact_gelu]
)
def test_layers_that_do_something_else_are_called(
    change: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = make_layers(4, "gelu")
    change(layers)  # type: ignore[operator]
    plain, x = copy.deepcopy(layers), torch.randn(2, 3, 4, 4)
    set_fused(monkeypatch, True)
    assert torch.equal(conv_norm(x, *layers), plain(x))


def test_sizes_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel reads or writes past an end."""
    set_fused(monkeypatch, True)
    x = torch.randn(2, 3, 4, 4)
    with pytest.raises(RuntimeError, match="running_mean"):
        conv_norm(x, nn.Conv2d(3, 8, 1), nn.BatchNorm2d(4))
    with pytest.raises(ValueError, match="does not fit a branch"):
        conv_norm(x, nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), stream=torch.randn(1, 4, 4, 4))


def test_one_value_has_no_variance(monkeypatch: pytest.MonkeyPatch) -> None:
    set_fused(monkeypatch, True)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        conv_norm(torch.randn(1, 3, 1, 1), *make_layers(4, "none"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("act", "stream"), [("relu", False), ("gelu", False), ("none", True)])
def test_error_is_that_of_pytorch(
    act: str, stream: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most 1.5 times the error of PyTorch's operators in the same dtype, against float64."""
    layers = make_layers(80, act).cuda().to(memory_format=LAYOUT)
    nn.init.dirac_(layers[0].weight)  # of the norm's error, not of the convolution's
    inputs = [
        None if i is None else i.cuda() if i.shape[1] == 1 else i.cuda().to(dtype)
        for i in inputs_of((2, 80, 200, 336), stream, stream)
    ]
    results = {}
    with torch.backends.cudnn.flags(allow_tf32=False):
        for fused in (True, False):
            set_fused(monkeypatch, fused)
            with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
                results[fused] = with_gradients(copy.deepcopy(layers), *inputs)
        doubles = [None if i is None else i.double() for i in inputs]
        exact = with_gradients(copy.deepcopy(layers).double(), *doubles)
    for i, (a, e, b) in enumerate(zip(results[True], results[False], exact, strict=True)):
        if i != 3 + stream:
            assert relative_error(a, b) <= 1.5 * max(relative_error(e, b), 1e-6), i
