"""Looks over a COCO or ADE20K folder before hours of training are spent on it."""

import argparse
import json
import math
import os
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError
from rich.console import Console
from rich.progress import track

DESCRIPTION = """\
Looks over a data folder the way mmdet and mmseg will read it, and names each problem with its file.

COCO layout: annotations/instances_*2017.json and one image folder for each, as train2017/
  - missing images; images that are empty, truncated or not readable
  - width or height in the annotations that differ from the file
  - boxes without width or height, or outside of the image
  - segmentations that are empty or malformed; iscrowd run lengths are understood
  - missing or duplicate ids, unknown images and categories
ADE20K layout: images/{training,validation}/*.jpg and annotations/{training,validation}/*.png
  - images without a label map and the reverse; files that are empty, truncated or not readable
  - label maps that differ from their image in size, or are not single-channel
  - labels outside of 0 to --num-classes (0 and 255 are both ignored in training)

Counts per split and class come first, then what is worth a look but does no harm ("note"), then
problems, then one line with the verdict. Exit code: 0 clean, 1 problems, 2 no such data, or the
arguments are wrong.
"""
EXAMPLES = """\
examples:
  python tools/check_data.py data/coco
  python tools/check_data.py data/coco --quick              # no decoding: seconds, not minutes
  python tools/check_data.py data/ADEChallengeData2016 --json report.json
  python tools/check_data.py data/shapes/ade --num-classes 7
"""
HOW_TO_GET = """\
  COCO 2017: train2017.zip, val2017.zip and annotations_trainval2017.zip from
             https://cocodataset.org/#download, unpacked side by side
  ADE20K:    http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip
  neither:   python tools/make_shapes.py data/shapes draws a small set in both layouts\
"""

COCO_ANNOTATIONS = "annotations/instances_*2017.json"
IMAGE_FIELDS = {
    "id": (int, str),
    "file_name": str,
    "width": (int, float),
    "height": (int, float),
}
CATEGORY_FIELDS = {"id": (int, str), "name": str}
ANNOTATION_FIELDS = ("id", "image_id", "category_id", "bbox", "area", "segmentation")
ADE_SPLITS = ("training", "validation")
IGNORED_LABEL = 255
EXAMPLES_SHOWN = 10
# Coordinates in COCO are rounded to hundredths, and boxes may end that much beyond the border.
BOX_SLACK = 1.0
# COCO 2017's own two boxes without height: (image id, annotation id). mmdet skips them.
PUBLISHED_FLAWS = {(200365, 918), (550395, 2206849)}
EXIF_ORIENTATION = 0x0112
# Below this many files, starting processes takes longer than reading.
SMALL = 256

Task = TypeVar("Task")
Result = TypeVar("Result")


