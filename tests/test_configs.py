"""The shipped configs: they build, and they say what the published recipes say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("mmengine")

from mmengine.config import Config

from tests.conftest import ROOT

CONFIGS = sorted(ROOT.glob("mm*_configs/*.py"))
PUBLISHED_DETECTORS = [f"cascade_mambavision_{v}" for v in "tsb"]
PUBLISHED_SEGMENTERS = [f"upernet_mambavision_{v}" for v in ("t", "s", "b", "l3")]
CHANNELS = {"t": 80, "s": 96, "b": 128, "l3": 256}


def load(name: str) -> Config:
    folder = "mmseg_configs" if name.startswith("upernet") else "mmdet_configs"
    return Config.fromfile(ROOT / folder / f"{name}.py")


def build(cfg: Config) -> Any:
    if cfg.default_scope == "mmdet":
        registry = pytest.importorskip("mmdet.registry")
        from mmdet.utils import register_all_modules
    else:
        registry = pytest.importorskip("mmseg.registry")
        from mmseg.utils import register_all_modules
    register_all_modules(init_default_scope=True)
    with torch.device("meta"):
        return registry.MODELS.build(cfg.model)


def test_every_promised_config_is_there() -> None:
    names = {path.stem for path in CONFIGS}
    promised = PUBLISHED_DETECTORS + PUBLISHED_SEGMENTERS
    assert names >= {*promised, *(f"{n}_fit" for n in promised), "mask_rcnn_mambavision_t"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_config_is_self_contained_and_short(path: Path) -> None:
    cfg = Config.fromfile(path)
    assert cfg.default_scope == path.parent.name.removesuffix("_configs")
    assert cfg.custom_imports.imports == ["mambavision_backbone"]
    assert not [key for key in cfg if key.startswith("_")]
    assert not re.search(r"mm(det|seg)::", path.read_text())
    if "demo" not in path.stem:
        assert len(path.read_text().splitlines()) <= 20


@pytest.mark.slow
@pytest.mark.openmmlab
@pytest.mark.parametrize(
    "name", [p.stem for p in CONFIGS if not p.stem.endswith("_fit") or "_t_" in p.stem]
)
def test_config_builds(name: str) -> None:
    cfg = load(name)
    model = build(cfg)
    assert model.backbone.out_indices == (0, 1, 2, 3)


def test_fit_twins_differ_in_windows_and_graphs_alone() -> None:
    for name in PUBLISHED_DETECTORS + PUBLISHED_SEGMENTERS:
        published, fitted = load(name), load(f"{name}_fit")
        assert published.model.backbone.window_mode == "pad"
        assert "graphs" not in published.model.backbone
        assert fitted.model.backbone.window_mode == "fit"
        graphs = 256 if name in PUBLISHED_DETECTORS else 0 if "_l3" in name else 32
        assert fitted.model.backbone.pop("graphs", 0) == graphs
        fitted.model.backbone.window_mode = "pad"
        assert published.to_dict() == fitted.to_dict()


@pytest.mark.parametrize("variant", ["t", "s", "b"])
def test_published_detection_recipe(variant: str) -> None:
    cfg = load(f"cascade_mambavision_{variant}")
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.weight_decay) == ("AdamW", 0.05)
    assert optimizer.lr == (2e-4 if variant == "b" else 1e-4)
    assert cfg.optim_wrapper.type == "AmpOptimWrapper"
    assert cfg.train_cfg.max_epochs == 36
    warm_up, steps = cfg.param_scheduler
    assert (warm_up.start_factor, warm_up.end) == (0.001, 1000)
    assert (steps.milestones, steps.gamma, steps.end) == ([27, 33], 0.1, 36)
    assert cfg.train_dataloader.batch_size * 8 == cfg.auto_scale_lr.base_batch_size == 16
    assert cfg.model.backbone.window_size == (8, 8, 112, 56)
    assert cfg.model.backbone.drop_path_rate == 0.2
    assert cfg.model.neck.in_channels == [CHANNELS[variant] * 2**i for i in range(4)]
    assert cfg.model.data_preprocessor.pad_size_divisor == 32
    stds = [head.bbox_coder.target_stds for head in cfg.model.roi_head.bbox_head]
    assert stds == [[0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.033, 0.033, 0.067, 0.067]]
    for head in cfg.model.roi_head.bbox_head:
        assert (head.num_shared_convs, head.num_shared_fcs) == (4, 1)
        assert head.norm_cfg.type == "SyncBN"
        assert (head.reg_class_agnostic, head.reg_decoded_bbox) == (False, True)
        assert (head.loss_bbox.type, head.loss_bbox.loss_weight) == ("GIoULoss", 10.0)
    choice = cfg.train_dataloader.dataset.pipeline[3]
    plain, cropped = choice.transforms
    sides = [scale[0] for scale in plain[0].scales]
    assert (min(sides), max(sides), sides[1] - sides[0]) == (480, 800, 32)
    assert [scale[0] for scale in cropped[0].scales] == [400, 500, 600]
    assert cropped[1].crop_size == (384, 600)
    assert cfg.test_dataloader.dataset.pipeline[1].scale == (1333, 800)


@pytest.mark.parametrize("variant", ["t", "s", "b", "l3"])
def test_published_segmentation_recipe(variant: str) -> None:
    cfg = load(f"upernet_mambavision_{variant}")
    optimizer = cfg.optim_wrapper.optimizer
    assert optimizer.lr == {"t": 5e-5, "s": 6e-5, "b": 5e-5, "l3": 8e-5}[variant]
    assert optimizer.weight_decay == (0.05 if variant == "l3" else 0.01)
    assert cfg.optim_wrapper.type == ("OptimWrapper" if variant == "l3" else "AmpOptimWrapper")
    assert cfg.train_cfg.max_iters == 160000
    warm_up, decay = cfg.param_scheduler
    assert (warm_up.start_factor, warm_up.end) == (1e-6, 1500)
    assert (decay.type, decay.power, decay.eta_min, decay.end) == ("PolyLR", 1.0, 0.0, 160000)
    windows = (8, 8, 160, 56) if variant == "s" else (8, 8, 64, 32)
    assert cfg.model.backbone.window_size == windows
    assert cfg.model.backbone.drop_path_rate == 0.2
    head, auxiliary = cfg.model.decode_head, cfg.model.auxiliary_head
    assert (head.type, head.channels, head.pool_scales) == ("UPerHead", 512, (1, 2, 3, 6))
    assert head.in_channels == [CHANNELS[variant] * 2**i for i in range(4)]
    assert (auxiliary.in_index, auxiliary.loss_decode.loss_weight) == (2, 0.4)
    assert auxiliary.in_channels == CHANNELS[variant] * 4
    assert head.num_classes == auxiliary.num_classes == 150
    side = 640 if variant == "l3" else 512
    crops = [t for t in cfg.train_dataloader.dataset.pipeline if t.type == "RandomCrop"]
    assert crops[0].crop_size == cfg.model.data_preprocessor.size == (side, side)


def test_no_decay_groups() -> None:
    """Norms, biases, A_log, D and gammas of the backbone are not decayed, everything else is."""
    from mmengine.optim import build_optim_wrapper

    from mambavision_backbone import MambaVision

    cfg = load("cascade_mambavision_t")
    arch = dict(dim=16, in_dim=8, depths=(1, 1, 2, 2), num_heads=(2, 2, 4, 4), layer_scale=1e-5)
    model = torch.nn.Module()
    model.backbone = MambaVision(arch)
    settings = {k: v for k, v in cfg.optim_wrapper.to_dict().items() if k != "loss_scale"}
    wrapper = build_optim_wrapper(model, {**settings, "type": "OptimWrapper"})
    decay = {
        id(p): group["weight_decay"]
        for group in wrapper.optimizer.param_groups
        for p in group["params"]
    }
    for name, parameter in model.named_parameters():
        plain = parameter.dim() == 1 or name.endswith("A_log")
        assert decay[id(parameter)] == (0.0 if plain else 0.05), name
