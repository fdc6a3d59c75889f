"""How much sooner a pretrained backbone gets a detector to its mark, on drawn shapes.

    python benchmarks/finetune.py --work-dir work_dirs/finetune

Trains the demo's Cascade Mask R-CNN on one set of drawn images and takes its backbone out; then
trains the detector on another set: from nothing for the demo's two epochs, and from the pretrained
backbone for one. A third run has the fine-tuning's settings and no pretraining, to tell the two
apart. Each is done with three seeds; all are measured on the same held-out images. Every step is
one of tools/, called as a user calls it; a step that is done is not repeated. Writes a JSON file.
Takes about 40 minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import RESULTS, commit, device_name, read_logs, write

ROOT = Path(__file__).resolve().parent.parent
DETECTOR = ROOT / "mmdet_configs/cascade_mambavision_demo.py"
IMAGES, PRETRAINING_IMAGES, BATCH = 1200, 2400, 4
EPOCHS = {"pretrained": 5, "from nothing": 2, "fine-tuned": 1, "control": 1}
SEEDS = (0, 1, 2)
# The heads are new and have few steps: a high rate, held for half of them.
SHORT = """\
_base_ = {base!r}
iterations = {iterations}
param_scheduler = [
    dict(type="LinearLR", start_factor=0.05, by_epoch=False, begin=0, end=20),
    dict(
        type="LinearLR", start_factor=1.0, end_factor=0.01, by_epoch=False,
        begin=iterations // 2, end=iterations,
    ),
]
optim_wrapper = dict(optimizer=dict(lr=2.5e-3))
"""


def run(*command: str | Path) -> None:
    """Run one of tools/; its output is shown."""
    print("+", *command, flush=True)
    subprocess.run([sys.executable, *map(str, command)], check=True, cwd=ROOT)


def draw(folder: Path, train: int, val: int, seed: int) -> Path:
    """Draw a set of images."""
    sizes = ["--train", str(train), "--val", str(val), "--size", "128", "--seed", str(seed)]
    run(ROOT / "tools/make_shapes.py", folder, *sizes)
    return folder


def detect(
    folder: Path, data: Path, epochs: int, seed: int, config: Path = DETECTOR, *options: str
) -> dict[str, float]:
    """Train a detector; returns what was measured at the end."""
    if not (folder / f"epoch_{epochs}.pth").exists():
        own = [f"param_scheduler.1.end={epochs}"] if config == DETECTOR else []
        run(
            *[ROOT / "tools/train.py", config, "--data-root", data / "coco"],
            *["--work-dir", folder, "--resume", "--cfg-options", f"randomness.seed={seed}"],
            *[f"train_cfg.max_epochs={epochs}", f"train_cfg.val_interval={epochs}", *own, *options],
        )
    last = [row for row in read_logs(folder) if "coco/bbox_mAP" in row][-1]
    return {"box": last["coco/bbox_mAP"], "mask": last["coco/segm_mAP"]}


def main() -> None:
    """Train all of it and compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work-dir", type=Path, default=ROOT / "work_dirs/finetune")
    parser.add_argument("--out", type=Path, default=RESULTS / "finetune.json")
    args = parser.parse_args()
    work = args.work_dir.resolve()
    own = draw(work / "data", IMAGES, 200, seed=0)
    other = draw(work / "other", PRETRAINING_IMAGES, 50, seed=1)
    short = work / "short.py"
    iterations = {name: epochs * IMAGES // BATCH for name, epochs in EPOCHS.items()}
    iterations["pretrained"] = EPOCHS["pretrained"] * PRETRAINING_IMAGES // BATCH
    short.write_text(SHORT.format(base=str(DETECTOR), iterations=iterations["fine-tuned"]))

    epochs = EPOCHS["pretrained"]
    runs = {"pretrained": [detect(work / "pretrained", other, epochs, seed=0)]}
    backbone = work / "pretrained/backbone.safetensors"
    run(ROOT / "tools/weights.py", "convert", work / f"pretrained/epoch_{epochs}.pth", backbone)
    settings: dict[str, list[Any]] = {
        "from nothing": [],
        "fine-tuned": [
            short,
            "model.backbone.init_cfg.type=Pretrained",
            f"model.backbone.init_cfg.checkpoint={backbone}",
            "model.backbone.frozen_stages=2",
            "optim_wrapper.paramwise_cfg.decay_rate=0.9",
        ],
        "control": [short],
    }
    for name, own_settings in settings.items():
        runs[name] = [
            detect(
                work / f"{name}_{seed}".replace(" ", "_"), own, EPOCHS[name], seed, *own_settings
            )
            for seed in SEEDS
        ]
    results = {name: {"iterations": iterations[name], "runs": rows} for name, rows in runs.items()}
    write(args.out, {"device": device_name("cpu"), "commit": commit(), **results})
    for name, rows in runs.items():
        each = [", ".join(f"{row[key]:.3f}" for row in rows) for key in ("box", "mask")]
        print(f"{name:<13}{iterations[name]:>5} iterations: box mAP {each[0]}; mask mAP {each[1]}")
    pairs = zip(runs["fine-tuned"], runs["from nothing"], strict=True)
    met = all(tuned[key] >= scratch[key] for tuned, scratch in pairs for key in ("box", "mask"))
    print(f"goal: at least the same mAP in half the iterations: {'met' if met else 'NOT met'}")


if __name__ == "__main__":
    main()
