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
    "bias_act": ["forward"],
    "conv_silu": ["forward", "backward"],
    "layer_norm": ["forward", "backward", "map_forward", "map_backward"],
    "linear": ["column_sum"],
    "mlp": ["backward"],
    "selective_scan.triton": ["chunk_ends", "carry", "forward", "backward", "finish"],
}


@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")
@pytest.mark.parametrize("capability", [80, 90])
def test_all_kernels_compile(capability: int) -> None:
    result = subprocess.run(
        [sys.executable, SCRIPT, str(capability)],
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(SCRIPT.parents[2])},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    names = {f"{op}.kernels.{name}" for op, names in KERNELS.items() for name in names}
    assert set(result.stdout.split()) == names
