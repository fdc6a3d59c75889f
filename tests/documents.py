"""Running the commands of the documents as they stand, on drawn shapes and a narrow network."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT

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
    *(f"tta_pipeline.1.transforms.0.{size}.scale=(128,128)" for size in range(3)),
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


def blocks(text: str) -> list[tuple[str, str]]:
    """Language and content of the code blocks of a document."""
    return re.findall(r"```(\w+)\n(.*?)```", text, re.DOTALL)


def commands(text: str) -> list[str]:
    """The command lines of a document, without comments."""
    lines = [
        line
        for language, block in blocks(text)
        if language == "bash"
        for line in block.replace("\\\n", " ").splitlines()
    ]
    return [line.split("  #")[0].strip() for line in lines if line.strip()]


def make_place(folder: Path, *configs: str) -> Path:
    """A folder like a clone whose data folder holds shapes; its configs have a narrow network."""
    (folder / "tools").symlink_to(ROOT / "tools")
    for config in configs:
        file = folder / config
        file.parent.mkdir(exist_ok=True)
        file.write_text(
            f"_base_ = {str(ROOT / config)!r}\n"
            "arch = dict(dim=16, in_dim=8, depths=(1, 1, 2, 2), num_heads=(2, 2, 4, 4))\n"
            "model = dict(backbone=dict(arch=dict(_delete_=True, **arch)))\n"
        )
    command = [sys.executable, "tools/make_shapes.py", "data", "--train", "4", "--val", "2"]
    subprocess.run([*command, "--size", "128"], cwd=folder, check=True)
    return folder


def run(command: str, place: Path, stand_ins: dict[str, str], options: list[str]) -> str:
    """Run a command with other words in place of some, and more settings; returns its output."""
    words = [stand_ins.get(word, word) for word in shlex.split(command)]
    words[0] = sys.executable if words[0] == "python" else words[0]
    if options:
        words += ["--cfg-options", *options]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, "PORT": "29641"}
    done = subprocess.run(
        words, cwd=place, env=env, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-3000:]}"
    return done.stdout + done.stderr
