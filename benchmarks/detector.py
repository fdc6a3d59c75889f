"""Time whole detectors and segmenters, and their memory, beside peers.

    python benchmarks/detector.py
    python benchmarks/detector.py --dtype bfloat16 --tasks segmentation
    python benchmarks/detector.py --device cpu --size 64 96 --batch 1 --rounds 1 --warmup 0

Models and optimizers are those of this repository's configs, with random weights, on random images;
only the backbone differs. A training iteration is mmengine's: preprocessing, forward, losses,
backward, AdamW. Inference is of one image, with as many detections as the config allows. As at the
start of training only the true boxes are worth a mask: 7 an image, where later up to 128 are.

Every round runs all networks of a task once, in turn, so that a drift of the machine's speed meets
all of them; the median over the rounds is reported. The peak is the most memory that PyTorch
allocates on the GPU, and what CUDA graphs keep for themselves, less what the other networks hold.
Writes a JSON file and prints a table.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from common import RESULTS, commit, device_name, graph_bytes, show, spread, write
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import InstanceData, PixelData

from mambavision_backbone import MambaVision
from mambavision_backbone.engine import BFloat16DetectionHook

ROOT = RESULTS.parents[1]
TASKS = {  # name: (library, config, images of a training iteration, their height and width)
    "detection": ("mmdet", "mmdet_configs/cascade_mambavision_t_fit.py", 2, (800, 1344)),
    "segmentation": ("mmseg", "mmseg_configs/upernet_mambavision_t_fit.py", 8, (512, 512)),
}
GRAPHED = "T fit, graphs"
NETWORKS: dict[str, dict[str, Any]] = {  # what differs from the config's backbone
    "T fit": {"graphs": 0},
    GRAPHED: {"graphs": 8},
    "T pad": {"window_mode": "pad", "graphs": 0},
    "T fit, with_cp": {"with_cp": True, "graphs": 0},
    "ResNet-50": {"_delete_": True, "type": "ResNet", "depth": 50},
    "Swin-T": {"_delete_": True, "type": "SwinTransformer", "drop_path_rate": 0.2},
}
CHANNELS = {"ResNet-50": [256, 512, 1024, 2048], "Swin-T": [96, 192, 384, 768]}
FROZEN = {"frozen_stages": 1, "norm_eval": True}  # in mmdet's ResNets, not in mmseg's
MODES = ["training", "inference"]
# The goals: task, network, network it is compared with, highest ratio of the times of a training
# iteration, highest peak of one in MiB.
GOALS = [
    *[("detection", network, "ResNet-50", 1.10, 3500) for network in ("T fit", GRAPHED)],
    *[("segmentation", network, "Swin-T", 0.90, 8500) for network in ("T fit", GRAPHED)],
]
BOXES = 7  # of an image, as in COCO

Batch = dict[str, list[Any]]


def read_config(task: str, network: str, hw: tuple[int, int]) -> Config:
    """The task's config with the network as its backbone."""
    cfg = Config.fromfile(ROOT / TASKS[task][1])
    backbone = NETWORKS[network]
    if (task, network) == ("detection", "ResNet-50"):
        backbone = backbone | FROZEN
    options: dict[str, Any] = {"model.backbone": backbone}
    channels = CHANNELS.get(network)
    if channels and task == "detection":
        options["model.neck.in_channels"] = channels
    elif channels:
        options["model.decode_head.in_channels"] = channels
        options["model.auxiliary_head.in_channels"] = channels[2]
    if task == "segmentation":
        options["model.data_preprocessor.size"] = hw
    cfg.merge_from_dict(options)
    return cfg


def build(cfg: Config, device: str, dtype: str) -> tuple[Any, Any]:
    """The model and its optimizer."""
    torch.manual_seed(0)
    optimizer = cfg.optim_wrapper
    optimizer.optimizer.lr = 0.0  # learning the batch would change how many boxes are worth a mask
    if dtype == "float32":
        optimizer.type = "OptimWrapper"
        del optimizer.loss_scale
    else:
        optimizer.dtype = dtype
    if dtype == "float16":
        optimizer.loss_scale = {"init_scale": 256.0}  # large ones overflow with random weights
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = revert_sync_batchnorm(MODELS.build(cfg.model))  # there is one process
        model.init_weights()
        wrapper = build_optim_wrapper(model.to(device), optimizer)
    if cfg.default_scope == "mmdet":
        BFloat16DetectionHook().before_run(SimpleNamespace(model=model))
        for head in model.roi_head.bbox_head:
            head.fc_cls.bias.data[0] = 5.0  # sure of every box; random weights would find none
    return model, wrapper


