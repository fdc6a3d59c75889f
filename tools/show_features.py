"""Show what a backbone makes of an image: features, attention and gradients, stage by stage.

    python tools/show_features.py IMAGE --config CONFIG --weights CHECKPOINT --out out
    python tools/show_features.py IMAGE --arch T --weights mambavision://T-1K --out out
    python tools/show_features.py IMAGE --arch T --out out --point 320 240 --point 40 60
    python tools/show_features.py IMAGE --arch T --out out --block 3 5

The backbone is that of a detector's or segmenter's config, or a published one (--arch). --weights
takes every file that holds its weights: a checkpoint of the whole model or one from ImageNet; the
heads are not used. Without it the weights are random, which is said. Written, in the image's size:

  OUT/stageS_norm.png      the L2 norm of each position's features, over the image
  OUT/stageS_pca.png       their first three principal components as red, green and blue
  OUT/stageS_gradient.png  |d(mean of the stage's squared features) / d(input)|, summed over colours
  OUT/stageS_blockB_attention_X_Y.png
                           stages 3 and 4: how much the position at pixel (X, Y) attends to each
                           position of its window (framed), mean over the heads; the points are
                           those of --point, the blocks each stage's last or those of --block
  OUT/overview.png         all of them

Features are taken before the norms of the returned maps: behind a layer norm, norms and gradients
say little, as every position has nearly the same norm. Position (row, column) of a stage is drawn
as the stride² pixels from (row, column) * stride on, at strides 4, 8, 16 and 32. The image is
normalised as the config says (--arch: as ImageNet's) and shrunk to --max-size, but not padded.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import cv2
import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from common import ToolError, check_file, positive, read_config, user_errors, weights_source
from infer import UnreadableError, choose_device, read_image, write_picture
from mmengine.config import DictAction
from mmengine.registry import MODELS, init_default_scope
from numpy.typing import NDArray
from torch import Tensor, nn

from mambavision_backbone import VARIANTS, MambaVision
from mambavision_backbone.checkpoint import load_pretrained
from mambavision_backbone.layers.attention import Attention
from mambavision_backbone.layers.windows import WINDOW_MODES, WindowGrid, merge, window_grid

STRIDES = (4, 8, 16, 32)
OPACITY = 0.65  # of colours over the image
IMAGENET = {"mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375], "bgr_to_rgb": True}

Picture = NDArray[np.uint8]  # (H, W, 3), RGB
Point = tuple[int, int]  # x, y


def build_backbone(args: argparse.Namespace) -> tuple[MambaVision, Mapping[str, Any]]:
    """The backbone in eval mode with its weights, and how its images are normalised.

    Raises:
        ToolError: the config has no MambaVision for images of three channels.
        WeightsError: the weights are another backbone's.
    """
    torch.manual_seed(0)
    backbone: nn.Module
    preprocessor: Mapping[str, Any] = IMAGENET
    if args.arch:
        backbone = MambaVision(args.arch, window_mode=args.window_mode or "pad")
    else:
        cfg = read_config(args.config, args.cfg_options)
        model: Any = cfg.get("model") or {}
        if not model.get("backbone"):
            raise ToolError(f"{args.config} has no backbone: give a detector's or segmenter's")
        model.backbone.pop("compile", None)  # slow to start, and hooks break its one graph
        if args.window_mode:
            model.backbone.window_mode = args.window_mode
        init_default_scope(cfg.get("default_scope", "mmengine"))
        backbone = MODELS.build(model.backbone)
        preprocessor = model.get("data_preprocessor") or {}
    if not isinstance(backbone, MambaVision):
        raise ToolError(
            f"the backbone of {args.config} is a {type(backbone).__name__}: give a config with "
            "type='MambaVision'"
        )
    if backbone.in_channels != 3:
        raise ToolError(f"the backbone of {args.config} must have in_channels=3, for a picture")
    if args.weights:
        load_pretrained(backbone, weights_source(args.weights))
    else:
        print("no --weights: they are RANDOM, no picture shows learnt features", file=sys.stderr)
    return backbone.eval().requires_grad_(False), preprocessor


def normalize(image: Picture, preprocessor: Mapping[str, Any]) -> Tensor:
    """The network's input, (1, 3, H, W), as the model's data preprocessor would make it.

    Args:
        image: RGB.
        preprocessor: the config's ``model.data_preprocessor``.
    """
    x = torch.from_numpy(image.astype(np.float32))
    if not preprocessor.get("bgr_to_rgb"):
        x = x.flip(2)
    mean, std = preprocessor.get("mean") or [0.0] * 3, preprocessor.get("std") or [1.0] * 3
    return ((x - torch.tensor(mean)) / torch.tensor(std)).permute(2, 0, 1).unsqueeze(0)


def choose_blocks(backbone: MambaVision, wanted: Sequence[tuple[int, int]]) -> dict[int, int]:
    """The attention block to show of each stage that has any; stages and blocks count from 1.

    Args:
        backbone: the network.
        wanted: (stage, block) in place of the stage's last.

    Raises:
        ToolError: a block that is none with attention; the message lists those.
    """
    levels: Any = backbone.levels[: backbone.out_indices[-1] + 1]
    there = {
        i + 1: [j + 1 for j, block in enumerate(level.blocks) if isinstance(block.mixer, Attention)]
        for i, level in enumerate(levels)
        if i >= 2
    }
    for stage, block in wanted:
        if block not in there.get(stage, ()):
            known = ", ".join(f"{s} {b}" for s, blocks in there.items() for b in blocks)
            raise ToolError(
                f"--block {stage} {block} has no attention, but these have: {known or 'none'}"
            )
    return {stage: blocks[-1] for stage, blocks in there.items() if blocks} | dict(wanted)


def run_backbone(
    backbone: MambaVision, x: Tensor, attentions: Iterable[nn.Module] = ()
) -> tuple[list[Tensor], dict[nn.Module, Tensor]]:
    """Run the backbone and keep what is shown.

    Args:
        backbone: the network.
        x: (1, 3, H, W).
        attentions: of its attention modules those whose input is wanted.

    Returns:
        Each stage's map before its feature norm, (1, C, h, w), up to the last that is returned;
        and the inputs of the attention modules, (windows, L, C).
    """
    maps: list[Tensor] = []
    tokens: dict[nn.Module, Tensor] = {}
    with ExitStack() as hooks:
        for level in backbone.levels:
            hooks.enter_context(level.register_forward_hook(lambda *call: maps.append(call[2])))
        for attention in attentions:
            hook = attention.register_forward_pre_hook(
                lambda module, inputs: tokens.update({module: inputs[0].detach()})
            )
            hooks.enter_context(hook)
        backbone(x)
    return maps, tokens


def principal_components(features: Tensor) -> Tensor:
    """(1, C, h, w) → (h, w, 3): the positions' first three principal components.

    Each component's sign, which is arbitrary, makes its direction's largest entry positive.
    """
    x = features[0].flatten(1).T.double()
    x = x - x.mean(0)
    axes = torch.linalg.eigh(x.T @ x).eigenvectors[:, -3:].flip(1)
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    return (x @ (axes * largest.sign())).unflatten(0, features.shape[2:])


def image_gradient(features: Tensor, x: Tensor) -> Tensor:
    """|d(mean of features²)/dx| summed over channels: (1, C, h, w), (1, 3, H, W) → (H, W)."""
    (gradient,) = torch.autograd.grad(features.square().mean(), x, retain_graph=True)
    return gradient.abs().sum(1)[0]


def attention_row(attention: Attention, tokens: Tensor, index: int) -> Tensor:
    """One token's attention weights: softmax(q Kᵀ / √d), as the module computes within.

    Args:
        attention: the module.
        tokens: (L, C), its input in one window.
        index: of the token that attends.

    Returns:
        (heads, L); each row sums to 1.
    """
    q, k, _ = attention.qkv(tokens).chunk(3, dim=1)
    heads = (attention.num_heads, attention.head_dim)
    scores = torch.einsum("hd,lhd->hl", q[index].view(heads), k.unflatten(1, heads))
    return (scores * attention.head_dim**-0.5).softmax(1)


def attention_map(
    attention: Attention, tokens: Tensor, grid: WindowGrid, position: tuple[int, int]
) -> Tensor:
    """A position's attention weights on the map, mean over heads: 0 outside of its window.

    Args:
        attention: the module.
        tokens: (windows, L, C), its input.
        grid: how the map was cut into these windows.
        position: row and column of the position that attends.

    Returns:
        (h, w) of the map. What it lacks to a sum of 1 is attention to padding.
    """
    (height, width), (row, col) = grid.size, position
    window = row // height * grid.counts[1] + col // width
    index = row % height * width + col % width
    weights = torch.zeros_like(tokens[..., :1])
    weights[window, :, 0] = attention_row(attention, tokens[window], index).mean(0)
    return merge(weights, grid)[0, 0]


def stretch(values: NDArray[Any]) -> NDArray[Any]:
    """Scale to 0..1 along the first two axes, from the 1st to the 99th percentile."""
    low, high = np.percentile(values, [1, 99], axis=(0, 1))
    return np.clip((values - low) / np.maximum(high - low, 1e-30), 0, 1)


def enlarge(values: Tensor, stride: int, hw: Sequence[int]) -> NDArray[Any]:
    """(h, w, …) → (H, W, …): each position as stride² pixels, cropped to the image."""
    pixels = values.detach().cpu().numpy().repeat(stride, 0).repeat(stride, 1)
    return pixels[: hw[0], : hw[1]]


def paint(shares: NDArray[Any], colors: str, image: Picture | None = None) -> Picture:
    """Numbers from 0 to 1, (H, W), in matplotlib's colours, blended over an image if one is given.

    Returns:
        (H, W, 3), RGB.
    """
    picture = 255 * matplotlib.colormaps[colors](shares)[..., :3]
    if image is not None:
        picture = OPACITY * picture + (1 - OPACITY) * image
    return picture.round().astype(np.uint8)


def mark(picture: Picture, point: Point) -> Picture:
    """The picture with a ring around a point."""
    radius = max(3, max(picture.shape) // 80)
    picture = picture.copy()
    for color, width in (((0, 0, 0), 3), ((255, 255, 255), 1)):
        cv2.circle(picture, point, radius, color, width, cv2.LINE_AA)
    return picture


def show_attention(
    weights: Tensor, grid: WindowGrid, stride: int, point: Point, image: Picture
) -> Picture:
    """A point's attention over the image, its window framed.

    Args:
        weights: (h, w), from :func:`attention_map`.
        grid: the map's windows.
        stride: pixels of the image along a position.
        point: the pixel that attends.
        image: (H, W, 3), RGB.
    """
    picture = paint(
        enlarge(weights / weights.max().clamp_min(1e-30), stride, image.shape), "inferno", image
    )
    (height, width), (x, y) = (stride * side for side in grid.size), point
    left, top = x // width * width, y // height * height
    right, bottom = min(left + width, image.shape[1]) - 1, min(top + height, image.shape[0]) - 1
    cv2.rectangle(picture, (left, top), (right, bottom), (255, 255, 255), 1)
    return mark(picture, point)


def draw_overview(path: Path, rows: Sequence[dict[str, Picture]], title: str) -> None:
    """A figure of all pictures, a row a stage, titled by their keys."""
    columns = max(map(len, rows))
    height, width = next(iter(rows[0].values())).shape[:2]
    size = (4 * columns, len(rows) * (4 * min(height / width, 4) + 0.4) + 0.6)
    figure, grid = plt.subplots(
        len(rows), columns, figsize=size, squeeze=False, layout="constrained"
    )
    for axes in grid.flat:
        axes.axis("off")
    for line, pictures in zip(grid, rows, strict=True):
        for axes, (name, picture) in zip(line, pictures.items(), strict=False):
            axes.imshow(picture)
            axes.set_title(name, fontsize=10)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def check_points(image: Picture, points: Sequence[Sequence[int]]) -> list[Point]:
    """The points that attend, each once; the centre if none is given.

    Raises:
        ToolError: a point outside of the image.
    """
    height, width = image.shape[:2]
    for x, y in points:
        if not (0 <= x < width and 0 <= y < height):
            raise ToolError(
                f"--point {x} {y} is outside the image: give X in 0..{width - 1} and Y in "
                f"0..{height - 1}"
            )
    return list(dict.fromkeys((x, y) for x, y in points)) or [(width // 2, height // 2)]


def shrink(image: Picture, points: Sequence[Point], max_size: int) -> tuple[Picture, list[Point]]:
    """An image (H, W, 3) whose longest side is at most ``max_size``, and points on it."""
    scale = min(1.0, max_size / max(image.shape[:2]))
    height, width = (max(1, round(scale * side)) for side in image.shape[:2])
    small = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    clipped = [(min(int(x * scale), width - 1), min(int(y * scale), height - 1)) for x, y in points]
    return np.asarray(small, np.uint8), clipped


def show(args: argparse.Namespace) -> list[Path]:
    """Write all pictures; returns their files."""
    check_file(args.image, "image")
    try:
        full = read_image(Path(args.image).expanduser())[..., ::-1]
    except UnreadableError as error:
        raise ToolError(f"cannot read {args.image}: {error}. Give an image file") from error
    points = check_points(full, args.point)
    device = choose_device(args.device)
    backbone, preprocessor = build_backbone(args)
    blocks = choose_blocks(backbone, args.block)
    backbone.to(device)

    image, shrunk = shrink(full, points, args.max_size)
    hw = image.shape[:2]
    x = normalize(image, preprocessor).to(device).requires_grad_()
    levels: Any = backbone.levels
    attentions = {stage: levels[stage - 1].blocks[b - 1].mixer for stage, b in blocks.items()}
    maps, tokens = run_backbone(backbone, x, attentions.values())

    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    rows: list[dict[str, Picture]] = []

    def write(name: str, title: str, picture: Picture) -> None:
        files.append(out / f"{name}.png")
        write_picture(files[-1], picture[..., ::-1])
        rows[-1][title] = picture

    for stage, (features, stride) in enumerate(zip(maps, STRIDES, strict=False), 1):
        rows.append({})
        norm = stretch(enlarge(features[0].norm(dim=0), stride, hw))
        write(f"stage{stage}_norm", f"stage {stage}: norm", paint(norm, "viridis", image))
        colors = 255 * stretch(enlarge(principal_components(features), stride, hw))
        write(f"stage{stage}_pca", "principal components", colors.round().astype(np.uint8))
        gradient = stretch(image_gradient(features, x).cpu().numpy())
        write(f"stage{stage}_gradient", "gradient", paint(gradient, "inferno"))
        if stage not in blocks:
            continue  # convolutions, or mixers only
        attention, level = attentions[stage], levels[stage - 1]
        map_hw = (features.shape[2], features.shape[3])
        grid = window_grid(map_hw, level.window_size, level.window_mode)
        for point, (px, py) in zip(points, shrunk, strict=True):
            position = (py // stride, px // stride)
            weights = attention_map(attention, tokens[attention], grid, position)
            name = f"stage{stage}_block{blocks[stage]}_attention_{point[0]}_{point[1]}"
            title = f"block {blocks[stage]}: attention of {point}"
            padding = 1 - float(weights.sum())
            if padding >= 0.005:  # else rounding
                title += f", {padding:.0%} on padding"
            write(name, title, show_attention(weights, grid, stride, (px, py), image))
    for point in shrunk:
        image = mark(image, point)
    rows[0]["image and points"] = image
    network = args.config or f"MambaVision-{args.arch}"
    names = [args.image, network, args.weights or "RANDOM weights"]
    files.append(out / "overview.png")
    draw_overview(files[-1], rows, ", ".join(Path(name).name for name in names))
    return files


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("image", help="image file")
    network = parser.add_mutually_exclusive_group(required=True)
    network.add_argument("--config", help="config file of a detector or segmenter")
    network.add_argument("--arch", choices=VARIANTS, help="a published backbone alone")
    parser.add_argument("--weights", help="file with the backbone's weights (default: random)")
    parser.add_argument("--out", required=True, help="folder to write to")
    parser.add_argument(
        "--point",
        type=int,
        nargs=2,
        action="append",
        default=[],
        metavar=("X", "Y"),
        help="pixel of the image whose attention is shown; may be repeated (default: the centre)",
    )
    parser.add_argument(
        "--block",
        type=int,
        nargs=2,
        action="append",
        default=[],
        metavar=("STAGE", "BLOCK"),
        help="block whose attention is shown, counted from 1; may be repeated, one a stage "
        "(default: the last of each)",
    )
    parser.add_argument(
        "--max-size",
        type=positive,
        default=800,
        metavar="N",
        help="longest side that the image is shrunk to (default: 800)",
    )
    parser.add_argument(
        "--window-mode", choices=WINDOW_MODES, help="in place of the config's (--arch: pad)"
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    parser.add_argument(
        "--cfg-options", nargs="+", action=DictAction, help="override settings of the config"
    )
    return parser.parse_args()


def main() -> None:
    """Draw."""
    args = parse_args()
    with user_errors():
        try:
            files = show(args)
        except torch.cuda.OutOfMemoryError as error:
            raise ToolError(
                f"the GPU's memory is too small for --max-size {args.max_size}: lower it, or give "
                "--device cpu"
            ) from error
    for path in files:
        print(path)


if __name__ == "__main__":
    main()
