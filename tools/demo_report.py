"""Write the demo's report.html and report.json from what its steps left in the work folder.

    python tools/demo_report.py work_dirs/demo

Called by tools/demo.py at its end. The page holds its pictures, so it can be moved and mailed.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import html
import io
import json
import os
import platform
from collections.abc import Iterable, Sequence
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import cv2
import mmcv
import numpy as np
from common import read_config, set_data_root
from demo import ENLARGE, REPORT, RESULTS, SCORE, TASKS, Task, clock, last_checkpoint, read_json
from infer import Segmentations
from mmengine.registry import DATASETS, init_default_scope
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mambavision_backbone.checkpoint import read_state_dict

PACKAGES = (
    "mambavision-backbone",
    "torch",
    "onedl-mmcv",
    "mmcv",
    "onedl-mmdetection",
    "mmdet",
    "onedl-mmsegmentation",
    "mmsegmentation",
    "onedl-mmengine",
    "mmengine",
)
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")

PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>MambaVision demo</title>
<style>
  body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 80rem; margin: 2rem auto;
         padding: 0 1rem; color: #222; background: #fff }}
  table {{ border-collapse: collapse; margin: 0 0 1.5rem }}
  th, td {{ padding: .25rem .8rem; border-bottom: 1px solid #ddd; text-align: left;
            vertical-align: top }}
  td.number {{ text-align: right; font-variant-numeric: tabular-nums }}
  .row {{ display: grid; grid-template-columns: repeat(4, 1fr); gap: .5rem; margin-bottom: .5rem }}
  img {{ max-width: 100% }}
  .notice {{ background: #fff3cd; padding: .5rem 1rem }}
</style>
<h1>MambaVision demo</h1>
{notice}
<p>Cascade Mask R-CNN and UPerNet with a narrow MambaVision, trained from scratch on {train} drawn
images and evaluated on {val} held-out ones.</p>
{summary}
<h2>By class</h2>
{classes}
<h2>Held-out images</h2>
<p>Objects with scores of at least {score}; none of these images was trained on.</p>
<div class="row"><b>objects: drawn</b><b>objects: found</b><b>classes: drawn</b>
<b>classes: found</b></div>
{pictures}
<h2>Curves</h2>
{curves}
<h2>Time</h2>
<p>The two trainings, each with its evaluation and pictures, run beside each other.</p>
{times}
<h2>Setting</h2>
{setting}
"""


def newest_metrics(folder: Path) -> dict[str, float]:
    """The metrics that tools/test.py wrote last below a folder."""
    files = [p for p in folder.glob("*/*.json") if p.stem == p.parent.name]
    return read_json(max(files, key=lambda p: p.stem))


def count_parameters(checkpoint: Path) -> int:
    """Parameters of the model of a checkpoint."""
    state = read_state_dict(str(checkpoint))
    return sum(v.numel() for k, v in state.items() if not k.endswith(BUFFERS))


