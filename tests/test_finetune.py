"""docs/finetune.md as a user follows it: its configs and commands, on shapes with other names."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT, TINY_ARCH, saved
from tests.documents import DETECTION, SEGMENTATION, blocks, commands, make_place, run
from tests.hub import Hub, Served

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")

from mambavision_backbone import MambaVision
from mambavision_backbone.checkpoint import read_state_dict

DOCUMENT = (ROOT / "docs/finetune.md").read_text()
CONFIGS = [block for language, block in blocks(DOCUMENT) if language == "python"]
NAMES = ["bolt", "nut", "gear", "spring", "washer", "bracket"]
STAND_INS = {
    "work_dirs/my_detector/epoch_12.pth": "work_dirs/my_detector/epoch_1.pth",
    "work_dirs/my_segmenter/iter_8000.pth": "work_dirs/my_segmenter/iter_1.pth",
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A clone with the document's configs, and shapes called by its classes as data/mine."""
    bases = [
        "mmdet_configs/cascade_mambavision_t_fit.py",
        "mmseg_configs/upernet_mambavision_t_fit.py",
    ]
    place = tmp_path / "clone"
    place.mkdir()
    make_place(place, *bases)
    (place / "data/coco").rename(place / "data/mine")
    (place / "data/ade").rename(place / "data/mine_masks")
    for file in (place / "data/mine/annotations").iterdir():
        content = json.loads(file.read_text())
        for category, name in zip(content["categories"], NAMES, strict=True):
            category["name"] = name
        file.write_text(json.dumps(content))
    for name, text in zip(("my_detector.py", "my_segmenter.py"), CONFIGS, strict=True):
        assert f"`{name}`" in DOCUMENT
        (place / name).write_text(text)
    return place


def options(command: str) -> list[str]:
    if "my_detector" in command:
        return [option for option in DETECTION if "metainfo" not in option]
    return SEGMENTATION if "my_segmenter" in command else []


@pytest.mark.slow
@pytest.mark.openmmlab
def test_commands_in_order(place: Path, hub: Hub) -> None:
    torch.manual_seed(4)
    weights = MambaVision({**TINY_ARCH, "window_size": (8, 8, 14, 7)}).state_dict()
    published = {f"module.{k}": v for k, v in weights.items() if not k.startswith("outnorm")}
    content = saved({"state_dict": {**published, "module.head.bias": torch.ones(5)}})
    served = hub.files["nvidia/MambaVision-T-1K/mambavision_tiny_1k.pth.tar"] = Served(content)
    lines = commands(DOCUMENT)
    outputs = {
        line: run(line, place, STAND_INS, options(line))
        for line in lines
        if not line.startswith("python benchmarks")
    }
    assert len(outputs) == 10
    assert len(served.ranges) == 1, "fetched once, then taken from the cache"
    trained = [output for line, output in outputs.items() if "train.py" in line]
    assert all(re.search(r"layer 0, decay", output) for output in trained)
    state = read_state_dict(str(place / "work_dirs/my_detector/epoch_1.pth"))
    stem = state["backbone.patch_embed.conv_down.0.weight"]
    # one epoch at a hundredth of the rate: still the published weights, but for rounding
    assert torch.allclose(stem, weights["patch_embed.conv_down.0.weight"], atol=1e-3)
    predictions = json.loads((place / "out/predictions.json").read_text())
    assert predictions["classes"] == NAMES
    masks = json.loads((place / "out_masks/predictions.json").read_text())
    assert masks["classes"] == ["table", *NAMES]


def test_files_named_are_there() -> None:
    for name in re.findall(r"\]\(((?!http)[^)]+)\)", DOCUMENT):
        assert (ROOT / "docs" / name).is_file(), name
