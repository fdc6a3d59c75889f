"""The benchmark of whole models, at a tiny size: every row is filled, and the goals follow."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")


def run(tmp_path: Path, task: str, networks: list[str], rounds: int) -> dict[str, Any]:
    """Run it on the CPU and read what it wrote."""
    file = tmp_path / "times.json"
    words = [sys.executable, str(ROOT / "benchmarks/detector.py"), "--device", "cpu"]
    words += ["--size", "64", "64", "--batch", "1", "--warmup", "0", "--rounds", str(rounds)]
    words += ["--tasks", task, "--networks", *networks, "--out", str(file)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(f"  {name} " in done.stdout for name in networks)
    return json.loads(file.read_text())


@pytest.mark.slow
@pytest.mark.openmmlab
@pytest.mark.parametrize(
    ("task", "networks", "rounds"),
    [("detection", ["ResNet-50"], 1), ("segmentation", ["T fit", "Swin-T"], 2)],
    ids=["detection", "segmentation"],
)
def test_rows_and_goals(task: str, networks: list[str], rounds: int, tmp_path: Path) -> None:
    """One detector, whose heads take half a minute on a CPU; both networks of the other goal."""
    got = run(tmp_path, task, networks, rounds)
    rows = {(row["mode"], row["network"]): row for row in got["rows"]}
    assert list(rows) == [(mode, name) for mode in ("training", "inference") for name in networks]
    images = {"training": 1 if task == "detection" else 2, "inference": 1}
    for (mode, _), row in rows.items():
        assert row["task"] == task
        assert row["shape"] == [images[mode], 3, 64, 64]
        assert row["runs"] == rounds
        assert 0 < row["min_s"] <= row["median_s"] <= row["max_s"]
        assert "peak_mib" not in row  # of a GPU only
        if mode == "training":
            assert 1 < row["loss"] < 100
        elif task == "detection":
            assert 0 < row["detections"] <= 100
    if len(networks) == 1:
        assert got["goals"] == []
    else:
        (goal,) = got["goals"]
        assert (goal["task"], goal["network"], goal["over"]) == (task, *networks)
        ours, peer = (rows["training", name]["median_s"] for name in networks)
        assert goal["ratio"] == pytest.approx(ours / peer)
        assert goal["goal"] == 0.9
