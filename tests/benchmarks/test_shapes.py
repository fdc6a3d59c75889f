"""What `make bench` runs, and how the benchmark of growth goes on; the GPU is stood in for."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from tests.conftest import ROOT

pytest.importorskip("matplotlib")
BENCHMARKS = ("common", "modes", "shapes")  # also names of other modules, of tools say


def test_make_bench_runs_what_there_is() -> None:
    make = ["make", "--dry-run", "bench"]
    done = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True)
    scripts = re.findall(r"benchmarks/\w+\.py", done.stdout)
    assert len(scripts) == 4
    assert all((ROOT / script).is_file() for script in scripts)


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark, of two networks at two sides and two numbers of images."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    for name in BENCHMARKS:
        monkeypatch.delitem(sys.modules, name, raising=False)
    import shapes

    monkeypatch.setattr(shapes, "GROWTH", ["A", "B"])
    monkeypatch.setattr(shapes, "SIDES", (256, 512))
    monkeypatch.setattr(shapes, "BATCHES", (1, 4))
    monkeypatch.setattr(shapes, "PASSES", {"training": lambda *_: {"graph": None}})
    monkeypatch.setattr(shapes, "build", lambda *_: nn.Linear(1, 1))
    yield shapes
    for name in BENCHMARKS:
        sys.modules.pop(name, None)


def test_growth_measures_what_is_missing(
    shapes: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    measured = []
    monkeypatch.setattr(shapes, "images", lambda *size: measured.append(size))
    monkeypatch.setattr(
        shapes, "timed", lambda *_: ({"median_s": 2.0, "peak_mib": 0.0, "graphs_mib": 0.0}, None)
    )
    done = [{"network": "A", "pass": "training", "batch": 1, "side": n} for n in (256, 512)]
    rows = shapes.growth(
        argparse.Namespace(dtype="float16"),
        tmp_path / "out.json",
        {"commit": "this", "growth": done},
    )
    assert measured == [(4, 512, 512), (1, 256, 256), (1, 512, 512), (4, 512, 512)]
    assert rows[:2] == done
    assert all(row["commit"] == "this" and row["median_s"] == 2 for row in rows[2:])
    assert json.loads((tmp_path / "out.json.part").read_text())["growth"] == rows


def test_shapes_of_the_recipe(shapes: Any) -> None:
    """Short sides of 480 to 800 and long ones up to 1333, padded to multiples of 32."""
    drawn = shapes.recipe_shapes(3000)
    assert len(drawn) == 3000
    assert drawn == shapes.recipe_shapes(3000)
    sides = {side for shape in drawn for side in shape}
    assert all(side % 32 == 0 for side in sides)
    assert max(sides) == 1344
    assert min(sides) == 480
    assert 200 < len(set(drawn)) < 600


def test_a_stopped_run_is_gone_on_with(
    shapes: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = {"device": "GPU", "dtype": "float16", "torch": "2", "timm": "1", "commit": "this"}
    out, parser = tmp_path / "out.json", argparse.ArgumentParser()
    assert shapes.held(out, facts, parser) == {}
    out.write_text(json.dumps(facts | {"commit": "old", "varying": [1], "growth": [2]}))
    assert shapes.held(out, facts, parser) == {"varying": [1], "growth": [2]}
    shapes.keep(out, facts | {"growth": [2, 3]})
    assert shapes.held(out, facts, parser) == {"varying": [1], "growth": [2, 3]}
    with pytest.raises(SystemExit):
        shapes.held(out, facts | {"dtype": "bfloat16"}, parser)
    assert "has dtype float16, this run bfloat16" in capsys.readouterr().err
