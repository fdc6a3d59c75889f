"""Time the mixer's depthwise convolutions with SiLU against causal-conv1d's kernel.

    python benchmarks/conv_silu.py

causal-conv1d computes tokens t - 2 to t where the mixer wants t - 1 to t + 1: its output is ours
one token late, and one token, with a zero behind the last one, has to be computed beside. Its time
here leaves that out, and the copy that puts both branches side by side; the gradients of both are
put side by side, as ours are. Both read the same token-major tensor; errors ‖a − b‖ / ‖b‖ are
against float64. CUDA graphs leave the host out. Prints a table and writes a JSON file.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import RESULTS, commit, relative_error, write
from scan import CASES, SETS, time_graph, version
from torch import Tensor

from mambavision_backbone.ops.conv_silu import conv_silu

Inputs = list[Tensor]


def ours(xz: Tensor, conv_x: Tensor, conv_z: Tensor) -> list[Tensor]:
    """Both branches, (B, L, D) each."""
    return list(conv_silu(xz, conv_x, conv_z))


def causal(xz: Tensor, conv_x: Tensor, conv_z: Tensor) -> list[Tensor]:
    """Both branches, each one token late."""
    from causal_conv1d import causal_conv1d_fn

    branches = zip(xz.mT.chunk(2, 1), (conv_x, conv_z), strict=True)
    return [causal_conv1d_fn(x, w[:, 0], activation="silu").mT for x, w in branches]


def exact(xz: Tensor, conv_x: Tensor, conv_z: Tensor) -> list[Tensor]:
    """Both branches in float64."""
    branches = zip(xz.double().mT.chunk(2, 1), (conv_x, conv_z), strict=True)
    return [F.silu(F.conv1d(x, w.double(), padding=1, groups=len(w))).mT for x, w in branches]


def with_grads(run: Callable[..., list[Tensor]], inputs: Inputs, dys: Inputs) -> list[Tensor]:
    """Outputs and gradients."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    ys = run(*leaves)
    return [*ys, *torch.autograd.grad(ys, leaves, dys)]


def measure(shape: tuple[int, int, int], dtype: torch.dtype) -> dict[str, Any]:
    """Times and errors of one shape of the scan's."""
    batch, seqlen, dim = shape
    shapes = (batch, seqlen, 2 * dim), (dim, 1, 3), (dim, 1, 3)
    sets = [[torch.randn(s, device="cuda").to(dtype) for s in shapes] for _ in range(SETS)]
    dys = [torch.randn(batch, seqlen, dim, device="cuda").to(dtype) for _ in range(2)]
    wanted = exact(*sets[0])
    row: dict[str, Any] = {"shape": list(shape)}
    for name, run in (("triton", ours), ("causal_conv1d", causal)):
        try:
            got = run(*sets[0])
        except ImportError:
            continue
        if run is causal:
            got, wanted = [y[:, 1:] for y in got], [y[:, :-1] for y in wanted]
        row[f"{name}_error"] = relative_error(got, wanted)
        with torch.no_grad():
            row[f"{name}_forward_s"] = time_graph(lambda i, r=run: r(*sets[i]))
        row[f"{name}_forward+backward_s"] = time_graph(lambda i, r=run: with_grads(r, sets[i], dys))
    return row


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", default="float16", help="float32, float16 or bfloat16")
    parser.add_argument("--out", type=Path, help="JSON file (default: in benchmarks/results)")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(1, "this benchmark needs a CUDA device\n")
    rows = []
    print(f"{torch.cuda.get_device_name()}, {args.dtype}; times in µs")
    for case, shapes in CASES.items():
        for shape in shapes:
            row = {"case": case, **measure(shape, getattr(torch, args.dtype))}
            rows.append(row)
            times = "  ".join(
                f"{key.removesuffix('_s')} {1e6 * value:.1f}"
                for key, value in row.items()
                if key.endswith("_s")
            )
            print(f"{case:20}{'×'.join(map(str, shape)):16}{times}", flush=True)
    facts = {"device": torch.cuda.get_device_name(), "dtype": args.dtype, "commit": commit()}
    facts |= {"torch": torch.__version__, "causal_conv1d": version("causal_conv1d")}
    write(args.out or RESULTS / f"conv_silu_{args.dtype}.json", {**facts, "rows": rows})


if __name__ == "__main__":
    main()