def make_batch(task: str, images: int, hw: tuple[int, int]) -> Batch:
    """Random images and what is to be found in them, as a data loader gives them."""
    generator = torch.Generator().manual_seed(0)
    batch: Batch = {"inputs": [], "data_samples": []}
    for _ in range(images):
        image = torch.randint(0, 256, (3, *hw), dtype=torch.uint8, generator=generator)
        sample = boxes_and_masks(hw, generator) if task == "detection" else labels(hw, generator)
        sample.set_metainfo({"img_shape": hw, "ori_shape": hw, "scale_factor": (1.0, 1.0)})
        batch["inputs"].append(image)
        batch["data_samples"].append(sample)
    return batch


def boxes_and_masks(hw: tuple[int, int], generator: torch.Generator) -> Any:
    """Boxes whose sides are 5 to 50 % of the image's, filled by their masks."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks

    size = 0.05 + 0.45 * torch.rand(BOXES, 2, generator=generator)
    corner = (1 - size) * torch.rand(BOXES, 2, generator=generator)
    boxes = torch.cat([corner, corner + size], 1) * torch.tensor([*hw[::-1], *hw[::-1]])
    masks = np.zeros((BOXES, *hw), np.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y1 : y2 + 1, x1 : x2 + 1] = 1
    classes = torch.randint(0, 80, (BOXES,), generator=generator)
    found = InstanceData(bboxes=boxes, labels=classes, masks=BitmapMasks(masks, *hw))
    return DetDataSample(gt_instances=found)


def labels(hw: tuple[int, int], generator: torch.Generator) -> Any:
    """A class for every pixel, but for the upper rows, which are to be ignored."""
    from mmseg.structures import SegDataSample

    classes = torch.randint(0, 150, (1, *hw), generator=generator)
    classes[:, : hw[0] // 8] = 255
    return SegDataSample(gt_sem_seg=PixelData(data=classes))


def run(model: Any, wrapper: Any, mode: str, batch: Batch, dtype: str) -> Any:
    """One training iteration, which returns the losses, or one inference, which returns samples."""
    if mode == "training":
        return model.train_step(batch, wrapper)
    half = dtype != "float32"
    with torch.no_grad(), torch.autocast("cuda", getattr(torch, dtype)) if half else nullcontext():
        return model.test_step(batch)


def own_bytes(model: Any, wrapper: Any, mode: str) -> int:
    """What a network holds on the GPU between two runs; inference needs no optimizer."""
    states = wrapper.optimizer.state.values() if mode == "training" else []
    held = [*model.parameters(), *model.buffers(), *(t for s in states for t in s.values())]
    if isinstance(model.backbone, MambaVision):
        held += model.backbone._graphs.buffers()
    return sum(t.nbytes for t in held if t.is_cuda)


def measure(task: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Times and peaks of one task."""
    _, config, images, hw = TASKS[task]
    hw = tuple(args.size or hw)
    count = {"training": args.batch or images, "inference": 1}
    if task == "segmentation":  # one value a channel is too few for its batch norms
        count["training"] = max(count["training"], 2)
    batches = {mode: make_batch(task, count[mode], hw) for mode in args.modes}
    torch.backends.cudnn.benchmark = Config.fromfile(ROOT / config).env_cfg.cudnn_benchmark
    models = {}
    rows: list[dict[str, Any]] = []
    for network in args.networks:
        show(f"{task}: building {network}")
        models[network] = build(read_config(task, network, hw), args.device, args.dtype)
        row = {"task": task, "network": network}
        rows += [{**row, "mode": m, "shape": [count[m], 3, *hw], "times_s": []} for m in args.modes]

    for round_ in range(1 - args.warmup, args.rounds + 1):
        for row in rows:
            mode = row["mode"]
            show(f"{task}: round {round_}/{args.rounds}, {mode}, {row['network']}")
            model, wrapper = models[row["network"]]
            model.train(mode == "training")
            if args.device == "cuda":
                others = torch.cuda.memory_allocated() - own_bytes(model, wrapper, mode)
                torch.cuda.reset_peak_memory_stats()
                torch.cuda.synchronize()
            start = time.perf_counter()
            result = run(model, wrapper, mode, batches[mode], args.dtype)
            if args.device == "cuda":
                torch.cuda.synchronize()
            if round_ < 1:
                continue  # this warmed up
            row["times_s"].append(time.perf_counter() - start)
            if args.device == "cuda":
                graphs = graph_bytes() if row["network"] == GRAPHED and mode == "training" else 0
                peak = (torch.cuda.max_memory_allocated() - others + graphs) / 2**20
                row["peak_mib"] = max(peak, row.get("peak_mib", 0.0))
            if mode == "training":
                row["loss"] = result["loss"].item()
                steps = [int(s["step"]) for s in wrapper.optimizer.state.values()]
                if max(steps, default=0) < round_:  # the loss scaler left the others out
                    sys.exit(f"{row['network']}: no finite gradients, give a higher --warmup")
            elif task == "detection":
                row["detections"] = len(result[0].pred_instances)
    for row in rows:
        times = row.pop("times_s")
        row |= {**spread(times), "runs": len(times)}
    return sorted(rows, key=lambda row: MODES.index(row["mode"]))


