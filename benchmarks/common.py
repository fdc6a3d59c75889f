"""What the benchmarks share."""

from __future__ import annotations

import gc
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

RESULTS = Path(__file__).parent / "results"


def relative_error(got: Iterable[Tensor], wanted: Iterable[Tensor]) -> float:
    """The largest ‖a − b‖ / ‖b‖ of pairs of tensors; ``wanted`` is in float64."""
    pairs = zip(got, wanted, strict=True)
    return max(((g.double() - w).norm() / w.norm()).item() for g, w in pairs)


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median, least and most, as rows of results have them."""
    return {"median_s": statistics.median(seconds), "min_s": min(seconds), "max_s": max(seconds)}


def commit() -> str:
    """The commit that is measured, marked where files differ from it."""
    git = ["git", "-C", str(RESULTS), "describe", "--always", "--dirty"]
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()


def device_name(device: str) -> str:
    """Of the GPU or the processor that is measured."""
    gpu = torch.cuda.get_device_name(device) if device.startswith("cuda") else None
    return gpu or platform.processor() or platform.machine()


def graph_bytes() -> int:
    """What CUDA graphs keep for themselves on the GPU and PyTorch does not count as allocated."""
    segments = torch.cuda.memory_snapshot()
    own = [s for s in segments if tuple(s["segment_pool_id"]) != (0, 0)]
    return sum(s["total_size"] - s["allocated_size"] for s in own)


def free() -> None:
    """Give back what the last measurement left."""
    gc.collect()
    torch.cuda.empty_cache()


def read_logs(folder: Path) -> list[dict[str, Any]]:
    """All that a training has logged, oldest first; an interrupted one has several logs."""
    logs = sorted(folder.glob("*/vis_data/scalars.json"))
    return [json.loads(line) for log in logs for line in log.read_text().splitlines()]


def show(message: str) -> None:
    """One progress line on a terminal, nothing elsewhere."""
    if sys.stderr.isatty():
        print(f"\r\033[K{message}", end="", file=sys.stderr, flush=True)


def keep(out: Path, result: dict[str, Any]) -> Path:
    """Put what is measured so far beside a JSON file, for a run that is cut short."""
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(out.name + ".part")
    part.write_text(json.dumps(result, indent=1) + "\n")
    return part


def write(out: Path, result: dict[str, Any]) -> None:
    """Put a result into a JSON file."""
    keep(out, result).replace(out)
    print(f"written to {out}")
