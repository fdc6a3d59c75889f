"""What a backbone costs on a GPU as images grow, and when their shapes vary.

    python benchmarks/shapes.py
    python benchmarks/shapes.py --draw benchmarks/results/shapes_float16.json

Growth: time and memory against the side of one square image, and against the number of images of
512×512; inference and training (forward and backward) as CUDA graphs, all networks alike; memory is
what the graph keeps for its pass: without weights, images, gradients and maps, but for the maps of
MambaVision's inference. Drawn into docs/images, from a stopped run's file, too (``--draw``).

Varying shapes: twenty padded sizes of COCO images, two a batch, in turn; inference and training as
each network is used where shapes vary: kernel by kernel (``eager``), MambaVision also by its
``graphs``, and in training without ``replay`` (``modules``). The first two rounds are reported
apart from the later ones: in the first one kernels are compiled and algorithms chosen, in the
second graphs are captured and passes recorded; memory is the most that PyTorch allocates in them
and what graphs keep for themselves. The later rounds of all networks take turns, as the host's
speed, which kernel by kernel is what counts, may change from second to second.

Recipe: training passes over the shapes that the recipes' multi-scale augmentation makes of batches
of two images of COCO's commonest sizes, some four hundred: MambaVision by graphs of all shapes that
come twice, then all networks kernel by kernel, a tenth of the passes. The first row's passes
compile kernels and have cuDNN prepare itself for every shape; the later rows find that done.
Memory is what the GPU has less of behind a row than before it.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import time
from pathlib import Path
from typing import Any

import matplotlib
import timm
import torch
from common import RESULTS, commit, device_name, free, graph_bytes, keep, show, spread, write
from modes import CASES, PASSES, timed
from torch import nn

from mambavision_backbone import MambaVision
from mambavision_backbone.graphs import TrainingGraphs
from mambavision_backbone.inference import accelerate
from mambavision_backbone.replay import TrainingReplays

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PICTURE = RESULTS.parents[1] / "docs/images/growth.png"
PARTS = ["varying", "recipe", "growth"]
GROWTH = ["T fit", "T pad", "ConvNeXt-T"]
SIDES, BATCHES = (256, 512, 768, 1024, 1536, 2048), (1, 4, 8, 16)
VARYING = ["T fit", "ConvNeXt-T", "ResNet-50"]
LANDSCAPE = [(800, width) for width in range(800, 1345, 64)]
COCO = [*LANDSCAPE, *((w, h) for h, w in LANDSCAPE if w > h), (640, 1344), (1344, 640), (736, 1344)]

# (width, height) of images of COCO, the commoner ones several times
SIZES = [(640, 480)] * 8 + [(640, 427)] * 5 + [(640, 426), (640, 425), (500, 375), (500, 333)]
SIZES += [(640, 360), (612, 612), *((h, w) for w, h in SIZES[6:14:2])]
SHORT_SIDES, LONG_SIDE = range(480, 801, 32), 1333
LIMITS = 1024, 0  # graphs


def build(name: str, pass_: str) -> nn.Module:
    """One of the networks of modes.py, ready for a pass."""
    torch.manual_seed(0)
    model = CASES[name][0]().cuda().to(memory_format=torch.channels_last)
    return model.train(pass_ == "training")


def images(batch: int, height: int, width: int) -> torch.Tensor:
    """Random images."""
    x = torch.randn(batch, 3, height, width, device="cuda")
    return x.contiguous(memory_format=torch.channels_last)


def growth(args: argparse.Namespace, out: Path, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Times and memory of all sizes and numbers of images; kept beside ``out`` while they come."""
    inputs = {(1, side) for side in SIDES} | {(batch, 512) for batch in BATCHES}
    keys = ("network", "pass", "batch", "side")
    rows = list(facts.get("growth", []))
    measured = {tuple(row[key] for key in keys) for row in rows}
    for name in GROWTH:
        for pass_, modes in PASSES.items():
            wanted = [size for size in sorted(inputs) if (name, pass_, *size) not in measured]
            if not wanted:
                continue
            model = build(name, pass_)
            for batch, side in wanted:
                show(f"{name}, {pass_}, {batch}×{side}×{side}")
                row = dict(zip(keys, (name, pass_, batch, side), strict=True))
                row["commit"] = facts["commit"]
                x = images(batch, side, side)
                built = modes(model, x, getattr(torch, args.dtype))
                with torch.set_grad_enabled(pass_ == "training"):
                    figures, run = timed(built["graph"], args)
                del figures["peak_mib"]  # a capture's, with whatever else was there
                rows.append(row | figures)
                keep(out, {**facts, "growth": rows})
                del built, run
                model.zero_grad(set_to_none=True)
                free()
    return rows


