"""Every command and every snippet of the README runs, and every file that it names is there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")

from mmengine.config import Config

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line.split("  #")[0].strip()
    for language, block in BLOCKS
    if language == "bash"
    for line in block.splitlines()
]
TOOLS = [c for c in COMMANDS if " tools/" in c]
# A narrow network, small images and one step, on the drawn shapes: the rest is as the README says.
CLASSES = "('circle','square','triangle','star','cross','ring')"
NARROW = [
    "train_dataloader.num_workers=0",
    "train_dataloader.persistent_workers=False",
    "default_hooks.logger.interval=1",
]
DETECTION = [
    *NARROW,
    "model.test_cfg.rpn.max_per_img=20",
    "model.train_cfg.rpn_proposal.max_per_img=20",
    *(f"model.train_cfg.rcnn.{stage}.sampler.num=16" for stage in range(3)),
    "model.neck.in_channels=[16,32,64,128]",
    "train_cfg.max_epochs=1",
    "model.backbone.window_size=(8,8,14,7)",
    *(
        f"{split}_dataloader.dataset.metainfo.classes={CLASSES}"
        for split in ("train", "val", "test")
    ),
    "train_dataloader.dataset.pipeline.3.prob=[1.0,0.0]",
    "train_dataloader.dataset.pipeline.3.transforms.0.0.scales=[(128,128)]",
    *(f"{split}_dataloader.dataset.pipeline.1.scale=(128,128)" for split in ("val", "test")),
]
SEGMENTATION = [
    *NARROW,
    "model.decode_head.in_channels=[16,32,64,128]",
    "model.auxiliary_head.in_channels=64",
    "model.data_preprocessor.size=(128,128)",
    "train_dataloader.dataset.pipeline.2.scale=(128,128)",
    "train_dataloader.dataset.pipeline.3.crop_size=(128,128)",
    "val_dataloader.dataset.pipeline.1.scale=(128,128)",
    "train_cfg.max_iters=1",
    "train_cfg.val_interval=1",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like a clone whose data folder holds shapes."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "tools").symlink_to(ROOT / "tools")
    for config in (
        "mmdet_configs/cascade_mambavision_t.py",
        "mmseg_configs/upernet_mambavision_t.py",
    ):
        file = folder / config
        file.parent.mkdir()
        file.write_text(
            f"_base_ = {str(ROOT / config)!r}\n"
            "arch = dict(dim=16, in_dim=8, depths=(1, 1, 2, 2), num_heads=(2, 2, 4, 4))\n"
            "model = dict(backbone=dict(arch=dict(_delete_=True, **arch)))\n"
        )
    command = [sys.executable, "tools/make_shapes.py", "data", "--train", "4", "--val", "2"]
    subprocess.run([*command, "--size", "128"], cwd=folder, check=True)
    return folder


def run(command: str, place: Path) -> str:
    words = shlex.split(command)
    words[0] = sys.executable if words[0] == "python" else words[0]
    if "dist_train.sh" in command:
        words[3] = "2"  # processes
    checkpoint = place / "work_dirs/cascade_mambavision_t/epoch_1.pth"
    stand_ins = {
        "CHECKPOINT": str(checkpoint),
        "IMAGES": "data/coco/val2017",
        "data/ade/ADEChallengeData2016": "data/ade",
    }
    words = [stand_ins.get(w, w) for w in words]
    if any("mmdet_configs" in w for w in words) and "get_flops" not in command:
        words += ["--cfg-options", *DETECTION]
    if any("mmseg_configs" in w for w in words):
        words += ["--cfg-options", *SEGMENTATION]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, "PORT": "29641"}
    done = subprocess.run(
        words, cwd=place, env=env, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-3000:]}"
    return done.stdout + done.stderr


def test_all_commands_are_known() -> None:
    """Those not run here are run by the tests of their own (and make test runs this one)."""
    rest = [c for c in COMMANDS if c and c not in TOOLS]
    assert [c.split()[:2] for c in rest] == [
        ["sudo", "apt-get"],
        ["make", "demo"],
        ["make", "test"],
        ["pip", "install"],
    ]
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^demo:", makefile, re.MULTILINE)
    assert re.search(r"^test:", makefile, re.MULTILINE)
    for package in ("g++", "python3-venv", "python3-dev"):
        assert package in rest[0]


@pytest.mark.slow
@pytest.mark.openmmlab
def test_tool_commands_in_order(place: Path) -> None:
    """From the data check to the curves, each command fed by those before it."""
    assert len(TOOLS) == 9
    for command in TOOLS:
        run(command, place)
    assert (place / "work_dirs/upernet_mambavision_t/iter_1.pth").exists()
    assert (place / "out/predictions.json").exists()
    assert (place / "plots/loss.png").exists()
    assert (place / "data/shapes/coco/annotations/instances_val2017.json").exists()


def test_python_snippets(tmp_path: Path) -> None:
    config, alone = (block for language, block in BLOCKS if language == "python")
    file = tmp_path / "config.py"
    file.write_text(f"_base_ = {str(ROOT / 'mmdet_configs/cascade_mambavision_s.py')!r}\n{config}")
    cfg = Config.fromfile(file)
    assert cfg.model.backbone.window_mode == "fit"
    assert cfg.model.neck.in_channels == [80, 160, 320, 640]
    from mambavision_backbone import MambaVision

    arguments = {k: v for k, v in cfg.model.backbone.to_dict().items() if k != "type"}
    with torch.device("meta"):
        MambaVision(**arguments)
    scope: dict[str, tuple[torch.Tensor, ...]] = {}
    exec(alone, scope)
    assert [m.shape[2] for m in scope["maps"]] == [56, 28, 14, 7]


def test_files_named_are_there() -> None:
    for name in re.findall(r"\]\(((?!http)[^)]+)\)", README):
        assert (ROOT / name).is_file(), name
    for name in re.findall(r"`((?:mmdet|mmseg)_configs/[\w.{},/]+\.py)`", README):
        head, variants, tail = re.match(r"([^{]*)(?:\{(.*)\})?(.*)", name).groups()  # type: ignore[union-attr]
        for variant in (variants or "").split(","):
            assert (ROOT / f"{head}{variant}{tail}").is_file(), name


def test_model_index() -> None:
    """Published results are marked so, and their configs exist."""
    import yaml

    index = yaml.safe_load((ROOT / "model-index.yml").read_text())
    assert len(index["Models"]) == 7
    for model in index["Models"]:
        assert (ROOT / model["Config"]).is_file()
        assert all(result["Source"] == "published" for result in model["Results"])
