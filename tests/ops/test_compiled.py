"""Every kernel compiles for GPUs, also where there is none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")
@pytest.mark.skipif(
    tuple(int(n) for n in triton.__version__.split(".")[:2]) < (3, 3),
    reason="written for the compiler's interface of Triton 3.3 and newer",
)
@pytest.mark.parametrize("capability", [80, 90])
def test_all_kernels_compile(capability: int) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "tests.ops.compile_kernels", str(capability)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    compiled = {line.split()[0] for line in result.stdout.splitlines()}
    assert {"chunk_ends", "carry", "forward", "backward", "finish", "column_sum"} <= compiled
