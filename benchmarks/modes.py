"""Time backbones on a GPU in every mode that a user can choose, beside peers in theirs.

    python benchmarks/modes.py
    python benchmarks/modes.py --cases "T fit" "ConvNeXt-T" --dtype bfloat16

Inference: ``amp`` is float32 weights under autocast; ``half`` weights in half precision (for
MambaVision by ``accelerate``, which also folds batch norms), kernels launched one by one; ``graph``
the same as a CUDA graph (for MambaVision by ``accelerate``, its copies in and out included);
``compiled`` torch.compile(mode="reduce-overhead"), which uses CUDA graphs too. Training is forward
and backward under autocast, with gradients given for the maps: ``eager``, kernels launched one by
one as users have it (MambaVision's by ``replay``, ``modules`` without); ``graphs`` as
``MambaVision(graphs=...)`` does it for every shape; ``graph`` with the whole pass in one CUDA graph
of the benchmark's own; ``compiled``. All in channels-last. The median of the runs, host included;
the most memory that PyTorch allocates, captures included; and what CUDA graphs keep for themselves
beyond what PyTorch counts as allocated between two runs. The error is ‖a − b‖ / ‖b‖ of the maps of
inference against the same network in float64. Writes a JSON file and prints a table.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from common import (
    RESULTS,
    commit,
    device_name,
    free,
    graph_bytes,
    keep,
    relative_error,
    show,
    spread,
    write,
)
from torch import Tensor, nn

from mambavision_backbone import MambaVision
from mambavision_backbone.graphs import TrainingGraphs
from mambavision_backbone.inference import FastBackbone, accelerate
from mambavision_backbone.replay import TrainingReplays

DETECTION, SEGMENTATION, CLASSIFICATION = (8, 8, 112, 56), (8, 8, 64, 32), (8, 8, 14, 7)
COCO, ADE, IMAGENET = (2, 800, 1344), (16, 512, 512), (128, 224, 224)  # images, height, width
Run = Callable[[], list[Tensor]]
Case = tuple[Callable[[], nn.Module], tuple[int, int, int], str]


def ours(arch: str, windows: tuple[int, ...], mode: str) -> Callable[[], nn.Module]:
    """A MambaVision, in training with the drop path of the recipes."""
    return lambda: MambaVision(arch, window_size=windows, window_mode=mode, drop_path_rate=0.2)


def peer(name: str, **options: Any) -> Callable[[], nn.Module]:
    """A network of timm that returns its maps."""
    return lambda: timm.create_model(name, features_only=True, **options)


CASES: dict[str, Case] = {  # name: (network, input, passes)
    "T fit": (ours("T", DETECTION, "fit"), COCO, "inference training"),
    "ConvNeXt-T": (peer("convnext_tiny"), COCO, "inference training"),
    "ResNet-50": (peer("resnet50"), COCO, "inference training"),
    "MambaOut-T": (peer("mambaout_tiny"), COCO, "inference training"),
    "Swin-T": (
        peer("swin_tiny_patch4_window7_224", strict_img_size=False),
        COCO,
        "inference training",
    ),
    "T pad": (ours("T", DETECTION, "pad"), COCO, "inference training"),
    "B fit": (ours("B", DETECTION, "fit"), COCO, "inference"),
    "T fit, ADE20K": (ours("T", SEGMENTATION, "fit"), ADE, "training"),
    "ConvNeXt-T, ADE20K": (peer("convnext_tiny"), ADE, "training"),
    "T, ImageNet": (ours("T", CLASSIFICATION, "pad"), IMAGENET, "inference"),
}
# It takes minutes.
COMPILED = ["T fit", "ConvNeXt-T", "ResNet-50", "MambaOut-T", "Swin-T", "ConvNeXt-T, ADE20K"]
# The goals: case, pass, modes of which the best counts, highest ms, highest MiB, and a case whose
# best mode (of the same pass and modes) it is compared with, with the highest ratio.
GRAPHS = ("graph", "compiled")
GOALS: list[tuple[str, str, tuple[str, ...], float, float | None, str | None, float | None]] = [
    ("T fit", "inference", GRAPHS, 3.0, None, "ConvNeXt-T", 0.75),
    ("T fit", "inference", ("amp", "half"), 5.0, None, "ResNet-50", 1.0),
    ("T fit", "training", GRAPHS, 13.0, 1500, "ConvNeXt-T", 0.9),
    ("T fit", "training", ("eager",), 25.0, None, "ResNet-50", 1.0),
    ("T pad", "inference", (*GRAPHS, "half"), 8.5, None, None, None),
    ("T pad", "training", (*GRAPHS, "eager"), 33.0, 2400, None, None),
    ("B fit", "inference", GRAPHS, 6.5, None, None, None),
    ("T fit, ADE20K", "training", GRAPHS, 20.0, 2500, "ConvNeXt-T, ADE20K", 0.9),
    ("T, ImageNet", "inference", GRAPHS, 6.0, None, None, None),
]


def timed(build: Callable[[], Run], args: argparse.Namespace) -> tuple[dict[str, float], Run]:
    """Median, least and most seconds of a run, and the peak memory from building it on."""
    torch.cuda.reset_peak_memory_stats()
    run = build()
    for _ in range(args.warmup):
        run()
    times = []
    for _ in range(args.runs):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    row = {
        **spread(times),
        "peak_mib": torch.cuda.max_memory_allocated() / 2**20,
        "graphs_mib": graph_bytes() / 2**20,
    }
    return row, run


def replayed(run: Run) -> Run:
    """A run as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = run()

    def replay() -> list[Tensor]:
        graph.replay()
        return outs

    return replay


