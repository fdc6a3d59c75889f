"""Counted parameters and FLOPs: against the published figures, by hand, and part by part."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mambavision_backbone import MambaVision
from tests.conftest import ROOT, TINY_ARCH

sys.path.append(str(ROOT / "tools"))
get_flops: Any = importlib.import_module("get_flops")

# GMACs; L3 at 512², the others at 224². Parameters (M) include a head of 1000 classes.
PUBLISHED = {
    "T": (4.4, 31.8),
    "T2": (5.1, 35.1),
    "S": (7.5, 50.1),
    "B": (15.0, 97.7),
    "L": (34.9, 227.9),
    "L2": (37.5, 241.5),
    "L3": (489.1, 739.6),
}


def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """Run the tool and read the JSON that it wrote."""
    file = tmp_path / "flops.json"
    monkeypatch.setattr(sys, "argv", ["get_flops.py", *arguments, "--json", str(file)])
    get_flops.main()
    return json.loads(file.read_text())


def meta_backbone(**kwargs: Any) -> MambaVision:
    with torch.device("meta"):
        return MambaVision(**kwargs).eval()


@pytest.mark.parametrize("arch", PUBLISHED)
def test_agrees_with_published(arch: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Published counts leave out attention's products and count the classifier."""
    count = run(monkeypatch, tmp_path, "--arch", arch)
    gmacs, params = PUBLISHED[arch]
    assert count["height_width"] == ([512, 512] if arch == "L3" else [224, 224])
    assert (count["flops"] - count["attention_flops"]) / 2e9 == pytest.approx(gmacs, rel=0.016)
    channels = meta_backbone(arch=arch).arch.channels
    classifier = 1001 * channels[-1] + 1000 + channels[-1] - 2 * sum(channels)
    # published figures are cut, not rounded
    assert (count["parameters"] + classifier) / 1e6 == pytest.approx(params, abs=0.07)


def test_scan_and_attention_by_hand() -> None:
    """One 8² map at stage 3 in one window of 8, one 4² map at stage 4 in one of 4."""
    backbone = meta_backbone(arch={**TINY_ARCH, "window_size": (8, 8, 8, 4)})
    count, maps = get_flops.count_backbone(backbone, (128, 128))
    lengths, channels = (64, 16), (64, 128)
    assert [tuple(m.shape[1:]) for m in maps[2:]] == [(64, 8, 8), (128, 4, 4)]
    assert count.attention == sum(
        4 * length**2 * dim for length, dim in zip(lengths, channels, strict=True)
    )
    assert count.scan == sum(
        length * dim // 2 * (9 * 8 + 1) for length, dim in zip(lengths, channels, strict=True)
    )


@pytest.mark.parametrize("out_indices", [(0, 1, 2, 3), (2,)], ids=str)
def test_parts_add_up(out_indices: tuple[int, ...]) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    backbone = meta_backbone(arch="T", out_indices=out_indices)
    count, _ = get_flops.count_backbone(backbone, (100, 180))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        backbone(torch.empty(1, 3, 100, 180, device="meta"))
    assert count.flops == counter.get_total_flops()
    assert count.params == sum(p.numel() for p in backbone.parameters())


def test_fitted_windows_cost_less(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = str(ROOT / "mmdet_configs" / "cascade_mambavision_t.py")
    arguments = (config, "--backbone-only", "--shape", "800", "1280")
    pad = run(monkeypatch, tmp_path, *arguments)
    fit = run(monkeypatch, tmp_path, *arguments, "--window-mode", "fit")
    assert pad["parameters"] == fit["parameters"]
    # 50 x 80 positions in one window of 112 x 112, then 25 x 40 in one of 56 x 56
    assert pad["scan_flops"] / fit["scan_flops"] > 3
    assert fit["attention_flops"] == 4 * (320 * 4 * 4000**2 + 640 * 2 * 1000**2)
    # the last block of a stage has as many queries as the map has positions
    third, fourth = (3 * 12544 + 4000) * 12544, (3136 + 1000) * 3136
    assert pad["attention_flops"] == 4 * (320 * third + 640 * fourth)


def test_detector(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = str(ROOT / "mmdet_configs" / "cascade_mambavision_t.py")
    count = run(monkeypatch, tmp_path, config, "--shape", "320", "512")
    parts = {part["name"]: part for part in count["parts"]}
    assert list(parts)[-8:] == [
        "neck",
        "rpn head",
        *[f"bbox head {i}, 1000 boxes" for i in (1, 2, 3)],
        *[f"mask head {i}, 100 boxes" for i in (1, 2, 3)],
    ]
    model = get_flops.build_model(get_flops.read_config(config))
    assert count["parameters"] == sum(p.numel() for p in model.parameters())
    conv, side = 2 * 9 * 256 * 256, 14
    mask = 100 * (4 * side**2 * conv + side**2 * 2 * 256 * 4 * 256 + (2 * side) ** 2 * 2 * 256 * 80)
    assert parts["mask head 1, 100 boxes"]["flops"] == mask
    assert count["flops"] == sum(part["flops"] for part in count["parts"])


def test_segmenter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = str(ROOT / "mmseg_configs" / "upernet_mambavision_t.py")
    count = run(monkeypatch, tmp_path, config, "--shape", "128", "128")
    assert [part["name"] for part in count["parts"][-2:]] == ["decode head", "auxiliary head"]
    assert count["parts"][-1]["flops"] is None  # for training only
    assert count["parts"][-2]["flops"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a config file or --arch"),
        (["x.py", "--arch", "T"], "give a config file or --arch"),
        (["--arch", "T", "--shape", "0", "5"], "0 is not positive"),
    ],
    ids=["neither", "both", "shape"],
)
def test_bad_arguments(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["get_flops.py", *arguments])
    with pytest.raises(SystemExit):
        get_flops.main()
    assert message in capsys.readouterr().err


def test_missing_config_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["get_flops.py", "nowhere.py"])
    with pytest.raises(SystemExit, match=r"config 'nowhere\.py' does not exist"):
        get_flops.main()
