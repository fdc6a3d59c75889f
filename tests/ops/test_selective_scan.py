"""The selective scan: golden data, backends against the reference, the operator's registration."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from mambavision_backbone.ops.selective_scan import api, chunked, selective_scan
from mambavision_backbone.ops.selective_scan.reference import selective_scan as reference
from tests.conftest import read_golden, relative_error

NAMES = ("u", "dt", "A", "B", "C", "D", "dt_bias")
INTERPRETED = [] if torch.cuda.is_available() else ["triton"]  # see conftest
SHAPES = [
    (2, 12, 8, 49),  # batch dim dstate seqlen
    (1, 16, 16, 257),
    (3, 8, 8, 1),
    (1, 20, 8, 196),
    (1, 6, 4, 1031),
    (5, 3, 1, 7),
]


def _id(shape: tuple[int, ...]) -> str:
    return "B{}-D{}-N{}-L{}".format(*shape)


def make_inputs(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> list[Tensor]:
    batch, dim, dstate, seqlen = shape
    generator = torch.Generator().manual_seed(sum(shape))

    def rand(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    tensors = [
        rand(batch, seqlen, dim),
        rand(batch, seqlen, dim),
        -torch.exp(0.5 * rand(dim, dstate)),
        rand(batch, seqlen, dstate),
        rand(batch, seqlen, dstate),
        rand(dim),
        rand(dim),
    ]
    return [t.to(device, dtype).requires_grad_() for t in tensors]


def value_and_grads(inputs: list[Tensor], backend: str, softplus: bool = True) -> list[Tensor]:
    y = selective_scan(*inputs, dt_softplus=softplus, backend=backend)
    return [y, *torch.autograd.grad(y.square().mean() + y.sin().mean(), inputs)]


@pytest.mark.parametrize("case", range(4))
@pytest.mark.parametrize(("backend", "limit"), [("reference", 1e-12), ("chunked", 1e-9)])
def test_golden(case: int, backend: str, limit: float) -> None:
    golden = read_golden("selective_scan")[0]
    inputs = []
    for name in NAMES:
        x = golden[f"{case}.{name}"]
        x = x.transpose(1, 2) if name in ("u", "dt", "B", "C") else x  # to token-major
        inputs.append(x.contiguous().requires_grad_())
    y = selective_scan(*inputs, backend=backend)
    y.square().mean().backward()
    assert relative_error(y.transpose(1, 2), golden[f"{case}.y"]) < limit
    for name, x in zip(NAMES, inputs, strict=True):
        expected = golden[f"{case}.grad.{name}"]
        got = x.grad.transpose(1, 2) if name in ("u", "dt", "B", "C") else x.grad
        if expected.abs().max() == 0:  # A, where there is one token
            assert got.abs().max() == 0
        else:
            assert relative_error(got, expected) < limit, name


@pytest.mark.parametrize("shape", SHAPES, ids=_id)
@pytest.mark.parametrize("softplus", [True, False], ids=["softplus", "plain"])
def test_chunked_equals_reference(shape: tuple[int, ...], softplus: bool) -> None:
    inputs = make_inputs(shape)
    if not softplus:
        inputs[1] = inputs[1].detach().abs().requires_grad_()
        inputs[6] = inputs[6].detach().abs().requires_grad_()
    expected = value_and_grads(inputs, "reference", softplus)
    for got, want in zip(value_and_grads(inputs, "chunked", softplus), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("segment", "step"), [(2**24, 2**17), (512, 64), (4096, 1024)])
def test_chunked_is_the_same_for_any_cut(
    segment: int, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make_inputs((2, 6, 2, 331))
    expected = value_and_grads(inputs, "reference")
    monkeypatch.setattr(chunked, "SEGMENT", segment)
    monkeypatch.setattr(chunked, "STEP", step)
    for got, want in zip(value_and_grads(inputs, "chunked"), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("function", [reference, selective_scan], ids=["reference", "chunked"])
def test_gradcheck(function: object) -> None:
    inputs = make_inputs((1, 3, 2, 9))
    assert torch.autograd.gradcheck(lambda *x: function(*x, True), inputs)  # type: ignore[operator]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_low_precision_keeps_the_state_in_float32(dtype: torch.dtype) -> None:
    """The only error of half-precision inputs is the rounding of y itself."""
    inputs = make_inputs((1, 8, 8, 700))
    rounded = [x.detach().to(dtype) for x in inputs]
    exact = reference(*(x.double() for x in rounded), True)
    y = selective_scan(*rounded)
    assert y.dtype == dtype
    assert relative_error(y, exact) < max(torch.finfo(dtype).eps, 1e-6)


def test_none_means_no_skip_and_no_bias() -> None:
    u, dt, A, B, C, D, bias = make_inputs((2, 4, 3, 11))
    zeros = torch.zeros_like(D)
    torch.testing.assert_close(
        selective_scan(u, dt, A, B, C),
        selective_scan(u, dt, A, B, C, zeros, torch.zeros_like(bias)),
    )


def test_strided_inputs_and_gradients() -> None:
    u, dt, A, B, C, D, bias = make_inputs((2, 4, 3, 11))
    wide = torch.cat([u, dt], 2)
    views = wide.split([4, 4], 2)
    y = selective_scan(*views, A, B, C, D, bias)
    torch.testing.assert_close(y, selective_scan(u, dt, A, B, C, D, bias))
    dy = torch.randn(2, 4, 11, dtype=torch.float64).transpose(1, 2)
    grads = torch.autograd.grad(y, [u, A], dy)
    wants = torch.autograd.grad(reference(u, dt, A, B, C, D, bias, True), [u, A], dy)
    for got, want in zip(grads, wants, strict=True):
        torch.testing.assert_close(got, want)


def test_nan_propagates() -> None:
    inputs = [x.detach() for x in make_inputs((1, 4, 2, 300))]
    inputs[0][0, 40, 1] = float("nan")
    y = selective_scan(*inputs)
    assert y[0, 40:, 1].isnan().all()
    assert y[0, :40].isfinite().all()


@pytest.mark.parametrize("backend", ["chunked", *INTERPRETED])
def test_opcheck(backend: str) -> None:
    dtype = torch.float64 if backend == "chunked" else torch.float32
    inputs = make_inputs((2, 4, 3, 5), dtype)
    op = torch.ops.mambavision.selective_scan.default
    torch.library.opcheck(op, (*inputs, True, backend))
    torch.library.opcheck(
        torch.ops.mambavision.selective_scan_backward.default,
        (torch.randn(2, 5, 4, dtype=dtype), *(x.detach() for x in inputs), True, backend),
    )


@pytest.mark.parametrize("backend", ["chunked", "reference", *INTERPRETED])
def test_results_have_the_strides_of_their_fakes(backend: str) -> None:
    """Compiled code relies on them; opcheck does not compare them."""
    inputs = [x.detach() for x in make_inputs((2, 4, 3, 5), torch.float32)]
    wide = torch.cat(inputs[:2], 2)
    inputs[:2] = wide[..., :4], wide[..., 4:]
    dy = torch.randn(2, 4, 5).transpose(1, 2)
    ops = torch.ops.mambavision
    y = ops.selective_scan(*inputs, True, backend)
    grads = ops.selective_scan_backward(dy, *inputs, True, backend)
    metas = [x.to("meta") for x in inputs]
    y_fake = ops.selective_scan(*metas, True, backend)
    fakes = ops.selective_scan_backward(dy.to("meta"), *metas, True, backend)
    for real, fake in zip([y, *grads], [y_fake, *fakes], strict=True):
        assert real.stride() == fake.stride()
        assert real.shape == fake.shape


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["auto", *INTERPRETED])
def test_compiles_in_one_graph(backend: str) -> None:
    inputs = make_inputs((2, 4, 3, 5), torch.float32)
    compiled = torch.compile(
        lambda *x: selective_scan(*x, backend=backend).square().mean(),
        fullgraph=True,
        backend="aot_eager",
    )
    got = torch.autograd.grad(compiled(*inputs), inputs)
    want = torch.autograd.grad(selective_scan(*inputs).square().mean(), inputs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_flops_are_counted() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    inputs = make_inputs((2, 4, 3, 5))
    forward = 2 * 4 * 5 * (9 * 3 + 1)
    with FlopCounterMode(display=False) as counter:
        selective_scan(*inputs).sum().backward()
    assert counter.get_total_flops() == 3 * forward


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dt": torch.zeros(2, 5, 3)}, r"dt must have shape \(2, 5, 4\)"),
        ({"A": torch.zeros(3, 3)}, r"A must have shape \(4, 3\)"),
        ({"B": torch.zeros(2, 5, 4)}, "B must have shape"),
        ({"D": torch.zeros(5)}, "D must have shape"),
        ({"u": torch.zeros(2, 5, 4, dtype=torch.int64)}, "u must be a float tensor"),
        ({"u": torch.zeros(2, 4)}, "u must be"),
        ({"dt_bias": torch.zeros(4, device="meta")}, "dt_bias is on meta"),
        ({"backend": "cuda"}, "unknown scan backend 'cuda': choose one of auto, chunked"),
        ({"backend": "mamba_ssm"}, "'mamba_ssm' needs CUDA tensors, u is on cpu"),
        ({"backend": "triton", "u": torch.zeros(2, 5, 4).double()}, "'triton' has no float64"),
        (
            {
                "backend": "triton",
                "A": torch.zeros(4, 17),
                "B": torch.zeros(2, 5, 17),
                "C": torch.zeros(2, 5, 17),
            },
            "cannot take this: dstate 17 is above 16|needs CUDA tensors",
        ),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_input_is_named(change: dict[str, object], message: str) -> None:
    inputs = dict(zip(NAMES, make_inputs((2, 4, 3, 5), torch.float32), strict=True))
    with pytest.raises(ValueError, match=message):
        selective_scan(**{**inputs, **change})


def test_no_tokens_is_an_error() -> None:
    inputs = [x[:, :0] if i in (0, 1, 3, 4) else x for i, x in enumerate(make_inputs((2, 4, 3, 5)))]
    with pytest.raises(ValueError, match="seqlen is 0"):
        selective_scan(*inputs)


_MEMORY = """
import torch
from mambavision_backbone.ops.selective_scan import selective_scan

