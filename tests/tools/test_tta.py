"""Test-time augmentation and averaged weights: real runs of the tools on drawn shapes."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from tests.conftest import ROOT

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")

from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from tests.tools.test_train import (
    CONFIGS,
    checkpoint,
    options,
    roots,
    shapes,  # noqa: F401 (a fixture)
    tool,
)

IMAGES = {"mmdet": "val2017", "mmseg": "images/validation"}


@pytest.fixture
def mirrored(shapes: Path, tmp_path: Path) -> Path:  # noqa: F811
    """The shapes, whose second validation image is the first one's mirror image."""
    for scope, root in roots(shapes).items():
        copy = roots(tmp_path)[scope]
        shutil.copytree(root, copy)
        first, second, *_ = sorted((copy / IMAGES[scope]).iterdir())
        image = cv2.imread(str(first))
        for path, pixels in ((first, image), (second, image[:, ::-1])):
            path.unlink()  # it may be a hard link to the other layout's
            path.write_bytes(cv2.imencode(".png", pixels)[1].tobytes())  # nothing is lost
    return tmp_path


def save_random(scope: str, folder: Path) -> Path:
    """A checkpoint of the demo's model."""
    init_default_scope(scope)
    torch.manual_seed(0)
    model = MODELS.build(Config.fromfile(CONFIGS[scope]).model)
    if scope == "mmseg":  # to be sure of several classes
        torch.nn.init.normal_(model.decode_head.conv_seg.weight)
    torch.save({"state_dict": model.state_dict()}, folder / "random.pth")
    return folder / "random.pth"


@pytest.mark.slow
@pytest.mark.openmmlab
@pytest.mark.parametrize("scope", ["mmdet", "mmseg"])
def test_mirror_image_gets_mirrored_predictions(scope: str, mirrored: Path, tmp_path: Path) -> None:
    """The views of an image and of its mirror image are the same, so what is merged is too."""
    out = tmp_path / ("out.pkl" if scope == "mmdet" else "out")
    file = save_random(scope, tmp_path)
    common = [CONFIGS[scope], file, "--data-root", roots(mirrored)[scope]]
    common += ["--work-dir", tmp_path / "run"]
    done = tool("test.py", *common, "--tta", "--out", out, "--show-dir", tmp_path / "pictures")
    text = done.stdout + done.stderr
    assert done.returncode == 0, text[-4000:]
    assert {"mmdet": "coco/bbox_mAP", "mmseg": "mIoU"}[scope] in text
    if scope == "mmseg":
        first, second, other, _ = (cv2.imread(str(f), 0) for f in sorted(out.iterdir()))
        assert len(np.unique(first)) > 1
        assert np.mean(first == second[:, ::-1]) > 0.999  # sums in another order
        assert np.mean(first == other) < 0.99
        return
    assert "--tta: model.roi_head.mask_head=None" in text
    assert "--tta: test_evaluator.metric=bbox" in text
    assert "segm_mAP" not in text
    samples = pickle.loads(out.read_bytes())
    first, second, other, _ = (sample["pred_instances"] for sample in samples)
    assert set(first) == {"bboxes", "scores", "labels"}
    assert 10 < len(first["scores"]) == len(second["scores"]) <= 100
    torch.testing.assert_close(first["scores"], second["scores"])
    assert torch.equal(first["labels"], second["labels"])
    flipped = second["bboxes"][:, [2, 1, 0, 3]]
    flipped[:, ::2] = 128 - flipped[:, ::2]
    torch.testing.assert_close(first["bboxes"], flipped, rtol=0, atol=1e-3)
    assert first["bboxes"].shape != other["bboxes"].shape or not torch.allclose(
        first["bboxes"], other["bboxes"], atol=1.0
    )


def test_config_without_views_is_an_error(tmp_path: Path) -> None:
    config = tmp_path / "config.py"
    config.write_text(
        "default_scope = 'mmseg'\nmodel = dict()\ntest_dataloader = dict(dataset=dict())\n"
        "tta_pipeline = []\n"
    )
    (tmp_path / "x.pth").touch()
    done = tool("test.py", config, tmp_path / "x.pth", "--tta")
    assert done.returncode == 1
    assert "error: --tta needs tta_model in the config" in done.stderr