def inference(model: nn.Module, x: Tensor, dtype: torch.dtype) -> dict[str, Callable[[], Run]]:
    """By mode of inference, what builds a run."""
    x_half = x.to(dtype)

    def amp() -> list[Tensor]:
        with torch.autocast("cuda", dtype):
            return model(x)

    def halved(graphs: int = 0) -> nn.Module:
        if isinstance(model, MambaVision):
            return accelerate(model, dtype, graphs)
        return copy.deepcopy(model).to(dtype)

    def half(graphs: int = 0) -> Run:
        net = halved(graphs)
        return lambda: net(x_half)

    def graph() -> Run:
        return half(graphs=1) if isinstance(model, MambaVision) else replayed(half())

    def compiled() -> Run:
        net = halved()
        net = net.net if isinstance(net, FastBackbone) else net  # without its own graphs
        compiled = torch.compile(net, mode="reduce-overhead", fullgraph=True)
        return lambda: compiled(x_half)

    return {"amp": lambda: amp, "half": half, "graph": graph, "compiled": compiled}


def training(model: nn.Module, x: Tensor, dtype: torch.dtype) -> dict[str, Callable[[], Run]]:
    """By mode of training, what builds a run."""
    grads: list[Tensor] = []

    def step(model: Callable[[Tensor], list[Tensor]] = model) -> list[Tensor]:
        for parameter in parameters:
            parameter.grad = None
        with torch.autocast("cuda", dtype):
            outs = model(x)
        if not grads:
            generator = torch.Generator("cuda").manual_seed(1)
            grads.extend(torch.empty_like(o).normal_(generator=generator) for o in outs)
        torch.autograd.backward([o.to(g.dtype) for o, g in zip(outs, grads, strict=True)], grads)
        return [o.detach() for o in outs]

    def compiled() -> Run:
        compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)

        def run() -> list[Tensor]:
            torch.compiler.cudagraph_mark_step_begin()
            return step(compiled)

        return run

    def modules() -> Run:
        model._replays = TrainingReplays(wanted=False)  # type: ignore[assignment]
        return step

    def graphs() -> Run:  # the last: the network keeps them
        model._graphs = TrainingGraphs(limit=1)  # type: ignore[assignment]
        return step

    parameters = list(model.parameters())
    modes: dict[str, Callable[[], Run]] = {"eager": lambda: step}
    modes |= {"graph": lambda: replayed(step), "compiled": compiled}
    if isinstance(model, MambaVision):
        modes |= {"modules": modules, "graphs": graphs}
    return modes


