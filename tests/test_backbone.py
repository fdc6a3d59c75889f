"""The backbone: golden data, published names, shapes, modes, and its errors."""

from __future__ import annotations

import copy
import json
import math
from functools import partialmethod
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from mambavision_backbone import VARIANTS, MambaVision
from mambavision_backbone.compiling import compiled
from mambavision_backbone.layers.attention import Attention
from mambavision_backbone.layers.mixer import MambaVisionMixer
from tests.conftest import TINY_ARCH, published_keys, read_golden, relative_error

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def net(arch: Any, **kwargs: Any) -> MambaVision:
    return MambaVision(arch, **kwargs).eval()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["small_windows", "layer_scale_big_windows"])
@pytest.mark.parametrize("index", [0, 1])
def test_golden(name: str, index: int, device: str) -> None:
    golden, meta = read_golden(name)
    model = net(json.loads(meta["config"]))
    weights = {k.removeprefix("weight."): v for k, v in golden.items() if k.startswith("weight.")}
    model.load_state_dict(weights, strict=True)
    model.to(device)
    if device == "cuda":  # the published outputs are plain float32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    x = golden[f"input.{index}"].to(device).requires_grad_()
    outs = model(x)
    for i, out in enumerate(outs):
        assert relative_error(out, golden[f"output.{index}.{i}"]) < 1e-5
    sum(out.square().mean() for out in outs).backward()
    assert relative_error(x.grad, golden[f"input_grad.{index}"]) < 1e-4
    prefix = f"param_grad.{index}."
    checked = [k for k in golden if k.startswith(prefix)]
    parameters = dict(model.named_parameters())
    for key in checked:
        grad = parameters[key.removeprefix(prefix)].grad
        assert relative_error(grad, golden[key]) < 1e-4, key
    assert len(checked) > 10


@pytest.mark.parametrize("name", VARIANTS)
def test_published_names_shapes_and_counts(name: str) -> None:
    published = published_keys()[name]
    with torch.device("meta"):
        model = MambaVision(name)
    own = {k: list(v.shape) for k, v in model.state_dict().items() if not k.startswith("outnorm")}
    expected = {k: v for k, v in published["keys"].items() if not k.startswith(("norm.", "head."))}
    assert own == expected
    count = sum(p.numel() for k, p in model.named_parameters() if not k.startswith("outnorm"))
    classifier = ("norm.weight", "norm.bias", "head.weight", "head.bias")
    count += sum(math.prod(published["keys"][k]) for k in classifier)
    assert count == published["params"]


