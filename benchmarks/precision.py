"""Whether training in half precision follows training in float32.

    python benchmarks/precision.py

Trains the demo's detector and segmenter for 2,000 iterations in float32, float16 (also by
CUDA graphs) and bfloat16 from the same random weights and with the same order of images, and once
more in float32 from another seed, to see how far two runs are apart anyway. A curve is the running
mean of the loss over five records; its distance is the mean of |a − b| / b to the first float32
run, warm-up left out. With ``--seeds`` also pairs of float16 by graphs and without, from as many
seeds, and by how much they differ. Writes a JSON file and a picture. The runs share the GPU: a
quarter of an hour for all at once on one GPU and 16 cores. What was interrupted goes on when
repeated.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from common import RESULTS, commit, device_name, read_logs, write

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
ITERATIONS, BATCH, WARMUP, WINDOW = 2000, 4, 100, 5
EPOCHS = 8
CONFIGS = {
    "detection": ROOT / "mmdet_configs/cascade_mambavision_demo.py",
    "segmentation": ROOT / "mmseg_configs/upernet_mambavision_demo.py",
}
LENGTH = {
    "detection": [f"train_cfg.max_epochs={EPOCHS}", f"param_scheduler.1.end={EPOCHS}"],
    "segmentation": [f"train_cfg.max_iters={ITERATIONS}", f"param_scheduler.1.end={ITERATIONS}"],
}
FLOAT16 = "type='AmpOptimWrapper', loss_scale='dynamic', dtype='float16'"
GRAPHS = ["model.backbone.graphs=8"]
RUNS = {  # name: (what replaces the config's mixed precision, further options)
    "float32": ("type='OptimWrapper'", ["randomness.seed=0"]),
    "float32, other seed": ("type='OptimWrapper'", ["randomness.seed=1"]),
    "float16": (FLOAT16, ["randomness.seed=0"]),
    "float16, graphs": (FLOAT16, ["randomness.seed=0", *GRAPHS]),
    "bfloat16": ("type='AmpOptimWrapper', dtype='bfloat16'", ["randomness.seed=0"]),
}


def start(task: str, name: str, work: Path, data: Path, options: list[str]) -> Any:
    """Start one training; its output goes to a file in its folder."""
    precision, own = RUNS[name]
    folder = work / task / name.replace(", ", "_").replace(" ", "_")
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "config.py"
    config.write_text(
        f"_base_ = {str(CONFIGS[task])!r}\n"
        "_wrapper = {k: v for k, v in _base_.optim_wrapper.items()"
        " if k not in ('type', 'loss_scale')}\n"
        f"optim_wrapper = dict(_wrapper, _delete_=True, {precision})\n"
        "del _wrapper\n"
    )
    layout = {"detection": "coco", "segmentation": "ade"}[task]
    command = [sys.executable, ROOT / "tools/train.py", config, "--data-root", data / layout]
    command += ["--work-dir", folder, "--resume", "--cfg-options", *own, *LENGTH[task], *options]
    threads = os.environ.get("OMP_NUM_THREADS", "2")
    with (folder / "output.txt").open("w") as output:
        print("+", *command, flush=True)
        return folder, subprocess.Popen(
            [*map(str, command)],
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": threads},
        )


def read(folder: Path) -> dict[str, Any]:
    """The losses of a run by iteration, and what was measured on held-out images at the end."""
    rows = read_logs(folder)
    losses = sorted({row["step"]: row["loss"] for row in rows if "loss" in row}.items())
    metrics = [row for row in rows if any(k.startswith("coco/") or k == "mIoU" for k in row)]
    last = metrics[-1] if metrics else {}
    wanted = ("coco/bbox_mAP", "coco/segm_mAP", "mIoU")
    return {"losses": losses, "metrics": {k: last[k] for k in wanted if k in last}}


def curve(losses: list[tuple[int, float]]) -> tuple[np.ndarray, np.ndarray]:
    """Iterations and smoothed losses, warm-up left out."""
    steps, values = np.array([pair for pair in losses if pair[0] > WARMUP]).T
    kernel = np.full(WINDOW, 1 / WINDOW)
    return steps[WINDOW - 1 :], np.convolve(values, kernel, "valid")


def finite(run: dict[str, Any]) -> bool:
    """Whether all its losses are."""
    return all(math.isfinite(loss) for _, loss in run["losses"])


def compare(runs: dict[str, dict[str, Any]]) -> None:
    """Put each run's distance to float32 and whether all its losses are finite into it."""
    _, wanted = curve(runs["float32"]["losses"])
    for run in runs.values():
        _, values = curve(run["losses"])
        run["distance"] = float(np.mean(np.abs(values - wanted) / wanted))
        run["finite"] = finite(run)


def pairs(seeds: int) -> dict[str, Any]:
    """Runs of float16 by graphs and without, from seeds 0 on."""
    return {
        f"{name}, seed {seed}": (FLOAT16, [f"randomness.seed={seed}", *graphs])
        for seed in range(seeds)
        for name, graphs in (("float16", []), ("float16, graphs", GRAPHS))
    }


