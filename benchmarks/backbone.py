"""Time the backbone beside its peers, and beside itself with sequential scans.

    python benchmarks/backbone.py --device cpu
    python benchmarks/backbone.py --device cuda --dtype float16 --train

Every round runs all networks of a shape once, in turn, so that a drift of the machine's speed meets
all of them; the median over the rounds is reported. The error is ‖a − b‖ / ‖b‖ of the returned maps
against the same network in float64. Writes a JSON file and prints a table.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import timm
import torch
import torch.nn.functional as F
from common import RESULTS, commit, device_name, relative_error, show, spread, write
from torch import Tensor, nn

from mambavision_backbone import MambaVision
from mambavision_backbone.ops.selective_scan import reference, schema

SEGMENTATION, DETECTION = (8, 8, 64, 32), (8, 8, 112, 56)  # published windows
CASES = {  # name: (shape, windows)
    "segmentation": ((1, 3, 512, 512), SEGMENTATION),
    "detection": ((1, 3, 800, 1344), DETECTION),
}
PEERS = {"ConvNeXt-T": "convnext_tiny", "ResNet-50": "resnet50"}
SLOW = "T pad, sequential scan"  # the package's own loop, scan_backend="reference"
SLOWER = "T pad, mamba-ssm's loop"  # the loop that Mamba networks run on a CPU
# The goals: case, network, network it is compared with, highest ratio of the times.
GOALS = [
    ("segmentation", "T fit", "ConvNeXt-T", 1.15),
    ("segmentation", "T pad", SLOW, 0.65),
    ("segmentation", "T pad", SLOWER, 0.65),
    ("detection", "T fit", SLOW, 0.25),
]


def mamba_ssm_loop(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    dt_softplus: bool,
) -> Tensor:
    """The steps of mamba-ssm's ``selective_scan_ref``: channel-major, decays of all tokens first.

    Arguments as in ``ops.selective_scan``.
    """
    dtype = u.dtype
    u, dt, B, C = (x.float().transpose(1, 2).contiguous() for x in (u, dt, B, C))
    delta = dt + dt_bias[:, None]
    delta = F.softplus(delta) if dt_softplus else delta
    decays = torch.exp(torch.einsum("bdl,dn->bdln", delta, A))
    inputs = torch.einsum("bdl,bnl,bdl->bdln", delta, B, u)
    h = A.new_zeros(len(u), *A.shape)
    ys = []
    for t in range(u.shape[2]):
        h = decays[:, :, t] * h + inputs[:, :, t]
        ys.append(torch.einsum("bdn,bn->bd", h, C[:, :, t]))
    return (torch.stack(ys, 2) + u * D[:, None]).transpose(1, 2).contiguous().to(dtype)


LOOPS = {SLOW: reference.selective_scan, SLOWER: mamba_ssm_loop}  # what scan_backend="reference" is


def networks(windows: tuple[int, ...]) -> dict[str, nn.Module]:
    """All networks of one case; the MambaVisions share their weights."""
    torch.manual_seed(0)
    ours = {
        "T fit": MambaVision("T", window_size=windows, window_mode="fit"),
        "T pad": MambaVision("T", window_size=windows),
        **{name: MambaVision("T", window_size=windows, scan_backend="reference") for name in LOOPS},
    }
    for model in ours.values():
        model.load_state_dict(ours["T fit"].state_dict())
    peers = {name: timm.create_model(key, features_only=True) for name, key in PEERS.items()}
    return {**ours, **peers}


def in_float64(model: MambaVision, x: Tensor) -> tuple[Tensor, ...]:
    """The maps of the same network in float64, by the fast scan."""
    mode = model.levels[2].window_mode
    exact = MambaVision(model.arch, window_mode=mode).eval().double().to(x.device)
    exact.load_state_dict(model.state_dict())
    with torch.no_grad():
        return exact(x.double())


def measure(case: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Times of one case."""
    shape, windows = CASES[case]
    shape = (args.batch, *shape[1:])
    device = torch.device(args.device)
    dtype = getattr(torch, args.dtype)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    models = networks(windows)
    if device.type == "cuda":
        models = {name: model for name, model in models.items() if name not in LOOPS}
    runs: dict[str, Callable[[], Any]] = {}
    for name, model in models.items():
        model.to(device).train(args.train)

        def run(name: str = name, model: nn.Module = model) -> Any:
            cast = nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)
            with (
                patch.dict(schema._FORWARD, reference=LOOPS.get(name, reference.selective_scan)),
                torch.set_grad_enabled(args.train),
                cast,
            ):
                outs = model(x)
                if args.train:
                    sum(o.float().square().mean() for o in outs).backward()
            model.zero_grad(set_to_none=True)
            return [o.detach() for o in outs]

        runs[name] = run

    times: dict[str, list[float]] = {name: [] for name in runs}
    peaks: dict[str, float] = {}
    last: dict[str, list[Tensor]] = {}
    for round_ in range(args.rounds + 1):
        for name, run in runs.items():
            if name in LOOPS and len(times[name]) >= args.slow_rounds:
                continue
            show(f"{case}: round {round_}/{args.rounds}, {name}")
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                torch.cuda.synchronize()
            start = time.perf_counter()
            last[name] = run()
            if device.type == "cuda":
                torch.cuda.synchronize()
                peaks[name] = torch.cuda.max_memory_allocated() / 2**20
            if round_ or name in LOOPS:  # the first round warms up; the loops need none
                times[name].append(time.perf_counter() - start)
    rows = []
    exact: dict[str, tuple[Tensor, ...]] = {}
    for name, model in models.items():
        row = {
            "case": case,
            "network": name,
            "shape": list(shape),
            **spread(times[name]),
            "runs": len(times[name]),
        }
        if name in peaks:
            row["peak_mib"] = peaks[name]
        if isinstance(model, MambaVision) and not args.train and not args.no_error:
            mode = model.levels[2].window_mode
            if mode not in exact:
                show(f"{case}: {mode} in float64")
                exact[mode] = in_float64(model, x)
            row["error"] = relative_error(last[name], exact[mode])
        rows.append(row)
    return rows