def exact_maps(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Maps of the same network, in its mode, in float64."""
    with torch.no_grad():
        return [o.detach() for o in copy.deepcopy(model).double()(x.double())]


PASSES = {"inference": inference, "training": training}


def measure(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows of one case."""
    free()  # the last case's network, whose graphs would be counted here
    build, (batch, *hw), passes = CASES[name]
    rows = []
    for pass_ in passes.split():
        torch.manual_seed(0)
        model = build().cuda().to(memory_format=torch.channels_last)
        model.train(pass_ == "training")
        x = torch.randn(batch, 3, *hw, device="cuda").contiguous(memory_format=torch.channels_last)
        exact = exact_maps(model, x[:2]) if pass_ == "inference" else None
        modes = PASSES[pass_](model, x, getattr(torch, args.dtype))
        for mode, build_run in modes.items():
            if mode == "compiled" and name not in args.compiled:
                continue
            show(f"{name}, {pass_}, {mode}")
            with torch.set_grad_enabled(pass_ == "training"):
                times, run = timed(build_run, args)
                row = {"case": name, "pass": pass_, "mode": mode, **times}
                if exact is not None:
                    row["error"] = relative_error([o[:2] for o in run()], exact)
            rows.append(row)
            del run, build_run  # with the graph that it may hold
            model.zero_grad(set_to_none=True)
            torch._dynamo.reset()
            free()
    return rows


def best(rows: list[dict[str, Any]], case: str, pass_: str, modes: tuple[str, ...]) -> Any:
    """The fastest row of a case in some modes, or None."""
    rows = [r for r in rows if r["case"] == case and r["pass"] == pass_ and r["mode"] in modes]
    return min(rows, key=lambda r: r["median_s"], default=None)


def check_goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was wanted and what was measured."""
    goals = []
    for case, pass_, modes, ms, mib, other, ratio in GOALS:
        row = best(rows, case, pass_, modes)
        if row is None:
            continue
        goal = {"case": case, "pass": pass_, "mode": row["mode"]}
        goal |= {"ms": 1e3 * row["median_s"], "goal_ms": ms}
        if mib is not None:
            goal |= {"mib": row["peak_mib"], "goal_mib": mib}
        peer_row = best(rows, other, pass_, modes) if other else None
        if peer_row is not None:
            goal |= {"over": f"{other}, {peer_row['mode']}", "goal_ratio": ratio}
            goal["ratio"] = row["median_s"] / peer_row["median_s"]
        goals.append(goal)
    return goals


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16"])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--runs", type=int, default=30, help="counted runs of each mode")
    parser.add_argument("--warmup", type=int, default=5, help="runs before them")
    parser.add_argument(
        "--compiled", nargs="*", default=COMPILED, choices=list(CASES), help="cases to compile too"
    )
    parser.add_argument("--out", type=Path, help="JSON file (default: in benchmarks/results)")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device; benchmarks/backbone.py measures on a CPU")

    facts = {"device": device_name("cuda"), "dtype": args.dtype, "torch": torch.__version__}
    facts |= {"timm": timm.__version__, "commit": commit()}
    facts |= {"PYTORCH_CUDA_ALLOC_CONF": os.environ.get("PYTORCH_CUDA_ALLOC_CONF")}
    out = args.out or RESULTS / f"modes_{args.dtype}.json"
    rows = []
    print(
        f"{'case':20}{'pass':11}{'mode':10}{'median ms':>10}{'min':>8}{'max':>8}{'peak MiB':>10}"
        f"{'graphs':>8}"
    )
    for name in args.cases:
        for row in measure(name, args):
            times = "".join(f"{1e3 * row[k]:8.2f}" for k in ("median_s", "min_s", "max_s"))
            error = f"  error {row['error']:.1e}" if "error" in row else ""
            print(
                f"{name:20}{row['pass']:11}{row['mode']:10}  {times}{row['peak_mib']:10.0f}"
                f"{row['graphs_mib']:8.0f}{error}",
                flush=True,
            )
            rows.append(row)
        keep(out, {**facts, "rows": rows})
    goals = check_goals(rows)
    for goal in goals:
        line = f"{goal['case']}, {goal['pass']} ({goal['mode']}): {goal['ms']:.2f} ms"
        line += f" (goal {goal['goal_ms']:g})"
        if "mib" in goal:
            line += f", {goal['mib']:.0f} MiB (goal {goal['goal_mib']})"
        if "ratio" in goal:
            line += f", {goal['ratio']:.2f} of {goal['over']} (goal {goal['goal_ratio']:g})"
        print(line)
    write(out, {**facts, "rows": rows, "goals": goals})


if __name__ == "__main__":
    main()
