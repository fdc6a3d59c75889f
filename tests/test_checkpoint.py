"""Reading, checking and loading weights."""

from __future__ import annotations

import argparse
import http.server
import pickle
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mambavision_backbone import MambaVision
from mambavision_backbone.checkpoint import (
    WeightsError,
    guess_variant,
    load_pretrained,
    read_state_dict,
)
from tests.conftest import published_keys

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


@pytest.mark.parametrize("module", [b"numpy.core", b"numpy._core"])
def test_numbers_of_numpy_1_and_2(module: bytes, tmp_path: Path) -> None:
    """Files of either are read under either."""
    file = tmp_path / "x.pth"
    content = {"state_dict": {"x": torch.ones(2)}, "best": np.float64(1), "log": np.ones(3)}
    torch.save(content, file, _use_new_zipfile_serialization=False)
    data = file.read_bytes()
    own = b"numpy._core" if b"numpy._core" in data else b"numpy.core"
    assert own in data
    file.write_bytes(data.replace(own, module))
    assert read_state_dict(str(file))["x"].tolist() == [1, 1]


def test_prefix_and_fewer_outputs(source: MambaVision, tiny_arch: Any, tmp_path: Path) -> None:
    file = tmp_path / "x.pth"
    torch.save({f"student.{k}": v for k, v in source.state_dict().items()}, file)
    target = MambaVision(tiny_arch, out_indices=(2,))
    load_pretrained(target, str(file), prefix="student")
    assert torch.equal(target.outnorm2.weight, source.outnorm2.weight)


def test_missing_file() -> None:
    with pytest.raises(FileNotFoundError, match=r"checkpoint 'no/such.pth' does not exist"):
        read_state_dict("no/such.pth")


def test_wrong_variant_is_named_with_its_first_tensors() -> None:
    with torch.device("meta"):
        model = MambaVision("T")
        other = {k: torch.empty(s) for k, s in published_keys()["S"]["keys"].items()}
    from mambavision_backbone.checkpoint import backbone_weights, check_weights

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


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path(self.marker),))

    def __init__(self, marker: str) -> None:
        self.marker = marker


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    file = tmp_path / "evil.pth"
    torch.save({"state_dict": {}, "x": _Evil(str(marker))}, file)
    with pytest.raises(WeightsError, match="not a checkpoint of tensors and plain data"):
        read_state_dict(str(file))
    assert not marker.exists()


@pytest.mark.parametrize("content", [b"", b"<html>", pickle.dumps([1, 2])], ids=str)
def test_other_files_are_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "x.pth"
    file.write_bytes(content)
    with pytest.raises(WeightsError, match=r"x\.pth"):
        read_state_dict(str(file))


def test_truncated_file_is_refused(source: MambaVision, tmp_path: Path) -> None:
    file = Path(write(source, "plain", tmp_path))
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(WeightsError, match="cannot be read"):
        read_state_dict(str(file))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None: ...

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(Handler, directory=tmp_path)
    ) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def test_address(
    source: MambaVision, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    write(source, "module", tmp_path)
    weights: dict[str, Tensor] = read_state_dict(f"{server}/module.pth")
    assert "module.patch_embed.conv_down.0.weight" in weights
    write(source, "safetensors", tmp_path)
    assert read_state_dict(f"{server}/weights.safetensors").keys() == source.state_dict().keys()
    with pytest.raises(WeightsError, match=r"none\.pth cannot be fetched"):
        read_state_dict(f"{server}/none.pth")
    marker = tmp_path / "marker"
    torch.save({"x": _Evil(str(marker))}, tmp_path / "evil.pth")
    with pytest.raises(WeightsError, match="not a checkpoint of tensors and plain data"):
        read_state_dict(f"{server}/evil.pth")
    assert not marker.exists()
