"""The hooks, alone; tests/tools/test_train.py has them in real runs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("mmengine")

from mmengine.dataset import BaseDataset, ConcatDataset, RepeatDataset
from torch import nn

from mambavision_backbone import MambaVision
from mambavision_backbone.checkpoint import WeightsError
from mambavision_backbone.engine import (
    CheckBackboneWeightsHook,
    FastInferenceHook,
    NameBadSampleHook,
)


def _runner(backbone: nn.Module) -> Any:
    model = nn.Module()
    model.backbone = backbone
    return SimpleNamespace(model=model, _load_from="some.pth")


def test_fitting_checkpoint_passes(tiny_arch: dict[str, Any]) -> None:
    backbone = MambaVision(tiny_arch)
    weights = {f"backbone.{k}": v for k, v in backbone.state_dict().items()}
    CheckBackboneWeightsHook().after_load_checkpoint(_runner(backbone), {"state_dict": weights})


def test_other_variant_stops(tiny_arch: dict[str, Any]) -> None:
    other = MambaVision({**tiny_arch, "dim": 24})
    weights = {f"backbone.{k}": v for k, v in other.state_dict().items()}
    with pytest.raises(WeightsError, match=r"'some.pth' does not fit(.|\n)*\(24, 8, 3, 3\)"):
        CheckBackboneWeightsHook().after_load_checkpoint(
            _runner(MambaVision(tiny_arch)), {"state_dict": weights}
        )


def test_classification_file_stops(tiny_arch: dict[str, Any]) -> None:
    """Nothing of it would be loaded, and the run would go on from random weights."""
    backbone = MambaVision(tiny_arch)
    with pytest.raises(WeightsError, match=r"'some.pth' holds no weights named backbone"):
        CheckBackboneWeightsHook().after_load_checkpoint(
            _runner(backbone), {"state_dict": backbone.state_dict()}
        )


def test_other_backbones_are_left_alone() -> None:
    CheckBackboneWeightsHook().after_load_checkpoint(
        _runner(nn.Conv2d(1, 1, 1)), {"state_dict": {"backbone.x": 1}}
    )


class _Data(BaseDataset):
    def load_data_list(self) -> list[dict[str, Any]]:
        return [{"img_path": f"{i}.jpg"} for i in range(3)]


def _fail_on_one(sample: dict[str, Any]) -> dict[str, Any]:
    if sample["img_path"] == "1.jpg":
        raise OSError("not an image")
    return sample


@pytest.mark.parametrize("wrap", ["plain", "repeat", "concat"])
def test_bad_sample_is_named(wrap: str) -> None:
    dataset: Any = _Data(pipeline=[_fail_on_one])
    if wrap == "repeat":
        dataset = RepeatDataset(dataset, 2)
    elif wrap == "concat":
        dataset = ConcatDataset([dataset, _Data(pipeline=[_fail_on_one])])
    runner = SimpleNamespace(train_dataloader=SimpleNamespace(dataset=dataset))
    hook = NameBadSampleHook()
    hook.before_train(runner)
    hook.before_train(runner)  # a second start does not wrap twice
    assert dataset[0]["img_path"] == "0.jpg"
    with pytest.raises(
        RuntimeError, match=r"sample 1\.jpg: OSError: not an image\. Replace"
    ) as info:
        dataset[1]
    assert str(info.value).count("cannot prepare") == 1


def test_fast_inference_takes_the_weights_of_the_moment(tiny_arch: dict[str, Any]) -> None:
    """Twice, with other weights: EMA's hook exchanges them before and after each test."""
    backbone = MambaVision(tiny_arch).eval()
    runner, hook = _runner(backbone), FastInferenceHook("float32")
    names = [name for name, _ in runner.model.named_parameters()]
    x = torch.randn(1, 3, 64, 64)
    for scale in (1.0, 0.5):
        backbone.patch_embed.conv_down[1].bias.data.fill_(scale)
        with torch.no_grad():
            wanted = backbone(x)
            hook.before_test_epoch(runner)
            got = backbone(x)
        for a, b in zip(got, wanted, strict=True):
            assert not torch.equal(a, b)  # folded
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert [name for name, _ in runner.model.named_parameters()] == names
        hook.after_test_epoch(runner)
        assert "forward" not in vars(backbone)
