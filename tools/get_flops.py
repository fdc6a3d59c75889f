"""Count parameters and FLOPs of a backbone, detector or segmenter, part by part.

    python tools/get_flops.py --arch T
    python tools/get_flops.py --arch B --window-mode fit --shape 800 1280
    python tools/get_flops.py mmdet_configs/cascade_mambavision_t.py
    python tools/get_flops.py mmseg_configs/upernet_mambavision_t.py --shape 512 512 --json t.json

Nothing is computed (PyTorch's meta device), so large inputs cost neither time nor memory, and no
weights are needed. What is counted: the forward pass of one image, as in testing.

  - Convolutions, linear layers and attention's two matrix products: 1 MAC = 2 FLOPs. Published
    "GMACs", and most "GFLOPs" of papers, are the MACs column.
  - The selective scan: 9 FLOPs per state element, 1 per token and channel: docs/selective_scan.md.
  - Norms, activations, interpolation, RoIAlign and NMS are not counted; they are small.
  - The published figures of MambaVision's classifiers leave out attention's two matrix products,
    as many counters do: compare them with "total without attention".
  - A two-stage detector's box heads see as many proposals, its mask heads as many detections, as
    the config's test_cfg allows in one image (usually 1000 and 100).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import ToolError, positive, read_config, user_errors
from mmengine.config import Config, DictAction
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mambavision_backbone import VARIANTS, MambaVision
from mambavision_backbone.layers.attention import Attention
from mambavision_backbone.layers.windows import WINDOW_MODES

# The image sizes that papers count at.
SHAPES = {"mmdet": (800, 1280), "mmseg": (512, 2048)}
BACKBONE_STRIDE = 16  # of stage 3, whose one window covers a classification image
LINEAR = ("aten.addmm", "aten.mm")  # what a linear layer is counted as


@dataclass
class Part:
    """Parameters and FLOPs of one part; ``flops`` is None for what runs in training only."""

    name: str
    params: int
    flops: int | None


@dataclass
class Count:
    """Everything counted for one image.

    Attributes:
        parts: from stem to heads.
        scan: FLOPs of the selective scans, contained in the parts.
        attention: FLOPs of the backbone's two attention products, contained in the parts.
    """

    parts: list[Part] = field(default_factory=list)
    scan: int = 0
    attention: int = 0

    @property
    def params(self) -> int:
        """Parameters of all parts."""
        return sum(part.params for part in self.parts)

    @property
    def flops(self) -> int:
        """FLOPs of all parts."""
        return sum(part.flops or 0 for part in self.parts)


def count_backbone(backbone: nn.Module, hw: tuple[int, int]) -> tuple[Count, tuple[Tensor, ...]]:
    """Count a backbone, a MambaVision stage by stage.

    Args:
        backbone: on the meta device, in eval mode.
        hw: height and width of the image in pixels.

    Returns:
        The count, and the backbone's maps (without data).
    """
    channels = getattr(backbone, "in_channels", 3)
    maps, flops = _run(backbone, torch.empty(1, channels, *hw, device="meta"))
    if not isinstance(backbone, MambaVision):
        return Count([_part("backbone", backbone, flops)]), maps
    by_stage: list[tuple[str, str, Any]] = [("stem", "patch_embed", backbone.patch_embed)]
    for i, level in enumerate(backbone.levels):
        by_stage.append((f"stage {i + 1}", f"levels.{i}", level))
        if level.downsample is not None:
            by_stage.append((f"downsample {i + 1}", f"levels.{i}.downsample", level.downsample))
    count = Count(scan=sum(v for k, v in flops[""].items() if "selective_scan" in str(k)))
    for title, name, module in by_stage:
        params = _params(module)
        if isinstance(getattr(module, "downsample", None), nn.Module):
            params -= _params(module.downsample)  # the backbone calls it: a part of its own
        count.parts.append(Part(title, params, _total(flops, name)))
    norms = [f"outnorm{i}" for i in backbone.out_indices]
    params = sum(_params(getattr(backbone, name)) for name in norms)
    count.parts.append(Part("feature norms", params, sum(_total(flops, name) for name in norms)))
    for name, module in backbone.named_modules():
        if isinstance(module, Attention):
            products = {k: v for k, v in flops.get(name, {}).items() if str(k) not in LINEAR}
            count.attention += sum(products.values())
    return count, maps


def count_model(model: Any, hw: tuple[int, int]) -> Count:
    """Count a detector or segmenter.

    Args:
        model: on the meta device, in eval mode, without SyncBN.
        hw: height and width of the image in pixels.

    Raises:
        ToolError: the model has a structure that cannot be counted part by part.
    """
    count, maps = count_backbone(model.backbone, hw)
    if getattr(model, "with_neck", False):
        maps, flops = _run(model.neck, maps)
        count.parts.append(_part("neck", model.neck, flops))
    if hasattr(model, "rpn_head"):
        count.parts.append(_part("rpn head", model.rpn_head, _run_head(model.rpn_head, maps)))
        count.parts.extend(_count_roi_head(model))
    else:
        name = "decode_head" if hasattr(model, "decode_head") else "bbox_head"
        head = getattr(model, name, None)
        if head is None:
            raise _cannot_count(model)
        count.parts.append(_part(name.replace("_", " "), head, _run_head(head, maps)))
    if getattr(model, "with_auxiliary_head", False):
        count.parts.append(Part("auxiliary head", _params(model.auxiliary_head), None))
    return count


def _count_roi_head(model: Any) -> list[Part]:
    """Box and mask heads on as many boxes as the test settings allow."""
    from mmdet.models.roi_heads import CascadeRoIHead, StandardRoIHead

    roi_head = model.roi_head
    if type(roi_head) not in (CascadeRoIHead, StandardRoIHead) or roi_head.with_shared_head:
        raise _cannot_count(roi_head)
    boxes = {"bbox": model.test_cfg.rpn.max_per_img, "mask": model.test_cfg.rcnn.max_per_img}
    parts = []
    for kind, number in boxes.items():
        heads = _as_list(getattr(roi_head, f"{kind}_head", None))
        extractors = _as_list(getattr(roi_head, f"{kind}_roi_extractor", None))
        extractors = extractors or _as_list(roi_head.bbox_roi_extractor)  # may be shared
        for i, (head, extractor) in enumerate(zip(heads, extractors, strict=True)):
            size = extractor.roi_layers[0].output_size
            crops = torch.empty(number, extractor.out_channels, *size, device="meta")
            title = f"{kind} head" + (f" {i + 1}" if len(heads) > 1 else "")
            parts.append(_part(f"{title}, {number} boxes", head, _run_head(head, crops)))
    return parts


def _as_list(module: nn.Module | None) -> list[Any]:
    if module is None:
        return []
    return list(module) if isinstance(module, nn.ModuleList) else [module]


def _run(module: nn.Module, inputs: Any) -> tuple[Any, dict[str, Mapping[Any, int]]]:
    """Run a module; returns its output and the FLOPs by operator of each submodule ("": all)."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        output = module(inputs)
    root = type(module).__name__
    counts = counter.get_flop_counts()
    flops = {k.removeprefix(f"{root}."): v for k, v in counts.items() if k.startswith(f"{root}.")}
    return output, {**flops, "": counts.get("Global", {})}


