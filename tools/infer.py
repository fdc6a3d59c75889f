"""Predict on images and videos with a detector (mmdet config) or a segmenter (mmseg config).

    python tools/infer.py mmdet_configs/cascade_mambavision_t.py CHECKPOINT demo.jpg --out out
    python tools/infer.py CONFIG CHECKPOINT clip.mp4 --out out --every 5
    python tools/infer.py CONFIG CHECKPOINT photos/ more.png --out out --batch-size 8

The config's default_scope decides the task. The backbone's ImageNet file is not needed. Written:

  OUT/predictions.json   detections: box [x1, y1, x2, y2] in pixels, score, label, class, and the
                         mask as COCO run lengths; segmentations: each class's share of the pixels
  OUT/labels/NAME.png    segmentations: the label map; a pixel's value is the class's index in
                         predictions.json, from 0 (videos: a folder, one file a frame)
  OUT/vis/NAME.png       the picture with the predictions drawn in; for a video NAME.mp4

Images of one size that follow each other share a batch, so the predictions do not depend on the
batch size. A file that cannot be read is named, listed under "failed" in predictions.json and left
out; the exit code is then 1. An interrupted run leaves the finished predictions, marked as
incomplete.
"""

from __future__ import annotations

import argparse
import colorsys
import io
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import mmcv
import numpy as np
import torch
from common import (
    ToolError,
    add_trust_argument,
    check_file,
    check_model_weights,
    positive,
    read_config,
    user_errors,
)
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.dataset import Compose, pseudo_collate
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DATASETS, MODELS, init_default_scope
from mmengine.visualization import Visualizer
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from rich.progress import track
from torch import nn

from mambavision_backbone.checkpoint import read_checkpoint
from mambavision_backbone.inference import accelerate

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v")
OPACITY = 0.55  # of the colours over a segmented image
SMALLEST_NAMED = 4  # pixels from a region's middle to its edge, below which it gets no name

Picture = NDArray[np.uint8]  # (H, W, 3), BGR


class UnreadableError(Exception):
    """An input that is left out; the message is the reason."""


@dataclass(frozen=True)
class Source:
    """An image or video, and the name of what is written for it, which no other source has."""

    path: Path
    name: str

    @property
    def is_video(self) -> bool:
        """Whether it is a video."""
        return self.path.suffix.lower() in VIDEOS


@dataclass(frozen=True)
class Item:
    """One picture to predict on; ``frame`` is its number in a video, from 0."""

    source: Source
    frame: int | None
    image: Picture


def find_sources(inputs: Sequence[str]) -> list[Source]:
    """Images and videos named by files and folders (not their subfolders), each once.

    Raises:
        ToolError: names a path that does not exist, has another suffix, or holds no image.
    """
    paths: list[Path] = []
    for text in inputs:
        path = Path(text).expanduser()
        if path.is_dir():
            found = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGES)
            if not found:
                raise ToolError(f"no images in {text!r}: looked for {', '.join(IMAGES)}")
            paths.extend(found)
        elif not path.exists():
            raise ToolError(f"input {text!r} does not exist (relative to {os.getcwd()})")
        elif path.suffix.lower() not in IMAGES + VIDEOS:
            raise ToolError(
                f"input {text!r} is neither an image ({', '.join(IMAGES)}) nor a video "
                f"({', '.join(VIDEOS)})"
            )
        else:
            paths.append(path)
    sources: dict[Path, Source] = {}
    names: set[str] = set()
    for path in paths:
        if path.resolve() in sources:
            continue
        name, number = path.stem, 1
        while name in names:
            number += 1
            name = f"{path.stem}_{number}"
        names.add(name)
        sources[path.resolve()] = Source(path, name)
    return list(sources.values())


def read_image(path: Path) -> Picture:
    """Decode an image as in training; UnreadableError if it is damaged in any way."""
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            image.load()  # OpenCV fills up what a truncated file lacks without saying so
        decoded = mmcv.imfrombytes(data)
    except UnidentifiedImageError as error:
        raise UnreadableError("not an image") from error
    except (OSError, SyntaxError, ValueError, cv2.error) as error:
        raise UnreadableError(str(error).splitlines()[0]) from error
    if decoded is None:
        raise UnreadableError("OpenCV cannot decode it")
    return decoded