def test_fast_copies_are_not_augmented(tmp_path: Path) -> None:
    (tmp_path / "x.pth").touch()
    done = tool("test.py", CONFIGS["mmseg"], tmp_path / "x.pth", "--tta", "--fast")
    assert done.returncode == 1
    assert "error: --fast and --tta do not go together" in done.stderr


@pytest.mark.slow
def test_missing_heads_are_still_noticed(shapes: Path, tmp_path: Path) -> None:  # noqa: F811
    """Masks may be left over, boxes may not be missing."""
    file = save_random("mmdet", tmp_path)
    state = torch.load(file, weights_only=True)["state_dict"]
    del state["roi_head.bbox_head.1.fc_cls.bias"]
    torch.save({"state_dict": state}, file)
    common = [CONFIGS["mmdet"], file, "--data-root", shapes / "coco", "--work-dir", tmp_path]
    done = tool("test.py", *common, "--tta")
    assert done.returncode == 1
    assert "roi_head.bbox_head.1.fc_cls.bias: missing. Give the config" in done.stderr


@pytest.mark.parametrize("path", sorted(ROOT.glob("mm*_configs/*.py")), ids=lambda p: p.stem)
def test_every_config_has_its_views(path: Path) -> None:
    cfg = Config.fromfile(path)
    scales, flips, *_ = cfg.tta_pipeline[1].transforms
    assert [flip.prob for flip in flips] == [0.0, 1.0]
    tested = next(t.scale for t in cfg.test_dataloader.dataset.pipeline if t.type == "Resize")
    assert tuple(tested) in [tuple(view.scale) for view in scales]
    ratios = {round(view.scale[0] / view.scale[1], 2) for view in scales}
    assert ratios == {round(tested[0] / tested[1], 2)}


def ema_options(momentum: float) -> list[str]:
    """What the shipped configs with averaged weights set, with another momentum."""
    both = [
        Config.fromfile(ROOT / f"{name}_mambavision_t_fit_ema.py").default_hooks.ema
        for name in ("mmdet_configs/cascade", "mmseg_configs/upernet")
    ]
    assert both[0] == both[1]
    hook = {**both[0], "momentum": momentum}
    return [f"default_hooks.ema.{key}={value}" for key, value in hook.items()]


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=False)


@pytest.mark.slow
def test_averaged_weights_are_saved_and_resumed(shapes: Path, tmp_path: Path) -> None:  # noqa: F811
    """state_dict is the average, ema_state_dict what is trained; a resumed run has both."""
    common = [CONFIGS["mmseg"], "--data-root", shapes / "ade", "--work-dir", tmp_path]
    keep = [*ema_options(0.3), "default_hooks.checkpoint.max_keep_ckpts=9"]
    done = tool("train.py", *common, *options("mmseg", *keep, "train_cfg.max_iters=2"))
    assert done.returncode == 0, done.stderr[-3000:]
    more = options("mmseg", *keep, "train_cfg.max_iters=4")
    done = tool("train.py", *common, "--resume", *more)
    text = done.stdout + done.stderr
    assert done.returncode == 0, text[-3000:]
    assert "resumed epoch: 0, iter: 2" in text
    assert "There is no `ema_state_dict`" not in text

    states = [load(tmp_path / f"iter_{i}.pth") for i in (1, 2, 3, 4)]
    assert [s["ema_state_dict"]["steps"].item() for s in states] == [1, 2, 3, 4]
    for name in ("backbone.levels.2.blocks.0.mixer.A_log", "backbone.levels.0.blocks.0.norm1.bias"):
        trained = [s["ema_state_dict"][f"module.{name}"] for s in states]
        average = trained[0]
        for state, weight in zip(states, trained, strict=True):
            average = average.lerp(weight, 0.3)
            torch.testing.assert_close(state["state_dict"][name], average)
        assert not torch.equal(trained[-1], average)

    wrong = options("mmseg", *keep, "model.backbone.arch.dim=24")
    done = tool("train.py", *common, "--resume", checkpoint(tmp_path, "mmseg"), *wrong)
    assert done.returncode == 1
    assert "does not fit this backbone" in done.stderr
