"""Compile every kernel that a small network starts, for a GPU that need not be there.

    python -m tests.ops.compile_kernels 80

The interpreter takes programs that the compiler refuses. Prints a line for each kernel.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mambavision_backbone import MambaVision
from mambavision_backbone.inference import accelerate
from mambavision_backbone.ops import mix
from mambavision_backbone.ops.selective_scan.triton import launch as scan
from tests.conftest import TINY_ARCH

OPS = "mambavision_backbone.ops."
MODULES = ["bias_act", "cast", "conv_norm", "conv_silu", "layer_norm", "linear", "mix", "mlp"]
LAUNCHES = ["bias_act", "conv_silu", "layer_norm", "linear", "mlp", "selective_scan.triton"]
TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


class Compiler:
    """Stands for ``launch``: compiles what has not been compiled yet, and starts nothing."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)
        self.seen: set[Any] = set()

    def __call__(
        self,
        kernel: Any,
        _grid: tuple[int, int, int],
        args: Sequence[Any],
        constants: tuple[Any, ...],
        warps: int,
    ) -> None:
        types = [f"*{TYPES[a.dtype]}" if isinstance(a, Tensor) else "i32" for a in args]
        floats = [i for i, a in enumerate(args) if isinstance(a, float)]
        for i in floats:
            types[i] = "fp32"
        key = kernel.__name__, tuple(types), constants, warps
        if key in self.seen:
            return
        self.seen.add(key)
        names = kernel.arg_names
        signature = dict(zip(names, types + ["constexpr"] * len(constants), strict=True))
        values = {(len(args) + i,): value for i, value in enumerate(constants)}
        triton.compile(ASTSource(kernel, signature, values), self.target, {"num_warps": warps})
        print(*key, flush=True)  # noqa: T201


def main() -> None:
    """Train and infer."""
    compiler = Compiler(int(sys.argv[1]))
    for name in LAUNCHES:
        importlib.import_module(f"{OPS}{name}.launch").launch = compiler  # type: ignore[attr-defined]
    model = MambaVision({**TINY_ARCH, "layer_scale": 0.5}, drop_path_rate=0.3, window_mode="fit")
    for name in MODULES:
        importlib.import_module(OPS + name).fusible = lambda _: True  # type: ignore[attr-defined]
    mix.choose_backend = lambda *_: "triton"  # type: ignore[attr-defined]
    x = torch.randn(1, 3, 64, 64)
    sum(o.float().mean() for o in model(x)).backward()  # type: ignore[attr-defined]
    with torch.no_grad():
        accelerate(model.eval(), torch.bfloat16)(x.bfloat16())

    scan.MIN_CHUNK = 8
    tokens = [torch.randn(1, 40, n, dtype=torch.float16) for n in (5, 5, 3, 3)]
    parameters = scan.Parameters(torch.randn(5, 3), torch.randn(5), torch.randn(5))
    for scan.FEW_CHUNKS in (1, 8):
        scan.scan(*tokens, parameters)
        scan.scan_backward(tokens[0], *tokens, parameters)


if __name__ == "__main__":
    main()
