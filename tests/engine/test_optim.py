"""The optimizer's groups: rates by layer, weight decay, and the same update as without merging."""

from __future__ import annotations

import io
import logging
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("mmengine")

from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.optim import LinearLR, MultiStepLR, OptimWrapper, build_optim_wrapper
from torch import nn

from mambavision_backbone import MambaVision
from tests.conftest import ROOT

LR, DECAY = 1e-2, 0.05
# Layer, scale at a decay_rate of 0.9 and number of tensors of variant T, depths 1, 3, 8, 4.
# A convolution block has 8 tensors, one with a mixer 17, one with attention 12; the first block
# after a downsampling has its convolution too.
T_LAYERS = [
    (0, 0.16677, 6),  # the stem: two convolutions without a bias and their norms
    (1, 0.18530, 8),
    (2, 0.20589, 9),
    (3, 0.22877, 8),
    (4, 0.25419, 8),
    (5, 0.28243, 18),
    (6, 0.31381, 17),
    (7, 0.34868, 17),
    (8, 0.38742, 17),
    (9, 0.43047, 12),
    (10, 0.47830, 12),
    (11, 0.53144, 12),
    (12, 0.59049, 12),
    (13, 0.65610, 18),
    (14, 0.72900, 17),
    (15, 0.81000, 12),
    (16, 0.90000, 12),
    (17, 1.00000, 8),  # the out norms of the four maps
]


class Detector(nn.Module):
    """A backbone and a head with a norm."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = self.backbone(x)
        return sum(m.square().mean() for m in maps) + self.head(x[0, :, :4, :4]).square().sum()


class Wrapped(nn.Module):
    """As MMDistributedDataParallel has its model."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def build(
    model: nn.Module, constructor: str = "LayerDecayOptimWrapperConstructor", **options: Any
) -> OptimWrapper:
    cfg = {
        "type": "OptimWrapper",
        "constructor": constructor,
        "optimizer": {"type": "AdamW", "lr": LR, "weight_decay": DECAY},
    }
    if options:
        cfg["paramwise_cfg"] = options
    return build_optim_wrapper(model, cfg)


def groups_of(wrapper: OptimWrapper) -> list[dict[str, Any]]:
    return wrapper.optimizer.param_groups


def settings_of(wrapper: OptimWrapper, model: nn.Module) -> dict[str, tuple[float, float]]:
    """Rate and weight decay of every parameter that is optimized."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        names[parameter]: (group["lr"], group["weight_decay"])
        for group in groups_of(wrapper)
        for parameter in group["params"]
    }


def layer_by_name(name: str, depths: tuple[int, ...]) -> int:
    """The layer of a parameter, read off its name."""
    if "patch_embed." in name:
        return 0
    match = re.search(r"levels\.(\d)\.(blocks|downsample)\.(\w+)", name)
    if match is None:
        return sum(depths) + 1
    stage = int(match[1])
    if match[2] == "downsample":
        return sum(depths[: stage + 1]) + 1
    return sum(depths[:stage]) + int(match[3]) + 1


@pytest.fixture
def scaled_arch(tiny_arch: dict[str, Any]) -> dict[str, Any]:
    """With every kind of parameter that there is."""
    return {**tiny_arch, "depths": (1, 2, 3, 2), "layer_scale": 1e-2, "layer_scale_conv": 1e-2}


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """What mmengine's logger says."""
    lines: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = MMLogger.get_current_instance()
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


