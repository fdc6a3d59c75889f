"""Prediction with tiny random models: what is written, and every way an input can be wrong."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import save_checkpoint
from pycocotools import mask as coco_mask

from mambavision_backbone.inference import accelerate
from tests.conftest import ROOT, TINY_ARCH

sys.path.append(str(ROOT / "tools"))
infer: Any = importlib.import_module("infer")

CLASSES = ("circle", "square", "triangle")
CHANNELS = [16, 32, 64, 128]
HW = (48, 64)


def save_model(cfg: Config, folder: Path, sharpen: list[str], meta: dict[str, Any]) -> None:
    """Write config.py and model.pth, random but with decided classes."""
    cfg.model.backbone.update(arch=TINY_ARCH, window_size=None, window_mode="fit")
    # The tool must not ask for it: the checkpoint holds the backbone.
    cfg.model.backbone.init_cfg = dict(type="Pretrained", checkpoint="imagenet.pth")
    cfg.dump(folder / "config.py")
    cfg.model.backbone.init_cfg = None
    init_default_scope(cfg.default_scope)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    for name in sharpen:
        torch.nn.init.normal_(model.get_parameter(name))
    path = str(folder / "model.pth")
    save_checkpoint({"state_dict": model.state_dict(), "meta": meta}, path)


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("detector")
    cfg = Config.fromfile(ROOT / "mmdet_configs" / "cascade_mambavision_t.py")
    cfg.model.neck.update(in_channels=CHANNELS, out_channels=32)
    cfg.model.rpn_head.update(in_channels=32, feat_channels=32)
    cfg.model.test_cfg.rpn.max_per_img = 40
    roi_head = cfg.model.roi_head
    roi_head.bbox_roi_extractor.out_channels = roi_head.mask_roi_extractor.out_channels = 32
    for head in [*roi_head.bbox_head, roi_head.mask_head]:
        head.update(in_channels=32, conv_out_channels=32, num_classes=len(CLASSES))
    cfg.test_dataloader.dataset.pipeline[1].scale = (96, 96)
    names = [f"roi_head.bbox_head.{i}.fc_cls.weight" for i in range(3)]
    save_model(cfg, folder, names, {"dataset_meta": {"classes": CLASSES}})
    return folder


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("segmenter")
    cfg = Config.fromfile(ROOT / "mmseg_configs" / "upernet_mambavision_t.py")
    number = len(CLASSES)
    cfg.model.decode_head.update(in_channels=CHANNELS, channels=32, num_classes=number)
    cfg.model.auxiliary_head.update(in_channels=64, channels=32, num_classes=number)
    cfg.test_dataloader.dataset.pipeline[1].scale = (128, 64)
    palette = [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
    meta = {"dataset_meta": {"classes": CLASSES, "palette": palette}}
    save_model(cfg, folder, ["decode_head.conv_seg.weight"], meta)
    return folder


def draw(hw: tuple[int, int], seed: int) -> Any:
    """A noisy image with a bright square."""
    image = np.random.default_rng(seed).integers(0, 120, (*hw, 3), dtype=np.uint8)
    image[8:28, 6 + 3 * seed : 26 + 3 * seed] = (60, 200, 240)
    return image


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Four images, the third of another size."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, hw in enumerate([HW, HW, HW[::-1], HW]):
        cv2.imwrite(str(folder / f"{i}.png"), draw(hw, i))
    return folder


def run(
    monkeypatch: pytest.MonkeyPatch, model: Path, out: Path, *arguments: object
) -> dict[str, Any]:
    """Run the tool on a CPU and read predictions.json."""
    config, checkpoint = str(model / "config.py"), str(model / "model.pth")
    options = ["--out", str(out), "--device", "cpu"]
    arguments = (config, checkpoint, *options, *map(str, arguments))
    monkeypatch.setattr(sys, "argv", ["infer.py", *arguments])
    infer.main()
    return json.loads((out / "predictions.json").read_text())


def test_detector(
    detector: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = run(monkeypatch, detector, tmp_path / "one", photos)
    two = run(monkeypatch, detector, tmp_path / "two", photos, "--batch-size", 2, "--no-vis")
    assert one["complete"]
    assert one["failed"] == []
    assert one["classes"] == list(CLASSES)
    assert [Path(image["path"]).name for image in one["images"]] == [f"{i}.png" for i in range(4)]
    assert any(image["instances"] for image in one["images"])
    for image, other in zip(one["images"], two["images"], strict=True):
        height, width = image["height"], image["width"]
        scores = [instance["score"] for instance in image["instances"]]
        assert scores == sorted(scores, reverse=True)
        assert all(score >= 0.3 for score in scores)
        for instance, twin in zip(image["instances"], other["instances"], strict=True):
            x1, y1, x2, y2 = instance["bbox"]
            assert 0 <= x1 <= x2 <= width
            assert 0 <= y1 <= y2 <= height
            assert instance["class"] == CLASSES[instance["label"]]
            assert coco_mask.decode(instance["mask"]).shape == (height, width)
            assert twin["bbox"] == pytest.approx(instance["bbox"], abs=0.05)
            assert twin["score"] == pytest.approx(instance["score"], abs=1e-3)
        picture = cv2.imread(str(tmp_path / "one" / image["picture"]))
        assert picture.shape == (height, width, 3)
        assert (picture != cv2.imread(image["path"])).any() == bool(image["instances"])
    assert not (tmp_path / "two" / "vis").exists()


def test_fast_is_the_same(
    detector: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU in float32: nothing but rounding differs."""
    slow = run(monkeypatch, detector, tmp_path / "slow", photos / "0.png", "--no-vis")
    fast = run(monkeypatch, detector, tmp_path / "fast", photos / "0.png", "--no-vis", "--fast")
    pairs = zip(slow["images"][0]["instances"], fast["images"][0]["instances"], strict=True)
    for a, b in pairs:
        assert b["bbox"] == pytest.approx(a["bbox"], abs=0.05)
        assert b["score"] == pytest.approx(a["score"], abs=1e-3)


