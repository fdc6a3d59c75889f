"""Reading and stitching mmengine's scalars, and the figures made of them."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import cv2
import pytest

sys.path.append(str(Path(__file__).parents[2] / "tools"))
plot_logs: Any = importlib.import_module("plot_logs")
ToolError = importlib.import_module("common").ToolError


def write_run(folder: Path, steps: range, mark: float, text: str = "") -> Path:
    """A run that logs every step's loss and validates after every 20 steps, an epoch."""
    lines = []
    for step in steps:
        train = {"lr": 1e-4, "loss": mark, "s0.loss_cls": mark / 2, "s0.acc": 90.0, "time": 0.1}
        lines.append({**train, "epoch": (step - 1) // 20 + 1, "iter": step, "step": step})
        if step % 20 == 0:
            val = {"coco/bbox_mAP": mark, "coco/bbox_mAP_s": -1.0, "time": 0.1}
            lines.append({**val, "step": step // 20})
    file = folder / "vis_data" / "scalars.json"
    file.parent.mkdir(parents=True)
    file.write_text("\n".join(map(json.dumps, lines)) + text)
    return file


def test_reads_training_and_validation_apart(tmp_path: Path) -> None:
    scalars = plot_logs.read_scalars(write_run(tmp_path / "run", range(10, 41, 10), 0.5))
    assert [record["step"] for record in scalars.train] == [10, 20, 30, 40]
    assert [(record["step"], record["coco/bbox_mAP"]) for record in scalars.val] == [
        (1, 0.5),
        (2, 0.5),
    ]
    assert scalars.val_unit == "epoch"


@pytest.mark.parametrize("folder", ["", "run", "run/vis_data", "run/vis_data/scalars.json"])
def test_every_kind_of_path_reads_the_same(tmp_path: Path, folder: str) -> None:
    file = write_run(tmp_path / "run", range(10, 41, 10), 0.5)
    assert plot_logs.read_scalars(tmp_path / folder) == plot_logs.read_scalars(file)


def test_resumed_run_replaces_what_it_repeats(tmp_path: Path) -> None:
    write_run(tmp_path / "20250101_000000", range(10, 71, 10), 1.0)
    write_run(tmp_path / "20250102_000000", range(50, 101, 10), 2.0)
    scalars = plot_logs.read_scalars(tmp_path)
    assert [(r["step"], r["loss"]) for r in scalars.train] == [
        *[(step, 1.0) for step in range(10, 41, 10)],
        *[(step, 2.0) for step in range(50, 101, 10)],
    ]
    assert [(r["step"], r["coco/bbox_mAP"]) for r in scalars.val] == [
        (1, 1.0),
        (2, 1.0),
        (3, 2.0),
        (4, 2.0),
        (5, 2.0),
    ]


def test_newest_of_two_separate_runs_counts(tmp_path: Path) -> None:
    write_run(tmp_path / "20250101_000000", range(10, 71, 10), 1.0)
    write_run(tmp_path / "20250102_000000", range(10, 31, 10), 2.0)
    assert [r["loss"] for r in plot_logs.read_scalars(tmp_path).train] == [2.0, 2.0, 2.0]


def test_half_written_last_line_is_left_out(tmp_path: Path) -> None:
    file = write_run(tmp_path, range(10, 31, 10), 1.0, text='\n{"lr": 0.00')
    assert [r["step"] for r in plot_logs.read_scalars(file).train] == [10, 20, 30]


def test_figures_are_written(tmp_path: Path) -> None:
    write_run(tmp_path / "a/run", range(10, 71, 10), 1.0)
    write_run(tmp_path / "b/run", range(10, 71, 10), 2.0)
    runs = {name: plot_logs.read_scalars(tmp_path / name) for name in "ab"}
    files = plot_logs.plot(runs, tmp_path / "out", title="two runs", smooth=0.9)
    assert [file.name for file in files] == ["loss.png", "lr.png", "metrics.png"]
    for file in files:
        picture = cv2.imread(str(file))
        colors = {tuple(map(int, c)) for c in picture.reshape(-1, 3)}
        assert {(180, 119, 31), (14, 127, 255)} <= colors, file  # BGR of both runs' lines


def test_keys_choose(tmp_path: Path) -> None:
    runs = {"a": plot_logs.read_scalars(write_run(tmp_path / "run", range(10, 71, 10), 1.0))}
    files = plot_logs.plot(runs, tmp_path / "out", keys=["*bbox_mAP"])
    assert [file.name for file in files] == ["metrics.png"]
    with pytest.raises(ToolError, match=r"match mIoU \(there are: .*loss.*coco/bbox_mAP\)"):
        plot_logs.plot(runs, tmp_path / "out", keys=["mIoU"])


def test_running_mean() -> None:
    assert plot_logs.running_mean([2.0, 2.0, float("nan"), 2.0], 0.9) == pytest.approx([2.0] * 4)
    assert plot_logs.running_mean([0.0, 1.0], 0.5) == pytest.approx([0.0, 2 / 3])


def test_same_folder_names_are_told_apart() -> None:
    named = plot_logs.name_runs(["x/a", "y/a", "y/b", "z/c/vis_data"])
    assert named == {
        name: Path(path)
        for name, path in zip(
            ["x/a", "y/a", "b", "z"], ["x/a", "y/a", "y/b", "z/c/vis_data"], strict=True
        )
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "log '.*nothing' does not exist"),
        ("", "no scalars in '.*nothing'"),
        ("[1, 2]\n[3]\n", "scalars.json, line 1: not a record of scalars"),
    ],
    ids=["missing", "empty", "other-json"],
)
def test_nothing_to_plot_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None, message: str
) -> None:
    path = tmp_path / "nothing"
    if content is not None:
        (path / "vis_data").mkdir(parents=True)
        (path / "vis_data" / "scalars.json").write_text(content)
    monkeypatch.setattr(sys, "argv", ["plot_logs.py", str(path), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match=message):
        plot_logs.main()
    assert not (tmp_path / "out").exists()