def check_goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The goals' ratios, where both networks were measured."""
    median = {(row["case"], row["network"]): row["median_s"] for row in rows}
    return [
        {
            "case": case,
            "network": a,
            "over": b,
            "ratio": median[case, a] / median[case, b],
            "goal": goal,
        }
        for case, a, b, goal in GOALS
        if (case, a) in median and (case, b) in median
    ]


def context(args: argparse.Namespace) -> dict[str, Any]:
    """Where and what was measured."""
    return {
        "device": device_name(args.device),
        "threads": torch.get_num_threads(),
        "dtype": args.dtype,
        "mode": "training, forward and backward" if args.train else "inference",
        "torch": torch.__version__,
        "timm": timm.__version__,
        "commit": commit(),
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="float32", help="float32, float16 or bfloat16")
    parser.add_argument("--batch", type=int, default=1, help="images")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--rounds", type=int, default=3, help="counted runs of each network")
    parser.add_argument(
        "--slow-rounds", type=int, default=1, help="counted runs of the sequential scans"
    )
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--train", action="store_true", help="time forward and backward")
    parser.add_argument("--no-error", action="store_true", help="leave the float64 runs out")
    parser.add_argument("--out", type=Path, help="JSON file (default: in benchmarks/results)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    rows = [row for case in args.cases for row in measure(case, args)]
    goals = check_goals(rows)
    show("")
    facts = context(args)
    print(", ".join(f"{k} {v}" for k, v in facts.items()))
    print(
        f"{'input':16}{'network':26}{'median ms':>10}{'min':>9}{'max':>9}{'runs':>6}{'error':>11}"
    )
    for row in rows:
        size = "×".join(str(n) for n in row["shape"] if n != 3)
        times = "".join(f"{1e3 * row[k]:9.0f}" for k in ("median_s", "min_s", "max_s"))
        error = f"{row['error']:11.1e}" if "error" in row else f"{'':>11}"
        print(f"{size:16}{row['network']:26} {times}{row['runs']:6}{error}")
    for goal in goals:
        print(
            f"{goal['case']}: {goal['network']} / {goal['over']} = {goal['ratio']:.2f} "
            f"(goal: at most {goal['goal']})"
        )
    out = args.out or RESULTS / f"backbone_{args.device}.json"
    write(out, {**facts, "rows": rows, "goals": goals})


if __name__ == "__main__":
    main()
