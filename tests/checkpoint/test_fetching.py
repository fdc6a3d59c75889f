"""Published names and addresses, from a server on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mambavision_backbone import MambaVision
from mambavision_backbone.checkpoint import (
    PUBLISHED,
    WeightsError,
    file_sha256,
    find_published,
    local_file,
    read_state_dict,
)
from tests.conftest import ROOT, published_keys, read_golden, relative_error, saved
from tests.hub import COMMIT, Hub, Served

T = "nvidia/MambaVision-T-1K/mambavision_tiny_1k.pth.tar"
DETECTOR = "nvidia/cascade_mask_rcnn_mamba_vision_tiny_3x_coco/"
DETECTOR += "cascade_mask_rcnn_mamba_vision_tiny_3x_coco.pth"


def small() -> bytes:
    return saved({"state_dict": {"x": torch.arange(100_000.0)}})


def cached(folder: Path) -> list[Path]:
    """Everything in the caches but locks, tags and notes (.no_exist)."""
    files = [p for p in folder.rglob("*") if p.is_file() or p.is_symlink()]
    files = [p for p in files if ".no_exist" not in p.parts]
    return [
        p
        for p in files
        if p.suffix in (".pth", ".tar", ".partial", ".incomplete") or p.parent.name == "blobs"
    ]


def golden_content(layout: str) -> tuple[Any, str]:
    """A file in a published layout with the golden network's weights, and its place on the hub."""
    golden, _ = read_golden("small_windows")
    weights = {k.removeprefix("weight."): v for k, v in golden.items() if k.startswith("weight.")}
    width = weights["levels.3.blocks.0.norm1.weight"].shape[0]
    head = {"norm.weight": torch.ones(width), "head.weight": torch.ones(10, width)}
    plain = {k: v for k, v in weights.items() if not k.startswith("outnorm")} | head
    if layout == "state_dict":
        return {"state_dict": plain, "epoch": 300, "arch": "mamba_vision_T"}, T
    if layout == "model":
        return {"model": plain}, T
    if layout == "module":
        return {"state_dict": {f"module.{k}": v for k, v in plain.items()}}, T
    pytest.importorskip("mmengine")
    from mmengine.logging import MessageHub

    messages = MessageHub.get_instance("golden_content")
    messages.update_scalar("train/loss", 0.5)
    state = {f"backbone.{k}": v for k, v in weights.items()}
    content = {
        "meta": {"epoch": 36, "iter": 1, "config": "raise SystemExit('executed')", "seed": None},
        "state_dict": state | {"neck.lateral_convs.0.conv.weight": torch.ones(1)},
        "message_hub": messages.state_dict(),
    }
    return content, DETECTOR


@pytest.mark.parametrize("layout", ["state_dict", "model", "module", "detector"])
def test_published_layouts_give_the_golden_outputs(layout: str, hub: Hub) -> None:
    content, place = golden_content(layout)
    data = saved(content)
    hub.files[place] = Served(data, cut_at=len(data) // 3)
    golden, meta = read_golden("small_windows")
    name = "cascade-T-3x-COCO" if layout == "detector" else "T-1K"
    model = MambaVision(
        json.loads(meta["config"]),
        init_cfg=dict(type="Pretrained", checkpoint=f"mambavision://{name}"),
    ).eval()
    model.init_weights()
    resumed = hub.files[place].ranges
    start = len(data) // 3 // (1 << 16) * (1 << 16)
    assert resumed == [None, f"bytes={start}-"], "it went on where it was cut"
    if layout != "detector":  # classification files have no feature norms
        norms = {k[7:]: v for k, v in golden.items() if k.startswith("weight.outnorm")}
        model.load_state_dict(norms, strict=False)
    with torch.no_grad():
        outs = model(golden["input.0"])
    for i, out in enumerate(outs):
        assert relative_error(out, golden[f"output.0.{i}"]) < 1e-5
    model.init_weights()
    assert len(resumed) == 2, "a cached file is not asked for again"


def test_published_t_file(hub: Hub) -> None:
    """The published names and shapes of T, classifier and all."""
    keys = published_keys()["T"]["keys"]
    weights = {k: torch.randn(s) if s else torch.tensor(3) for k, s in keys.items()}
    hub.files[T] = Served(saved({"state_dict": {f"module.{k}": v for k, v in weights.items()}}))
    model = MambaVision("T", init_cfg=dict(type="Pretrained", checkpoint="mambavision://t-1k"))
    model.init_weights()
    own = model.state_dict()
    for name, value in weights.items():
        if not name.startswith(("norm.", "head.")):
            assert torch.equal(own[name], value), name
    assert torch.equal(own["outnorm3.weight"], torch.ones(640))


@pytest.mark.parametrize("source", ["mambavision://T-1K", "address"])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("wrong digest", "is not the file it should be: its SHA-256 is"),
        ("truncated", "cannot be fetched"),
        ("HTML", "HTML page"),
        ("absent", "cannot be fetched.*(404|not found|Not Found)"),
        ("no network", "cannot be fetched"),
    ],
)
def test_faults_leave_nothing_in_the_cache(
    source: str,
    fault: str,
    message: str,
    hub: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)  # the hub's library waits between its tries
    wrong = "0" * 64
    file = Served(small())
    if fault == "wrong digest":
        file.sha256 = wrong
    elif fault == "truncated":
        file.short_by = 1000
    elif fault == "HTML":
        page = b"<!DOCTYPE html><title>Sign in</title>"
        file = Served(page, sha256="abc", type="text/html")
    place = T if source.startswith("mambavision") else "files/model.pth"
    if fault != "absent":
        hub.files[place] = file
    if source == "address":
        source = f"{hub.address}/{place}" + (f"#sha256={wrong}" if fault == "wrong digest" else "")
    if fault == "no network":
        hub.shutdown()
        hub.server_close()
    with pytest.raises(WeightsError, match=message) as caught:
        local_file(source)
    assert source.partition("#")[0] in str(caught.value)
    assert cached(tmp_path) == []


