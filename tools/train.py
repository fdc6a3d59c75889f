"""Train a detector (mmdet config) or a segmenter (mmseg config).

    python tools/train.py mmdet_configs/cascade_mambavision_t.py --data-root data/coco
    python tools/train.py mmseg_configs/upernet_mambavision_t.py \
        --data-root data/ade/ADEChallengeData2016
    python tools/train.py mmdet_configs/cascade_mambavision_t_fit.py --pretrained --amp
    bash tools/dist_train.sh mmdet_configs/cascade_mambavision_t.py 8

The config's default_scope decides the task. Without a GPU the run trains in float32 on the CPU.
"""

from __future__ import annotations

import argparse
import zipfile
from pathlib import Path

from common import (
    ToolError,
    add_run_arguments,
    build_runner,
    check_data,
    check_file,
    fit_to_cpu,
    load_config,
    say,
    user_errors,
    weights_source,
)
from mmengine.config import Config

from mambavision_backbone.checkpoint import PUBLISHED, SCHEME


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="config file")
    add_run_arguments(parser)
    parser.add_argument(
        "--amp", action="store_true", help="mixed precision, where the config does not say so"
    )
    parser.add_argument(
        "--auto-scale-lr",
        action="store_true",
        help="scale the learning rate by the batch size over the config's base batch size",
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        help="go on from the newest checkpoint in the work folder, or from the one given",
    )
    parser.add_argument(
        "--pretrained",
        nargs="?",
        const="auto",
        metavar="WEIGHTS",
        help="start the backbone from the variant's published ImageNet weights, or from those "
        "given: a name of tools/weights.py list, a file or an address. The published ones are "
        "under CC-BY-NC-SA-4.0, so no config takes them unasked",
    )
    return parser.parse_args()


def apply_train_arguments(cfg: Config, args: argparse.Namespace) -> None:
    """Put the arguments of this tool into the config."""
    if args.amp and cfg.optim_wrapper.get("type", "OptimWrapper") == "OptimWrapper":
        cfg.optim_wrapper.type = "AmpOptimWrapper"
        cfg.optim_wrapper.setdefault("loss_scale", "dynamic")
    if args.auto_scale_lr:
        if "base_batch_size" not in cfg.get("auto_scale_lr", {}):
            raise ToolError("--auto-scale-lr needs auto_scale_lr.base_batch_size in the config")
        cfg.auto_scale_lr.enable = True
    if args.resume:
        found = newest_checkpoint(cfg) if args.resume == "auto" else args.resume
        if found:
            cfg.load_from, cfg.resume = found, True
    if cfg.get("load_from"):
        check_file(cfg.load_from, "checkpoint")
    backbone = cfg.get("model", {}).get("backbone", {})
    if args.pretrained and not backbone:
        raise ToolError("--pretrained needs a config with a model.backbone")
    if args.pretrained:
        backbone.init_cfg = {"type": "Pretrained", "checkpoint": pretrained(cfg, args.pretrained)}
    elif not (cfg.get("load_from") or backbone.get("init_cfg") or backbone.get("pretrained")):
        say(
            "the backbone starts from random weights: --pretrained starts it from ImageNet's, as "
            "the published results did"
        )


def pretrained(cfg: Config, wish: str) -> str:
    """The checkpoint that --pretrained asks for.

    Raises:
        ToolError: nothing was named, and the config's backbone is no published variant.
    """
    if wish != "auto":
        return weights_source(wish)
    arch = cfg.model.get("backbone", {}).get("arch", "")
    for name, file in PUBLISHED.items():
        if isinstance(arch, str) and file.arch == arch.upper():
            return SCHEME + name
    raise ToolError(
        "--pretrained needs a name or file here: model.backbone.arch of the config names no "
        "published variant"
    )


def newest_checkpoint(cfg: Config) -> str | None:
    """The newest complete checkpoint in the work folder, or None to start anew.

    mmengine notes the last checkpoint in a file, which names a missing or half-written one when the
    process was killed while saving.
    """
    files = [*Path(cfg.work_dir).glob("epoch_*.pth"), *Path(cfg.work_dir).glob("iter_*.pth")]
    for file in sorted(files, key=lambda f: f.stat().st_mtime, reverse=True):
        if zipfile.is_zipfile(file):  # its directory is written last
            return str(file)
        print(f"{file} is not complete: looking for an older checkpoint")
    return None


def main() -> None:
    """Train."""
    args = parse_args()
    with user_errors():
        cfg = load_config(args)
        apply_train_arguments(cfg, args)
        fit_to_cpu(cfg)
        check_data(cfg, "train", "val")
        build_runner(cfg, args.trust_checkpoint).train()


if __name__ == "__main__":
    main()
