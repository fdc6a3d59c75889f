"""Writing weights, and reading them back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from mambavision_backbone import MambaVision
from mambavision_backbone.checkpoint import (
    WeightsError,
    load_pretrained,
    read_checkpoint,
    write_weights,
    writing,
)


@pytest.mark.parametrize("suffix", ["safetensors", "pth", "pth.tar"])
@pytest.mark.parametrize("layout", writing.LAYOUTS)
def test_round_trip_is_bit_identical(
    layout: str, suffix: str, tiny_arch: dict[str, Any], tmp_path: Path
) -> None:
    """Ours → a published layout → ours; classification files have no feature norms."""
    torch.manual_seed(5)
    source, target = MambaVision(tiny_arch), MambaVision(tiny_arch)
    for norm in (m for k, m in source.named_children() if k.startswith("outnorm")):
        torch.nn.init.normal_(norm.weight)
    file = tmp_path / f"x.{suffix}"
    write_weights(source.state_dict(), file, layout, {"arch": "none"})
    load_pretrained(target, str(file))
    own = target.state_dict()
    for key, value in source.state_dict().items():
        if layout == "classifier" and key.startswith("outnorm"):
            continue
        assert own[key].numpy().tobytes() == value.numpy().tobytes(), key


def test_layouts_have_the_published_names(tiny_arch: dict[str, Any], tmp_path: Path) -> None:
    weights = MambaVision(tiny_arch).state_dict()
    write_weights(weights, tmp_path / "c.pth.tar", "classifier")
    names = set(read_checkpoint(str(tmp_path / "c.pth.tar"))["state_dict"])
    assert names == {k for k in weights if not k.startswith("outnorm")}
    write_weights(weights, tmp_path / "d.pth", "detector", {"arch": "T"})
    content = read_checkpoint(str(tmp_path / "d.pth"))
    assert set(content["state_dict"]) == {f"backbone.{k}" for k in weights}
    assert content["meta"] == {"arch": "T"}
    write_weights(weights, tmp_path / "s.safetensors", meta={"arch": "T"})
    with safe_open(tmp_path / "s.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "arch": "T"}


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_failed_write_leaves_the_old_file(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / f"x.{suffix}"
    write_weights({"x": torch.ones(3)}, file)
    before = file.read_bytes()

    def full(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing.os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_weights({"x": torch.zeros(3)}, file)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_errors_name_what_is_valid(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"must end in \.safetensors"):
        write_weights({}, tmp_path / "x.bin")
    with pytest.raises(WeightsError, match="choose one of backbone, classifier, detector"):
        write_weights({}, tmp_path / "x.pth", "onnx")