@pytest.mark.parametrize("kind", ["detector", "bare", "wrapped"])
def test_layers_of_t(kind: str) -> None:
    with torch.device("meta"):
        backbone = MambaVision("T")
        model = backbone if kind == "bare" else Detector(backbone)
    wrapper = build(Wrapped(model) if kind == "wrapped" else model, decay_rate=0.9)
    tensors: Counter[int] = Counter()
    for group in groups_of(wrapper):
        layer = int(re.fullmatch(r"layer (\d+), (no )?decay", group["name"])[1])  # type: ignore[index]
        tensors[layer] += len(group["params"])
        assert group["lr"] == pytest.approx(T_LAYERS[layer][1] * LR, rel=1e-4)
        assert group["lr"] == pytest.approx(0.9 ** (17 - layer) * LR, rel=1e-12)
    if kind != "bare":
        tensors[17] -= 4  # the head
    assert sorted(tensors.items()) == [(layer, number) for layer, _, number in T_LAYERS]
    names = [group["name"] for group in groups_of(wrapper)]
    assert names[-3:] == ["layer 1, no decay", "layer 0, decay", "layer 0, no decay"]
    assert groups_of(wrapper)[0]["lr"] == LR, "which mmengine logs as lr"
    assert len(set(names)) == len(names) == 35 + (kind != "bare")  # out norms have nothing to decay


@pytest.mark.parametrize("rate", [1.0, 0.9, 0.5])
def test_every_parameter_is_in_one_group(rate: float, scaled_arch: dict[str, Any]) -> None:
    model = Detector(MambaVision(scaled_arch))
    groups = groups_of(build(model, decay_rate=rate))
    counts = Counter(p for group in groups for p in group["params"])
    assert counts == Counter(model.parameters())
    depths = scaled_arch["depths"]
    for name, (lr, _) in settings_of(build(model, decay_rate=rate), model).items():
        layer = layer_by_name(name, depths)
        assert lr == pytest.approx(LR * rate ** (sum(depths) + 1 - layer)), name


@pytest.mark.parametrize("options", [{}, {"decay_rate": 0.9}, {"norm_decay_mult": 0.5}])
def test_what_is_not_decayed(options: dict[str, Any], scaled_arch: dict[str, Any]) -> None:
    """Of the backbone, whatever the options say; of the head, what they say."""
    model = Detector(MambaVision(scaled_arch))
    settings = settings_of(build(model, **options), model)
    plain = {name.split("backbone.")[1] for name, (_, d) in settings.items() if d == 0}
    ends = {".".join(name.split(".")[-2:]) for name in plain}
    numbered = {end for end in ends if re.fullmatch(r"\d\.\w+", end)}
    assert numbered == {"1.weight", "1.bias", "4.weight", "4.bias", "0.gamma"} | {
        f"{block}.{name}" for block in (0, 1) for name in ("gamma", "gamma_1", "gamma_2")
    } | {f"2.{name}" for name in ("gamma_1", "gamma_2")}
    assert ends - numbered == {
        *(f"norm{i}.{name}" for i in (1, 2) for name in ("weight", "bias")),
        *(f"outnorm{i}.{name}" for i in range(4) for name in ("weight", "bias")),
        *(f"{name}.bias" for name in ("conv1", "conv2", "fc1", "fc2", "qkv", "proj", "dt_proj")),
        "mixer.A_log",
        "mixer.D",
    }
    decayed = {name for name, (_, d) in settings.items() if d == DECAY}
    assert {name.split(".")[-2] for name in decayed if "mixer" in name} == {
        *("in_proj", "conv1d_x", "conv1d_z", "x_proj", "dt_proj", "out_proj", "qkv", "proj")
    }
    head = [settings[f"head.{name}"][1] for name in ("0.weight", "0.bias", "1.weight", "1.bias")]
    norm = DECAY * options.get("norm_decay_mult", 1.0)
    assert head == [DECAY, DECAY, norm, norm]


