"""Reading files that may be anything."""

from __future__ import annotations

import codecs
import logging
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mambavision_backbone.checkpoint import (
    WeightsError,
    read_checkpoint,
    read_state_dict,
    reading,
)
from tests.conftest import Call


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


def test_missing_file() -> None:
    with pytest.raises(FileNotFoundError, match=r"checkpoint 'no/such.pth' does not exist"):
        read_state_dict("no/such.pth")


def test_a_blocked_module_is_named(tmp_path: Path) -> None:
    torch.save({"x": Call(os.mkdir, str(tmp_path / "marker"))}, tmp_path / "evil.pth")
    with pytest.raises(WeightsError, match=r"tensors and plain data.*posix\.mkdir"):
        read_state_dict(str(tmp_path / "evil.pth"))
    assert not (tmp_path / "marker").exists()


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    file = tmp_path / "evil.pth"
    torch.save({"state_dict": {}, "x": Call(Path.touch, marker)}, file)
    with pytest.raises(WeightsError, match="not a checkpoint of tensors and plain data"):
        read_state_dict(str(file))
    assert not marker.exists()


@pytest.mark.parametrize("content", [b"", b"<html>", pickle.dumps([1, 2])], ids=str)
def test_other_files_are_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "x.pth"
    file.write_bytes(content)
    with pytest.raises(WeightsError, match=r"x\.pth"):
        read_state_dict(str(file))


@pytest.mark.parametrize("mmap", [False, True])
def test_truncated_file_is_refused(mmap: bool, tmp_path: Path) -> None:
    file = tmp_path / "x.pth"
    torch.save({"x": torch.ones(5000)}, file)
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(WeightsError, match="cannot be read"):
        read_state_dict(str(file), mmap)


def test_a_trusted_file_is_unpickled(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    marker, file = tmp_path / "marker", tmp_path / "own.pth"
    torch.save({"x": Call(Path.touch, marker)}, file)
    with caplog.at_level(logging.WARNING, "mambavision_backbone"):
        read_checkpoint(str(file), trust=True)
    assert marker.exists()
    assert "own.pth is unpickled without limits, as asked: code in it is executed" in caplog.text


@pytest.mark.parametrize(
    ("version", "named"),
    [
        ("2.4.1+cu121", ["CVE-2025-32434", "CVE-2026-24747"]),
        ("2.5.1", ["CVE-2025-32434", "CVE-2026-24747"]),
        ("2.9.1", ["CVE-2026-24747"]),
        ("2.10.0", []),
        ("2.11.0+cu130", []),
    ],
)
def test_old_torch_is_warned_of_once(
    version: str,
    named: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    file = tmp_path / "x.pth"
    torch.save({"x": torch.ones(1)}, file)
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(reading, "_warned", [False])
    for _ in range(2):
        read_state_dict(str(file))
    assert len(caplog.records) == bool(named)
    for cve in ("CVE-2025-32434", "CVE-2026-24747"):
        assert (cve in caplog.text) == (cve in named)


def test_admitted_classes_are_admitted_while_reading_only(tmp_path: Path) -> None:
    before = set(torch.serialization.get_safe_globals())
    file = tmp_path / "x.pth"
    torch.save({"best": np.float64(1), "x": torch.ones(1)}, file)
    read_state_dict(str(file))
    assert set(torch.serialization.get_safe_globals()) == before


ARRAY = np.zeros(1).__reduce__()[0]
SCALAR = np.float64(0).__reduce__()[0]
FOREIGN = b"A" * 8  # as an address


@pytest.mark.parametrize(
    "thing",
    [
        Call(np.ndarray, (1,), "O", FOREIGN),
        Call(np.ndarray, (1,), np.dtype("f8"), FOREIGN),
        Call(ARRAY, np.ndarray, (1,), b"O"),
        Call(ARRAY, np.ndarray, (0,), b"b", state=(1, (1,), np.dtype("O"), False, [object])),
        Call(ARRAY, np.ndarray, (0,), b"b", state=(1, (9,), np.dtype("f8"), False, FOREIGN)),
        Call(SCALAR, np.dtype("f8"), b"1234"),
        Call(np.dtype, "O8", False, True),
        Call(np.dtype, "f8,O8", False, True),
        Call(np.dtype, "f8", False, True, state=(3, "<", None, ("x",), {"x": 1}, 8, 8, 63)),
        np.array([Call(print, "x")], dtype=object),
        np.zeros(2, dtype="f8,i4"),
        Call(codecs.encode, "x", "bz2"),
    ],
    ids=[
        "object array over bytes",
        "array over bytes",
        "array of objects",
        "object state",
        "more elements than bytes",
        "short scalar",
        "object dtype",
        "structured dtype",
        "dtype with fields",
        "object array",
        "structured array",
        "other codec",
    ],
)
def test_numpys_constructors_take_plain_data_only(thing: Any, tmp_path: Path) -> None:
    file = tmp_path / "x.pth"
    torch.save({"state_dict": {}, "x": thing}, file)
    with pytest.raises(WeightsError, match=r"x\.pth"):
        read_checkpoint(str(file))


@pytest.mark.parametrize(
    "value",
    [
        np.arange(6, dtype="u1").reshape(2, 3),
        np.arange(6, dtype=">i2").reshape(3, 2).T,
        np.zeros((0, 3), "f4"),
        np.array(["a", "bcd"]),
        np.array([1 + 2j]),
        np.array([True, False]),
        np.float32(1.5),
        np.uint16(7),
        np.bool_(True),
        np.str_("text"),
    ],
    ids=lambda v: f"{v.dtype}",
)
def test_plain_numpy_comes_back(value: Any, tmp_path: Path) -> None:
    """As it was, and again when what was read is written."""
    file = tmp_path / "x.pth"
    for _ in range(2):
        torch.save({"x": value}, file)
        found = read_checkpoint(str(file))["x"]
        # numpy's reader turns bytes to the machine's order
        assert found.dtype == value.dtype.newbyteorder("=")
        assert np.array_equal(found, value)
        value = found
    trusted = torch.load(file, weights_only=False)["x"]
    assert type(trusted) in (np.ndarray, type(np.asarray(trusted)[()]))


def test_what_the_process_admits_elsewhere_is_not_admitted(tmp_path: Path) -> None:
    marker, file = tmp_path / "marker", tmp_path / "x.pth"
    torch.save({"x": Call(Path.touch, marker)}, file)
    before = torch.serialization.get_safe_globals()
    torch.serialization.add_safe_globals([Path.touch, type(marker), type(marker).__mro__[1]])
    try:
        with pytest.raises(WeightsError, match="not a checkpoint of tensors"):
            read_checkpoint(str(file))
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)
    assert not marker.exists()


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("content", [b"hello world", b"0\n", b"text\n" * 50], ids=repr)
def test_text_is_no_checkpoint(content: bytes, trust: bool, tmp_path: Path) -> None:
    file = tmp_path / "x.pth"
    file.write_bytes(content)
    with pytest.raises(WeightsError, match=r"x\.pth"):
        read_checkpoint(str(file), trust=trust)


@pytest.mark.parametrize("source", ["s3://a/b.pth", "open-mmlab://x", "torchvision://resnet50"])
def test_other_schemes_are_named(source: str) -> None:
    with pytest.raises(WeightsError, match="are not read safely here"):
        read_checkpoint(source)
