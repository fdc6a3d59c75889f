"""Cascade Mask R-CNN in bfloat16, which mmcv's RoIAlign cannot do by itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("mmdet")

from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.structures import InstanceData

from mambavision_backbone.engine import BFloat16DetectionHook
from tests.conftest import ROOT

SIZE = (96, 128)


class _Extractor(nn.Module):
    roi_layers = ()

    def forward(self, maps: tuple[torch.Tensor, ...], rois: torch.Tensor) -> list[torch.dtype]:
        return [x.dtype for x in (*maps, rois)]


class _Head(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        return [x], x

    def predict_by_feat(self) -> None: ...


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_only_bfloat16_is_cast(dtype: torch.dtype) -> None:
    extractor, head = model = nn.Sequential(_Extractor(), _Head())
    for _ in range(2):  # a runner that trains, then tests
        BFloat16DetectionHook().before_run(SimpleNamespace(model=model))
    assert len(extractor._forward_pre_hooks) == len(head._forward_hooks) == 1
    maps = tuple(torch.zeros(1, 4, n, n, dtype=dtype) for n in (4, 2))
    wanted = torch.float32 if dtype == torch.bfloat16 else dtype
    assert extractor(maps, torch.zeros(1, 5)) == [wanted, wanted, torch.float32]
    (first,), second = head(maps[0])
    assert first.dtype == second.dtype == wanted


def _sample() -> DetDataSample:
    boxes = torch.tensor([[10.0, 12.0, 60.0, 70.0], [50.0, 20.0, 120.0, 90.0]])
    masks = np.zeros((2, *SIZE), np.uint8)
    for mask, box in zip(masks, boxes.int().tolist(), strict=True):
        mask[box[1] : box[3], box[0] : box[2]] = 1
    shapes = dict.fromkeys(("img_shape", "ori_shape", "pad_shape", "batch_input_shape"), SIZE)
    sample = DetDataSample(metainfo={**shapes, "scale_factor": (1.0, 1.0)})
    sample.gt_instances = InstanceData(
        bboxes=boxes, labels=torch.tensor([0, 2]), masks=BitmapMasks(masks, *SIZE)
    )
    return sample


@pytest.mark.slow
@pytest.mark.openmmlab
def test_cascade_trains_and_predicts_in_bfloat16() -> None:
    """One step by the demo's config: finite losses near float32's, gradients everywhere."""
    register_all_modules()
    cfg: Any = Config.fromfile(ROOT / "mmdet_configs/cascade_mambavision_demo.py")
    assert any(hook.type == "BFloat16DetectionHook" for hook in cfg.custom_hooks)
    model = MODELS.build(cfg.model)
    images = torch.randn(1, 3, *SIZE)

    def total() -> torch.Tensor:
        torch.manual_seed(0)  # of the sampled RoIs
        losses = model.loss(images, [_sample()])
        return sum(
            part
            for name, value in losses.items()
            if "loss" in name
            for part in (value if isinstance(value, list) else [value])
        )

    exact = total()
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(RuntimeError, match="BFloat16"),
    ):
        total()
    BFloat16DetectionHook().before_run(SimpleNamespace(model=model))
    with torch.autocast("cpu", torch.bfloat16):
        loss = total()
        loss.backward()
    assert abs(loss.item() - exact.item()) < 0.1 * abs(exact.item())
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(g is not None and g.isfinite().all() for g in grads.values())
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        (found,) = model.predict(images, [_sample()])
    assert found.pred_instances.bboxes.isfinite().all()
