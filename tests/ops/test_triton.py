"""The Triton kernels: interpreted on the CPU at toy sizes, compiled where there is a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mambavision_backbone.ops.selective_scan import chunked, selective_scan
from mambavision_backbone.ops.selective_scan import triton as backend
from tests.conftest import relative_error

pytest.importorskip("triton")
from mambavision_backbone.ops.selective_scan.triton import launch

NAMES = ("u", "dt", "A", "B", "C", "D", "dt_bias")
DRAWS = 5
FLOAT32 = 1e-5  # ‖a − b‖ / ‖b‖ that golden data allow in float32
DEVICE = "cpu" if backend.interpreted() else "cuda"


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of channels, tiles and chunks in a few tokens: the interpreter is slow."""
    if backend.interpreted():
        monkeypatch.setattr(launch, "MIN_CHUNK", 8)
        monkeypatch.setattr(launch, "BLOCK_D", 4)
        monkeypatch.setattr(launch, "FEW_CHUNKS", 2)
        for name, size in (("TOKENS", 16), ("ROWS", 2), ("COLUMNS", 4)):
            monkeypatch.setattr(launch, f"FINISH_{name}", size)


def make_inputs(batch: int, seqlen: int, dim: int, dstate: int, draw: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(batch + seqlen + dim + dstate + draw)

    def rand(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    A = -torch.exp(0.5 * rand(dim, dstate))
    tokens = [rand(batch, seqlen, n) for n in (dim, dim, dstate, dstate)]
    return [tokens[0], 3 * tokens[1], A, tokens[2], tokens[3], rand(dim), rand(dim)]


def exact(dy: Tensor, inputs: list[Tensor], softplus: bool = True) -> list[Tensor]:
    """The output and all gradients in float64."""
    inputs = [x.detach().double() for x in inputs]
    y = chunked.selective_scan(*inputs, softplus)
    return [y, *chunked.selective_scan_backward(dy.double(), *inputs, softplus)]


def compute(dy: Tensor, inputs: list[Tensor], softplus: bool = True) -> list[Tensor]:
    """The same through the operator and its registered backward."""
    leaves = [x.detach().to(DEVICE).requires_grad_() for x in inputs]
    y = selective_scan(*leaves, dt_softplus=softplus, backend="triton")
    return [y, *torch.autograd.grad(y, leaves, dy.to(DEVICE))]


def check(got: list[Tensor], wanted: list[Tensor], limit: float) -> None:
    for name, a, b in zip(("y", *NAMES), got, wanted, strict=True):
        if b.abs().max() > 0:
            assert relative_error(a, b) < limit, name
        else:  # A's, where there is one token
            assert a.abs().max() == 0, name


@pytest.mark.parametrize(
    ("shape", "chunks"),
    [((1, 1, 5, 8), 1), ((2, 7, 3, 8), 1), ((1, 33, 6, 3), 3), ((2, 17, 4, 1), 2)],
    ids=["one token", "one chunk", "odd sizes", "one state"],
)
def test_value_and_gradients(shape: tuple[int, int, int, int], chunks: int) -> None:
    inputs = make_inputs(*shape)
    if backend.interpreted():
        assert launch._sizes(inputs[0], inputs[2]).chunks == chunks
    dy = torch.randn_like(inputs[0])
    check(compute(dy, inputs), exact(dy, inputs), FLOAT32)


@pytest.mark.parametrize("seqlen", [5, 17, 80], ids=["one chunk", "two chunks", "many chunks"])
def test_gradients_without_what_the_scan_kept(seqlen: int) -> None:
    u, dt, A, B, C, D, dt_bias = (x.to(DEVICE) for x in make_inputs(2, seqlen, 4, 4))
    parameters = launch.Parameters(A, D, dt_bias)
    y, ends = launch.scan(u, dt, B, C, parameters)
    dy = torch.randn_like(y)
    kept, anew = (launch.scan_backward(dy, u, dt, B, C, parameters, e) for e in (ends, None))
    for name, a, b in zip(NAMES, kept, anew, strict=True):
        assert torch.equal(a, b), name


def test_gradient_of_fast_decays() -> None:
    """Where little is left of the past, dA is tiny: it must not come out as a difference."""
    inputs = make_inputs(1, 40, 4, 8)
    inputs[2] = -torch.arange(1.0, 9).expand(4, -1).contiguous()
    inputs[1] = 3 + inputs[1].abs()  # Δ from 3 on: the last state keeps e^-24 of its past
    dy = torch.randn_like(inputs[0])
    got, wanted = compute(dy, inputs)[3], exact(dy, inputs)[3]
    for n in range(8):
        assert relative_error(got[:, n], wanted[:, n]) < FLOAT32, n


def test_without_softplus() -> None:
    inputs = make_inputs(1, 9, 4, 2)
    inputs[1], inputs[6] = inputs[1].abs(), inputs[6].abs()
    dy = torch.randn_like(inputs[0])
    check(compute(dy, inputs, False), exact(dy, inputs, False), FLOAT32)


@pytest.mark.parametrize("seqlen", [9, 20, 33], ids=["one chunk", "two", "carried"])
def test_without_softplus_and_a_negative_bias(seqlen: int) -> None:
    """Behind the last token dt is zero, and a decay of the bias alone would overflow."""
    inputs = make_inputs(1, seqlen, 4, 2)
    inputs[1] = 64 + (8 * inputs[1]).round().abs() / 8  # in eighths, so that the sum is exact
    inputs[6] = torch.full_like(inputs[6], -64)
    inputs[2] = -2 - inputs[2].abs()
    dy = torch.randn_like(inputs[0])
    check(compute(dy, inputs, False), exact(dy, inputs, False), FLOAT32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_inputs(dtype: torch.dtype) -> None:
    inputs = make_inputs(1, 20, 4, 8)
    inputs = [x.to(dtype) if x.dim() == 3 else x for x in inputs]
    dy = torch.randn_like(inputs[0])
    got = compute(dy, inputs)
    assert [x.dtype for x in got[1:]] == [x.dtype for x in inputs]
    check(got, exact(dy, inputs), 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(("dim", "dstate"), [(5, 3), (4, 1), (6, 4)], ids=str)
def test_half_precision_that_does_not_come_in_pairs(dim: int, dstate: int) -> None:
    """Odd numbers of channels or states, odd strides, odd addresses."""
    inputs = [x.to(DEVICE) for x in make_inputs(2, 20, dim, dstate)]
    sizes = [1, dim, dim, dstate, dstate]
    wide = torch.randn(2, 20, sum(sizes)).half().to(DEVICE)
    _, inputs[0], inputs[1], inputs[3], inputs[4] = wide.split(sizes, 2)
    dy = torch.randn(2, 20, dim + 1).half().to(DEVICE)[..., 1:]
    got = compute(dy, inputs)
    assert [x.dtype for x in got] == [torch.float16, *(x.dtype for x in inputs)]
    check(got, exact(dy, inputs), 2 * torch.finfo(torch.float16).eps)


def shifted(x: Tensor) -> Tensor:
    """The same, one element behind an address that fits all sizes."""
    return x.new_empty(x.numel() + 1)[1:].view_as(x).copy_(x)


@pytest.mark.parametrize(
    "x",
    [
        shifted(torch.randn(2, 10, 4).half()),
        torch.randn(2, 10, 6).half()[..., 1:5],
        torch.randn(2, 10, 5).half()[..., :4],
        torch.randn(99).half().as_strided((2, 10, 4), (45, 4, 1)),
        torch.randn(1, 1, 65).half()[..., 49:57],
        torch.randn(2, 10, 4).half().transpose(1, 2),
    ],
    ids=["odd address", "of tokens", "odd rows", "odd batch", "one token", "transposed"],
)
def test_what_is_read_in_pairs_lies_at_even_places(x: Tensor) -> None:
    rows = launch._rows(x)
    assert rows.data_ptr() % 4 == 0
    assert not any(stride % 2 for stride in rows.stride()[:2])
    assert rows.stride(2) == 1
    assert torch.equal(rows, x)


def test_what_fits_is_not_copied() -> None:
    for x in (torch.randn(2, 10, 5), torch.randn(2, 10, 36).half()[..., 20:28]):
        assert launch._rows(x) is x


def test_float64_step_sizes_beside_float32() -> None:
    inputs = make_inputs(1, 20, 4, 4)
    inputs[1], inputs[3] = inputs[1].double(), inputs[3].double()
    dy = torch.randn_like(inputs[0])
    got = compute(dy, inputs)
    assert [x.dtype for x in got[1:]] == [x.dtype for x in inputs]
    check(got, exact(dy, inputs), FLOAT32)


def test_views_and_strided_gradients() -> None:
    inputs = [x.to(DEVICE) for x in make_inputs(2, 10, 4, 4)]
    wide = torch.cat([inputs[0], inputs[3], inputs[1], inputs[4]], 2)
    inputs[0], inputs[3], inputs[1], inputs[4] = wide.split(4, 2)
    inputs[4] = inputs[4].transpose(1, 2).contiguous().transpose(1, 2)  # channels not contiguous
    dy = torch.randn(2, 4, 10, device=DEVICE).transpose(1, 2)
    check(compute(dy, inputs), exact(dy, inputs), FLOAT32)


@pytest.mark.parametrize("raw", [-80.0, -30.0, -9.0, 0.0, 19.0, 25.0, 100.0])
def test_softplus_is_exact_in_its_tails(raw: float) -> None:
    """Δ down to e^-80, and its derivative, keep float32's relative accuracy; here y = Δ."""
    one, zero = torch.ones(1), torch.zeros(1)
    token = one.view(1, 1, 1)
    inputs = [token, raw * token, -token[0], token, token, zero, zero]
    delta, _du, ddt, *_ = compute(token, inputs)
    exact_raw = torch.tensor(raw, dtype=torch.float64)
    for got, wanted in (
        (delta, torch.nn.functional.softplus(exact_raw)),
        (ddt, torch.sigmoid(exact_raw)),
    ):
        torch.testing.assert_close(got.double().item(), wanted.item(), rtol=FLOAT32, atol=0)


def test_nan_propagates() -> None:
    inputs = make_inputs(1, 20, 4, 2)
    inputs[0][0, 9, 1] = float("nan")
    y = selective_scan(*(x.to(DEVICE) for x in inputs), backend="triton")
    assert y[0, 9:, 1].isnan().all()
    assert y[0, :9].isfinite().all()
    assert y[0, :, 0].isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "chunks"),
    [
        ((128, 49, 320, 8), range(1, 2)),
        ((2, 90, 40, 3), range(2, 3)),
        ((16, 256, 320, 8), range(3, 33)),
        ((2, 4200, 160, 8), range(65, 129)),
        ((1, 9000, 40, 16), range(129, 257)),
    ],
    ids=["one chunk", "two, 3 states", "a few", "many", "more than 128, 16 states"],
)
def test_error_is_that_of_eager_operators(
    shape: tuple[int, int, int, int], chunks: range, dtype: torch.dtype
) -> None:
    """At most 1.5 times the error of PyTorch operators in the same dtype, against float64.

    Summed over some draws: float32's own errors, near 1e-7, are a matter of luck in a single one.
    """
    errors = {name: [0.0, 0.0] for name in ("y", *NAMES)}
    for draw in range(DRAWS):
        torch.manual_seed(draw)
        inputs = make_inputs(*shape, draw)
        inputs = [(x.to(dtype) if x.dim() == 3 else x).cuda() for x in inputs]
        assert launch._sizes(inputs[0], inputs[2]).chunks in chunks
        dy = torch.randn_like(inputs[0])
        wanted = exact(dy, inputs)
        leaves = [x.detach().requires_grad_() for x in inputs]
        y = selective_scan(*leaves, backend="chunked")
        eager = [y, *torch.autograd.grad(y, leaves, dy)]
        for total, a, e, b in zip(errors.values(), compute(dy, inputs), eager, wanted, strict=True):
            total[0] += relative_error(a, b)
            total[1] += relative_error(e, b)
    floor = 1e-7 * DRAWS  # half a unit in float32's last place
    for name, (ours, eagers) in errors.items():
        assert ours <= 1.5 * max(eagers, floor), name


@pytest.mark.gpu
@pytest.mark.parametrize("seqlen", [3136, 500], ids=["many chunks", "a few"])
def test_results_are_the_same_every_time(seqlen: int) -> None:
    inputs = [x.cuda().half() for x in make_inputs(2, seqlen, 320, 8)]
    dy = torch.randn_like(inputs[0])
    first = compute(dy, inputs)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(compute(dy, inputs), first, strict=True))
