"""Compile every kernel that a small network starts, for a GPU that need not be there.

    python tests/ops/compile_kernels.py 80
    python tests/ops/compile_kernels.py 80 --shapes

The interpreter takes programs that the compiler refuses. Prints the name of each kernel compiled.
With ``--shapes`` nothing is compiled: prints each kernel with the number of times that images of
many shapes would have it compiled for the same dtypes and constants.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mambavision_backbone import MambaVision
from mambavision_backbone.inference import accelerate
from mambavision_backbone.ops import mix, triton_support
from mambavision_backbone.ops.row_sum import launch as row_sum
from mambavision_backbone.ops.selective_scan.triton import launch as scan

OPS = "mambavision_backbone.ops."
TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int64: "i64"}
VERSION = tuple(int(n) for n in triton.__version__.split(".")[:2])


class Compiler:
    """Stands for ``launch``: compiles what has not been compiled yet, and starts nothing."""

    def __init__(self, capability: int, only_count: bool) -> None:
        self.target = GPUTarget("cuda", capability, 32)
        self.only_count = only_count
        self.seen: set[Any] = set()

    def __call__(
        self,
        kernel: Any,
        _grid: tuple[int, int, int],
        tensors: Sequence[Any],
        numbers: Sequence[Any],
        constants: tuple[Any, ...],
        warps: int,
    ) -> None:
        args = [*tensors, *numbers]
        types = [type_of(arg) for arg in args]
        specialised = [not p.do_not_specialize for p in kernel.params[: len(args)]]
        pairs = list(zip(specialised, args, strict=True))
        aligned = tuple(known and divisible(arg) for known, arg in pairs)
        ones = tuple(known and type(arg) is int and arg == 1 for known, arg in pairs)
        name = f"{kernel.__module__.removeprefix(OPS)}.{kernel.__name__}"
        key = name, tuple(types), (aligned, ones), constants, warps
        if key in self.seen:
            return
        self.seen.add(key)
        if self.only_count:
            return
        source = source_of(kernel, types, aligned, constants)
        triton.compile(source, self.target, {"num_warps": warps})
        print(name, flush=True)  # noqa: T201


def type_of(arg: Any) -> str:
    """Triton's name of an argument's type; None is not used, whatever it is."""
    if isinstance(arg, Tensor):
        return "*" + TYPES[arg.dtype]
    return "fp32" if isinstance(arg, float) else "i32"


def divisible(arg: Any) -> bool:
    """Whether Triton compiles for a multiple of 16, or of 16 bytes: tensors begin at one."""
    if isinstance(arg, Tensor):
        return arg.storage_offset() * arg.element_size() % 16 == 0
    return isinstance(arg, int) and arg % 16 == 0


def source_of(
    kernel: Any, types: list[str], aligned: tuple[bool, ...], constants: tuple[Any, ...]
) -> ASTSource:
    """As the versions of Triton want it; before 3.3 nothing is known to be aligned."""
    names = kernel.arg_names
    first = len(types)
    if VERSION < (3, 2):
        return ASTSource(kernel, dict(enumerate(types)), dict(enumerate(constants, first)))
    signature = dict(zip(names, types, strict=False))
    if VERSION < (3, 3):
        return ASTSource(kernel, signature, dict(zip(names[first:], constants, strict=True)))
    signature |= dict.fromkeys(names[first:], "constexpr")
    values = {(i,): value for i, value in enumerate(constants, first)}
    attributes = {(i,): [["tt.divisibility", 16]] for i, known in enumerate(aligned) if known}
    return ASTSource(kernel, signature, values, attributes)


def stand_in(name: str, value: Any) -> None:
    """Take a value for what is in ``triton_support``, also where that has been imported."""
    original = getattr(triton_support, name)
    for module in list(sys.modules.values()):
        if getattr(module, name, None) is original:
            setattr(module, name, value)


def train_and_infer(model: MambaVision, *shape: int) -> None:
    """Both once."""
    x = torch.randn(shape)
    with torch.autocast("cpu", torch.bfloat16):
        sum(o.float().mean() for o in model.train()(x)).backward()  # type: ignore[attr-defined]
    with torch.no_grad():
        accelerate(model.eval(), torch.bfloat16)(x.bfloat16())


def main() -> None:
    """Train and infer; then scans of other sizes, or images of other shapes."""
    only_count = "--shapes" in sys.argv
    compiler = Compiler(int(sys.argv[1]), only_count)
    stand_in("launch", compiler)
    stand_in("fusible", lambda _: True)
    mix.choose_backend = lambda *_: "triton"  # type: ignore[attr-defined]
    scan.MIN_CHUNK = 8
    if only_count:
        arch = {"dim": 48, "in_dim": 16, "depths": (1, 1, 2, 2), "num_heads": (2, 2, 4, 4)}
        model = MambaVision(arch, drop_path_rate=0.3, window_mode="fit")
        train_and_infer(model, 2, 3, 64, 64)  # imports all
        for module in list(sys.modules.values()):
            if module.__name__.startswith(OPS) and hasattr(module, "PROGRAMS"):
                module.PROGRAMS = 16  # so that few rows are several tiles of a program
        for height in range(64, 257, 32):
            for width in range(height, 257, 32):
                train_and_infer(model, 2, 3, height, width)
        variants = Counter((key[:2], key[3:]) for key in compiler.seen)
        for ((name, _types), _others), count in variants.items():
            print(name, count)  # noqa: T201
        return
    train_and_infer(MambaVision("B", drop_path_rate=0.3, window_mode="fit"), 1, 3, 64, 64)

    for dim, dstate in ((5, 3), (32, 2), (32, 16)):
        tokens = [torch.randn(1, 48, n, dtype=torch.float16) for n in (dim, dim, dstate, dstate)]
        A = torch.randn(dim, dstate)
        parameters = scan.Parameters(A, torch.randn(dim), torch.randn(dim))
        for scan.FEW_CHUNKS in (1, 8):
            scan.scan(*tokens, parameters)
            scan.scan_backward(tokens[0], *tokens, parameters)

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        parts, total = torch.randn(3, 5), torch.randn(5, dtype=dtype)
        one = triton_support.Launch(
            row_sum.kernels.row_sum, (1, 1, 1), (3, 5), (row_sum.BLOCK_ROWS,), row_sum.WARPS
        )
        merged, tensors = row_sum.merge_launches([one, one], [(parts, total)] * 2)
        merged(*tensors)


if __name__ == "__main__":
    main()
