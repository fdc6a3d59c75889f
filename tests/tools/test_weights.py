"""tools/weights.py as a user runs it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("mmengine")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import weights as tool

from mambavision_backbone import MambaVision
from mambavision_backbone.checkpoint import PUBLISHED, file_sha256, read_state_dict
from tests.conftest import published_keys
from tests.hub import COMMIT, Hub, Served


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["weights.py", *map(str, arguments)])
    tool.main()


@pytest.fixture
def detector(tiny_arch: dict[str, Any], tmp_path: Path) -> Path:
    state = {f"backbone.{k}": v for k, v in MambaVision(tiny_arch).state_dict().items()}
    content = {
        "meta": {
            "epoch": 12,
            "mmengine_version": "0.10.7",
            "dataset_meta": {"classes": ("a", "b")},
        },
        "state_dict": state | {"roi_head.x": torch.ones(2)},
        "optimizer": {},
    }
    torch.save(content, tmp_path / "detector.pth")
    return tmp_path / "detector.pth"


def test_list(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, "list")
    out = capsys.readouterr().out
    for name, file in PUBLISHED.items():
        assert f"{name} " in out
        assert f"{file.repo}/{file.file}" in out
    assert "CC-BY-NC-SA-4.0" in out


def test_get(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    torch.save({"state_dict": {"x": torch.ones(2)}}, tmp_path / "x.pth")
    content = (tmp_path / "x.pth").read_bytes()
    hub.files["nvidia/MambaVision-B-21K/mambavision_base_21k.pth.tar"] = Served(content)
    run(monkeypatch, "get", "b-21k")
    out = capsys.readouterr().out
    assert file_sha256(tmp_path / "x.pth") in out
    assert f"mambavision://b-21k@{COMMIT}" in out
    assert Path(out.splitlines()[0].removeprefix("path").strip()).read_bytes() == content


def test_inspect(
    detector: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "inspect", detector, "--tensors")
    out = capsys.readouterr().out
    assert "kind       detector" in out
    assert "arch       of no published variant" in out
    assert "epoch      12" in out
    assert "classes    2: a, b" in out
    assert "also holds optimizer" in out
    assert "backbone.patch_embed.conv_down.0.weight [8, 3, 3, 3] float32" in out


def test_inspect_says_which_variant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = published_keys()["T"]["keys"]
    weights = {f"module.{k}": torch.ones(s).half() for k, s in keys.items()}
    torch.save({"state_dict": weights}, tmp_path / "x.pth.tar")
    run(monkeypatch, "inspect", tmp_path / "x.pth.tar")
    out = capsys.readouterr().out
    assert "kind       classifier" in out
    assert "fits       arch='T'" in out
    assert "float16" in out
    assert "none: made anew when loaded" in out


def test_convert(detector: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "backbone.safetensors"
    run(monkeypatch, "convert", detector, out)
    expected = read_state_dict(str(detector))
    found = read_state_dict(str(out))
    assert len(found) == len(expected) - 1
    assert all(torch.equal(v, expected[f"backbone.{k}"]) for k, v in found.items())
    run(monkeypatch, "convert", out, tmp_path / "again.pth", "--layout", "detector")
    again = read_state_dict(str(tmp_path / "again.pth"))
    assert all(torch.equal(v, found[k.removeprefix("backbone.")]) for k, v in again.items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["get", "T-2K"], "no published weights 'T-2K': did you mean T-1K"),
        (["inspect", "none.pth"], "checkpoint 'none.pth' does not exist"),
        (["convert", "{detector}", "{detector}"], "OUT is IN"),
        (["convert", "{detector}", "x.bin"], r"must end in \.safetensors"),
        (["convert", "{other}", "x.pth"], "holds no MambaVision backbone"),
        (["convert", "{detector}", "x.pth", "--prefix", "teacher"], "under 'teacher'"),
    ],
)
def test_errors(
    arguments: list[str],
    message: str,
    detector: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"conv.weight": torch.ones(2)}, "other.pth")
    places = {"{detector}": str(detector), "{other}": "other.pth"}
    before = detector.read_bytes()
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, *(places.get(a, a) for a in arguments))
    assert detector.read_bytes() == before
