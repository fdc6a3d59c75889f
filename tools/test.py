"""Evaluate a detector (mmdet config) or a segmenter (mmseg config) on its test split.

    python tools/test.py mmdet_configs/cascade_mambavision_t.py CHECKPOINT --data-root data/coco
    bash tools/dist_test.sh mmseg_configs/upernet_mambavision_t.py CHECKPOINT 8

The config's default_scope decides the task. The backbone's ImageNet file is not needed.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from common import (
    ToolError,
    add_run_arguments,
    build_runner,
    check_data,
    check_file,
    check_model_weights,
    evaluators_of,
    fit_to_cpu,
    load_config,
    say,
    user_errors,
)
from mmengine.config import Config
from mmengine.model import is_model_wrapper
from torch import Tensor

from mambavision_backbone import MambaVision
from mambavision_backbone.checkpoint import read_checkpoint, state_dict_of


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="config file")
    parser.add_argument("checkpoint", help="checkpoint file")
    add_run_arguments(parser)
    parser.add_argument(
        "--out",
        help="write the predictions: a .pkl file for detection, a folder for segmentation",
    )
    parser.add_argument("--amp", action="store_true", help="evaluate in mixed precision")
    parser.add_argument(
        "--amp-dtype",
        choices=["float16", "bfloat16"],
        default="float16" if torch.cuda.is_available() else "bfloat16",
        help="with --amp: float16 (default, GPU only) or bfloat16",
    )
    parser.add_argument(
        "--fast",
        action="store_true",
        help="fold the backbone's batch norms; on a GPU also keep its weights in half precision, "
        "replay CUDA graphs of input shapes that come again, and imply --amp",
    )
    parser.add_argument(
        "--tta",
        action="store_true",
        help="test-time augmentation: merge the predictions on several views of each image, as the "
        "config's tta_pipeline and tta_model say; of a detector the boxes alone",
    )
    parser.add_argument("--show", action="store_true", help="show the predictions in a window")
    parser.add_argument("--show-dir", help="save pictures of the predictions in this folder")
    parser.add_argument("--wait-time", type=float, default=2, help="seconds a picture is shown")
    return parser.parse_args()


def apply_test_arguments(cfg: Config, args: argparse.Namespace) -> None:
    """Put the arguments of this tool into the config."""
    cfg.load_from = args.checkpoint
    if "backbone" in cfg.model:
        cfg.model.backbone.init_cfg = None  # the checkpoint holds the backbone
    if args.tta:
        apply_tta(cfg)
    if args.out and cfg.default_scope == "mmdet":
        if Path(args.out).suffix not in (".pkl", ".pickle"):
            raise ToolError(f"--out {args.out!r}: predictions of a detector go to a .pkl file")
        cfg.test_evaluator = [
            *evaluators_of(cfg, "test"),
            dict(type="DumpDetResults", out_file_path=args.out),
        ]
    elif args.out:
        for evaluator in evaluators_of(cfg, "test"):
            evaluator["output_dir"] = args.out
    if args.fast:
        if args.tta:
            raise ToolError("--fast and --tta do not go together: leave one out")
        args.amp |= torch.cuda.is_available()
        dtype = args.amp_dtype if args.amp else "float32"
        cfg.custom_hooks.append({"type": "FastInferenceHook", "dtype": dtype})
    if args.amp:
        if args.amp_dtype == "float16" and not torch.cuda.is_available():
            raise ToolError("--amp-dtype float16 needs a GPU: a CPU has bfloat16")
        cfg.test_cfg.fp16 = True  # mmengine's name for mixed precision of any dtype
        torch.set_autocast_dtype("cuda", getattr(torch, args.amp_dtype))
    if args.show or args.show_dir:
        hook = cfg.default_hooks.get("visualization")
        if hook is None:
            raise ToolError("--show and --show-dir need default_hooks.visualization in the config")
        hook.update(draw=True, show=args.show, wait_time=args.wait_time)
        if cfg.default_scope == "mmdet":
            hook.test_out_dir = args.show_dir
        else:
            hook.interval = 1
            cfg.visualizer.save_dir = args.show_dir


def apply_tta(cfg: Config) -> None:
    """Test on several views of each image, as mmdet's and mmseg's own tools do.

    ``tta_cfg_options`` are settings that the config changes for it.
    """
    missing = [key for key in ("tta_model", "tta_pipeline") if key not in cfg]
    if missing:
        raise ToolError(
            f"--tta needs {' and '.join(missing)} in the config; the files in _base_/datasets of "
            "the shipped configs show them"
        )
    for key, value in cfg.get("tta_cfg_options", {}).items():
        say(f"--tta: {key}={value}")
        cfg.merge_from_dict({key: value})
    cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
    cfg.model = {**cfg.tta_model, "module": cfg.model}


def without_removed_parts(checkpoint: Mapping[str, Any], cfg: Config) -> dict[str, Tensor]:
    """The weights but those of parts of the model that ``tta_cfg_options`` takes away."""
    removed = tuple(
        key.removeprefix("model.") + "."
        for key, value in cfg.get("tta_cfg_options", {}).items()
        if value is None
    )
    return {
        k: v
        for k, v in state_dict_of(checkpoint).items()
        if not k.removeprefix("module.").startswith(removed)
    }


def main() -> None:
    """Evaluate."""
    args = parse_args()
    with user_errors():
        check_file(args.checkpoint, "checkpoint")
        cfg = load_config(args)
        apply_test_arguments(cfg, args)
        fit_to_cpu(cfg)
        check_data(cfg, "test")
        runner = build_runner(cfg, args.trust_checkpoint)
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        checkpoint = read_checkpoint(args.checkpoint, trust=args.trust_checkpoint)
        if args.tta:
            model, checkpoint = model.module, without_removed_parts(checkpoint, cfg)
        check_model_weights(model, checkpoint, args.checkpoint)
        if args.fast and not isinstance(getattr(model, "backbone", None), MambaVision):
            raise ToolError("--fast needs a config whose model.backbone is a MambaVision")
        runner.test()


if __name__ == "__main__":
    main()
