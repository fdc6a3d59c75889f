"""Draws a small, deterministic data set of shapes for both tasks, without any download."""

import argparse
import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as rle
from rich.progress import track

CLASSES = ("circle", "square", "triangle", "star", "cross", "ring")
PALETTE = (
    (230, 60, 60),
    (60, 160, 240),
    (70, 190, 80),
    (250, 200, 40),
    (170, 80, 210),
    (250, 130, 30),
)
SEMANTIC_CLASSES = ("background", *CLASSES)
SEMANTIC_PALETTE = ((90, 90, 90), *PALETTE)

MANIFEST = "shapes.json"
# Raise it when the same arguments come to draw something else, so that old folders are noticed.
DRAWING = 1
SPLITS = {"train": "training", "val": "validation"}
MIN_AREA = 16
MIN_VISIBLE = 0.4
MIN_SIDE = 32
SUBPIXEL_BITS = 4

DESCRIPTION = """\
Draws a data set of shapes on textured backgrounds, once, and lays it out for both tasks:

  OUT/coco   COCO 2017 instances: annotations/instances_{train,val}2017.json, {train,val}2017/*.jpg
  OUT/ade    ADE20K: images/{training,validation}/*.jpg, annotations/{training,validation}/*.png
             (the same images, as hard links where the file system has them)

Classes: circle, square, triangle, star, cross and ring, varied in size, colour, rotation, overlap
and truncation at the border. Masks, boxes and labels hold visible pixels only; a shape that would
be mostly hidden is left out. Label maps are for reduce_zero_label=True, as ADE20K's are: 1 is
background, 2 to 7 are the shapes, and no pixel is unlabeled.

The same arguments and libraries draw the same bytes, and an image does not depend on how
many there are. A run that finds its data complete does nothing; one that was interrupted starts
again.
"""
EXAMPLES = """\
examples:
  python tools/make_shapes.py data/shapes
  python tools/make_shapes.py data/shapes --train 400 --val 80 --size 128
  python tools/make_shapes.py data/wide --size 160 240 --max-shapes 10 --seed 1
  python tools/check_data.py data/shapes/ade --num-classes 7
"""

Image = NDArray[np.float32]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Shape:
    """One shape, placed on the canvas.

    Args:
        label: Index into `CLASSES`.
        contours: Its outline and, for a ring, that of its hole, each (points, 2) as x, y in pixels.
    """

    label: int
    contours: tuple[NDArray[np.float64], ...]

    @property
    def area(self) -> float:
        """Area in pixels, parts beyond the image included."""
        outer, *holes = (cv2.contourArea(c.astype(np.float32)) for c in self.contours)
        return outer - sum(holes)

    def coverage(self, hw: tuple[int, int]) -> NDArray[np.uint8]:
        """How much of each pixel the filled shape covers, (H, W), 0 to 255."""
        canvas = np.zeros(hw, np.uint8)
        cv2.fillPoly(canvas, self._fixed_point(), 255, cv2.LINE_AA, SUBPIXEL_BITS)
        return canvas

    def edge(self, hw: tuple[int, int]) -> NDArray[np.uint8]:
        """How much of each pixel the outline covers, (H, W), 0 to 255."""
        canvas = np.zeros(hw, np.uint8)
        cv2.polylines(canvas, self._fixed_point(), True, 255, 1, cv2.LINE_AA, SUBPIXEL_BITS)
        return canvas

    def _fixed_point(self) -> list[NDArray[np.int32]]:
        return [np.rint(c * 2**SUBPIXEL_BITS).astype(np.int32) for c in self.contours]


@dataclass(frozen=True, eq=False)
class Picture:
    """One drawn image and everything known about it.

    Args:
        image: (H, W, 3), BGR.
        labels: (H, W), 1 for background and 2 + index into `CLASSES` for shapes.
        instances: Index into `CLASSES` and visible mask (H, W) of each shape, in painting order.
    """

    image: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    instances: list[tuple[int, Mask]]


def regular(corners: int, radii: Sequence[float] = (1.0,)) -> NDArray[np.float64]:
    """Corners of a regular polygon, (corners, 2); several radii take turns, as in a star."""
    angles = 2 * np.pi * np.arange(corners) / corners
    return np.stack([np.cos(angles), np.sin(angles)], 1) * np.resize(radii, corners)[:, None]