def check_goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The goals' ratios and peaks, where their networks were trained."""
    trained = {(row["task"], row["network"]): row for row in rows if row["mode"] == "training"}
    goals: list[dict[str, Any]] = []
    for task, a, b, highest, most in GOALS:
        row, other = trained.get((task, a)), trained.get((task, b))
        goal = {"task": task, "network": a}
        if row and other:
            ratio = row["median_s"] / other["median_s"]
            goals.append({**goal, "over": b, "ratio": ratio, "goal": highest})
        if row and "peak_mib" in row:
            goals.append({**goal, "peak_mib": row["peak_mib"], "goal": most})
    return goals


def print_table(rows: list[dict[str, Any]], goals: list[dict[str, Any]]) -> None:
    """Every row, then the goals."""
    print(
        f"{'task':14}{'mode':11}{'input':14}{'network':16}{'median ms':>10}{'min':>9}{'max':>9}"
        f"{'runs':>6}{'peak MiB':>10}"
    )
    for row in rows:
        size = "×".join(str(n) for n in row["shape"] if n != 3)
        times = "".join(f"{1e3 * row[k]:9.1f}" for k in ("median_s", "min_s", "max_s"))
        peak = f"{row['peak_mib']:10.0f}" if "peak_mib" in row else ""
        name = f"{row['task']:14}{row['mode']:11}{size:14}{row['network']:16}"
        print(f"{name} {times}{row['runs']:6}{peak}")
    for goal in goals:
        name = f"{goal['task']}, training: {goal['network']}"
        got = f"peak {goal['peak_mib']:.0f} MiB" if "peak_mib" in goal else ""
        got = got or f"/ {goal['over']} = {goal['ratio']:.2f}"
        print(f"{name} {got} (goal: at most {goal['goal']})")


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--dtype", help="float16 (a GPU's default), bfloat16, float32 (a CPU's)")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--modes", nargs="+", default=MODES, choices=MODES)
    parser.add_argument("--rounds", type=int, default=20, help="counted runs of each network")
    parser.add_argument("--warmup", type=int, default=5, help="runs before them")
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="of the images")
    parser.add_argument("--batch", type=int, help="of training (UPerNet's batch norms need 2)")
    parser.add_argument(
        "--out", type=Path, help="JSON file (default: in benchmarks/results, if all runs on a GPU)"
    )
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device: give --device cpu, and a small --size")
    if args.device == "cpu" and args.dtype not in (None, "float32"):
        parser.error("mmengine's mixed precision is for GPUs: leave --dtype out")
    args.dtype = args.dtype or ("float16" if args.device == "cuda" else "float32")
    return args


def main() -> None:
    """Measure, print, write."""
    args = parse_args()
    MMLogger.get_instance("mmengine", log_level="ERROR")  # else every weight's start is reported
    facts = {"device": device_name(args.device), "threads": torch.get_num_threads()}
    facts |= {"PYTORCH_CUDA_ALLOC_CONF": os.environ.get("PYTORCH_CUDA_ALLOC_CONF")}
    facts |= {"dtype": args.dtype, "torch": torch.__version__, "commit": commit()}
    rows = []
    for task in args.tasks:
        library = TASKS[task][0]
        if importlib.util.find_spec(library) is None:
            print(f"{library} is not installed: {task} is left out")
            continue
        rows += measure(task, args)
        facts[library] = sys.modules[library].__version__
    goals = check_goals(rows)
    show("")
    print(", ".join(f"{k} {v}" for k, v in facts.items()))
    print_table(rows, goals)
    everything = len(rows) == len(TASKS) * len(NETWORKS) * len(MODES)
    if args.device == "cuda" and everything and not (args.size or args.batch):
        args.out = args.out or RESULTS / f"detector_{args.dtype}.json"
    if args.out:
        write(args.out, {**facts, "rows": rows, "goals": goals})


if __name__ == "__main__":
    main()
