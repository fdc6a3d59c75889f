"""What train.py and test.py share: reading a config and fitting it to the data and the machine."""

from __future__ import annotations

import argparse
import errno
import importlib.util
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.logging import print_log
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from torch import Tensor, nn

from mambavision_backbone import MambaVision
from mambavision_backbone.checkpoint import (
    PUBLISHED,
    SCHEME,
    WeightsError,
    backbone_weights,
    check_weights,
    state_dict_of,
)

LIBRARIES = {
    "mmdet": "pip install onedl-mmdetection (or mmdet)",
    "mmseg": "pip install onedl-mmsegmentation (or mmsegmentation)",
}
DATA_HELP = {
    "mmdet": "COCO 2017 (train2017, val2017 and annotations_trainval2017 of cocodataset.org)",
    "mmseg": "ADE20K (ADEChallengeData2016.zip of the MIT Scene Parsing Benchmark)",
}
SHOWN = 5  # tensors named in a message
HOOKS = ("BFloat16DetectionHook", "CheckBackboneWeightsHook", "NameBadSampleHook")


class ToolError(Exception):
    """Something the user can mend; shown as one message without a traceback."""


@contextmanager
def user_errors() -> Iterator[None]:
    """End the program with the message alone where the user can mend what is wrong."""
    try:
        yield
    except (ToolError, WeightsError, FileNotFoundError, PermissionError) as error:
        raise SystemExit(f"error: {error}") from error
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise SystemExit(f"error: the disk is full: {error}. Free some and resume") from error


def positive(text: str) -> int:
    """An argparse type: a whole number from 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return number


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of every tool that builds a runner."""
    parser.add_argument(
        "--work-dir", help="folder for logs and checkpoints (default: work_dirs/<config's name>)"
    )
    parser.add_argument(
        "--data-root",
        help="folder of the data set, in place of the config's data_root in every split",
    )
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=DictAction,
        help="override settings of the config, e.g. train_dataloader.batch_size=4 "
        'model.backbone.window_size="(8,8,64,32)" (no spaces inside a value)',
    )
    parser.add_argument(
        "--launcher",
        choices=["none", "pytorch", "slurm", "mpi"],
        default="none",
        help="how the processes of a distributed run were started (dist_train.sh says pytorch)",
    )
    add_trust_argument(parser)
    # torch.distributed.launch passes it; torchrun sets the variable instead
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)


def add_trust_argument(parser: argparse.ArgumentParser) -> None:
    """The argument of every tool that reads checkpoints."""
    parser.add_argument(
        "--trust-checkpoint",
        action="store_true",
        help="unpickle whatever the checkpoint holds; without it, one that holds more than tensors "
        "and plain data is refused. RISK: a checkpoint can run any program as you, so only for "
        "files that you or people you trust have made (docs/security.md)",
    )


def load_config(args: argparse.Namespace) -> Config:
    """Read the config named on the command line and apply the common arguments to it."""
    os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    cfg = read_config(args.config, args.cfg_options)
    cfg.launcher = args.launcher
    if args.work_dir:
        cfg.work_dir = args.work_dir
    elif cfg.get("work_dir") is None:
        cfg.work_dir = os.path.join("work_dirs", Path(args.config).stem)
    if args.data_root:
        set_data_root(cfg, args.data_root)
    _add_hooks(cfg)
    return cfg


def build_runner(cfg: Config, trust_checkpoint: bool) -> Runner:
    """The config's runner; by default, and wherever a checkpoint is read, a SafeRunner.

    Raises:
        ToolError: another kind of runner that would read a checkpoint in its own way.
    """
    kind = cfg.setdefault("runner_type", "SafeRunner")
    reads = cfg.get("load_from") or cfg.get("resume")
    if kind != "SafeRunner" and reads and not trust_checkpoint:
        raise ToolError(
            f"runner_type={kind!r} reads checkpoints without the safeguards of SafeRunner: leave "
            "runner_type out, or give --trust-checkpoint for a file that you trust"
        )
    runner = RUNNERS.build(cfg)
    runner.trust_checkpoint = trust_checkpoint  # not in the config, which is kept for later runs
    return runner