def _run_head(head: nn.Module, inputs: Any) -> dict[str, Mapping[Any, int]]:
    try:
        return _run(head, inputs)[1]
    except (TypeError, RuntimeError) as error:
        raise _cannot_count(head) from error


def _cannot_count(module: nn.Module) -> ToolError:
    return ToolError(f"{type(module).__name__} cannot be counted by itself: give --backbone-only")


def _part(name: str, module: nn.Module, flops: dict[str, Mapping[Any, int]]) -> Part:
    return Part(name, _params(module), _total(flops, ""))


def _total(flops: dict[str, Mapping[Any, int]], name: str) -> int:
    return sum(flops.get(name, {}).values())


def _params(module: Any) -> int:
    return sum(p.numel() for p in module.parameters())


def build_model(cfg: Config) -> Any:
    """The config's model without data, on the meta device."""
    init_default_scope(cfg.get("default_scope", "mmengine"))
    with torch.device("meta"):
        return revert_sync_batchnorm(MODELS.build(cfg.model)).eval()


def count(args: argparse.Namespace) -> tuple[str, tuple[int, int], Count]:
    """What is counted, at which height and width, and the result."""
    if args.arch:
        with torch.device("meta"):
            backbone = MambaVision(args.arch, window_mode=args.window_mode or "pad").eval()
        side = BACKBONE_STRIDE * backbone.arch.window_size[2]
        hw = tuple(args.shape or (side, side))
        title = f"MambaVision-{args.arch}, window mode {args.window_mode or 'pad'}"
        return title, hw, count_backbone(backbone, hw)[0]
    cfg = read_config(args.config, args.cfg_options)
    if args.window_mode:
        cfg.model.backbone.window_mode = args.window_mode
    hw = tuple(args.shape or SHAPES.get(cfg.get("default_scope"), (224, 224)))
    model = build_model(cfg)
    if args.backbone_only:
        return f"backbone of {args.config}", hw, count_backbone(model.backbone, hw)[0]
    return args.config, hw, count_model(model, hw)