@pytest.mark.parametrize("mode", ["pad", "fit"])
@pytest.mark.parametrize(
    "hw", [(1, 1), (1, 500), (4000, 33), (64, 96), (37, 101)], ids=lambda s: f"{s[0]}x{s[1]}"
)
def test_any_size(tiny_arch: dict[str, Any], hw: tuple[int, int], mode: str) -> None:
    with torch.no_grad():
        outs = net(tiny_arch, window_mode=mode)(torch.randn(1, 3, *hw))
    for i, out in enumerate(outs):
        stride = 4 * 2**i
        assert out.shape == (1, 16 * 2**i, -(-hw[0] // stride), -(-hw[1] // stride))
        assert out.isfinite().all()


def test_fit_equals_pad_where_windows_divide_the_map(tiny_arch: dict[str, Any]) -> None:
    windows = (8, 8, 4, 2)
    pad, fit = (net(tiny_arch, window_size=windows, window_mode=m) for m in ("pad", "fit"))
    fit.load_state_dict(pad.state_dict())
    x = torch.randn(2, 3, 64, 128)
    for a, b in zip(pad(x), fit(x), strict=True):
        torch.testing.assert_close(a, b)


def test_memory_format_does_not_matter(tiny_arch: dict[str, Any]) -> None:
    model = net(tiny_arch)
    x = torch.randn(2, 3, 40, 56)
    for a, b in zip(model(x), model(x.contiguous(memory_format=torch.channels_last)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("out_norm", ["LN", "BN", "none"])
@pytest.mark.parametrize("mode", ["pad", "fit"])
def test_maps_are_contiguous(tiny_arch: dict[str, Any], mode: str, out_norm: str) -> None:
    """Mmcv's RoIAlign ignores strides: a channels-last map gives a detector that never learns."""
    x = torch.randn(2, 3, 40, 56).contiguous(memory_format=torch.channels_last)
    assert all(o.is_contiguous() for o in net(tiny_arch, window_mode=mode, out_norm=out_norm)(x))


def test_batch_items_are_independent(tiny_arch: dict[str, Any]) -> None:
    model = net(tiny_arch)
    x = torch.randn(3, 3, 40, 56)
    for whole, single in zip(model(x), model(x[1:2]), strict=True):
        torch.testing.assert_close(whole[1:2], single, rtol=1e-4, atol=1e-5)


def test_nan_propagates(tiny_arch: dict[str, Any]) -> None:
    x = torch.randn(1, 3, 64, 64)
    x[0, 0, 30, 30] = float("nan")
    outs = net(tiny_arch)(x)
    assert all(out.isnan().any() for out in outs)


def test_first_half_of_a_stage_mixes_and_second_attends() -> None:
    with torch.device("meta"):
        model = MambaVision("S")
    for stage in (2, 3):
        kinds = [type(b.mixer) for b in model.levels[stage].blocks]
        mixers = -(-len(kinds) // 2)
        assert kinds == [MambaVisionMixer] * mixers + [Attention] * (len(kinds) - mixers)


def test_drop_path_grows_linearly() -> None:
    model = MambaVision("T", drop_path_rate=0.3)
    rates = [b.drop_path_rate for level in model.levels for b in level.blocks]
    assert rates == pytest.approx(torch.linspace(0, 0.3, 16).tolist())


def test_step_sizes_start_in_mambas_range(tiny_arch: dict[str, Any]) -> None:
    """With the bias added twice, as the forward pass does."""
    mixer = net(tiny_arch).levels[2].blocks[0].mixer
    steps = nn.functional.softplus(2 * mixer.dt_proj.bias)
    assert steps.min() >= 1e-3 * 0.999
    assert steps.max() <= 1e-1 * 1.001
    assert torch.equal(mixer.A_log.exp()[0].round(), torch.arange(1.0, 9.0))
    assert mixer.dt_proj.weight.abs().max() <= mixer.dt_rank**-0.5


@pytest.mark.parametrize("out_norm", ["LN", "BN", "none"])
def test_out_norm(tiny_arch: dict[str, Any], out_norm: str) -> None:
    model = MambaVision(tiny_arch, out_norm=out_norm, out_indices=(1, 3))
    names = {k for k in model.state_dict() if k.startswith("outnorm")}
    assert {k.split(".")[0] for k in names} == (
        set() if out_norm == "none" else {"outnorm1", "outnorm3"}
    )
    outs = model(torch.randn(2, 3, 64, 64))
    assert [tuple(o.shape[1:]) for o in outs] == [(32, 8, 8), (128, 2, 2)]
    if out_norm == "LN":
        assert outs[0].mean(1).abs().max() < 1e-5


@pytest.mark.parametrize("out_indices", [(0,), (0, 1), (2,), (0, 1, 2, 3)], ids=str)
def test_every_trainable_parameter_gets_a_gradient(
    tiny_arch: dict[str, Any], out_indices: tuple[int, ...]
) -> None:
    """Distributed training stops at parameters that are waited for in vain."""
    model = MambaVision(tiny_arch, out_indices=out_indices)
    sum(o.sum() for o in model(torch.randn(2, 3, 64, 64))).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert {k for k, _ in MambaVision(tiny_arch).named_parameters()} >= {
        k for k, _ in model.named_parameters()
    }


def test_frozen_stages_and_norm_eval(tiny_arch: dict[str, Any]) -> None:
    model = MambaVision(tiny_arch, frozen_stages=2, norm_eval=True).train()
    frozen = {k.split(".blocks")[0] for k, p in model.named_parameters() if not p.requires_grad}
    assert {k.split(".")[0] for k in frozen} == {"patch_embed", "levels", "outnorm0", "outnorm1"}
    assert not any(k.startswith(("levels.2", "levels.3", "outnorm2")) for k in frozen)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model(torch.randn(2, 3, 64, 64))[3].sum().backward()
    assert not any(m.training for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.levels[2].training
    assert model.patch_embed.conv_down[0].weight.grad is None
    assert MambaVision(tiny_arch, frozen_stages=0).levels[0].blocks[0].conv1.weight.requires_grad


def test_checkpointing_gives_the_same_gradients(tiny_arch: dict[str, Any]) -> None:
    x = torch.randn(2, 3, 64, 64)
    grads = []
    for with_cp in (False, True):
        torch.manual_seed(1)
        model = MambaVision(tiny_arch, with_cp=with_cp, drop_path_rate=0.0)
        sum(o.sin().mean() for o in model(x)).backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("in_channels", [1, 4])
def test_in_channels(tiny_arch: dict[str, Any], in_channels: int) -> None:
    model = net(tiny_arch, in_channels=in_channels)
    assert len(model(torch.randn(1, in_channels, 32, 32))) == 4
    with pytest.raises(ValueError, match=rf"\(B, {in_channels}, H, W\), got \(1, 3, 32, 32\)"):
        model(torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"arch": "XXL"}, "unknown arch 'XXL': choose one of T, T2, S, B, L, L2, L3"),
        ({"window_mode": "crop"}, "unknown window_mode 'crop'"),
        ({"window_size": (8, 8, 0, 7)}, "window_size must be 4 positive integers"),
        ({"window_size": (8, 8, 14)}, "window_size must be 4 positive integers"),
        ({"window_size": 14}, "window_size must be 4 positive integers, got 14"),
        ({"out_indices": (0, 4)}, r"out_indices must be .* 0..3, got \(0, 4\)"),
        ({"out_indices": ()}, "out_indices"),
        ({"out_indices": 3}, r"out_indices must be .* 0..3, got 3"),
        ({"out_indices": (2, 1)}, "out_indices must be ascending"),
        ({"out_norm": "GN"}, "unknown out_norm 'GN'"),
        ({"scan_backend": "triton9"}, "unknown scan backend 'triton9'"),
        ({"drop_path_rate": 1.0}, "drop_path_rate"),
        ({"frozen_stages": 5}, "frozen_stages must be in -1..4"),
        ({"in_channels": 0}, "in_channels"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_arguments_are_named(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MambaVision(**kwargs)


def test_unknown_argument_is_an_error() -> None:
    with pytest.raises(TypeError, match="windows"):
        MambaVision("T", windows=3)  # type: ignore[call-arg]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_autocast(tiny_arch: dict[str, Any], dtype: torch.dtype, device: str) -> None:
    model = MambaVision(tiny_arch).to(device)
    x = torch.randn(2, 3, 64, 96, device=device)
    with torch.autocast(device, dtype):
        outs = model(x)
        loss = sum(o.float().square().mean() for o in outs)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    exact = net(tiny_arch).to(device)
    exact.load_state_dict(model.state_dict())
    with torch.no_grad(), torch.autocast(device, dtype):
        low = exact(x)
    with torch.no_grad():
        full = exact(x)
    for a, b in zip(low, full, strict=True):
        assert relative_error(a, b) < 10 * torch.finfo(dtype).eps


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["pad", "fit"])
def test_compiles_in_one_graph(tiny_arch: dict[str, Any], mode: str) -> None:
    model = net(tiny_arch, window_mode=mode)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 3, 48, 80)
    for a, b in zip(compiled(x), model(x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_exports(tiny_arch: dict[str, Any]) -> None:
    model = net(tiny_arch, window_mode="fit")
    x = torch.randn(1, 3, 64, 64)
    program = torch.export.export(model, (x,))
    assert "mambavision.selective_scan" in str(program.graph)
    for a, b in zip(program.module()(x), model(x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# Short sides of 800 at most, long ones of 1333, divided by 8: the sizes that COCO's images get.
COCO_SIZES = [
    (100, 136), (136, 100), (100, 152), (152, 100), (96, 168), (168, 96), (100, 100), (100, 128),
    (128, 100), (76, 168), (100, 132), (132, 100), (100, 144), (144, 100), (100, 112), (112, 100),
    (88, 168), (168, 88), (100, 160), (160, 100),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "train"), [("fit", False), ("pad", True)])
def test_twenty_sizes_take_a_handful_of_compilations(
    mode: str, train: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the switch; with a backend that only counts, for it is quick. Windows cover the maps."""
    counter = CompileCounter()
    compile_with(counter, monkeypatch)
    arch = {**TINY_ARCH, "depths": (1, 1, 1, 1), "window_size": (8, 8, 14, 7)}
    quick, plain = compiled_and_plain(arch, mode, train)
    with torch.set_grad_enabled(train):
        for hw in COCO_SIZES:
            x = torch.randn(2, 3, *hw)
            for a, b in zip(quick(x), plain(x), strict=True):
                torch.testing.assert_close(a, b)
    # The stem and four stages; with ``pad``, those of maps that need padding or that need none.
    assert 5 <= counter.frame_count <= (5 if mode == "fit" else 10)
    assert not counters["graph_break"]


@pytest.mark.slow
def test_compiled_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """In training with drop path, evaluation, of one image and of many windows: never an error."""
    compile_with("aot_eager", monkeypatch)
    model = MambaVision({**TINY_ARCH, "depths": (1, 1, 2, 1)}, drop_path_rate=0.5, compile=True)
    images = [torch.randn(batch, 3, *hw) for batch in (2, 1) for hw in [(64, 96), (200, 300)]]
    for x in images:
        first, second = model.train()(x), model(x)
        sum(m.square().mean() for m in first).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        assert not torch.allclose(first[3], second[3])  # other branches are skipped
    with torch.no_grad():
        for x in images:
            for a, b in zip(model.eval()(x), copy.deepcopy(model)(x), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert compiled(model.patch_embed)
    assert not compiled(copy.deepcopy(model).patch_embed)


def compile_with(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=backend))
    torch._dynamo.reset()
    counters.clear()


def compiled_and_plain(
    arch: dict[str, Any], mode: str, train: bool
) -> tuple[MambaVision, MambaVision]:
    options: dict[str, Any] = {"window_mode": mode, "drop_path_rate": 0.0}
    quick = MambaVision(arch, compile=True, **options).train(train)
    plain = MambaVision(arch, **options).train(train)
    plain.load_state_dict(quick.state_dict())
    return quick, plain


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_trains_compiled(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the compiler itself: same maps and gradients, sizes that vary, windows that do not."""
    compile_with("inductor", monkeypatch)
    arch = {**TINY_ARCH, "depths": (1, 1, 2, 1), "window_size": (8, 8, 112, 56)}
    models = [model.to(device) for model in compiled_and_plain(arch, "fit", True)]
    for hw in [(96, 160), (160, 128), (192, 192)]:
        x = torch.randn(2, 3, *hw, device=device)
        results = []
        for model in models:
            model.zero_grad()
            maps = model(x)
            sum(m.square().sum() for m in maps).backward()
            # The norm takes away what a bias of a convolution adds: gradients of rounding alone.
            zero = ("conv1.bias", "conv2.bias")
            grads = [p.grad for k, p in model.named_parameters() if not k.endswith(zero)]
            results.append([*maps, *grads])
        for a, b in zip(*results, strict=True):
            assert relative_error(a, b) < 1e-2
    # Not one for each size; on a CPU a few more, where sizes decide on the way of summing.
    assert counters["stats"]["unique_graphs"] <= (5 if device == "cuda" else 9)
    assert not counters["graph_break"]


@pytest.mark.parametrize("skip_first", [False, True], ids=["", "first block skipped"])
def test_padding_does_not_blow_gradients_up(skip_first: bool) -> None:
    norms = []
    for mode in ("fit", "pad"):
        torch.manual_seed(0)
        model = MambaVision("T", window_size=(8, 8, 28, 14), window_mode=mode, drop_path_rate=0.0)
        if skip_first:  # drop path does so
            for level in model.levels[2:]:
                level.blocks[0].drop_path_rate = 1 - 1e-6
        maps = model(torch.randn(1, 3, 96, 96))
        grads = torch.autograd.grad([m.square().mean() for m in maps], list(model.parameters()))
        norms.append(torch.stack([g.norm() for g in grads]).norm())
    assert norms[1] < 2 * norms[0]
