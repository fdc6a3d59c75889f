"""Every kernel compiles for GPUs, also where there is none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).resolve().with_name("compile_kernels.py")
KERNELS = {
    "batch_norm": ["statistics", "forward", "gradient_sums", "backward"],
    "bias_act": ["forward"],
    "conv_silu": ["forward", "backward"],
    "layer_norm": ["forward", "backward", "map_forward", "map_backward"],
    "linear": ["column_sum"],
    "mlp": ["backward"],
    "row_sum": ["row_sum", "eight_row_sums"],
    "selective_scan.triton": ["chunk_ends", "carry", "forward", "backward", "finish"],
}


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")


def output(*arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, SCRIPT, *arguments],
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(SCRIPT.parents[2])},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.mark.parametrize("capability", [80, 90])
def test_all_kernels_compile(capability: int) -> None:
    names = {f"{op}.kernels.{name}" for op, names in KERNELS.items() for name in names}
    assert set(output(str(capability)).split()) == names


def test_images_of_other_shapes_compile_next_to_nothing() -> None:
    """Or training on images of many sizes would stop for a second again and again.

    Maps lie in memory in two ways, in rows that are aligned or not; so are B and C in theirs.
    """
    limits = {
        f"selective_scan.triton.kernels.{name}": 2 for name in KERNELS["selective_scan.triton"]
    }
    limits["selective_scan.triton.kernels.finish"] = 4
    limits |= {f"layer_norm.kernels.map_{name}": 4 for name in ("forward", "backward")}
    counts = [line.split() for line in output("90", "--shapes").splitlines()]
    assert {name for name, _ in counts} >= {*limits} - {"selective_scan.triton.kernels.carry"}
    assert [name for name, count in counts if int(count) > limits.get(name, 1)] == []