def show(title: str, hw: tuple[int, int], result: Count) -> None:
    """Print the table."""
    print(f"{title}, one image of {hw[0]} x {hw[1]} (height x width)")
    table = Table()
    table.add_column("part")
    for column in ("params (M)", "GMACs", "GFLOPs", "share"):
        table.add_column(column, justify="right")

    def add(name: str, params: int | None, flops: int | None, style: str = "") -> None:
        cells = [name, "" if params is None else f"{params / 1e6:.2f}"]
        if flops is None:
            cells += ["training only", "", ""]
        else:
            share = flops / max(result.flops, 1)
            cells += [f"{flops / 2e9:.3f}", f"{flops / 1e9:.3f}", f"{share:.1%}"]
        table.add_row(*cells, style=style)

    for part in result.parts:
        add(part.name, part.params, part.flops)
    table.add_section()
    add("total", result.params, result.flops, style="bold")
    add("of it: selective scan", None, result.scan)
    add("of it: attention products", None, result.attention)
    add("total without attention", None, result.flops - result.attention)
    Console().print(table)
    print(
        "1 MAC = 2 FLOPs. Published GMACs: the GMACs column, without attention. --help says more."
    )


def write_json(path: str, title: str, hw: tuple[int, int], result: Count) -> None:
    """Write the numbers."""
    content = {
        "model": title,
        "height_width": hw,
        "parameters": result.params,
        "flops": result.flops,
        "macs": result.flops // 2,
        "scan_flops": result.scan,
        "attention_flops": result.attention,
        "parts": [asdict(part) for part in result.parts],
    }
    Path(path).write_text(json.dumps(content, indent=2) + "\n")


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="?", help="config file of a detector or segmenter")
    parser.add_argument(
        "--arch", choices=VARIANTS, help="count this backbone alone, with its own windows"
    )
    parser.add_argument(
        "--shape",
        type=positive,
        nargs=2,
        metavar=("H", "W"),
        help="height and width after resizing (default: 800 1280 for detectors, 512 2048 for "
        "segmenters, the classification size for --arch)",
    )
    parser.add_argument("--backbone-only", action="store_true", help="leave neck and heads out")
    parser.add_argument(
        "--window-mode", choices=WINDOW_MODES, help="in place of the config's (--arch: pad)"
    )
    parser.add_argument(
        "--cfg-options", nargs="+", action=DictAction, help="override settings of the config"
    )
    parser.add_argument("--json", metavar="FILE", help="write the numbers to this file too")
    args = parser.parse_args()
    if (args.config is None) == (args.arch is None):
        parser.error("give a config file or --arch, one of the two")
    return args


def main() -> None:
    """Count and print."""
    args = parse_args()
    with user_errors():
        title, hw, result = count(args)
        show(title, hw, result)
        if args.json:
            write_json(args.json, title, hw, result)


if __name__ == "__main__":
    main()