def read_config(path: str, options: dict[str, Any] | None = None) -> Config:
    """Read a config and make sure that the library it is written for is installed."""
    if not os.path.isfile(path):
        raise ToolError(f"config {path!r} does not exist (relative to {os.getcwd()})")
    cfg = Config.fromfile(path, import_custom_modules=False)
    if options:
        cfg.merge_from_dict(options)
    scope = cfg.get("default_scope", "mmengine")
    if scope in LIBRARIES and importlib.util.find_spec(scope) is None:
        raise ToolError(
            f"{path} is a config for {scope}, which is not installed: {LIBRARIES[scope]}"
        )
    if cfg.get("custom_imports"):
        from mmengine.utils import import_modules_from_strings

        import_modules_from_strings(**cfg.custom_imports)
    return cfg


def _datasets(cfg: Config, split: str) -> Iterator[ConfigDict]:
    """The innermost data sets of a split's loader."""
    pending = [cfg.get(f"{split}_dataloader", {}).get("dataset")]
    while pending:
        dataset = pending.pop()
        if isinstance(dataset, ConfigDict):
            pending.append(dataset.get("dataset"))
            pending.extend(dataset.get("datasets", []))
            if "dataset" not in dataset and "datasets" not in dataset:
                yield dataset


def evaluators_of(cfg: Config, split: str) -> list[dict[str, Any]]:
    """A split's evaluators, of which a config may give none, one or a list."""
    evaluators = cfg.get(f"{split}_evaluator") or []
    return evaluators if isinstance(evaluators, list) else [evaluators]


def set_data_root(cfg: Config, root: str) -> None:
    """Put every split's data set, and the evaluators' annotation files, under another folder."""
    for split in ("train", "val", "test"):
        old_roots = []
        for dataset in _datasets(cfg, split):
            old_roots.append(dataset.get("data_root"))
            dataset.data_root = root
        for evaluator in evaluators_of(cfg, split):
            annotations = evaluator.get("ann_file") or ""
            for old in filter(None, old_roots):
                if Path(annotations).is_relative_to(old):
                    evaluator["ann_file"] = os.path.join(root, os.path.relpath(annotations, old))


def check_data(cfg: Config, *splits: str) -> None:
    """Make sure, before the model is built, that the data of these splits are there.

    Raises:
        ToolError: names the first path that is missing or empty, and how to get the data.
    """
    for split in splits:
        if cfg.get(f"{split}_cfg") is None:
            continue
        for dataset in _datasets(cfg, split):
            root = dataset.get("data_root") or ""
            paths = [root] if root else []
            if dataset.get("ann_file"):
                paths.append(os.path.join(root, dataset.ann_file))
            for prefix in (dataset.get("data_prefix") or {}).values():
                if isinstance(prefix, str):
                    paths.append(os.path.join(root, prefix))
            for path in paths:
                empty = os.path.isdir(path) and next(os.scandir(path), None) is None
                if "://" in path or (os.path.exists(path) and not empty):
                    continue
                source = DATA_HELP.get(cfg.get("default_scope", ""), "the data set")
                raise ToolError(
                    f"{split} data: {path!r} {'is empty' if empty else 'does not exist'} "
                    f"(relative to {os.getcwd()}). Get {source} and give its folder with "
                    "--data-root, or draw a small set with tools/make_shapes.py"
                )


def check_file(path: str, what: str) -> None:
    """Make sure that a local file exists."""
    if "://" not in path and not os.path.isfile(os.path.expanduser(path)):
        raise ToolError(f"{what} {path!r} does not exist (relative to {os.getcwd()})")


def weights_source(text: str) -> str:
    """A path or address as it is; a published name with its scheme."""
    if "://" in text or os.path.exists(os.path.expanduser(text)):
        return text
    names = {name.lower() for name in PUBLISHED}
    looks_like_path = os.sep in text or Path(text).suffix in (".pth", ".pt", ".tar", ".safetensors")
    if text.partition("@")[0].lower() in names or not looks_like_path:
        return SCHEME + text
    return text