def cross_outline(arm: float = 0.3) -> NDArray[np.float64]:
    """Outline of a plus sign, (12, 2); `arm` is half the width of its arms."""
    quarter = np.array([(1.0, -arm), (1.0, arm), (arm, arm)])
    turn = np.array([(0.0, -1.0), (1.0, 0.0)])
    return np.concatenate([quarter @ np.linalg.matrix_power(turn.T, k) for k in range(4)])


OUTLINES: dict[str, tuple[NDArray[np.float64], ...]] = {
    "circle": (regular(48),),
    "square": (regular(4),),
    "triangle": (regular(3),),
    "star": (regular(10, (1.0, 0.42)),),
    "cross": (cross_outline(),),
    "ring": (regular(48), 0.6 * regular(48)),
}


def smooth_noise(rng: np.random.Generator, hw: tuple[int, int], cells: int) -> Image:
    """Random values on a coarse grid of `cells` per side, enlarged to (H, W), within 0 to 1."""
    grid = rng.random((cells, cells), dtype=np.float32)
    return np.clip(cv2.resize(grid, hw[::-1], interpolation=cv2.INTER_CUBIC), 0, 1)


def position_along(rng: np.random.Generator, hw: tuple[int, int]) -> tuple[Image, Image]:
    """Coordinates of each pixel on two turned axes, each (H, W), in units of the short side."""
    side = np.float32(min(hw))
    y = np.arange(hw[0], dtype=np.float32)[:, None] / side
    x = np.arange(hw[1], dtype=np.float32) / side
    angle = rng.uniform(0, np.pi)
    cos, sin = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    return cos * x + sin * y, cos * y - sin * x


def noise(rng: np.random.Generator, hw: tuple[int, int]) -> Image:
    """Clouds: smooth noise at four scales."""
    octaves = [smooth_noise(rng, hw, 4 * 2**k) / 2**k for k in range(4)]
    return np.stack(octaves).sum(0) / np.float32(1.875)


def gradient(rng: np.random.Generator, hw: tuple[int, int]) -> Image:
    """A linear ramp in a random direction."""
    ramp, _ = position_along(rng, hw)
    return (ramp - ramp.min()) / np.ptp(ramp)


def stripes(rng: np.random.Generator, hw: tuple[int, int]) -> Image:
    """Soft stripes in a random direction."""
    along, _ = position_along(rng, hw)
    return 0.5 + 0.5 * np.sin(np.float32(2 * np.pi * rng.uniform(3, 12)) * along)


def checker(rng: np.random.Generator, hw: tuple[int, int]) -> Image:
    """A turned checkerboard."""
    across, down = position_along(rng, hw)
    cells = np.float32(rng.uniform(6, 16))
    return ((np.floor(across * cells) + np.floor(down * cells)) % 2).astype(np.float32)


def blobs(rng: np.random.Generator, hw: tuple[int, int]) -> Image:
    """Patches with soft borders."""
    return np.clip((smooth_noise(rng, hw, int(rng.integers(5, 12))) - 0.45) * 8, 0, 1)


TEXTURES: tuple[Callable[[np.random.Generator, tuple[int, int]], Image], ...] = (
    noise,
    gradient,
    stripes,
    checker,
    blobs,
)


def random_colours(
    rng: np.random.Generator,
    count: int,
    saturation: tuple[float, float],
    value: tuple[float, float],
) -> Image:
    """Random BGR colours, (count, 3), 0 to 255, of any hue."""
    low, high = (0.0, saturation[0], value[0]), (360.0, saturation[1], value[1])
    hsv = rng.uniform(low, high, (count, 3)).astype(np.float32)
    return cv2.cvtColor(hsv[None], cv2.COLOR_HSV2BGR)[0] * 255


def draw_background(rng: np.random.Generator, hw: tuple[int, int]) -> Image:
    """A muted two-coloured texture with grain, (H, W, 3), BGR, 0 to 255."""
    texture = TEXTURES[rng.integers(len(TEXTURES))](rng, hw)[..., None]
    first, second = random_colours(rng, 2, (0.0, 0.5), (0.3, 0.9))
    # Half-way to each other, or the fields of a checkerboard would pass for squares.
    second = first + 0.5 * (second - first)
    grain = rng.standard_normal((*hw, 3), dtype=np.float32) * np.float32(rng.uniform(1, 7))
    return first + texture * (second - first) + grain


