"""Fixtures that all tests share."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from tests.hub import Hub
from tests.hub import serve as serve_hub

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are first imported

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).parent / "golden"

TINY_ARCH = {
    "dim": 16,
    "in_dim": 8,
    "depths": (1, 1, 2, 2),
    "num_heads": (2, 2, 4, 4),
    "window_size": (8, 8, 5, 3),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests that need a GPU where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def tiny_arch() -> dict[str, Any]:
    """A network of the full structure, small enough for a CPU."""
    return dict(TINY_ARCH)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def read_golden(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a golden file."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        return {k: file.get_tensor(k) for k in file.keys()}, file.metadata()  # noqa: SIM118


def published_keys() -> dict[str, Any]:
    """Names, shapes and parameter counts of the published variants."""
    return json.loads((GOLDEN / "published_keys.json").read_text())


class Call:
    """Pickles to a call with any arguments, and optionally a state."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.parts = (function, arguments, state)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.parts


def saved(content: Any) -> bytes:
    """A checkpoint file's bytes."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def relative_error(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ / ‖b‖ in float64."""
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return ((a - b).norm() / b.norm().clamp_min(1e-30)).item()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that HF_ENDPOINT names, and empty caches."""
    from huggingface_hub import constants

    with serve_hub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))  # for other processes
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf/hub"))
        # small test files too are resumed in the middle
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
        yield server
