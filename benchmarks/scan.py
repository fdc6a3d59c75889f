"""Time the scan's GPU backends at every shape that the published recipes meet.

    python benchmarks/scan.py
    python benchmarks/scan.py --dtype float32 --cases detection

Each backend gets its inputs in its own layout, contiguous, so that no copy is counted; mamba-ssm
also by ``backend="mamba_ssm"`` ("copying"), from the tensors that the Triton kernels get: (batch,
L, channels), as projections leave and want them, where it copies them to (batch, channels, L) and
its output back. Goals are for the first of the two. Calls over several sets of inputs are captured
in a CUDA graph, which leaves the host out; the median over the replays is reported, with the error
‖a − b‖ / ‖b‖ of the output and the worst gradient against float64, and the same for plain PyTorch
operators in the same dtype. The floor is the time to read the inputs and write the outputs once at
this GPU's copy speed. Writes a JSON file, prints a table.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, commit, relative_error, write
from torch import Tensor

from mambavision_backbone.ops.selective_scan import selective_scan

DSTATE = 8
CASES = {  # MambaVision-T's stages 3 and 4: (batch · windows, tokens of a window, channels)
    "detection, fit": [(2, 4200, 160), (2, 1050, 320)],
    "detection, pad": [(1, 12544, 160), (2, 12544, 160), (2, 3136, 320)],
    "segmentation, fit": [(16, 1024, 160), (16, 256, 320)],
    "segmentation, pad": [(1, 4096, 160), (16, 4096, 160), (16, 1024, 320)],
    "classification": [(128, 196, 160), (128, 49, 320)],
}
GOALS = {"forward": 0.6, "forward+backward": 0.7}  # of mamba-ssm's time
FLOOR_GOAL, FLOOR_FROM = 4.0, 4096  # times the floor, for at least so many tokens
CALLS, REPLAYS, SETS = 12, 25, 4

Inputs = list[Tensor]


def make_inputs(shape: tuple[int, int, int], dtype: torch.dtype, seed: int) -> Inputs:
    """Inputs as the mixer makes them: u, dt, A, B, C, D, dt_bias."""
    batch, seqlen, dim = shape
    generator = torch.Generator("cuda").manual_seed(seed)

    def rand(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device="cuda")

    tokens = [rand(batch, seqlen, n).to(dtype) for n in (dim, dim, DSTATE, DSTATE)]
    A = -torch.arange(1.0, DSTATE + 1, device="cuda").expand(dim, -1) * (1 + 0.1 * rand(dim, 1))
    return [tokens[0], tokens[1] - 3, A.contiguous(), *tokens[2:], rand(dim), rand(dim)]


def ours(backend: str) -> Callable[[Inputs], Tensor]:
    """One of this package's backends."""
    return lambda inputs: selective_scan(*inputs, backend=backend)