def memory(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(key)) / 1024

def scan(seqlen):
    shapes = [(1, seqlen, 160)] * 2 + [(160, 8)] + [(1, seqlen, 8)] * 2 + [(160,)] * 2
    inputs = [torch.rand(s) for s in shapes]
    inputs[2].neg_()
    inputs = [x.requires_grad_({grad}) for x in inputs]
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the high-water mark starts anew
    before = memory("VmRSS")
    y = selective_scan(*inputs)
    if {grad}:
        y.sum().backward()
    return memory("VmHWM") - before

scan(64)  # loads what the first call loads
print(scan(12544))
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
@pytest.mark.parametrize(("grad", "limit"), [(False, 400), (True, 1.2 * 1024)])
def test_memory_is_bounded(grad: bool, limit: float) -> None:
    """Extra memory in MiB at (1, 160, 12544, 8), the largest window of the published models."""
    code = _MEMORY.format(grad=grad)
    extra = float(subprocess.check_output([sys.executable, "-c", code]))
    states = 160 * 12544 * 8 * 4 / 2**20
    assert (states if grad else states / 8) < extra < limit


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=_id)
@pytest.mark.parametrize("backend", ["chunked", "mamba_ssm", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_gpu_backends(shape: tuple[int, ...], backend: str, dtype: torch.dtype) -> None:
    """Against float64 on the same rounded inputs: y and all gradients."""
    if backend == "mamba_ssm":
        pytest.importorskip("mamba_ssm")
    rounded = [
        (x.detach().to(dtype) if name in ("u", "dt", "B", "C") else x.detach().float())
        for name, x in zip(NAMES, make_inputs(shape), strict=True)
    ]
    expected = value_and_grads([x.double().requires_grad_() for x in rounded], "reference")
    got = value_and_grads([x.cuda().requires_grad_() for x in rounded], backend)
    limit = 1e-4 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
    for name, a, b in zip(("y", *NAMES), got, expected, strict=True):
        if b.abs().max() > 0:
            assert relative_error(a, b) < limit, name


@pytest.mark.gpu
def test_auto_on_a_gpu() -> None:
    u, A = torch.zeros(1, 1, 1, device="cuda"), torch.zeros(1, 8, device="cuda")
    assert api.choose_backend("auto", u, A) == "triton"
    assert api.choose_backend("auto", u.double(), A) == "chunked"


@pytest.mark.parametrize(
    ("batch", "dstate", "broken", "choice"),
    [
        (1, 8, (), "triton"),
        (70000, 8, (), "mamba_ssm"),
        (1, 17, (), "mamba_ssm"),
        (1, 8, ("triton",), "mamba_ssm"),
        (1, 300, (), "chunked"),
    ],
)
def test_auto_takes_the_first_that_works(
    batch: int,
    dstate: int,
    broken: tuple[str, ...],
    choice: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name, module in api._GPU_BACKENDS.items():
        reason = "it is broken" if name in broken else None
        monkeypatch.setattr(module, "unavailable", lambda reason=reason: reason)
    u = SimpleNamespace(shape=(batch, 1, 1), is_cuda=True, dtype=torch.float16)
    A = torch.zeros(1, dstate)
    api._cuda_choice.cache_clear()
    api._say.cache_clear()
    with caplog.at_level("INFO", "mambavision_backbone"):
        assert api.choose_backend("auto", u, A) == api.choose_backend("auto", u, A) == choice
    api._cuda_choice.cache_clear()
    (record,) = caplog.records  # said once
    if choice == "chunked":
        assert (
            "triton: dstate 300 is above 16; mamba_ssm: dstate 300 is above 256" in record.message
        )
    else:
        assert choice in record.message