def average_precisions(annotations: Path, predictions: Path, kind: str) -> dict[str, float]:
    """COCO's AP at IoU 0.5:0.95 of each class, 0 to 1.

    Args:
        annotations: the COCO file of the held-out images.
        predictions: COCO results.
        kind: ``bbox`` or ``segm``.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        names = {c["id"]: c["name"] for c in truth.loadCats(truth.getCatIds())}
        results = read_json(predictions)
        if not results:
            return dict.fromkeys(names.values(), 0.0)
        evaluation = COCOeval(truth, truth.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # IoU, recall, class
    return {
        names[category]: float(np.mean(values[values > -1]))
        if (values > -1).any()
        else float("nan")
        for category, values in zip(
            evaluation.params.catIds, np.moveaxis(precision, 2, 0), strict=True
        )
    }


def intersections_over_unions(
    truth: Path, predicted: Path, classes: Sequence[str]
) -> dict[str, float]:
    """IoU of each class over all label maps of a folder, 0 to 1; pixels are 1 + class."""
    size = len(classes) + 1
    confusion = np.zeros((size, size), np.int64)
    for path in sorted(predicted.glob("*.png")):
        labels = [mmcv.imread(folder / path.name, "unchanged") for folder in (truth, predicted)]
        np.add.at(confusion, tuple(labels), 1)
    known = confusion[1:, 1:]
    hits = np.diag(known)
    unions = known.sum(0) + known.sum(1) - hits
    return {
        name: float(hit / union) if union else float("nan")
        for name, hit, union in zip(classes, hits, unions, strict=True)
    }


def load_truth(work: Path, task: Task) -> Any:
    """The held-out data set of a task with its annotations, enlarged."""
    cfg = read_config(str(task.config))
    set_data_root(cfg, f"{work / 'data' / task.layout}/")
    init_default_scope(cfg.default_scope)
    dataset = cfg.test_dataloader.dataset
    (annotations,) = (s for s in dataset.pipeline if s.type == "LoadAnnotations")
    dataset.pipeline = [
        dict(type="LoadImageFromFile"),
        annotations,
        dict(type="Resize", scale_factor=float(ENLARGE), keep_ratio=True),
        dict(type=dataset.pipeline[-1].type, meta_keys=()),
    ]
    return DATASETS.build(dataset)


def draw_truth(work: Path, names: Iterable[str]) -> dict[str, list[bytes]]:
    """The named held-out images with their annotations drawn in, as JPEG, for each task."""
    from mmdet.visualization import DetLocalVisualizer

    drawn: dict[str, list[bytes]] = {}
    for task in TASKS:
        dataset = load_truth(work, task)
        meta = dataset.metainfo
        index = {Path(dataset.get_data_info(i)["img_path"]).stem: i for i in range(len(dataset))}
        drawn[task.name] = []
        for name in names:
            item = dataset[index[name]]
            image = np.ascontiguousarray(item["inputs"].permute(1, 2, 0).numpy())
            sample = item["data_samples"]
            if task.layout == "coco":
                visualizer = DetLocalVisualizer(name="truth")
                visualizer.dataset_meta = meta
                sample.gt_instances.bboxes = sample.gt_instances.bboxes.tensor
                visualizer.add_datasample("", image[..., ::-1], sample, draw_pred=False)
                picture = visualizer.get_image()[..., ::-1]
            else:
                sample.pred_sem_seg = sample.gt_sem_seg
                named = SimpleNamespace(classes=meta["classes"], palette=meta["palette"])
                picture = Segmentations(cast(Any, named), work).draw(image, sample)
            drawn[task.name].append(encode(picture))
    return drawn


def encode(picture: NDArray[np.uint8]) -> bytes:
    """A BGR picture as JPEG."""
    quality = (cv2.IMWRITE_JPEG_QUALITY, 90)
    return cv2.imencode(".jpg", np.ascontiguousarray(picture), quality)[1].tobytes()


def image_tag(data: bytes, kind: str, title: str) -> str:
    """An image file as part of the page."""
    text = base64.b64encode(data).decode("ascii")
    return f'<img src="data:image/{kind};base64,{text}" alt="{html.escape(title)}">'


def table(rows: Iterable[Sequence[Any]], head: Sequence[str] = ()) -> str:
    """A table; floats are shown with three digits."""

    def cell(value: Any) -> str:
        if isinstance(value, float):
            return f'<td class="number">{value:.3f}</td>'
        return f"<td>{html.escape(str(value))}</td>"

    top = f"<tr>{''.join(f'<th>{html.escape(h)}</th>' for h in head)}</tr>\n" if head else ""
    body = "\n".join(f"<tr>{''.join(cell(v) for v in row)}</tr>" for row in rows)
    return f"<table>\n{top}{body}\n</table>"


def installed(names: Iterable[str]) -> str:
    """Versions of those of the packages that are installed."""
    found = []
    for name in names:
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return ", ".join(found)


def collect(work: Path) -> dict[str, Any]:
    """All numbers of the report."""
    state = read_json(work / "demo.json")
    detection, segmentation = (work / task.name for task in TASKS)
    det, seg = (newest_metrics(folder / "test") for folder in (detection, segmentation))
    coco = work / "data/coco/annotations/instances_val2017.json"
    dataset = load_truth(work, TASKS[1])
    classes = dataset.metainfo["classes"]
    aps = {
        kind: average_precisions(coco, detection / f"test/predictions.{kind}.json", kind)
        for kind in ("bbox", "segm")
    }
    ious = intersections_over_unions(
        work / "data/ade/annotations/validation", segmentation / "test/labels", classes
    )
    drawn = read_json(work / "data/shapes.json")["settings"]
    return {
        "scale": state["scale"],
        "train": drawn["train"],
        "val": drawn["val"],
        "summary": [
            ["box mAP (0.5:0.95)", f"{det['coco/bbox_mAP']:.3f}"],
            ["mask mAP (0.5:0.95)", f"{det['coco/segm_mAP']:.3f}"],
            ["box AP50", f"{det['coco/bbox_mAP_50']:.3f}"],
            ["mask AP50", f"{det['coco/segm_mAP_50']:.3f}"],
            ["mIoU", f"{seg['mIoU'] / 100:.3f}"],
            ["pixel accuracy (aAcc)", f"{seg['aAcc'] / 100:.3f}"],
            *(
                [f"parameters, {t.name}", f"{count_parameters(last_checkpoint(work / t.name)):,}"]
                for t in TASKS
            ),
            ["device", state["device"]],
            ["time up to this report", clock(state["total"])],
        ],
        "classes": [
            [name, aps["bbox"].get(name, ""), aps["segm"].get(name, ""), ious[name]]
            for name in classes
        ],
        "times": [[name, clock(seconds)] for name, seconds in state["seconds"].items()],
        "setting": [
            ["written", datetime.now().astimezone().isoformat(timespec="seconds")],
            ["system", f"{platform.platform()}, {len(os.sched_getaffinity(0))} cores"],
            ["python", platform.python_version()],
            ["packages", installed(PACKAGES)],
            ["image size", "{} × {}".format(*drawn["size"])],
        ],
    }


def make_page(work: Path, numbers: dict[str, Any]) -> str:
    """The report."""
    names = [path.stem for path in sorted((work / "pictures/held-out").glob("*.png"))]
    drawn = draw_truth(work, names)
    rows = []
    for i, name in enumerate(names):
        cells = []
        for task in TASKS:
            found = encode(mmcv.imread(work / "pictures" / task.name / "vis" / f"{name}.png"))
            cells.append(image_tag(drawn[task.name][i], "jpeg", f"{name}, drawn"))
            cells.append(image_tag(found, "jpeg", f"{name}, found"))
        rows.append(f'<div class="row">{"".join(cells)}</div>')
    curves = [
        f"<h3>{task.name}</h3>"
        + "".join(
            image_tag(path.read_bytes(), "png", path.stem)
            for kind in ("loss", "metrics", "lr")
            if (path := work / "curves" / task.name / f"{kind}.png").exists()
        )
        for task in TASKS
    ]
    smoke = '<p class="notice">Toy scale (--smoke): the numbers mean nothing.</p>'
    return PAGE.format(
        notice=smoke if numbers["scale"] == "smoke" else "",
        score=SCORE,
        train=numbers["train"],
        val=numbers["val"],
        summary=table(numbers["summary"]),
        classes=table(numbers["classes"], ("class", "box AP", "mask AP", "IoU")),
        pictures="\n".join(rows),
        curves="\n".join(curves),
        times=table(numbers["times"], ("step", "h:mm:ss")),
        setting=table(numbers["setting"]),
    )


def main() -> None:
    """Write the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work_dir", type=Path, help="the demo's work folder")
    work = parser.parse_args().work_dir.resolve()
    numbers = collect(work)
    page = make_page(work, numbers)
    (work / RESULTS).write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    (work / REPORT).write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