def test_a_damaged_cache_is_noticed(hub: Hub, tmp_path: Path) -> None:
    hub.files[T] = Served(small())
    path = Path(local_file("mambavision://T-1K"))
    blob = path.resolve()
    blob.write_bytes(b"x" + blob.read_bytes()[1:])
    with pytest.raises(WeightsError, match="SHA-256"):
        local_file("mambavision://T-1K")
    assert cached(tmp_path) == []
    assert file_sha256(local_file("mambavision://T-1K")) == file_sha256(path)


def test_revision(hub: Hub) -> None:
    hub.files[T] = Served(small())
    path = Path(local_file(f"mambavision://T-1K@{COMMIT}"))
    assert path.parent.name == COMMIT
    hub.files.clear()
    assert local_file(f"mambavision://T-1K@{COMMIT}") == str(path)


def test_addresses_with_one_file_name_are_told_apart(hub: Hub) -> None:
    for number in (1, 2):
        content = saved({"x": torch.tensor([float(number)])})
        hub.files[f"run{number}/model.pth"] = Served(content, cut_at=len(content) // 2)
    for number in (1, 2):
        found = read_state_dict(f"{hub.address}/run{number}/model.pth")
        assert found["x"].item() == number
    first = hub.files["run1/model.pth"]
    digest = file_sha256(local_file(f"{hub.address}/run1/model.pth"))
    assert local_file(f"{hub.address}/run1/model.pth#sha256={digest}")
    assert len(first.ranges) == 2, "cut once, then taken from the cache"
    path = Path(local_file(f"{hub.address}/run1/model.pth"))
    path.write_bytes(path.read_bytes()[:-9] + b"something")
    with pytest.raises(WeightsError, match="SHA-256"):
        local_file(f"{hub.address}/run1/model.pth#sha256={digest}")
    local_file(f"{hub.address}/run1/model.pth#sha256={digest}")  # fetched again
    with pytest.raises(WeightsError, match="64 hexadecimal digits"):
        local_file(f"{hub.address}/run1/model.pth#sha256=12")


def test_names() -> None:
    assert len(PUBLISHED) == 18
    assert find_published("mambavision://l3-512-21k")[0] == "L3-512-21K"
    assert find_published("mambavision://T-1K@abc")[2] == "abc"
    with pytest.raises(WeightsError, match=r"no published weights 'T-2K': did you mean T-1K"):
        find_published("mambavision://T-2K")
    with pytest.raises(WeightsError, match="choose one of T-1K, T2-1K"):
        find_published("mambavision://resnet50")


def test_configs_of_published_detectors_exist() -> None:
    for file in PUBLISHED.values():
        assert file.config is None or (ROOT / file.config).is_file()


@pytest.mark.slow
def test_environment_variables(hub: Hub, tmp_path: Path) -> None:
    """A new process finds the mirror and the cache, and stays offline when told to."""
    hub.files[T] = Served(small())

    def get(**env: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "tools/weights.py"), "get", "T-1K"]
        environment = {**os.environ, "HF_HUB_DISABLE_TELEMETRY": "1", **env}
        return subprocess.run(
            command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
        )

    offline = get(HF_HUB_OFFLINE="1")
    assert offline.returncode == 1
    assert "mambavision://T-1K cannot be fetched" in offline.stderr
    assert "Traceback" not in offline.stderr
    fetched = get(TQDM_POSITION="-1")  # shows the bar although stderr is no terminal
    assert fetched.returncode == 0, fetched.stderr
    assert "100%" in fetched.stderr, "progress is shown"
    assert f"pinned  mambavision://T-1K@{COMMIT}" in fetched.stdout
    assert str(tmp_path / "hf/hub") in fetched.stdout
    asked = len(hub.files[T].ranges)
    assert get(HF_HUB_OFFLINE="1").stdout == fetched.stdout
    assert len(hub.files[T].ranges) == asked