def test_fast_needs_a_mambavision(detector: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(infer, "load_weights", lambda *_: {})
    cfg = infer.read_config(str(detector / "config.py"))
    cfg.model.backbone = {"type": "mmdet.ResNet", "depth": 18}
    with pytest.raises(infer.ToolError, match=r"--fast: CascadeRCNN has no MambaVision"):
        infer.Predictor(cfg, str(detector / "model.pth"), torch.device("cpu"), fast=True)


@pytest.mark.slow
def test_inferencers_take_the_fast_backbone(detector: Path, segmenter: Path, photos: Path) -> None:
    """Those of mmdet and mmseg, as docs/speed.md says."""
    from mmdet.apis import DetInferencer
    from mmseg.apis import MMSegInferencer

    image = cv2.imread(str(photos / "0.png"))
    results = []
    for fast in (False, True):
        files = [str(detector / name) for name in ("config.py", "model.pth")]
        detect = DetInferencer(*files, device="cpu", show_progress=False)
        files = [str(segmenter / name) for name in ("config.py", "model.pth")]
        segment = MMSegInferencer(*files, device="cpu")
        if fast:
            accelerate(detect.model)
            accelerate(segment.model)
        results.append((detect(image)["predictions"][0], segment(image)["predictions"]))
    (boxes, labels), (fast_boxes, fast_labels) = results
    np.testing.assert_allclose(fast_boxes["scores"], boxes["scores"], atol=1e-3)
    assert (np.asarray(labels) == np.asarray(fast_labels)).mean() > 0.99


def test_score_threshold(
    detector: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def soften(content: dict[str, Any]) -> None:
        for name, weight in content["state_dict"].items():
            if "fc_cls" in name:
                weight *= 0.02

    model = change_checkpoint(detector, tmp_path, soften)
    arguments = (photos / "0.png", "--no-vis", "--score-thr")
    all_ = run(monkeypatch, model, tmp_path / "all", *arguments, 0.0)["images"][0]["instances"]
    scores = sorted(instance["score"] for instance in all_)
    between = (scores[0] + scores[-1]) / 2
    few = run(monkeypatch, model, tmp_path / "few", *arguments, between)["images"][0]["instances"]
    assert few == [instance for instance in all_ if instance["score"] >= between]
    assert 0 < len(few) < len(all_)


def test_segmenter(
    segmenter: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    result = run(monkeypatch, segmenter, out, photos, "--batch-size", 2)
    assert len(result["images"]) == 4
    for image in result["images"]:
        labels = cv2.imread(str(out / image["label_map"]), cv2.IMREAD_UNCHANGED)
        assert labels.shape == (image["height"], image["width"])
        assert labels.dtype == np.uint8
        shares = {entry["label"]: entry["share"] for entry in image["classes"]}
        assert sum(shares.values()) == pytest.approx(1, abs=1e-5)
        for label, share in shares.items():
            assert (labels == label).mean() == pytest.approx(share, abs=1e-6)
        assert list(shares.values()) == sorted(shares.values(), reverse=True)
        assert cv2.imread(str(out / image["picture"])).shape == (*labels.shape, 3)
    assert len({entry["class"] for i in result["images"] for entry in i["classes"]}) > 1


def test_batches_hold_one_shape(segmenter: Path, photos: Path) -> None:
    cfg = infer.read_config(str(segmenter / "config.py"))
    predictor = infer.Predictor(cfg, str(segmenter / "model.pth"), torch.device("cpu"))
    items = infer.read_items(infer.find_sources([str(photos)]), 1, None, [])
    batches = list(predictor.batches(items, 2))
    assert [[item.source.name for item, _ in batch] for batch in batches] == [
        ["0", "1"],
        ["2"],
        ["3"],
    ]


def test_unreadable_images_are_named_and_skipped(
    segmenter: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cv2.imwrite(str(photos / "cut.jpg"), draw((200, 200), 0))
    data = (photos / "cut.jpg").read_bytes()
    (photos / "cut.jpg").write_bytes(data[: len(data) // 2])
    (photos / "text.png").write_text("not an image")
    with pytest.raises(SystemExit, match="2 of 6 inputs could not be read"):
        run(monkeypatch, segmenter, tmp_path / "out", photos, "--no-vis")
    result = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [Path(entry["path"]).name for entry in result["failed"]] == ["cut.jpg", "text.png"]
    assert len(result["images"]) == 4
    error = capsys.readouterr().err
    assert "cut.jpg: image file is truncated" in error
    assert "text.png: not an image" in error


def write_video(path: Path, frames: int) -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 10, HW[::-1])
    for i in range(frames):
        writer.write(draw(HW, i))
    writer.release()
    return path


def test_video(segmenter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    video = write_video(tmp_path / "clip.mp4", 7)
    out = tmp_path / "out"
    result = run(monkeypatch, segmenter, out, video, "--every", 2, "--limit", 3, "--batch-size", 2)
    assert [image["frame"] for image in result["images"]] == [0, 2, 4]
    assert [image["label_map"] for image in result["images"]] == [
        f"labels/clip/{frame:06d}.png" for frame in (0, 2, 4)
    ]
    assert all((out / image["label_map"]).is_file() for image in result["images"])
    assert [path.name for path in (out / "vis").iterdir()] == ["clip.mp4"]
    drawn = cv2.VideoCapture(str(out / "vis" / "clip.mp4"))
    assert drawn.get(cv2.CAP_PROP_FRAME_COUNT) == 3
    assert drawn.get(cv2.CAP_PROP_FPS) == 5
    assert drawn.read()[1].shape == (*HW, 3)


def test_broken_video_is_named(
    segmenter: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.mp4").write_bytes(b"\0" * 1000)
    inputs = (tmp_path / "broken.mp4", photos / "0.png")
    with pytest.raises(SystemExit, match="1 of 2 inputs could not be read"):
        run(monkeypatch, segmenter, tmp_path / "out", *inputs, "--no-vis")
    result = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [entry["path"] for entry in result["failed"]] == [str(tmp_path / "broken.mp4")]
    assert len(result["images"]) == 1


def test_interrupted_run_keeps_what_is_done(
    segmenter: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict = infer.Predictor.predict

    def interrupted(self: Any, batch: Any) -> Any:
        if batch[0][0].source.name == "2":
            raise KeyboardInterrupt
        return predict(self, batch)

    monkeypatch.setattr(infer.Predictor, "predict", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, segmenter, tmp_path / "out", photos)
    result = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert not result["complete"]
    assert [Path(image["path"]).name for image in result["images"]] == ["0.png", "1.png"]


def test_sources_are_unique(tmp_path: Path) -> None:
    for name in ("a/x.png", "b/x.png", "b/x.jpg", "b/notes.txt", "b/deeper/y.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    sources = infer.find_sources(
        [str(tmp_path / "a" / "x.png"), str(tmp_path / "b"), str(tmp_path / "a")]
    )
    assert [(s.path.relative_to(tmp_path).as_posix(), s.name) for s in sources] == [
        ("a/x.png", "x"),
        ("b/x.jpg", "x_2"),
        ("b/x.png", "x_3"),
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "input '.*nowhere' does not exist"),
        ("empty", "no images in '.*empty'"),
        ("notes.txt", r"input '.*notes\.txt' is neither an image .* nor a video"),
    ],
)
def test_wrong_inputs_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").touch()
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, tmp_path, tmp_path / "out", tmp_path / name)
    assert not (tmp_path / "out").exists()


def change_checkpoint(model: Path, folder: Path, change: Any) -> Path:
    """The same config beside a changed checkpoint."""
    checkpoint = torch.load(model / "model.pth", weights_only=False)
    change(checkpoint)
    torch.save(checkpoint, folder / "model.pth")
    (folder / "config.py").write_bytes((model / "config.py").read_bytes())
    return folder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["model.backbone.arch=T"], r"does not fit this backbone.*patch_embed\.conv_down\.0"),
        (
            ["model.decode_head.num_classes=5"],
            r"conv_seg\.weight: file \(3, 32, 1, 1\)",
        ),
        (["model.decode_head.channels=16"], "does not fit the config's model.* more"),
    ],
    ids=["variant", "classes", "head"],
)
def test_checkpoint_of_another_model_is_refused(
    segmenter: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    message: str,
) -> None:
    with pytest.raises(SystemExit, match=f"(?s){message}"):
        run(monkeypatch, segmenter, tmp_path / "out", photos, "--cfg-options", *options)


def test_checkpoint_without_head_is_refused(
    segmenter: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = change_checkpoint(
        segmenter, tmp_path, lambda c: c["state_dict"].pop("decode_head.conv_seg.bias")
    )
    with pytest.raises(SystemExit, match=r"decode_head\.conv_seg\.bias: missing"):
        run(monkeypatch, model, tmp_path / "out", photos)


def test_truncated_checkpoint_is_named(
    segmenter: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = change_checkpoint(segmenter, tmp_path, lambda c: None)  # noqa: ARG005
    data = (model / "model.pth").read_bytes()
    (model / "model.pth").write_bytes(data[: len(data) // 2])
    with pytest.raises(SystemExit, match=r"model\.pth' cannot be read as a checkpoint"):
        run(monkeypatch, model, tmp_path / "out", photos)


def test_class_names_without_meta(
    segmenter: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The config's names count if there are as many as classes; ADE20K's 150 do not."""
    model = change_checkpoint(segmenter, tmp_path, lambda c: c["meta"].clear())
    arguments = (photos / "0.png", "--no-vis")
    result = run(monkeypatch, model, tmp_path / "out", *arguments)
    assert result["classes"] == ["class 0", "class 1", "class 2"]
    assert "names for the model's 3 classes" in capsys.readouterr().err
    names = "test_dataloader.dataset.metainfo.classes=a,b,c"
    result = run(monkeypatch, model, tmp_path / "out", *arguments, "--cfg-options", names)
    assert result["classes"] == ["a", "b", "c"]


def test_absent_device_is_named(
    segmenter: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = torch.cuda.device_count()
    with pytest.raises(SystemExit, match=f"cuda:{number}: there are {number} GPUs"):
        run(monkeypatch, segmenter, tmp_path, photos, "--device", f"cuda:{number}")