def draw(rows: list[dict[str, Any]]) -> None:
    """Four pictures: time and memory against sides and numbers."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 8))
    colors = dict(zip(GROWTH, ("tab:red", "tab:orange", "tab:blue"), strict=True))
    lines = {"inference": "--", "training": "-"}
    for column, key in enumerate(("side", "batch")):
        chosen = [r for r in rows if (r["batch"] == 1 if key == "side" else r["side"] == 512)]
        for axis, value in zip(axes[:, column], ("median_s", "graphs_mib"), strict=True):
            for name in GROWTH:
                for pass_, line in lines.items():
                    own = [r for r in chosen if (r["network"], r["pass"]) == (name, pass_)]
                    own.sort(key=lambda r: r[key])
                    scale = 1e3 if value == "median_s" else 1.0
                    axis.plot(
                        [r[key] for r in own],
                        [scale * r[value] for r in own],
                        line,
                        color=colors[name],
                        marker=".",
                        label=f"{name}, {pass_}",
                    )
            axis.set(xscale="log", yscale="log")
            axis.set_xlabel("side of one image" if key == "side" else "images of 512×512")
            axis.set_ylabel("ms" if value == "median_s" else "MiB")
            ticks = SIDES if key == "side" else BATCHES
            axis.set_xticks(ticks, [str(t) for t in ticks])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="upper center", ncols=3)
    figure.tight_layout(rect=(0, 0, 1, 0.93))
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=80)


def varying(args: argparse.Namespace, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Times of a pass over shapes in turn."""
    inputs = [images(2, *hw) for hw in COCO]
    rows = []
    for pass_ in PASSES:
        with torch.set_grad_enabled(pass_ == "training"):
            rows += in_turn(pass_, inputs, args, facts)
    return rows


