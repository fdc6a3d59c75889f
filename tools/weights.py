"""List, fetch, convert and look into weights.

    python tools/weights.py list
    python tools/weights.py get T-1K
    python tools/weights.py inspect mambavision_tiny_1k.pth.tar
    python tools/weights.py convert work_dirs/my_detector/epoch_12.pth backbone.safetensors

FILE and NAME may be a path, a name of `list` (with or without mambavision://, also NAME@REVISION),
or an http(s) address, to which #sha256=DIGEST may be added. Nothing in a file is executed.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from common import ToolError, add_trust_argument, user_errors, weights_source
from torch import Tensor

from mambavision_backbone import VARIANTS, MambaVision
from mambavision_backbone.checkpoint import (
    LICENCE,
    PUBLISHED,
    SCHEME,
    WeightsError,
    backbone_weights,
    check_weights,
    file_sha256,
    guess_variant,
    local_file,
    read_checkpoint,
    state_dict_of,
    write_weights,
)
from mambavision_backbone.checkpoint.writing import LAYOUTS


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("list", help="the published weights")
    get = commands.add_parser("get", help="fetch weights and say where they are")
    get.add_argument("name", metavar="NAME")
    inspect = commands.add_parser("inspect", help="say what a file holds")
    inspect.add_argument("file", metavar="FILE")
    inspect.add_argument("--tensors", action="store_true", help="list all tensors")
    add_trust_argument(inspect)
    convert = commands.add_parser(
        "convert", help="write a file's backbone in another format or layout"
    )
    convert.add_argument("file", metavar="IN")
    convert.add_argument("out", metavar="OUT", help=".safetensors (preferred), .pth, .pt or .tar")
    convert.add_argument(
        "--layout",
        choices=LAYOUTS,
        default="backbone",
        help="names in OUT: backbone (default); classifier: as published classification files, "
        "without feature norms; detector: with the prefix backbone., as detectors and segmenters",
    )
    convert.add_argument("--prefix", help="take only the names under this prefix")
    add_trust_argument(convert)
    return parser.parse_args()


def list_published() -> None:
    """Print the table of published weights."""
    print(f"{'name':<24} {'arch':<4} {'M params':>8} {'MB, about':>9}  published result")
    for name, file in PUBLISHED.items():
        size = 4 * file.params  # float32; the true size is known when the file is fetched
        print(f"{name:<24} {file.arch:<4} {file.params:>8g} {size:>9.0f}  {file.result}".rstrip())
        print(f"    {file.repo}/{file.file}" + (f"\n    {file.config}" if file.config else ""))
        if file.sha256:
            print(f"    sha256 {file.sha256}")
    print(
        f"\nLicence of all: {LICENCE}. In a config:\n"
        f"    init_cfg=dict(type='Pretrained', checkpoint='{SCHEME}T-1K')\n"
        "Detectors and segmenters also as load_from, or as the checkpoint of test.py and infer.py."
    )


def get(name: str) -> None:
    """Fetch weights; print path, size and digest."""
    source = weights_source(name)
    path = local_file(source)
    print(f"path    {path}")
    print(f"size    {os.path.getsize(path) / 1e6:.1f} MB")
    print(f"sha256  {file_sha256(path)}")
    commit = Path(path).parent.name if Path(path).is_symlink() else None
    if source.startswith(SCHEME):
        print(f"licence {LICENCE}")
        if commit:
            print(f"pinned  {source.partition('@')[0]}@{commit}")


def describe(checkpoint: Mapping[str, Any]) -> tuple[str, dict[str, Tensor]]:
    """What kind of file this is, and the tensors of its backbone."""
    state = {k.removeprefix("module."): v for k, v in state_dict_of(checkpoint).items()}
    weights = backbone_weights(state)
    heads = {k.partition(".")[0] for k in state} - {"backbone"}
    if any(k.startswith("backbone.") for k in state):
        kind = "detector" if heads & {"rpn_head", "roi_head", "bbox_head"} else "segmenter"
        if not heads:
            kind = "backbone of a detector or segmenter"
    elif any(k.startswith(("head.", "norm.")) for k in state):
        kind = "classifier"
    else:
        kind = "backbone"
    if guess_variant(weights) is None and not any(k.startswith("levels.") for k in weights):
        kind = "no MambaVision"
    return kind, weights


def inspect(file: str, tensors: bool, trust: bool) -> None:
    """Print what a file holds."""
    path = local_file(weights_source(file))
    checkpoint = read_checkpoint(path, mmap=True, trust=trust)
    state = state_dict_of(checkpoint)
    kind, weights = describe(checkpoint)
    arch = guess_variant(weights)
    dtypes = sorted({str(v.dtype).removeprefix("torch.") for v in state.values()})
    print(f"file       {path} ({os.path.getsize(path) / 1e6:.1f} MB)")
    print(f"sha256     {file_sha256(path)}")
    print(f"kind       {kind}")
    print(f"arch       {arch or 'of no published variant'}")
    count = sum(v.numel() for v in state.values())
    print(f"tensors    {len(state)}, {count / 1e6:.2f} M numbers, {', '.join(dtypes)}")
    if kind != "no MambaVision":
        norms = sorted({k.partition(".")[0] for k in weights if k.startswith("outnorm")})
        print(f"out norms  {', '.join(norms) or 'none: made anew when loaded'}")
        if arch:
            print(f"fits       {fit(arch, weights, path)}")
    meta = checkpoint.get("meta")
    if isinstance(meta, Mapping):
        plain = {k: v for k, v in meta.items() if isinstance(v, str | int | float)}
        for key in ("epoch", "iter", "seed", "experiment_name", "time", "mmengine_version"):
            if key in plain:
                print(f"{key:<10} {plain[key]}")
        classes = (meta.get("dataset_meta") or {}).get("classes")
        if classes:
            print(f"classes    {len(classes)}: {', '.join(map(str, classes))}")
    extra = sorted(set(checkpoint) - set(state) - {"state_dict", "model", "meta"})
    if extra:
        print(f"also holds {', '.join(map(str, extra))}")
    if tensors:
        for name, tensor in state.items():
            print(f"  {name} {json.dumps(list(tensor.shape))} {str(tensor.dtype)[6:]}")


def fit(arch: str, weights: Mapping[str, Tensor], path: str) -> str:
    """Whether weights fit a variant, in a few words."""
    channels = weights["patch_embed.conv_down.0.weight"].shape[1]
    try:
        with torch.device("meta"):
            check_weights(MambaVision(arch, in_channels=channels), weights, path)
    except WeightsError as error:
        return f"nothing: {error}"
    return f"arch={arch!r}" + ("" if channels == 3 else f", in_channels={channels}")


def convert(file: str, out: str, layout: str, prefix: str | None, trust: bool) -> None:
    """Write a file's backbone in another format or layout."""
    path = local_file(weights_source(file))
    if os.path.exists(out) and os.path.samefile(path, out):
        raise ToolError(f"OUT is IN: {out!r}")
    checkpoint = read_checkpoint(path, mmap=True, trust=trust)
    weights = backbone_weights(state_dict_of(checkpoint), prefix)
    if not any(k.startswith("levels.") for k in weights):
        raise ToolError(
            f"{file!r} holds no MambaVision backbone" + (f" under {prefix!r}" * bool(prefix))
        )
    arch = guess_variant(weights)
    meta = {"source": os.path.basename(path), "sha256": file_sha256(path)}
    if arch in VARIANTS:
        meta["arch"] = str(arch)
    write_weights(weights, out, layout, meta)
    print(f"{out}: {len(weights)} tensors of a backbone, arch {arch or 'of no published variant'}")


def main() -> None:
    """Run the command."""
    args = parse_args()
    with user_errors():
        if args.command == "list":
            list_published()
        elif args.command == "get":
            get(args.name)
        elif args.command == "inspect":
            inspect(args.file, args.tensors, args.trust_checkpoint)
        else:
            convert(args.file, args.out, args.layout, args.prefix, args.trust_checkpoint)


if __name__ == "__main__":
    main()
