"""Checkpoints of strangers and published ones, given to the tools: nothing in them is executed."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT, Call, saved
from tests.hub import Hub, Served

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")

from mambavision_backbone.checkpoint import read_checkpoint
from tests.tools.test_train import (
    CONFIGS,
    options,
    run,
    shapes,  # noqa: F401 (a fixture)
    tool,
)

CONFIG = CONFIGS["mmseg"]
OPTIONS = options("mmseg")
TWO = "train_cfg.max_iters=2"


@pytest.fixture(scope="module")
def trained(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A folder with drawn shapes and the checkpoint of one iteration."""
    folder = tmp_path_factory.mktemp("safety")
    (folder / "data").symlink_to(shapes)
    data = ["--data-root", folder / "data/ade", "--work-dir", folder / "run"]
    done = tool("train.py", CONFIG, *data, *OPTIONS)
    assert done.returncode == 0, done.stderr
    return folder


def commands(folder: Path, file: Path | str, out: Path) -> dict[str, list[object]]:
    """Every way a tool reads a checkpoint."""
    data = ["--data-root", folder / "data/ade", "--work-dir", out / "run"]
    image = next((folder / "data/ade/images/validation").iterdir())
    tools = ROOT / "tools"
    return {
        "resume": [tools / "train.py", CONFIG, "--resume", file, *data, *OPTIONS, TWO],
        "load_from": [tools / "train.py", CONFIG, *data, *OPTIONS, f"load_from={file}"],
        "init_cfg": [
            *[tools / "train.py", CONFIG, *data, *OPTIONS],
            "model.backbone.init_cfg.type=Pretrained",
            f"model.backbone.init_cfg.checkpoint={file}",
        ],
        "test": [tools / "test.py", CONFIG, file, *data, *OPTIONS],
        "infer": [tools / "infer.py", CONFIG, file, image, "--out", out / "infer", *OPTIONS],
        "inspect": [tools / "weights.py", "inspect", file],
        "convert": [tools / "weights.py", "convert", file, out / "x.safetensors"],
        "features": [
            *[tools / "show_features.py", image, "--config", CONFIG, "--weights", file],
            *["--out", out / "features", *OPTIONS],
        ],
    }


IN_TURN = """
import json, runpy, sys
from pathlib import Path
for way, words in json.loads(sys.argv[1]).items():
    sys.argv = words
    sys.path[0] = str(Path(words[0]).parent)
    try:
        runpy.run_path(words[0], run_name="__main__")
        message = "finished"
    except SystemExit as ending:
        message = str(ending)
    print("ENDING", json.dumps([way, message]))
"""


def run_all(tools: dict[str, list[object]]) -> dict[str, str]:
    """Run the tools in one process, to save starting each; returns how each ended."""
    words = json.dumps({way: [str(c) for c in command] for way, command in tools.items()})
    done = run(sys.executable, "-c", IN_TURN, words)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("ENDING ")]
    return dict(json.loads(line.removeprefix("ENDING ")) for line in lines)


@pytest.mark.slow
@pytest.mark.openmmlab
def test_pickled_code(trained: Path, tmp_path: Path) -> None:
    marker, file = tmp_path / "marker", tmp_path / "evil.pth"
    content = dict(read_checkpoint(str(trained / "run/iter_1.pth")))
    torch.save({**content, "extra": Call(os.mkdir, str(marker))}, file)
    endings = run_all(commands(trained, file, tmp_path))
    assert len(endings) == 8
    for way, message in endings.items():
        assert "not a checkpoint of tensors and plain data" in message, way
    assert not marker.exists()


@pytest.mark.slow
@pytest.mark.openmmlab
def test_config_text(trained: Path, tmp_path: Path) -> None:
    """The tools do their work on the tensors and leave the text alone."""
    marker, file = tmp_path / "marker", tmp_path / "evil.pth"
    content = dict(read_checkpoint(str(trained / "run/iter_1.pth")))
    text = f"import os\nos.mkdir({str(marker)!r})\ngpu_ids = [0]"
    content["meta"] = {**content["meta"], "config": text, "cfg": text}
    torch.save(content, file)
    endings = run_all(commands(trained, file, tmp_path))
    assert len(endings) == 8
    assert endings == dict.fromkeys(endings, "finished")
    assert not marker.exists()


@pytest.mark.slow
def test_a_trusted_checkpoint_is_unpickled(trained: Path, tmp_path: Path) -> None:
    marker, file = tmp_path / "marker", tmp_path / "own.pth"
    content = dict(read_checkpoint(str(trained / "run/iter_1.pth")))
    torch.save({**content, "extra": Call(os.mkdir, str(marker))}, file)
    command = commands(trained, file, tmp_path)["resume"]
    done = run(sys.executable, *command[:2], "--trust-checkpoint", *command[2:])
    assert done.returncode == 0, done.stderr
    assert marker.exists(), "which shows that the file is what the other tests say"
    assert "is unpickled without limits" in done.stdout + done.stderr


@pytest.mark.slow
def test_another_runner_reads_no_checkpoint(trained: Path, tmp_path: Path) -> None:
    command = commands(trained, trained / "run/iter_1.pth", tmp_path)["resume"]
    done = run(sys.executable, *command, "runner_type=Runner")
    assert done.returncode == 1
    assert "runner_type='Runner' reads checkpoints without the safeguards" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("way", ["test", "infer"])
def test_published_segmenter_by_name(way: str, trained: Path, hub: Hub, tmp_path: Path) -> None:
    """By its name on the hub, without the ImageNet file that the config speaks of."""
    content = dict(read_checkpoint(str(trained / "run/iter_1.pth")))
    content["meta"] = {**content["meta"], "config": "raise SystemExit('executed')"}
    name = "mamba_vision_160k_ade20k-512x512_tiny"
    hub.files[f"nvidia/{name}/{name}.pth"] = Served(saved(content))
    command = commands(trained, "mambavision://upernet-T-160k-ADE20K", tmp_path)[way]
    missing = ["model.backbone.init_cfg.type=Pretrained", "model.backbone.init_cfg.checkpoint=none"]
    done = run(sys.executable, *command, *missing)
    assert done.returncode == 0, done.stdout + done.stderr
    if way == "test":
        assert "mIoU" in done.stdout + done.stderr
    else:
        assert list((tmp_path / "infer/labels").iterdir())