def place_shape(rng: np.random.Generator, hw: tuple[int, int]) -> Shape:
    """A shape of random class, size, place and rotation whose centre lies within the image."""
    label = int(rng.integers(len(CLASSES)))
    radius = min(hw) * math.exp(rng.uniform(math.log(0.08), math.log(0.26)))
    centre = rng.uniform((0, 0), hw[::-1])
    angle = rng.uniform(0, 2 * np.pi)
    turn = np.array([(math.cos(angle), math.sin(angle)), (-math.sin(angle), math.cos(angle))])
    return Shape(label, tuple(centre + radius * c @ turn for c in OUTLINES[CLASSES[label]]))


def drop_hidden(shapes: Sequence[Shape], hw: tuple[int, int]) -> tuple[list[Shape], list[Mask]]:
    """Drops shapes too little of which would be seen, before anything is painted.

    Args:
        shapes: In painting order: later ones hide earlier ones.
        hw: Size of the image.

    Returns:
        The shapes kept, in painting order, and their visible masks, each (H, W).
    """
    kept: list[Shape] = []
    masks: list[Mask] = []
    taken = np.zeros(hw, bool)
    # From the topmost down, so that a shape which is dropped itself hides no other.
    for shape in reversed(shapes):
        solid = shape.coverage(hw) >= 128
        visible = solid & ~taken
        if np.count_nonzero(visible) >= max(MIN_AREA, MIN_VISIBLE * shape.area):
            kept.insert(0, shape)
            masks.insert(0, visible)
            taken |= solid
    return kept, masks


def paint(image: Image, shape: Shape, rng: np.random.Generator) -> None:
    """Paints a shaded shape with a dark outline onto `image` (H, W, 3), in place."""
    hw = (image.shape[0], image.shape[1])
    coverage = shape.coverage(hw)
    left, top, width, height = cv2.boundingRect(coverage)
    window = np.s_[top : top + height, left : left + width]
    patch, coverage, edge = image[window], coverage[window], shape.edge(hw)[window]
    # Of a few vivid colours, the one that stands out best from what lies beneath.
    beneath = np.asarray(cv2.mean(patch, coverage), np.float32)[:3]
    candidates = random_colours(rng, 4, (0.55, 1.0), (0.45, 1.0))
    colour = candidates[np.linalg.norm(candidates - beneath, axis=1).argmax()]
    light, _ = position_along(rng, (height, width))
    shade = 1 + np.float32(rng.uniform(-0.3, 0.3)) * (light - light.mean())
    shade *= 1 - np.float32(0.55 / 255) * edge
    alpha = (coverage / np.float32(255))[..., None]
    patch += alpha * (colour * shade[..., None] - patch)


def draw_picture(
    seed: int, split: str, index: int, hw: tuple[int, int], max_shapes: int
) -> Picture:
    """Draws one image.

    Args:
        seed: The data set's seed, at least 0.
        split: `"train"` or `"val"`.
        index: Number of the image within its split.
        hw: Height and width in pixels.
        max_shapes: At most this many shapes; at least one is always seen.
    """
    rng = np.random.default_rng([seed, list(SPLITS).index(split), index])
    canvas = draw_background(rng, hw)
    shapes: list[Shape] = []
    while not shapes:
        wanted = int(rng.integers(1, max_shapes + 1))
        shapes, visible = drop_hidden([place_shape(rng, hw) for _ in range(wanted)], hw)
    labels = np.ones(hw, np.uint8)
    for shape, mask in zip(shapes, visible, strict=True):
        paint(canvas, shape, rng)
        labels[mask] = shape.label + 2
    image = np.clip(canvas, 0, 255).astype(np.uint8)
    return Picture(image, labels, [(s.label, m) for s, m in zip(shapes, visible, strict=True)])