def check_model_weights(
    model: nn.Module, checkpoint: Mapping[str, Any], path: str
) -> dict[str, Tensor]:
    """Make sure that a checkpoint fits a whole detector or segmenter; mmengine only logs misfits.

    Returns:
        The state dict, without a ``module.`` prefix.

    Raises:
        WeightsError: the backbone's tensors do not fit.
        ToolError: other tensors do not fit.
    """
    state = {k.removeprefix("module."): v for k, v in state_dict_of(checkpoint).items()}
    backbone = getattr(model, "backbone", None)
    # a config may have dropped the auxiliary head, which is for training
    may_add: tuple[str, ...] = ("auxiliary_head.",)
    if isinstance(backbone, MambaVision):
        check_weights(backbone, backbone_weights(state), path)
        may_add += ("backbone.",)  # what is too much there was found by check_weights
    own = model.state_dict()
    faults = [
        f"{k}: file {tuple(v.shape)}, model {tuple(own[k].shape)}"
        for k, v in state.items()
        if k in own and v.shape != own[k].shape
    ]
    faults += [
        f"{k}: missing" for k in own if k not in state and not k.endswith("num_batches_tracked")
    ]
    faults += [f"{k}: left over" for k in state if k not in own and not k.startswith(may_add)]
    if faults:
        more = f" and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise ToolError(
            f"{path!r} does not fit the config's model: {'; '.join(faults[:SHOWN])}{more}. Give "
            "the config that the checkpoint was trained with"
        )
    return state


def _add_hooks(cfg: Config) -> None:
    """Give configs of other projects the plugin's hooks too."""
    hooks = cfg.get("custom_hooks") or []
    present = {hook.get("type") for hook in hooks}
    cfg.custom_hooks = [*hooks, *({"type": name} for name in HOOKS if name not in present)]


def fit_to_cpu(cfg: Config) -> None:
    """Without a GPU, replace what only a GPU can do, saying each in one line."""
    if torch.cuda.is_available():
        return
    wrapper = cfg.get("optim_wrapper") or {}
    if wrapper.get("type") == "AmpOptimWrapper":
        for key in ("loss_scale", "dtype", "use_fsdp"):
            wrapper.pop(key, None)
        wrapper["type"] = "OptimWrapper"
        say("no GPU: training in float32 (AmpOptimWrapper needs one)")
    if _replace_type(cfg.model, "SyncBN", "BN"):
        say("no GPU: SyncBN replaced by BN")
    if cfg.launcher not in ("none", "pytorch"):
        raise ToolError(
            f"no GPU: --launcher {cfg.launcher} needs GPUs, tools/dist_train.sh works without"
        )
    if cfg.launcher == "pytorch":
        # mmengine's own start-up calls CUDA; a group that is already there is used as it is
        cfg.setdefault("env_cfg", {})["dist_cfg"] = {"backend": "gloo"}
        cfg.model_wrapper_cfg = {
            "type": "MMDistributedDataParallel",
            "device_ids": None,  # mmengine's default is a GPU's number
            "broadcast_buffers": False,
            "find_unused_parameters": cfg.get("find_unused_parameters", False),
        }
        torch.distributed.init_process_group("gloo")
        say("no GPU: processes talk through gloo")


def _replace_type(node: Any, old: str, new: str) -> int:
    """Replace ``type=old`` everywhere below a node; returns how often."""
    if isinstance(node, dict):
        count = sum(_replace_type(value, old, new) for value in node.values())
        if node.get("type") == old:
            node["type"] = new
            count += 1
        return count
    if isinstance(node, list | tuple):
        return sum(_replace_type(value, old, new) for value in node)
    return 0


def say(message: str) -> None:
    """Log one line, once in a distributed run."""
    if int(os.environ.get("RANK", 0)) == 0:
        print_log(message, logger="current")
