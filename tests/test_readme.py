"""Every command and every snippet of the README runs, and every file that it names is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT
from tests.documents import DETECTION, SEGMENTATION, blocks, commands, make_place, run

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")

from mmengine.config import Config

README = (ROOT / "README.md").read_text()
COMMANDS = commands(README)
TOOLS = [c for c in COMMANDS if " tools/" in c]
STAND_INS = {
    "CHECKPOINT": "work_dirs/cascade_mambavision_t/epoch_1.pth",
    "IMAGES": "data/coco/val2017",
    "data/ade/ADEChallengeData2016": "data/ade",
    "8": "2",  # processes
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(
        tmp_path_factory.mktemp("clone"),
        "mmdet_configs/cascade_mambavision_t.py",
        "mmseg_configs/upernet_mambavision_t.py",
    )


def options(command: str) -> list[str]:
    if "get_flops" in command:
        return []
    if "mmdet_configs" in command:
        return DETECTION
    return SEGMENTATION if "mmseg_configs" in command else []


def test_all_commands_are_known() -> None:
    """Those not run here are run by the tests of their own (and make test runs this one)."""
    rest = [c for c in COMMANDS if c not in TOOLS]
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
    assert len(TOOLS) == 11
    image = next((place / "data/coco/val2017").iterdir())
    for command in TOOLS:
        run(command, place, {**STAND_INS, "IMAGE": str(image)}, options(command))
    assert (place / "work_dirs/upernet_mambavision_t/iter_1.pth").exists()
    assert (place / "out/predictions.json").exists()
    assert (place / "plots/loss.png").exists()
    assert (place / "data/shapes/coco/annotations/instances_val2017.json").exists()


def test_python_snippets(tmp_path: Path) -> None:
    config, alone = (block for language, block in blocks(README) if language == "python")
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