def mamba_ssm(inputs: Inputs) -> Tensor:
    """mamba-ssm's own function on channel-major inputs."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    u, dt, A, B, C, D, bias = inputs
    return selective_scan_fn(u, dt, A, B, C, D=D, delta_bias=bias, delta_softplus=True)


def channel_major(inputs: Inputs) -> Inputs:
    """(batch, L, C) → (batch, C, L) of the four token tensors."""
    return [x.transpose(1, 2).contiguous() if x.dim() == 3 else x for x in inputs]


def with_grads(run: Callable[[Inputs], Tensor], inputs: Inputs, dy: Tensor) -> list[Tensor]:
    """The output and all gradients."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = run(leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def time_graph(call: Callable[[int], Any]) -> float:
    """Median seconds of one call; ``call(i)`` works on the i-th set of inputs."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(SETS):
            call(i)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(CALLS):
            call(i % SETS)
    times = []
    for _ in range(REPLAYS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / 1e3 / CALLS)
    return statistics.median(times[3:])


def copy_speed() -> float:
    """Bytes a second of a large copy, counting those read and those written."""
    x = torch.randn(2**28, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.nbytes / time_graph(lambda _: y.copy_(x))


def measure(shape: tuple[int, int, int], dtype: torch.dtype, speed: float) -> dict[str, Any]:
    """Times, errors and the floor of one shape."""
    sets = [make_inputs(shape, dtype, seed) for seed in range(SETS)]
    dys = [torch.randn_like(inputs[0]) for inputs in sets]
    row: dict[str, Any] = {"shape": list(shape)}

    exact = with_grads(ours("chunked"), [x.double() for x in sets[0]], dys[0].double())
    row["eager_error"] = errors(with_grads(ours("chunked"), sets[0], dys[0]), exact)
    backends: dict[str, tuple[Callable[[Inputs], Tensor], list[Inputs], list[Tensor]]] = {
        "triton": (ours("triton"), sets, dys)
    }
    try:
        import mamba_ssm as _
    except ImportError:
        print("mamba_ssm is not installed: left out")
    else:
        swapped = [channel_major(inputs) for inputs in sets]
        backends["mamba_ssm"] = (mamba_ssm, swapped, [dy.mT.contiguous() for dy in dys])
        backends["mamba_ssm_copying"] = (ours("mamba_ssm"), sets, dys)

    for name, (run, inputs, dy) in backends.items():
        got = with_grads(run, inputs[0], dy[0])
        if name == "mamba_ssm":
            got = [x.mT if x.dim() == 3 else x for x in got]
        row[f"{name}_error"] = errors(got, exact)
        with torch.no_grad():
            row[f"{name}_forward_s"] = time_graph(lambda i, r=run, x=inputs: r(x[i]))
        row[f"{name}_forward+backward_s"] = time_graph(
            lambda i, r=run, x=inputs, d=dy: with_grads(r, x[i], d[i])
        )
    u, dt, _, B, C, *_ = sets[0]
    forward = 2 * u.nbytes + dt.nbytes + B.nbytes + C.nbytes
    backward = 3 * u.nbytes + 2 * (dt.nbytes + B.nbytes + C.nbytes)
    row["forward_floor_s"] = forward / speed
    row["forward+backward_floor_s"] = (forward + backward) / speed
    return row


def errors(got: list[Tensor], exact: list[Tensor]) -> dict[str, float]:
    """Of the output and of the worst gradient."""
    return {
        "output": relative_error(got[:1], exact[:1]),
        "gradients": relative_error(got[1:], exact[1:]),
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", default="float16", help="float32, float16 or bfloat16")
    parser.add_argument("--cases", nargs="+", default=list(CASES), help="words of the cases' names")
    parser.add_argument(
        "--out", type=Path, help="JSON file (default: in benchmarks/results, if all cases run)"
    )
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(1, "this benchmark needs a CUDA device\n")
    speed = copy_speed()
    print(
        f"{torch.cuda.get_device_name()}, {args.dtype}, copies {speed / 1e9:.0f} GB/s; times in µs"
    )
    print(
        f"{'case':20}{'batch×L×D':13}{'pass':17}{'triton':>8}{'mamba':>8}{'ratio':>7}"
        f"{'copying':>9}{'ratio':>7}{'floor':>7}{'×floor':>8}{'error':>9}{'eager':>9}"
    )
    rows = []
    for case, shapes in CASES.items():
        if not any(word in case for word in args.cases):
            continue
        for shape in shapes:
            row = {"case": case, **measure(shape, getattr(torch, args.dtype), speed)}
            rows.append(row)
            print_row(row)
    facts = {"device": torch.cuda.get_device_name(), "dtype": args.dtype, "copy_bytes_s": speed}
    facts |= {"torch": torch.__version__, "triton": version("triton"), "commit": commit()}
    facts |= {"mamba_ssm": version("mamba_ssm"), "goals": GOALS, "floor_goal": FLOOR_GOAL}
    out = args.out or (RESULTS / f"scan_{args.dtype}.json" if args.cases == list(CASES) else None)
    if out:
        write(out, {**facts, "rows": rows})


def version(package: str) -> str | None:
    """Of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def print_row(row: dict[str, Any]) -> None:
    """Two lines of the table; a figure that misses its goal is marked."""
    size = "×".join(str(n) for n in row["shape"])
    for name, goal in GOALS.items():
        time, floor = row[f"triton_{name}_s"], row[f"{name}_floor_s"]
        mamba = beside(time, row.get(f"mamba_ssm_{name}_s"), goal)
        copying = beside(time, row.get(f"mamba_ssm_copying_{name}_s"))
        over = time / floor
        mark = "!" if over > FLOOR_GOAL and row["shape"][1] >= FLOOR_FROM else ""
        kind = "output" if name == "forward" else "gradients"
        print(
            f"{row['case']:20}{size:13}{name:17}{1e6 * time:8.1f}{mamba:>15}{copying:>16}"
            f"{1e6 * floor:7.1f}{f'{over:.1f}{mark}':>8}"
            f"{row['triton_error'][kind]:9.1e}{row['eager_error'][kind]:9.1e}"
        )


def beside(time: float, peer: float | None, goal: float = float("inf")) -> str:
    """A peer's time in µs, and the ratio to it."""
    if peer is None:
        return ""
    return f"{1e6 * peer:.1f}{f'{time / peer:.2f}' + '!' * (time > goal * peer):>7}"


if __name__ == "__main__":
    main()