def coco_instance(label: int, mask: Mask, image_id: int, instance_id: int) -> dict[str, Any]:
    """A COCO annotation of a visible mask (H, W), as run lengths: polygons know no holes."""
    encoded = rle.encode(np.asfortranarray(mask, np.uint8))
    return {
        "id": instance_id,
        "image_id": image_id,
        "category_id": label + 1,
        "bbox": rle.toBbox(encoded).tolist(),
        "area": int(rle.area(encoded)),
        "iscrowd": 0,
        "segmentation": {"size": encoded["size"], "counts": encoded["counts"].decode("ascii")},
    }


def write_image(path: Path, image: NDArray[np.uint8], *options: int) -> None:
    """Writes an image in the format of its suffix.

    Raises:
        OSError: The file cannot be written; `cv2.imwrite` would only return False.
    """
    _, encoded = cv2.imencode(path.suffix, image, options)
    path.write_bytes(encoded.tobytes())


def link(source: Path, target: Path) -> None:
    """Gives a file a second name, or copies it where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def draw_split(out: Path, split: str, settings: dict[str, Any]) -> int:
    """Draws one split into both layouts and returns how many shapes it holds."""
    hw = (settings["size"][0], settings["size"][1])
    coco_images = out / "coco" / f"{split}2017"
    ade_images = out / "ade" / "images" / SPLITS[split]
    ade_labels = out / "ade" / "annotations" / SPLITS[split]
    annotation_file = out / "coco" / "annotations" / f"instances_{split}2017.json"
    for folder in (coco_images, ade_images, ade_labels, annotation_file.parent):
        folder.mkdir(parents=True, exist_ok=True)

    images: list[dict[str, Any]] = []
    instances: list[dict[str, Any]] = []
    for index in track(range(1, settings[split] + 1), f"drawing {split}"):
        picture = draw_picture(settings["seed"], split, index, hw, settings["max_shapes"])
        name = f"{index:012d}"
        write_image(coco_images / f"{name}.jpg", picture.image, cv2.IMWRITE_JPEG_QUALITY, 92)
        link(coco_images / f"{name}.jpg", ade_images / f"{name}.jpg")
        write_image(ade_labels / f"{name}.png", picture.labels)
        images.append({"id": index, "file_name": f"{name}.jpg", "height": hw[0], "width": hw[1]})
        for label, mask in picture.instances:
            instances.append(coco_instance(label, mask, index, len(instances) + 1))
    content = {
        "info": {"description": f"shapes drawn by tools/make_shapes.py, {split}"},
        "licenses": [],
        "images": images,
        "annotations": instances,
        "categories": [
            {"id": i, "name": name, "supercategory": "shape"} for i, name in enumerate(CLASSES, 1)
        ],
    }
    annotation_file.write_text(json.dumps(content), encoding="utf-8")
    return len(instances)


def write_manifest(out: Path, settings: dict[str, Any], complete: bool) -> None:
    """Says in `out` what is drawn there, replacing the file in one step."""
    text = json.dumps({"complete": complete, "settings": settings}, indent=2)
    draft = out / f"{MANIFEST}.part"
    draft.write_text(text + "\n", encoding="utf-8")
    draft.replace(out / MANIFEST)


def files_are_there(out: Path, settings: dict[str, Any]) -> bool:
    """Whether every folder holds as many files as were drawn."""
    return all(
        (out / "coco" / "annotations" / f"instances_{split}2017.json").is_file()
        and all(
            len(list((out / folder).glob(f"*{suffix}"))) == settings[split]
            for folder, suffix in (
                (f"coco/{split}2017", ".jpg"),
                (f"ade/images/{ade}", ".jpg"),
                (f"ade/annotations/{ade}", ".png"),
            )
        )
        for split, ade in SPLITS.items()
    )


def is_drawn(out: Path, settings: dict[str, Any], overwrite: bool) -> bool:
    """Whether `out` already holds exactly this data set.

    Raises:
        SystemExit: It holds other data that must not be replaced.
    """
    try:
        manifest = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        if foreign := [name for name in ("coco", "ade") if os.path.lexists(out / name)]:
            raise SystemExit(
                f"{out / foreign[0]} was not drawn by this tool and is left alone: "
                "choose another folder"
            ) from None
        return False
    except json.JSONDecodeError as error:
        raise SystemExit(
            f"{out / MANIFEST} is not readable ({error}): delete {out} or choose another folder"
        ) from None
    if overwrite or not manifest["complete"]:
        return False
    if differing := [k for k in settings if manifest["settings"].get(k) != settings[k]]:
        differences = ", ".join(
            f"{key} {manifest['settings'].get(key)} (now {settings[key]})" for key in differing
        )
        raise SystemExit(
            f"{out} was drawn with other arguments: {differences}. "
            "Add --overwrite to draw it anew, or choose another folder"
        )
    return files_are_there(out, settings)


def draw_dataset(
    out: Path,
    train: int,
    val: int,
    hw: tuple[int, int] = (160, 160),
    seed: int = 0,
    max_shapes: int = 7,
    overwrite: bool = False,
) -> bool:
    """Draws both splits in both layouts, unless that is already done.

    Args:
        out: Folder to draw into; made if missing.
        train: Number of training images.
        val: Number of validation images.
        hw: Height and width in pixels.
        seed: At least 0.
        max_shapes: At most this many shapes in an image.
        overwrite: Draw anew even over complete data drawn by this tool.

    Returns:
        Whether anything was drawn.

    Raises:
        SystemExit: The folder holds something else.
        OSError: The folder cannot be written.
    """
    settings = {
        "train": train,
        "val": val,
        "size": list(hw),
        "seed": seed,
        "max_shapes": max_shapes,
        "drawing": DRAWING,
    }
    if is_drawn(out, settings, overwrite):
        print(f"{out}: already drawn with these arguments, nothing to do")
        return False
    out.mkdir(parents=True, exist_ok=True)
    # From here to the last line the manifest says that the folder is ours and unfinished.
    write_manifest(out, settings, complete=False)
    for layout in ("coco", "ade"):
        if (out / layout).exists():
            shutil.rmtree(out / layout)
    shapes = {split: draw_split(out, split, settings) for split in SPLITS}
    write_manifest(out, settings, complete=True)
    for split, count in shapes.items():
        print(f"{split}: {settings[split]} images, {count} shapes")
    print(f"instances: data_root={out / 'coco'}, classes {CLASSES}")
    print(f"semantic:  data_root={out / 'ade'}, classes {SEMANTIC_CLASSES}")
    return True


def at_least(minimum: int) -> Callable[[str], int]:
    """An argparse type: an integer no smaller than `minimum`."""

    def parse(text: str) -> int:
        number = int(text)
        if number < minimum:
            raise argparse.ArgumentTypeError(f"{number} is less than {minimum}")
        return number

    parse.__name__ = "int"
    return parse


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        # --size takes one or two numbers, so a folder right after it would be read as the second.
        usage="%(prog)s OUT [options]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to draw into")
    parser.add_argument(
        "--train",
        type=at_least(1),
        default=1000,
        metavar="N",
        help="training images (default: 1000)",
    )
    parser.add_argument(
        "--val", type=at_least(1), default=200, metavar="N", help="validation images (default: 200)"
    )
    parser.add_argument(
        "--size",
        type=at_least(MIN_SIDE),
        nargs="+",
        default=[160],
        metavar="PX",
        help=f"side, or height and width, in pixels, at least {MIN_SIDE} (default: 160)",
    )
    parser.add_argument(
        "--max-shapes",
        type=at_least(1),
        default=7,
        metavar="N",
        help="most shapes in an image (default: 7)",
    )
    parser.add_argument("--seed", type=at_least(0), default=0, metavar="N", help="default: 0")
    parser.add_argument(
        "--overwrite", action="store_true", help="draw anew over data that this tool drew before"
    )
    args = parser.parse_args(argv)
    if len(args.size) > 2:
        parser.error(f"argument --size: one or two numbers, got {len(args.size)}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the tool."""
    args = parse_args(argv)
    hw = (args.size[0], args.size[-1])
    try:
        draw_dataset(args.out, args.train, args.val, hw, args.seed, args.max_shapes, args.overwrite)
    except OSError as error:
        raise SystemExit(
            f"cannot draw into {args.out}: {error}. Free space or choose another folder"
        ) from error
    except KeyboardInterrupt:
        raise SystemExit("interrupted: the same command starts it again") from None


if __name__ == "__main__":
    main()
