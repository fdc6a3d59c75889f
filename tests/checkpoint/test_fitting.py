"""Which of a file's tensors belong to a backbone, and loading them."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mambavision_backbone import MambaVision
from mambavision_backbone.checkpoint import (
    WeightsError,
    backbone_weights,
    check_weights,
    fitting,
    guess_variant,
    load_pretrained,
)
from tests.conftest import ROOT, published_keys

LAYOUTS = ["plain", "state_dict", "model", "module", "detector", "safetensors", "training"]


@pytest.fixture
def source(tiny_arch: dict[str, Any]) -> MambaVision:
    torch.manual_seed(7)
    return MambaVision(tiny_arch)


def write(model: MambaVision, layout: str, folder: Path) -> str:
    """Save the weights as the published files, mmengine or a user would."""
    weights = dict(model.state_dict())
    classifier = {"norm.weight": torch.ones(128), "head.weight": torch.ones(10, 128)}
    published = {k: v for k, v in weights.items() if not k.startswith("outnorm")} | classifier
    file = folder / f"{layout}.pth"
    if layout == "safetensors":
        file = folder / "weights.safetensors"
        save_file(weights, str(file))
        return str(file)
    content: Any = {
        "plain": weights,
        "state_dict": {"state_dict": published, "epoch": 3},
        "model": {"model": published},
        "module": {"state_dict": {f"module.{k}": v for k, v in published.items()}},
        "detector": {
            "meta": {"seed": 3},
            "state_dict": {f"backbone.{k}": v for k, v in weights.items()}
            | {"neck.conv.weight": torch.ones(3)},
        },
        "training": {
            "state_dict": published,
            "args": argparse.Namespace(lr=0.1),
            "metric": np.float64(82.3),
            "history": np.zeros(3),
        },
    }[layout]
    torch.save(content, file)
    return str(file)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(
    source: MambaVision, tiny_arch: dict[str, Any], layout: str, tmp_path: Path
) -> None:
    torch.manual_seed(8)
    target = MambaVision(
        {**tiny_arch, "window_size": (8, 8, 3, 2)},  # windows may differ
        init_cfg=dict(type="Pretrained", checkpoint=write(source, layout, tmp_path)),
    )
    target.init_weights()
    expected = source.state_dict()
    for key, value in target.state_dict().items():
        assert torch.equal(value, expected[key]), key


def test_prefix_and_fewer_outputs(source: MambaVision, tiny_arch: Any, tmp_path: Path) -> None:
    file = tmp_path / "x.pth"
    torch.save({f"student.{k}": v for k, v in source.state_dict().items()}, file)
    target = MambaVision(tiny_arch, out_indices=(2,))
    load_pretrained(target, str(file), prefix="student")
    assert torch.equal(target.outnorm2.weight, source.outnorm2.weight)


def test_wrong_variant_is_named_with_its_first_tensors() -> None:
    with torch.device("meta"):
        model = MambaVision("T")
        other = {k: torch.empty(s) for k, s in published_keys()["S"]["keys"].items()}
    with pytest.raises(WeightsError) as caught:
        check_weights(model, backbone_weights(other), "small.pth")
    message = str(caught.value)
    assert "'small.pth' does not fit" in message
    assert "patch_embed.conv_down.0.weight: file (64, 3, 3, 3), network (32, 3, 3, 3)" in message
    assert "it looks like arch='S'" in message


@pytest.mark.parametrize("name", ["T", "T2", "S", "B", "L", "L2", "L3"])
def test_every_published_file_is_recognised(name: str) -> None:
    weights = {k: torch.empty(s, device="meta") for k, s in published_keys()[name]["keys"].items()}
    assert guess_variant(weights) == name


def test_nothing_is_loaded_when_something_does_not_fit(
    source: MambaVision, tiny_arch: Any, tmp_path: Path
) -> None:
    weights = dict(source.state_dict())
    weights["levels.2.blocks.0.mixer.extra"] = torch.ones(1)
    del weights["levels.3.blocks.1.mixer.qkv.bias"]
    file = tmp_path / "x.pth"
    torch.save(weights, file)
    torch.manual_seed(9)
    target = MambaVision(tiny_arch)
    before = {k: v.clone() for k, v in target.state_dict().items()}
    with pytest.raises(WeightsError, match=r"missing: levels.3.*qkv.bias(.|\n)*left over:.*extra"):
        load_pretrained(target, str(file))
    assert all(torch.equal(v, before[k]) for k, v in target.state_dict().items())


@pytest.mark.parametrize("spelling", ["mmengine.Pretrained", "PretrainedInit", "list", "mixed"])
def test_every_spelling_is_read_safely(
    spelling: str, source: MambaVision, tiny_arch: Any, tmp_path: Path
) -> None:
    file = write(source, "module", tmp_path)
    cfg: Any = dict(type=spelling, checkpoint=file)
    if spelling in ("list", "mixed"):
        cfg = [dict(type="Pretrained", checkpoint=file)]
    if spelling == "mixed":
        cfg.insert(0, dict(type="Kaiming", layer="Conv2d"))
    target = MambaVision(tiny_arch, init_cfg=cfg)
    target.init_weights()
    stem = "patch_embed.conv_down.0.weight"
    assert torch.equal(target.state_dict()[stem], source.state_dict()[stem])
    Path(file).write_bytes(b"no checkpoint")
    with pytest.raises(WeightsError, match="is not a checkpoint"):
        target.init_weights()


def test_half_a_feature_norm_is_missing(
    source: MambaVision, tiny_arch: Any, tmp_path: Path
) -> None:
    """All of it may be missing, as in classification files; a part is a damaged file."""
    weights = dict(source.state_dict())
    del weights["outnorm2.bias"]
    file = tmp_path / "x.pth"
    torch.save(weights, file)
    with pytest.raises(WeightsError, match=r"missing: outnorm2\.bias"):
        load_pretrained(MambaVision(tiny_arch), str(file))


@pytest.mark.parametrize("channels", [1, 2, 4, 6])
def test_other_channel_counts(
    source: MambaVision, tiny_arch: Any, channels: int, tmp_path: Path
) -> None:
    """Images whose channels are all equal give what such an RGB image gives."""
    file = write(source, "plain", tmp_path)
    target = MambaVision(tiny_arch, in_channels=channels).eval()
    load_pretrained(target, file)
    stem, own = (m.patch_embed.conv_down[0].weight for m in (source, target))
    if channels == 1:
        assert torch.allclose(own, stem.sum(1, keepdim=True))
    else:
        for i in range(channels):
            assert torch.allclose(own[:, i], stem[:, i % 3] * 3 / channels)
    if channels != 1 and channels % 3:
        return
    grey = torch.randn(1, 1, 40, 56)
    for a, b in zip(
        source.eval()(grey.expand(-1, 3, -1, -1)),
        target(grey.expand(-1, channels, -1, -1)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_channel_counts_are_converted_from_colour_only(tiny_arch: Any, tmp_path: Path) -> None:
    file = write(MambaVision(tiny_arch, in_channels=4), "plain", tmp_path)
    with pytest.raises(WeightsError, match=r"conv_down.0.weight: file \(8, 4, 3, 3\), network"):
        load_pretrained(MambaVision(tiny_arch), file)
    target = MambaVision(tiny_arch, in_channels=4)
    load_pretrained(target, file)  # as it is


def test_half_precision_and_large_files_in_parts(
    source: MambaVision, tiny_arch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "_PART", 10_000)
    file = tmp_path / "x.pth"
    torch.save(
        {k: v.half() if v.is_floating_point() else v for k, v in source.state_dict().items()}, file
    )
    torch.manual_seed(9)
    target = MambaVision(tiny_arch)
    load_pretrained(target, str(file))
    for key, value in target.state_dict().items():
        expected = source.state_dict()[key]
        assert value.dtype == expected.dtype
        assert torch.equal(value, expected.half().to(value.dtype)), key


LOAD = """
import json, os, resource, sys, time
from mambavision_backbone import MambaVision
resident = int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
arch, file = sys.argv[1:]
model = MambaVision(arch, init_cfg=dict(type="Pretrained", checkpoint=file))
start = time.perf_counter()
model.init_weights()
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps([seconds, (peak - resident) / os.path.getsize(file)]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("arch", ["T", "L3"])
def test_time_and_memory_of_published_files(arch: str, tmp_path: Path) -> None:
    """T within a second; L3 within 1.3 times its file, the network itself counted in."""
    if arch == "L3" and shutil.disk_usage(tmp_path).free < 5e9:
        pytest.skip("needs 5 GB of disk")
    file = tmp_path / "published.pth.tar"
    keys = published_keys()[arch]["keys"]
    weights = {f"module.{k}": torch.ones(s) if s else torch.tensor(1) for k, s in keys.items()}
    torch.save({"state_dict": weights}, file)
    del weights
    output = subprocess.run(
        [sys.executable, "-c", LOAD, arch, str(file)],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    ).stdout
    file.unlink()
    seconds, memory = json.loads(output)
    if arch == "T":
        assert seconds < 1
    else:
        assert memory < 1.3