def in_turn(
    pass_: str, inputs: list[torch.Tensor], args: argparse.Namespace, facts: dict[str, Any]
) -> list[dict[str, Any]]:
    """A round of each network, then the next of each: hosts are not as fast all the time."""
    dtype = getattr(torch, args.dtype)
    ours = ["graphs", "modules"] if pass_ == "training" else ["graphs"]
    modes = [(name, "eager") for name in VARYING] + [(VARYING[0], mode) for mode in ours]
    rows, runs = [], []
    for name, mode in modes:
        show(f"{name}, {pass_}, {mode}, shapes in turn")
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        model = build(name, pass_)
        if mode == "modules":
            model._replays = TrainingReplays(wanted=False)  # type: ignore[assignment]
        run = stepper(model, pass_, len(COCO) if mode == "graphs" else 0, dtype)
        del model
        row = {"network": name, "pass": pass_, "mode": mode, "commit": facts["commit"]}
        row["first_rounds_s"] = a_round(run, inputs) + a_round(run, inputs)
        row["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
        row["graphs_mib"] = graph_bytes() / 2**20
        rows.append(row)
        runs.append(run)
    times: list[list[float]] = [[] for _ in runs]
    for i in range(args.rounds):
        show(f"{pass_}, round {i + 1} of {args.rounds}")
        for run, seconds in zip(runs, times, strict=True):
            seconds.append(a_round(run, inputs) / len(inputs))
    for row, seconds in zip(rows, times, strict=True):
        row |= spread(seconds)
    del run, runs
    free()
    return rows


def a_round(run: Any, inputs: list[torch.Tensor]) -> float:
    """Seconds of a pass over each input."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for x in inputs:
        run(x)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def recipe_shapes(count: int) -> list[tuple[int, int]]:
    """Heights and widths of batches as configs with coco_instance_multiscale.py make them."""
    draw = random.Random(0)

    def resize(width: int, height: int, short: int, long: int) -> tuple[int, int]:
        scale = min(short / min(width, height), long / max(width, height))
        return round(width * scale), round(height * scale)

    def augment(width: int, height: int) -> tuple[int, int]:
        if draw.random() < 0.5:
            width, height = resize(width, height, draw.choice((400, 500, 600)), 4200)
            width = draw.randint(min(width, 384), min(width, 600))
            height = draw.randint(min(height, 384), min(height, 600))
        return resize(width, height, draw.choice(SHORT_SIDES), LONG_SIDE)

    shapes: list[tuple[int, int]] = []
    waiting: dict[bool, tuple[int, int]] = {}  # an upright image, and one that is not
    while len(shapes) < count:
        size = draw.choice(SIZES)
        upright, image = size[0] < size[1], augment(*size)
        if upright not in waiting:
            waiting[upright] = image
            continue
        sides = zip(waiting.pop(upright), image, strict=True)
        width, height = (math.ceil(max(pair) / 32) * 32 for pair in sides)
        shapes.append((height, width))
    return shapes


def recipe(args: argparse.Namespace, out: Path, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Times and memory of training passes over the recipe's shapes; kept as ``growth`` keeps."""
    rows = list(facts.get("recipe", []))
    measured = {(row["network"], row["limit"], row["passes"]) for row in rows}
    for name in VARYING:
        for limit in LIMITS if name.startswith("T ") else (0,):
            passes = args.passes if limit else args.passes // 10
            if (name, limit, passes) in measured:
                continue
            shapes = recipe_shapes(passes)
            show(f"{name}, {limit} graphs, {passes} passes of the recipe")
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.mem_get_info()[0]
            model = build(name, "training")
            run = stepper(model, "training", limit, getattr(torch, args.dtype))
            seconds = [a_round(run, [images(2, *shape)]) for shape in shapes]
            tenths = [seconds[i * passes // 10 : (i + 1) * passes // 10] for i in range(10)]
            graphs = len(model._graphs._passes) if limit else 0  # type: ignore[union-attr]
            rows.append(
                {
                    "network": name,
                    "limit": limit,
                    "passes": passes,
                    "shapes": len(set(shapes)),
                    "graphs": graphs,
                    "mean_s": [statistics.mean(tenth) for tenth in tenths],
                    "memory_mib": (before - torch.cuda.mem_get_info()[0]) / 2**20,
                    "allocated_mib": torch.cuda.max_memory_allocated() / 2**20,
                    "graphs_mib": graph_bytes() / 2**20,
                    "commit": facts["commit"],
                }
            )
            keep(out, {**facts, "recipe": rows})
            del model, run
            free()
    return rows


def stepper(model: nn.Module, pass_: str, graphs: int, dtype: torch.dtype) -> Any:
    """A pass over given images."""
    if pass_ == "inference":
        net = (
            accelerate(model, dtype, graphs) if isinstance(model, MambaVision) else model.to(dtype)
        )
        return lambda x: net(x.to(dtype))
    if graphs:
        model._graphs = TrainingGraphs(graphs)  # type: ignore[assignment]
    parameters = list(model.parameters())

    def step(x: torch.Tensor) -> None:
        for parameter in parameters:
            parameter.grad = None
        with torch.autocast("cuda", dtype):
            maps = model(x)
        torch.autograd.backward(maps, [torch.ones_like(m) for m in maps])

    return step


def held(out: Path, facts: dict[str, Any], parser: argparse.ArgumentParser) -> dict[str, Any]:
    """What a run, finished or stopped, has left; an error if it was another device's or dtype's."""
    parts: dict[str, Any] = {}
    for file in (out, out.with_name(out.name + ".part")):
        if not file.exists():
            continue
        found = json.loads(file.read_text())
        for key in ("device", "dtype", "torch", "timm"):
            if found[key] != facts[key]:
                parser.error(f"{file} has {key} {found[key]}, this run {facts[key]}")
        parts |= {key: found[key] for key in PARTS if key in found}
    return parts


def main() -> None:
    """Measure, draw, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16"])
    parser.add_argument("--runs", type=int, default=10, help="counted runs of a size")
    parser.add_argument("--warmup", type=int, default=3, help="runs before them")
    parser.add_argument("--rounds", type=int, default=9, help="counted rounds of varying shapes")
    parser.add_argument("--passes", type=int, default=3000, help="over the recipe's shapes")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--out", type=Path, help="JSON file (default: in benchmarks/results)")
    parser.add_argument(
        "--resume", action="store_true", help="keep what the JSON file holds, measure what it lacks"
    )
    parser.add_argument("--draw", type=Path, metavar="JSON", help="draw what it holds, and stop")
    args = parser.parse_args()
    if args.draw:
        draw(json.loads(args.draw.read_text())["growth"])
        return
    if args.passes < 100:
        parser.error(f"--passes: at least 100, got {args.passes}")
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device; benchmarks/backbone.py measures on a CPU")
    facts = {"device": device_name("cuda"), "dtype": args.dtype, "torch": torch.__version__}
    facts |= {"timm": timm.__version__, "commit": commit()}
    out = args.out or RESULTS / f"shapes_{args.dtype}.json"
    if out.exists() and set(args.parts) != set(PARTS) and not args.resume:
        parser.error(f"not all parts: --resume keeps the others that {out} holds, or give --out")
    if args.resume:
        facts |= held(out, facts, parser)
    if "varying" in args.parts and "varying" not in facts:
        facts["varying"] = varying(args, facts)
        for row in facts["varying"]:
            print(
                f"{len(COCO)} shapes in turn: {row['network']:12}{row['pass']:10} {row['mode']:7}"
                f"{1e3 * row['median_s']:8.2f} ms, first two rounds {row['first_rounds_s']:.1f} s,"
                f" peak {row['peak_mib']:.0f} MiB and {row['graphs_mib']:.0f} of graphs",
                flush=True,
            )
        keep(out, facts)
    if "recipe" in args.parts:
        facts["recipe"] = recipe(args, out, facts)
        for row in facts["recipe"]:
            tenths = " ".join(f"{1e3 * s:.1f}" for s in row["mean_s"])
            print(
                f"{row['passes']} passes, {row['shapes']} shapes: {row['network']:12}"
                f"{row['graphs']:4} graphs, ms of each tenth {tenths}, {row['memory_mib']:.0f} MiB",
                flush=True,
            )
    if "growth" in args.parts:
        facts["growth"] = growth(args, out, facts)
        for row in facts["growth"]:
            print(
                f"{row['network']:12}{row['pass']:10} {row['batch']:3}×{row['side']}²"
                f"{1e3 * row['median_s']:9.2f} ms {row['graphs_mib']:7.0f} MiB"
            )
        draw(facts["growth"])
    write(out, facts)


if __name__ == "__main__":
    main()