@dataclass
class Findings:
    """Findings by kind: how many, and the first few of them."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, where: str) -> None:
        """Counts one finding."""
        self.counts[kind] += 1
        examples = self.examples.setdefault(kind, [])
        if len(examples) < EXAMPLES_SHOWN:
            examples.append(where)

    def as_list(self) -> list[dict[str, Any]]:
        """For JSON."""
        return [
            {"kind": kind, "count": count, "examples": self.examples[kind]}
            for kind, count in self.counts.items()
        ]


@dataclass
class Report:
    """What is known of a data folder.

    Args:
        root: The folder.
        task: `"coco"` or `"ade"`.
        quick: Whether files were only opened, not decoded.
        splits: Counts of each split, by its name.
        notes: What does no harm.
        problems: What does.
    """

    root: Path
    task: str
    quick: bool
    splits: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: Findings = field(default_factory=Findings)
    problems: Findings = field(default_factory=Findings)

    @property
    def exit_code(self) -> int:
        """0 for clean data, 1 for problems."""
        return 1 if self.problems.counts else 0

    @property
    def verdict(self) -> str:
        """One line."""
        images = sum(split["images"] for split in self.splits.values())
        if self.problems.counts:
            kinds = ", ".join(f"{count} x {kind}" for kind, count in self.problems.counts.items())
            return f"PROBLEMS: {self.root}: {self.problems.counts.total()} found: {kinds}"
        depth = "without decoding (--quick)" if self.quick else "in full"
        return f"CLEAN: {self.root}: {images} images checked {depth}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "root": str(self.root),
            "task": self.task,
            "quick": self.quick,
            "splits": self.splits,
            "notes": self.notes.as_list(),
            "problems": self.problems.as_list(),
            "verdict": self.verdict,
            "exit_code": self.exit_code,
        }


@dataclass(frozen=True)
class ImageFile:
    """What was found of one image or label map.

    Args:
        fault: Why it cannot be read; empty if it can.
        size: Width and height as it will be loaded.
        labels: How many pixels each value has, where that was asked for.
    """

    fault: str = ""
    size: tuple[int, int] = (0, 0)
    labels: dict[int, int] = field(default_factory=dict)


def ends_as_jpeg(data: bytes) -> bool:
    """Whether the end-of-image marker follows the last start of a scan.

    Decoders take a tail of zeros, as an interrupted download may leave it, for a plain grey area.
    """
    return data.rfind(b"\xff\xd9") > data.rfind(b"\xff\xda")


def read_image(path: Path, quick: bool, as_labels: bool = False) -> ImageFile:
    """Opens an image and, unless `quick`, decodes all of it.

    Pillow decodes: OpenCV fills what is missing of a truncated JPEG with grey and says nothing.
    """
    try:
        if path.stat().st_size == 0:
            return ImageFile("empty file")
        with Image.open(path) as image:
            size = image.size
            # A photograph that says it lies on its side is turned upright when mmcv loads it.
            if not as_labels and image.getexif().get(EXIF_ORIENTATION, 1) > 4:
                size = (size[1], size[0])
            if as_labels and len(image.getbands()) > 1:
                return ImageFile(f"mode {image.mode}, not one channel")
            if quick:
                return ImageFile(size=size)
            image.load()
            if image.format == "JPEG" and not ends_as_jpeg(path.read_bytes()):
                return ImageFile("truncated: no end of image")
            labels = np.bincount(np.asarray(image).ravel()) if as_labels else np.zeros(0, int)
        with Image.open(path) as image:
            # Checksums, which decoding a PNG passes over.
            image.verify()
    except UnidentifiedImageError:
        with path.open("rb") as file:
            # A link written out as text, a pointer to large-file storage and a web page show here.
            return ImageFile(f"not an image, begins with {file.read(50)!r}")
    except Exception as error:  # Pillow's decoders raise all sorts on damaged files.
        return ImageFile(f"{type(error).__name__}: {error}")
    present = np.flatnonzero(labels)
    return ImageFile("", size, dict(zip(present.tolist(), labels[present].tolist(), strict=True)))


def read_pair(paths: tuple[Path, Path], quick: bool) -> tuple[ImageFile, ImageFile]:
    """Reads an image and its label map."""
    return read_image(paths[0], quick), read_image(paths[1], quick, as_labels=True)


def each_result(
    function: Callable[[Task], Result], tasks: Sequence[Task], workers: int, description: str
) -> Iterator[tuple[Task, Result]]:
    """Runs a function over tasks in `workers` processes; yields each task with its result."""
    console = Console(stderr=True)
    total = len(tasks)
    pairs: Iterator[tuple[Task, Result]]
    if workers < 2 or total < SMALL:
        pairs = ((task, function(task)) for task in tasks)
        yield from track(pairs, description, total=total, console=console)
        return
    with ProcessPoolExecutor(workers) as pool:
        results = pool.map(function, tasks, chunksize=32)
        pairs = zip(tasks, results, strict=True)
        yield from track(pairs, description, total=total, console=console)


def files_in(folder: Path) -> dict[str, Path]:
    """The files below a folder, hidden ones left out, by their path relative to it."""
    return {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


def polygon_fault(polygons: list[Any]) -> str:
    """What is wrong with a list of polygons; empty if nothing is."""
    if not polygons:
        return "empty"
    for polygon in polygons:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
            return "a polygon needs at least three pairs of x, y"
        if not all(isinstance(number, int | float) for number in polygon):
            return "a polygon holds something other than numbers"
        if not math.isfinite(sum(polygon)):
            return "a polygon holds a number that is not finite"
    return ""


def judge_polygons(record: dict[str, Any]) -> dict[str, Any]:
    """Replaces polygons by a tuple of what is wrong with them, as soon as they are parsed.

    All of COCO's polygons, as Python numbers, would take several gigabytes.
    """
    if isinstance(polygons := record.get("segmentation"), list):
        record["segmentation"] = (polygon_fault(polygons),)
    return record


def decode_runs(counts: str) -> list[int]:
    """Unpacks COCO's compressed run lengths.

    Each is a little-endian number of five bits a character, and from the fourth on the difference
    to the one two places before. pycocotools would read beyond the end of a damaged string.

    Raises:
        ValueError: The string ends within a number or holds other characters.
    """
    runs: list[int] = []
    number = shift = 0
    for character in counts:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            raise ValueError(f"run lengths hold the character {character!r}")
        number |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            number -= 1 << shift
        runs.append(number + runs[-2] if len(runs) > 2 else number)
        number = shift = 0
    if shift:
        raise ValueError("run lengths end too early")
    return runs


def rle_fault(segmentation: dict[str, Any], size: tuple[int, int]) -> str:
    """What is wrong with run lengths in an image of `size` (width, height); empty if nothing is."""
    width, height = size
    counts = segmentation["counts"]
    runs = decode_runs(counts) if isinstance(counts, str) else counts
    if list(segmentation["size"]) != [height, width]:
        return f"run lengths of a mask of {segmentation['size']}, not {[height, width]}"
    if min(runs, default=0) < 0 or sum(runs) != height * width:
        return f"run lengths do not add up to {height} x {width}"
    return "" if sum(runs[1::2]) else "empty"


def annotation_faults(
    annotation: dict[str, Any], images: dict[Any, tuple[int, int]], categories: dict[Any, str]
) -> Iterator[tuple[str, str]]:
    """Yields kind and detail of what is wrong with one annotation.

    Args:
        annotation: As parsed, after `judge_polygons`.
        images: Width and height by image id.
        categories: Names by category id.

    Raises:
        TypeError, ValueError: A field holds something of another type.
    """
    if missing := [key for key in ANNOTATION_FIELDS if annotation.get(key) is None]:
        yield "annotation without a field", ", ".join(missing)
        return
    if annotation["category_id"] not in categories:
        yield "unknown category", f"category id {annotation['category_id']}"
    size = images.get(annotation["image_id"])
    if size is None:
        yield "annotation of an unknown image", f"image id {annotation['image_id']}"
        return

    # Written so that NaN fails too.
    x, y, width, height = annotation["bbox"]
    if not (width > 0 and height > 0):
        yield "box without width or height", f"box {annotation['bbox']}"
    elif not (
        min(x, y) >= -BOX_SLACK
        and x + width <= size[0] + BOX_SLACK
        and y + height <= size[1] + BOX_SLACK
    ):
        yield "box outside of the image", f"box {annotation['bbox']} in {size[0]} x {size[1]}"
    elif not annotation["area"] > 0:
        yield "annotation without area", f"area {annotation['area']}"

    segmentation = annotation["segmentation"]
    if isinstance(segmentation, tuple):
        (fault,) = segmentation
    elif isinstance(segmentation, dict):
        fault = rle_fault(segmentation, size)
    else:
        fault = "neither polygons nor run lengths"
    if fault:
        yield "bad segmentation", fault


def index_by_id(
    records: list[dict[str, Any]],
    fields: dict[str, Any],
    kind: str,
    file: Path,
    found: Findings,
) -> dict[Any, dict[str, Any]]:
    """Indexes images or categories by id and reports those that are incomplete or repeated.

    Args:
        records: Entries of `file`.
        fields: Type or types of each field that an entry must have.
        kind: What to call an entry.
        file: Where the entries are from.
        found: Takes the findings.
    """
    index: dict[Any, dict[str, Any]] = {}
    for position, record in enumerate(records):
        if bad := [key for key, types in fields.items() if not isinstance(record.get(key), types)]:
            where = f"{file}: {kind} number {position}, id {record.get('id')}"
            found.add(f"{kind} with a missing or bad field", f"{where}: {', '.join(bad)}")
        elif record["id"] in index:
            found.add(f"duplicate {kind} id", f"{file}: {kind} id {record['id']}")
        else:
            index[record["id"]] = record
    return index


def check_instances(
    report: Report, file: Path, split: str, num_classes: int | None
) -> dict[Any, dict[str, Any]]:
    """Checks what an annotation file says, without looking at images.

    Returns:
        The entries of the images, by id.

    Raises:
        ValueError: The file is no JSON.
        KeyError, TypeError, AttributeError: It is laid out in another way.
    """
    with file.open(encoding="utf-8") as stream:
        content = json.load(stream, object_hook=judge_polygons)
    found = report.problems
    categories = {
        id_: record["name"]
        for id_, record in index_by_id(
            content["categories"], CATEGORY_FIELDS, "category", file, found
        ).items()
    }
    if num_classes is not None and len(categories) != num_classes:
        found.add("unexpected number of categories", f"{file}: {len(categories)}")
    images = index_by_id(content["images"], IMAGE_FIELDS, "image", file, found)
    sizes = {id_: (record["width"], record["height"]) for id_, record in images.items()}

    classes = Counter(dict.fromkeys(categories.values(), 0))
    seen: set[Any] = set()
    annotated: set[Any] = set()
    crowds = 0
    for annotation in content["annotations"]:
        try:
            faults = list(annotation_faults(annotation, sizes, categories))
        except (TypeError, ValueError, KeyError) as error:
            faults = [("malformed annotation", f"{type(error).__name__}: {error}")]
        id_, image_id = annotation.get("id"), annotation.get("image_id")
        if id_ in seen:
            faults.append(("duplicate annotation id", f"image id {image_id}"))
        seen.add(id_)
        annotated.add(image_id)
        crowds += bool(annotation.get("iscrowd"))
        if annotation.get("category_id") in categories:
            classes[categories[annotation["category_id"]]] += 1
        name = images.get(image_id, {}).get("file_name", "")
        where = f"{file}: annotation id {id_} ({name})" if name else f"{file}: annotation id {id_}"
        for kind, detail in faults:
            if (image_id, id_) in PUBLISHED_FLAWS:
                report.notes.add("flaw of COCO 2017 as published", f"{where}: {kind}, {detail}")
            else:
                found.add(kind, f"{where}: {detail}")
    report.splits[split] = {
        "images": len(content["images"]),
        "annotations": len(content["annotations"]),
        "crowd": crowds,
        "images_without_annotations": len(images.keys() - annotated),
        "classes": dict(classes),
    }
    return images


def check_coco(report: Report, num_classes: int | None, workers: int) -> None:
    """Checks all splits of a folder in COCO 2017 layout."""
    found = report.problems
    for file in sorted(report.root.glob(COCO_ANNOTATIONS)):
        split = file.stem.removeprefix("instances_")
        report.splits[split] = {"images": 0, "classes": {}}
        try:
            images = check_instances(report, file, split, num_classes)
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            found.add("unreadable annotation file", f"{file}: {type(error).__name__}: {error}")
            continue
        if not images:
            found.add("split without images", str(file))
        if not report.splits[split]["annotations"]:
            found.add("split without annotations", str(file))
        folder = report.root / split
        if not folder.is_dir():
            found.add("missing image folder", f"{folder} ({len(images)} images)")
            continue
        files = files_in(folder)
        listed: dict[str, dict[str, Any]] = {}
        for id_, record in images.items():
            name = record["file_name"]
            if name in listed:
                found.add("image listed twice", f"{folder / name} (image id {id_})")
            elif name not in files:
                found.add("missing image", f"{folder / name} (image id {id_})")
            listed[name] = record
        for name in files.keys() - listed.keys():
            report.notes.add("file without an entry", str(files[name]))
        paths = [path for name, path in files.items() if name in listed]
        read = partial(read_image, quick=report.quick)
        for path, image in each_result(read, paths, workers, f"reading {split}"):
            record = listed[path.relative_to(folder).as_posix()]
            where = f"{path} (image id {record['id']})"
            if image.fault:
                found.add("unreadable image", f"{where}: {image.fault}")
            elif image.size != (record["width"], record["height"]):
                stated = f"{record['width']} x {record['height']}"
                found.add(
                    "wrong size",
                    f"{where}: {image.size[0]} x {image.size[1]}, annotated as {stated}",
                )


def check_ade(report: Report, num_classes: int, workers: int) -> None:
    """Checks all splits of a folder in ADE20K layout."""
    for split in ADE_SPLITS:
        image_folder = report.root / "images" / split
        label_folder = report.root / "annotations" / split
        if image_folder.is_dir() or label_folder.is_dir():
            check_ade_split(report, split, image_folder, label_folder, num_classes, workers)
        else:
            report.notes.add("split not there", str(image_folder))


def stems(files: dict[str, Path], suffix: str) -> dict[str, Path]:
    """Those files that end with `suffix`, by their name without it."""
    return {
        name.removesuffix(suffix): path for name, path in files.items() if name.endswith(suffix)
    }


def check_ade_split(
    report: Report,
    split: str,
    image_folder: Path,
    label_folder: Path,
    num_classes: int,
    workers: int,
) -> None:
    """Checks one split of a folder in ADE20K layout."""
    found = report.problems
    image_files, label_files = files_in(image_folder), files_in(label_folder)
    images, labels = stems(image_files, ".jpg"), stems(label_files, ".png")
    if not images:
        found.add("split without images", f"{image_folder}: no *.jpg")
    for name in sorted(images.keys() - labels.keys()):
        found.add("image without a label map", f"{images[name]}: no {label_folder / name}.png")
    for name in sorted(labels.keys() - images.keys()):
        found.add("label map without an image", f"{labels[name]}: no {image_folder / name}.jpg")
    unread = {*image_files.values(), *label_files.values()} - {*images.values(), *labels.values()}
    for path in sorted(unread):
        report.notes.add("file that mmseg does not read", str(path))

    pixels: Counter[int] = Counter()
    holders: Counter[int] = Counter()
    pairs = [(images[name], labels[name]) for name in images if name in labels]
    read = partial(read_pair, quick=report.quick)
    for (image_path, label_path), (image, label) in each_result(
        read, pairs, workers, f"reading {split}"
    ):
        if image.fault:
            found.add("unreadable image", f"{image_path}: {image.fault}")
        if label.fault:
            found.add("unreadable label map", f"{label_path}: {label.fault}")
        if not image.fault and not label.fault and image.size != label.size:
            sizes = " x ".join(map(str, label.size)), " x ".join(map(str, image.size))
            found.add("wrong size", f"{label_path}: {sizes[0]}, but its image is {sizes[1]}")
        if outside := {
            value: count
            for value, count in label.labels.items()
            if value > num_classes and value != IGNORED_LABEL
        }:
            listing = ", ".join(f"{value} ({count} px)" for value, count in outside.items())
            found.add("label out of range", f"{label_path}: {listing}, above {num_classes}")
        if label.labels and not label.labels.keys() - {0, IGNORED_LABEL}:
            report.notes.add("label map without any label", str(label_path))
        pixels.update(label.labels)
        holders.update(label.labels.keys())
    total = pixels.total()
    report.splits[split] = {
        "images": len(images),
        "label_maps": len(labels),
        **({"unlabeled_share": (pixels[0] + pixels[IGNORED_LABEL]) / total} if total else {}),
        "classes": {
            str(value): {"pixel_share": pixels[value] / total, "images": holders[value]}
            for value in sorted(pixels.keys() - {0, IGNORED_LABEL})
        },
    }


def recognise(root: Path) -> list[str]:
    """Which layouts a folder follows: none, one or both of `"coco"` and `"ade"`."""
    coco = any(root.glob(COCO_ANNOTATIONS))
    ade = any(
        (root / part / split).is_dir() for part in ("images", "annotations") for split in ADE_SPLITS
    )
    return ["coco"] * coco + ["ade"] * ade


def choose_task(root: Path, task: str | None) -> str:
    """The layout to check.

    Raises:
        LookupError: There is no such data; the message says where there is, or how to get some.
    """
    if not root.is_dir():
        raise LookupError(f"{root} is not a folder. How to get data:\n{HOW_TO_GET}")
    tasks = recognise(root)
    if len(tasks) == 1 and task in (None, *tasks):
        return tasks[0]
    if task in tasks:
        return task
    if tasks and task is None:
        raise LookupError(f"{root} holds both layouts: say which with --task coco or --task ade")
    inner = [path for path in sorted(root.iterdir()) if path.is_dir() and recognise(path)]
    if inner:
        raise LookupError(f"{root} holds data one level down: check {' or '.join(map(str, inner))}")
    expected = {
        "coco": f"no {COCO_ANNOTATIONS}",
        "ade": "no images/training or images/validation",
    }
    lacking = ", ".join(expected[name] for name in ([task] if task else expected))
    raise LookupError(f"{root}: {lacking}. How to get data:\n{HOW_TO_GET}")


def describe_split(name: str, split: dict[str, Any]) -> Iterator[str]:
    """Yields lines with the counts of one split and its classes."""
    counts = {key.replace("_", " "): split[key] for key in split if key != "classes"}
    yield f"{name}: " + ", ".join(
        f"{key} {value:.1%}" if isinstance(value, float) else f"{key} {value}"
        for key, value in counts.items()
    )
    classes = split["classes"]
    if not classes:
        return
    if isinstance(next(iter(classes.values())), int):
        yield f"  annotations of each of {len(classes)} classes:"
        entries = [f"{name} {count}" for name, count in classes.items()]
    else:
        yield f"  share of pixels (images) of each of {len(classes)} labels:"
        entries = [f"{v} {of['pixel_share']:.2%} ({of['images']})" for v, of in classes.items()]
    # Spaces within an entry are no places to break a line.
    listing = ", ".join(entry.replace(" ", "\xa0") for entry in entries)
    lines = textwrap.fill(listing, 98, initial_indent="    ", subsequent_indent="    ")
    yield lines.replace("\xa0", " ")


def describe(report: Report) -> Iterator[str]:
    """Yields the lines of the report, the verdict last."""
    for name, split in report.splits.items():
        yield from describe_split(name, split)
    for title, findings in (("note", report.notes), ("PROBLEM", report.problems)):
        for kind, count in findings.counts.items():
            yield f"{title}: {kind}: {count}"
            yield from (f"  {example}" for example in findings.examples[kind])
            if count > EXAMPLES_SHOWN:
                yield f"  and {count - EXAMPLES_SHOWN} more"
    yield report.verdict


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("root", type=Path, metavar="DATA_ROOT", help="folder to check")
    parser.add_argument("--task", choices=("coco", "ade"), help="layout (default: recognised)")
    parser.add_argument(
        "--num-classes",
        type=int,
        metavar="N",
        help="highest label of ADE20K (default: 150); number of COCO categories (default: any)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="open files without decoding them: finds missing files and wrong sizes, "
        "not truncation or bad labels",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=min(8, os.cpu_count() or 1),
        metavar="N",
        help="processes that read images (default: as many as CPUs, at most 8)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the report as JSON")
    args = parser.parse_args(argv)
    if args.json and not args.json.absolute().parent.is_dir():
        parser.error(f"argument --json: {args.json.parent} is not a folder")
    if args.num_classes is not None and args.num_classes < 1:
        parser.error(f"argument --num-classes: {args.num_classes} is less than 1")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool and returns its exit code."""
    args = parse_args(argv)
    try:
        task = choose_task(args.root, args.task)
    except LookupError as error:
        print(f"NOT FOUND: {error}", file=sys.stderr)
        return 2
    report = Report(args.root, task, args.quick)
    if task == "coco":
        check_coco(report, args.num_classes, args.workers)
    else:
        check_ade(report, args.num_classes or 150, args.workers)
    for line in describe(report):
        print(line)
    if args.json:
        try:
            args.json.write_text(json.dumps(report.as_dict(), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            print(f"--json: {args.json} cannot be written: {error.strerror}", file=sys.stderr)
            return 2
    return report.exit_code


if __name__ == "__main__":
    sys.exit(main())