def read_frames(path: Path, every: int, limit: int | None) -> Iterator[tuple[int, Picture]]:
    """Every n-th frame of a video, at most ``limit`` of them, with their numbers."""
    video = mmcv.VideoReader(str(path))
    if not video.opened:
        raise UnreadableError("OpenCV cannot open it as a video")
    number = 0
    while limit is None or number < limit * every:
        frame = video.read()
        if frame is None:
            break
        if number % every == 0:
            yield number, frame
        number += 1
    if number == 0:
        raise UnreadableError("no frame can be decoded")
    if limit is None and number < video.frame_cnt:
        raise UnreadableError(f"it ends at frame {number} of {video.frame_cnt}")


def read_items(
    sources: Sequence[Source], every: int, limit: int | None, failed: list[dict[str, str]]
) -> Iterator[Item]:
    """All pictures in order; what cannot be read is named and added to ``failed``."""
    for source in sources:
        try:
            if source.is_video:
                for number, frame in read_frames(source.path, every, limit):
                    yield Item(source, number, frame)
            else:
                yield Item(source, None, read_image(source.path))
        except UnreadableError as error:
            print(f"cannot read {source.path}: {error}", file=sys.stderr)
            failed.append({"path": str(source.path), "reason": str(error)})


def count_items(sources: Sequence[Source], every: int, limit: int | None) -> int:
    """How many pictures there are, as far as the videos' headers know."""
    total = 0
    for source in sources:
        frames = -(-mmcv.VideoReader(str(source.path)).frame_cnt // every) if source.is_video else 1
        total += max(frames, 0) if limit is None else min(max(frames, 0), limit)
    return total


class Predictor:
    """A model with its weights, and the preparation of its images.

    Args:
        cfg: of a detector or segmenter.
        checkpoint: file or address of its weights.
        device: where it runs.
        fast: fold the backbone's batch norms; on a GPU also run in half precision, and replay CUDA
            graphs of input shapes that come again.

    Attributes:
        classes: names by label.
        palette: RGB colours by label.

    Raises:
        ToolError: the checkpoint cannot be read or lacks weights of the heads.
        WeightsError: its backbone is another one.
    """

    def __init__(
        self,
        cfg: Config,
        checkpoint: str,
        device: torch.device,
        fast: bool = False,
        trust: bool = False,
    ) -> None:
        init_default_scope(cfg.default_scope)
        cfg.model.backbone.init_cfg = None
        self.model = revert_sync_batchnorm(MODELS.build(cfg.model))
        meta = load_weights(self.model, checkpoint, trust)
        self.model.to(device).eval()
        self.half = fast and device.type == "cuda"
        if fast:
            try:
                accelerate(self.model)
            except TypeError as error:
                raise ToolError(f"--fast: {error}") from error
        dataset = test_dataset(cfg)
        self.classes, self.palette = classes_of(self.model, meta, dataset)
        loader, *steps = [step for step in dataset.pipeline if "Annotation" not in step["type"]]
        loader = {"type": "LoadImageFromNDArray", "to_float32": loader.get("to_float32", False)}
        self.pipeline = Compose([loader, *steps])

    def batches(self, items: Iterable[Item], size: int) -> Iterator[list[tuple[Item, dict]]]:
        """Prepared items in order; those of a batch have one shape."""
        batch: list[tuple[Item, dict]] = []
        for item in items:
            data = self.pipeline({"img": item.image, "img_id": 0})
            full = len(batch) == size
            if batch and (full or batch[0][1]["inputs"].shape != data["inputs"].shape):
                yield batch
                batch = []
            batch.append((item, data))
        if batch:
            yield batch

    @torch.no_grad()
    def predict(self, batch: Sequence[tuple[Item, dict]]) -> list[tuple[Item, Any]]:
        """Each item with its data sample on the CPU."""
        with torch.autocast("cuda", torch.float16, enabled=self.half):
            samples = self.model.test_step(pseudo_collate([data for _, data in batch]))
        return [(item, sample.cpu()) for (item, _), sample in zip(batch, samples, strict=True)]


def test_dataset(cfg: Config) -> ConfigDict:
    """The innermost data set that the config tests on."""
    dataset = cfg.test_dataloader.dataset
    while "dataset" in dataset or "datasets" in dataset:
        dataset = dataset.get("dataset") or dataset.datasets[0]
    return dataset


def load_weights(model: nn.Module, path: str, trust: bool = False) -> Mapping[str, Any]:
    """Load a checkpoint into the whole model, strictly; returns its meta data."""
    checkpoint = read_checkpoint(path, trust=trust)
    state = check_model_weights(model, checkpoint, path)
    model.load_state_dict(state, strict=False)
    return checkpoint.get("meta") or {}


def classes_of(
    model: nn.Module, meta: Mapping[str, Any], dataset: ConfigDict
) -> tuple[list[str], list[tuple[int, ...]]]:
    """Names and RGB colours of the classes: the checkpoint's, else the config's, else numbers."""
    number = number_of_classes(model)
    with DATASETS.switch_scope_and_registry(None) as datasets:
        dataset_class = datasets.get(dataset.type)
    for known in (
        {k.lower(): v for k, v in (meta.get("dataset_meta") or meta).items()},
        {**getattr(dataset_class, "METAINFO", {}), **dataset.get("metainfo", {})},
    ):
        names = known.get("classes") or ()
        if len(names) == number:
            palette = known.get("palette") or ()
            # COCO's own palette is longer than a subset of its classes: not theirs
            return list(names), palette_of(number, palette if len(palette) == number else ())
    print(
        f"neither checkpoint nor config has names for the model's {number} classes: numbering them",
        file=sys.stderr,
    )
    return [f"class {i}" for i in range(number)], palette_of(number, ())


def number_of_classes(model: Any) -> int:
    """How many labels the model predicts."""
    head: Any = getattr(model, "decode_head", None) or getattr(model, "bbox_head", None)
    head = head or model.roi_head.bbox_head
    head = head[-1] if isinstance(head, nn.ModuleList) else head
    return head.num_classes


def palette_of(number: int, known: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """The known colours, or as many well distinguished ones."""
    if known:
        return [tuple(color) for color in known]
    golden = 0.618  # of the hue circle: neighbours differ however many colours there are
    hues = [colorsys.hsv_to_rgb(i * golden % 1, 0.75, 0.95) for i in range(number)]
    return [tuple(round(255 * c) for c in color) for color in hues]


class Detections:
    """What is written and drawn of a detector's predictions.

    Args:
        predictor: gives names and colours.
        score_thr: detections below are left out.
    """

    task = "detection"

    def __init__(self, predictor: Predictor, score_thr: float) -> None:
        from mmdet.visualization import DetLocalVisualizer

        self.classes = predictor.classes
        self.score_thr = score_thr
        self.visualizer = DetLocalVisualizer(name="infer")
        self.visualizer.dataset_meta = {"classes": self.classes, "palette": predictor.palette}

    def record(self, item: Item, sample: Any) -> dict[str, Any]:
        """The entry of predictions.json, best first."""
        found = sample.pred_instances
        found = found[found.scores >= self.score_thr]
        found = found[found.scores.argsort(descending=True, stable=True)]
        instances = []
        for i in range(len(found)):
            label = int(found.labels[i])
            instance = {
                "bbox": [round(x, 2) for x in found.bboxes[i].tolist()],
                "score": round(float(found.scores[i]), 4),
                "label": label,
                "class": self.classes[label],
            }
            if "masks" in found:
                instance["mask"] = encode_runs(np.asarray(found.masks[i]))
            instances.append(instance)
        return {**describe(item), "instances": instances}

    def draw(self, image: Picture, sample: Any) -> Picture:
        """The image with boxes, names and masks."""
        rgb = image[..., ::-1]
        self.visualizer.add_datasample(
            "", rgb, sample, draw_gt=False, pred_score_thr=self.score_thr
        )
        return self.visualizer.get_image()[..., ::-1]


def encode_runs(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """A mask (H, W) as COCO's compressed run lengths."""
    from pycocotools import mask as coco_mask

    encoded = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(mask.shape), "counts": encoded["counts"].decode()}


class Segmentations:
    """What is written and drawn of a segmenter's predictions.

    Args:
        predictor: gives names and colours.
        out: folder for the label maps.
    """

    task = "segmentation"

    def __init__(self, predictor: Predictor, out: Path) -> None:
        self.out = out
        self.classes = predictor.classes
        self.colors = np.array(predictor.palette, np.uint8)[:, ::-1]
        self.visualizer = Visualizer(name="infer")

    def record(self, item: Item, sample: Any) -> dict[str, Any]:
        """Write the label map; the entry of predictions.json, largest class first."""
        labels = label_map(sample)
        stem = item.source.name if item.frame is None else f"{item.source.name}/{item.frame:06d}"
        name = Path("labels", f"{stem}.png")
        (self.out / name).parent.mkdir(parents=True, exist_ok=True)
        dtype = np.uint8 if len(self.classes) <= 256 else np.uint16
        write_picture(self.out / name, labels.astype(dtype))
        present, counts = np.unique(labels, return_counts=True)
        order = np.argsort(-counts, kind="stable")
        shares = [
            {
                "label": int(present[i]),
                "class": self.classes[present[i]],
                "share": round(float(counts[i] / labels.size), 6),
            }
            for i in order
        ]
        return {**describe(item), "label_map": str(name), "classes": shares}

    def draw(self, image: Picture, sample: Any) -> Picture:
        """The image under its classes' colours, with the name of each in its widest place."""
        labels = label_map(sample)
        blended = cv2.addWeighted(self.colors[labels], OPACITY, image, 1 - OPACITY, 0)
        self.visualizer.set_image(blended[..., ::-1])
        size = float(np.clip(min(labels.shape) / 40, 6, 16))
        for label in np.unique(labels):
            region = np.pad(labels == label, 1).astype(np.uint8)
            distance = cv2.distanceTransform(region, cv2.DIST_L2, 3)[1:-1, 1:-1]
            y, x = np.unravel_index(distance.argmax(), distance.shape)
            if distance[y, x] < SMALLEST_NAMED:
                continue
            side = min(int(5 * x / labels.shape[1]), 4)  # names near a border stay inside
            self.visualizer.draw_texts(
                self.classes[label],
                np.array([x, y]),
                font_sizes=size,
                colors="white",
                horizontal_alignments={0: "left", 4: "right"}.get(side, "center"),
                vertical_alignments="center",
                bboxes={"facecolor": "black", "alpha": 0.6, "pad": 1, "edgecolor": "none"},
            )
        return self.visualizer.get_image()[..., ::-1]


def label_map(sample: Any) -> NDArray[np.int64]:
    """A segmenter's labels, (H, W)."""
    return sample.pred_sem_seg.data[0].numpy()


def describe(item: Item) -> dict[str, Any]:
    """What predictions.json says of every picture."""
    height, width = item.image.shape[:2]
    frame = {} if item.frame is None else {"frame": item.frame}
    return {"path": str(item.source.path), **frame, "height": height, "width": width}


def write_picture(path: Path, picture: NDArray[Any]) -> None:
    """Write an image file; OpenCV alone would say nothing if it cannot."""
    if not cv2.imwrite(str(path), picture):
        raise OSError(f"cannot write {path}")


class PictureWriter:
    """Pictures go to files of their own, frames to a video, which is named when closed."""

    def __init__(self, folder: Path, every: int) -> None:
        self.folder = folder
        self.every = every
        self.video: Any = None
        self.video_name = ""
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, item: Item, picture: Picture) -> str:
        """Returns the file's name in the folder."""
        if item.frame is None:
            name = f"{item.source.name}.png"
            write_picture(self.folder / name, picture)
            return name
        name = f"{item.source.name}.mp4"
        if name != self.video_name:
            self.close()
            self._open(name, item.source.path, picture)
        self.video.write(np.ascontiguousarray(picture))
        return name

    def _open(self, name: str, source: Path, picture: Picture) -> None:
        fps = (mmcv.VideoReader(str(source)).fps or 25) / self.every
        height, width = picture.shape[:2]
        codec = cv2.VideoWriter.fourcc(*"mp4v")
        self.video = cv2.VideoWriter(str(self._unfinished(name)), codec, fps, (width, height))
        if not self.video.isOpened():
            raise ToolError(f"OpenCV cannot write videos to {self.folder}: give --no-vis")
        self.video_name = name

    def _unfinished(self, name: str) -> Path:
        return self.folder / f"unfinished_{name}"

    def close(self) -> None:
        """Close the video that is being written, if any."""
        if self.video is not None:
            self.video.release()
            self._unfinished(self.video_name).replace(self.folder / self.video_name)
            self.video, self.video_name = None, ""


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file that is either complete or not there."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(json.dumps(content) + "\n")
    unfinished.replace(path)


def predict_all(
    predictor: Predictor,
    task: Detections | Segmentations,
    sources: Sequence[Source],
    args: argparse.Namespace,
) -> list[dict[str, str]]:
    """Predict, draw and write; returns the inputs that could not be read."""
    out = Path(args.out)
    pictures = None if args.no_vis else PictureWriter(out / "vis", args.every)
    failed: list[dict[str, str]] = []
    records: list[dict[str, Any]] = []
    summary = {
        "task": task.task,
        "config": args.config,
        "checkpoint": args.checkpoint,
        "score_thr": args.score_thr if task.task == "detection" else None,
        "classes": predictor.classes,
        "complete": False,
    }
    items = read_items(sources, args.every, args.limit, failed)
    total = count_items(sources, args.every, args.limit)
    try:
        for batch in predictor.batches(track(items, "predicting", total), args.batch_size):
            for item, sample in predictor.predict(batch):
                record = task.record(item, sample)
                if pictures:
                    name = pictures.write(item, task.draw(item.image, sample))
                    record["picture"] = str(Path("vis", name))
                records.append(record)
        summary["complete"] = True
    except torch.cuda.OutOfMemoryError as error:
        raise ToolError(
            f"the GPU's memory is too small for --batch-size {args.batch_size}: lower it, or give "
            "--device cpu"
        ) from error
    finally:
        if pictures:
            pictures.close()
        write_json(out / "predictions.json", {**summary, "failed": failed, "images": records})
    return failed


def choose_device(name: str) -> torch.device:
    """The device of that name; ``auto`` is a GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ToolError(f"--device {name!r}: give auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ToolError(f"--device {name}: there are {torch.cuda.device_count()} GPUs here")
    return device


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="config file")
    parser.add_argument("checkpoint", help="checkpoint file, trained with this config")
    parser.add_argument("inputs", nargs="+", metavar="input", help="image, folder of images, video")
    parser.add_argument("--out", required=True, help="folder to write to")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    parser.add_argument("--batch-size", type=positive, default=1, metavar="N", help="default: 1")
    parser.add_argument(
        "--fast",
        action="store_true",
        help="fold the backbone's batch norms; on a GPU also run in half precision, and replay "
        "CUDA graphs of input shapes that come again",
    )
    parser.add_argument(
        "--score-thr",
        type=float,
        default=0.3,
        metavar="X",
        help="leave out detections with lower scores (default: 0.3)",
    )
    parser.add_argument(
        "--every", type=positive, default=1, metavar="N", help="of a video, only every N-th frame"
    )
    parser.add_argument(
        "--limit", type=positive, metavar="N", help="of a video, predict on at most N frames"
    )
    parser.add_argument("--no-vis", action="store_true", help="do not draw: faster")
    parser.add_argument(
        "--cfg-options", nargs="+", action=DictAction, help="override settings of the config"
    )
    add_trust_argument(parser)
    return parser.parse_args()


def main() -> None:
    """Predict."""
    args = parse_args()
    with user_errors():
        sources = find_sources(args.inputs)
        check_file(args.checkpoint, "checkpoint")
        device = choose_device(args.device)
        cfg = read_config(args.config, args.cfg_options)
        if cfg.get("default_scope") not in ("mmdet", "mmseg"):
            raise ToolError(f"{args.config}: default_scope must be 'mmdet' or 'mmseg'")
        Path(args.out).mkdir(parents=True, exist_ok=True)
        predictor = Predictor(cfg, args.checkpoint, device, args.fast, args.trust_checkpoint)
        task = (
            Detections(predictor, args.score_thr)
            if cfg.default_scope == "mmdet"
            else Segmentations(predictor, Path(args.out))
        )
        failed = predict_all(predictor, task, sources, args)
    print(f"predictions are in {args.out}")
    if failed:
        raise SystemExit(f"{len(failed)} of {len(sources)} inputs could not be read, see above")


if __name__ == "__main__":
    main()