@pytest.mark.parametrize("rate", [1.0, 0.8])
def test_update_is_that_of_single_groups(rate: float, scaled_arch: dict[str, Any]) -> None:
    """Bit for bit that of an optimizer with a group a parameter, as mmengine makes them."""
    torch.manual_seed(0)
    model, other = (Detector(MambaVision(scaled_arch, drop_path_rate=0)) for _ in range(2))
    other.load_state_dict(model.state_dict())
    merged = build(model, decay_rate=rate, norm_decay_mult=0.0, bias_decay_mult=0.0).optimizer
    keys = {key: {"decay_mult": 0.0} for key in ("mixer.A_log", "mixer.D", "gamma")}
    single = build(
        other,
        "DefaultOptimWrapperConstructor",
        norm_decay_mult=0.0,
        bias_decay_mult=0.0,
        custom_keys=keys,
    ).optimizer
    assert len(single.param_groups) == len(list(model.parameters()))
    depths = scaled_arch["depths"]
    for (name, _), group in zip(other.named_parameters(), _in_order(single, other), strict=True):
        group["lr"] *= rate ** (sum(depths) + 1 - layer_by_name(name, depths))
    assert len(merged.param_groups) == (2 if rate == 1 else 2 * 9 + 2)

    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):
        x = torch.randn(2, 3, 32, 32)
        for network, optimizer in ((model, merged), (other, single)):
            optimizer.zero_grad()
            network(x).backward()
            optimizer.step()
    for (name, p), q, old in zip(model.named_parameters(), other.parameters(), before, strict=True):
        assert torch.equal(p, q), name
        assert not torch.equal(p, old), name