def unpaired(runs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The runs but those of ``pairs``."""
    return {name: run for name, run in runs.items() if ", seed " not in name}


def show_pairs(runs: dict[str, dict[str, Any]]) -> None:
    """Print what graphs change: losses at the end and metrics, over all seeds."""
    graphed = [run for name, run in runs.items() if name.startswith("float16, graphs, seed ")]
    plain = [run for name, run in runs.items() if name.startswith("float16, seed ")]
    print(f"{len(graphed)} seeds: {'' if all(map(finite, graphed + plain)) else 'NOT '}all finite")

    def figures(run: dict[str, Any]) -> dict[str, float]:
        last = np.mean([loss for _, loss in run["losses"][-10:]])
        return {"last 10 losses": float(last), **run["metrics"]}

    for key in figures(graphed[0]):
        a, b = (np.array([figures(run)[key] for run in part]) for part in (graphed, plain))
        error = (a - b).std(ddof=1) / math.sqrt(len(a))
        print(
            f"{len(a)} seeds, {key}: {a.mean():.4g} by graphs, {b.mean():.4g} without, "
            f"difference {(a - b).mean():.3g} with a standard error of {error:.2g}"
        )


def draw(results: dict[str, dict[str, Any]], out: Path) -> None:
    """One picture with the curves of each task."""
    figure, axes = plt.subplots(1, len(results), figsize=(6 * len(results), 4), squeeze=False)
    for axis, (task, runs) in zip(axes[0], results.items(), strict=True):
        for name, run in unpaired(runs).items():
            axis.plot(*curve(run["losses"]), label=name, linewidth=1.2)
        axis.set(title=task, xlabel="iteration", ylabel="loss", yscale="log")
        axis.legend()
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=90)


def main() -> None:
    """Train all, compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work-dir", type=Path, default=ROOT / "work_dirs/precision")
    parser.add_argument("--tasks", nargs="+", default=list(CONFIGS), choices=list(CONFIGS))
    parser.add_argument(
        "--runs",
        nargs="+",
        default=list(RUNS),
        choices=list(RUNS),
        help="some of them, names with spaces in quotes; or --tasks: then --out and --picture too",
    )
    parser.add_argument(
        "--seeds", type=int, default=0, help="pairs of float16, by graphs and without: 0, 2 or more"
    )
    parser.add_argument("--jobs", type=int, default=10, help="trainings at a time")
    parser.add_argument("--out", type=Path, default=RESULTS / "precision.json")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs/images/precision.png")
    parser.add_argument("--options", nargs="+", default=[], help="more --cfg-options")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device: on a CPU the tools train in float32")
    if "float32" not in args.runs:
        parser.error("--runs needs float32, which the others are compared with")
    some = set(args.runs) != set(RUNS) or set(args.tasks) != set(CONFIGS)
    defaults = parser.get_default("out"), parser.get_default("picture")
    if some and (args.out == defaults[0] or args.picture == defaults[1]):
        parser.error("not all runs: give --out and --picture, or those of all would be lost")
    if args.seeds < 0 or args.seeds == 1:
        parser.error(f"--seeds must be 0, 2 or more, got {args.seeds}")
    RUNS.update(pairs(args.seeds))
    args.runs += pairs(args.seeds)
    work = args.work_dir.resolve()
    sizes = ["--train", str(ITERATIONS * BATCH // EPOCHS), "--val", "100", "--size", "128"]
    draw_shapes = [sys.executable, ROOT / "tools/make_shapes.py", work / "data", *sizes]
    subprocess.run([*map(str, draw_shapes)], check=True, cwd=ROOT)

    waiting = [(task, name) for task in args.tasks for name in dict.fromkeys(args.runs)]
    started: dict[tuple[str, str], Any] = {}
    running: list[Any] = []
    while waiting or running:
        while waiting and len(running) < args.jobs:
            key = waiting.pop(0)
            started[key], process = start(*key, work, work / "data", args.options)
            running.append((key, process))
        (task, name), process = running.pop(0)
        if process.wait():
            for _, other in running:
                other.kill()
            sys.exit(f"{task}, {name} failed: see {started[task, name] / 'output.txt'}")

    results: dict[str, dict[str, Any]] = {task: {} for task in args.tasks}
    for (task, name), folder in started.items():
        results[task][name] = read(folder)
    for task, runs in results.items():
        named = unpaired(runs)
        compare(named)
        for name, run in named.items():
            metrics = ", ".join(f"{k} {v:.3f}" for k, v in run["metrics"].items())
            verdict = "all losses finite" if run["finite"] else "NOT ALL LOSSES FINITE"
            print(f"{task:13} {name:20} distance {run['distance']:.3f}, {verdict}; {metrics}")
        if args.seeds:
            show_pairs(runs)
        halves = [run for name, run in named.items() if not name.startswith("float32")]
        if "float32, other seed" not in runs or not halves:
            continue
        apart = runs["float32, other seed"]["distance"]
        met = all(run["finite"] and run["distance"] <= apart for run in halves)
        print(
            f"{task}: as close to float32 as another seed's float32: {'met' if met else 'NOT met'}"
        )
    write(args.out, {"device": device_name("cuda"), "commit": commit(), "results": results})
    draw(results, args.picture)


if __name__ == "__main__":
    main()