def _in_order(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[dict[str, Any]]:
    """The group of every parameter, in the model's order."""
    groups = {group["params"][0]: group for group in optimizer.param_groups}
    return [groups[parameter] for parameter in model.parameters()]


def test_other_options_keep_their_meaning(tiny_arch: dict[str, Any]) -> None:
    """Multipliers come on top of the layer's scale, and settings of a parameter's own stay."""
    model = Detector(MambaVision(tiny_arch))
    keys: dict[str, Any] = {
        "patch_embed": {"lr_mult": 0.5},
        "head": {"lr_mult": 4.0, "betas": [0.5, 0.9]},
    }
    wrapper = build(model, decay_rate=0.9, custom_keys=keys)
    settings = settings_of(wrapper, model)
    stem = settings["backbone.patch_embed.conv_down.0.weight"]
    assert stem == pytest.approx((LR * 0.5 * 0.9**7, DECAY))
    assert settings["head.0.weight"] == pytest.approx((LR * 4, DECAY))
    groups = {group["name"]: group for group in groups_of(wrapper)}
    head = groups[f"layer 7, decay, lr {LR * 4}, betas [0.5, 0.9]"]
    assert head["betas"] == [0.5, 0.9]
    assert len(head["params"]) == 4
    assert f"layer 0, no decay, lr {LR * 0.5}" in groups
    assert groups["layer 7, no decay"]["betas"] == (0.9, 0.999)


def test_two_backbones_have_their_own_depths(tiny_arch: dict[str, Any]) -> None:
    model = nn.ModuleDict(
        {"a": MambaVision(tiny_arch), "b": MambaVision({**tiny_arch, "depths": (1, 1, 1, 1)})}
    )
    settings = settings_of(build(model, decay_rate=0.5), model)
    assert settings["a.patch_embed.conv_down.0.weight"][0] == LR * 0.5**7
    assert settings["b.patch_embed.conv_down.0.weight"][0] == LR * 0.5**5
    assert settings["b.outnorm3.weight"][0] == LR


def test_shared_parameters_count_once(tiny_arch: dict[str, Any]) -> None:
    model = Detector(MambaVision(tiny_arch))
    model.tied = nn.Linear(4, 4)
    model.tied.weight = model.head[0].weight
    groups = groups_of(build(model))
    assert Counter(p for g in groups for p in g["params"]) == Counter(model.parameters())


@pytest.mark.parametrize("frozen_stages", [0, 2, 4])
def test_frozen_stages_are_left_out(frozen_stages: int, tiny_arch: dict[str, Any]) -> None:
    model = Detector(MambaVision(tiny_arch, frozen_stages=frozen_stages))
    settings = settings_of(build(model, decay_rate=0.9), model)
    assert set(settings) == {n for n, p in model.named_parameters() if p.requires_grad}
    full = Detector(MambaVision(tiny_arch))
    whole = settings_of(build(full, decay_rate=0.9), full)
    assert settings.items() < whole.items()


def test_schedulers_scale_all_groups(tiny_arch: dict[str, Any]) -> None:
    wrapper = build(Detector(MambaVision(tiny_arch)), decay_rate=0.9)
    full = [group["lr"] for group in groups_of(wrapper)]
    schedulers = [
        LinearLR(wrapper, start_factor=0.1, begin=0, end=4, by_epoch=False),
        MultiStepLR(wrapper, milestones=[6], gamma=0.1, by_epoch=False),
    ]
    factors = []
    for _ in range(8):
        rates = [group["lr"] for group in groups_of(wrapper)]
        factors.append(rates[0] / full[0])
        assert rates == pytest.approx([factors[-1] * lr for lr in full])
        assert wrapper.get_lr()["base_lr"] == pytest.approx([factors[-1] * LR])
        wrapper.step()
        for scheduler in schedulers:
            scheduler.step()
    assert factors == pytest.approx([0.1, 0.4, 0.7, 1.0, 1.0, 1.0, 0.1, 0.1])


def test_state_goes_through_a_file(tiny_arch: dict[str, Any]) -> None:
    """As a resumed run has it: read strictly, in an optimizer built anew from the same config."""
    model = Detector(MambaVision(tiny_arch, drop_path_rate=0))
    wrapper = build(model, decay_rate=0.9)
    scheduler = LinearLR(wrapper, start_factor=0.1, end=4, by_epoch=False)
    x = torch.randn(2, 3, 32, 32)
    wrapper.update_params(model(x))
    scheduler.step()
    file = io.BytesIO()
    state = {"model": model.state_dict(), "optimizer": wrapper.state_dict()}
    torch.save({**state, "scheduler": scheduler.state_dict()}, file)
    wrapper.update_params(model(x))

    file.seek(0)
    state = torch.load(file, weights_only=True)
    again = Detector(MambaVision(tiny_arch, drop_path_rate=0))
    resumed = build(again, decay_rate=0.9)
    scheduler = LinearLR(resumed, start_factor=0.1, end=4, by_epoch=False)
    again.load_state_dict(state["model"])
    resumed.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    resumed.update_params(again(x))
    for name, p in model.state_dict().items():
        assert torch.equal(p, again.state_dict()[name]), name
    for old, new in zip(groups_of(wrapper), groups_of(resumed), strict=True):
        assert {k: v for k, v in old.items() if k != "params"} == {
            k: v for k, v in new.items() if k != "params"
        }


def test_one_table_is_logged(tiny_arch: dict[str, Any], logged: list[str]) -> None:
    model = Detector(MambaVision(tiny_arch, frozen_stages=0))
    build(model, decay_rate=0.9, norm_decay_mult=0.0)
    (message,) = logged
    title, head, *rows = message.splitlines()
    assert title == "Parameter groups:"
    assert head.split() == ["group", "lr", "weight", "decay", "tensors", "parameters"]
    assert rows[-2].split("  ")[0] == "layer 1, decay"
    assert rows[-2].split()[-4:] == ["0.005314", "0.05", "2", "4,608"]  # 0.9**6, 2·16·16·3·3
    assert rows[1].split()[-4:] == ["0.01", "0", "10", "488"]  # 2·(16+32+64+128+4)
    MMLogger.get_current_instance().info("and it speaks again")
    assert logged[-1] == "and it speaks again"


@pytest.mark.parametrize("rate", [0, -0.5, 1.5, float("nan"), "0.9", None])
def test_bad_rate(rate: Any, tiny_arch: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"decay_rate must be in \(0, 1\], got"):
        build(MambaVision(tiny_arch), decay_rate=rate)


def test_rate_needs_something_to_scale(tiny_arch: dict[str, Any]) -> None:
    cfg = {
        "constructor": "LayerDecayOptimWrapperConstructor",
        "optimizer": {"type": "AdamW"},
        "paramwise_cfg": {"decay_rate": 0.9},
    }
    with pytest.raises(ValueError, match=r"decay_rate needs optimizer\.lr"):
        build_optim_wrapper(MambaVision(tiny_arch), cfg)
    del cfg["paramwise_cfg"]
    decays = {g["name"]: g["weight_decay"] for g in groups_of(_build(tiny_arch, cfg))}
    assert decays == {"decay": 0.01, "no decay": 0.0}  # the optimizer's own, and none


def _build(arch: dict[str, Any], cfg: dict[str, Any]) -> OptimWrapper:
    return build_optim_wrapper(MambaVision(arch), cfg)


def test_other_backbones_are_merged_only() -> None:
    model = Detector(nn.Conv2d(3, 4, 3))
    with pytest.raises(ValueError, match=r"decay_rate=0\.9 needs a MambaVision in the model"):
        build(model, decay_rate=0.9)
    (group,) = groups_of(build(model))
    assert (group["name"], group["lr"], group["weight_decay"]) == ("decay", LR, DECAY)
    settings = settings_of(build(model, norm_decay_mult=0.0), model)
    assert {name for name, (_, d) in settings.items() if d == 0} == {"head.1.weight", "head.1.bias"}


@pytest.mark.parametrize("path", sorted(ROOT.glob("mm*_configs/*.py")), ids=lambda p: p.stem)
def test_every_config_has_it(path: Path) -> None:
    """Also those that replace the whole optim_wrapper of their base."""
    wrapper = Config.fromfile(path).optim_wrapper
    assert wrapper.constructor == "LayerDecayOptimWrapperConstructor"
    heads = {k: v for k, v in wrapper.paramwise_cfg.items() if k != "custom_keys"}
    assert heads == {"norm_decay_mult": 0.0, "bias_decay_mult": 0.0}


@pytest.mark.slow
@pytest.mark.openmmlab
@pytest.mark.parametrize("name", ["cascade_mambavision_t", "upernet_mambavision_t"])
def test_shipped_recipes_are_what_they_were(name: str) -> None:
    """Rate and decay of every parameter, against mmengine's constructor and explicit keys."""
    scope = "mmdet" if name.startswith("cascade") else "mmseg"
    registry = pytest.importorskip(f"{scope}.registry")
    utils = pytest.importorskip(f"{scope}.utils")
    utils.register_all_modules(init_default_scope=True)
    assert registry.OPTIM_WRAPPER_CONSTRUCTORS.get("LayerDecayOptimWrapperConstructor")
    cfg = Config.fromfile(ROOT / f"{scope}_configs" / f"{name}.py")
    with torch.device("meta"):
        model = registry.MODELS.build(cfg.model)
    shipped = {k: v for k, v in cfg.optim_wrapper.to_dict().items() if k != "loss_scale"}
    shipped["type"] = "OptimWrapper"  # the other is for GPUs
    assert shipped["constructor"] == "LayerDecayOptimWrapperConstructor"
    keys = {key: {"decay_mult": 0.0} for key in ("mixer.A_log", "mixer.D", "gamma")}
    explicit = {
        **shipped,
        "constructor": "DefaultOptimWrapperConstructor",
        "paramwise_cfg": {"norm_decay_mult": 0.0, "bias_decay_mult": 0.0, "custom_keys": keys},
    }
    ours, theirs = (build_optim_wrapper(model, options) for options in (shipped, explicit))
    assert settings_of(ours, model) == settings_of(theirs, model)
    assert len(settings_of(ours, model)) == len(list(model.parameters()))
    assert len(groups_of(theirs)) > 100 * len(groups_of(ours)) == 200
