"""The drawn data set: the same bytes each time, labels that agree with pixels, both layouts."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

TOOL = Path(__file__).parents[2] / "tools" / "make_shapes.py"
HW = (96, 128)
TRAIN, VAL = 24, 6


def load_tool():
    spec = importlib.util.spec_from_file_location("make_shapes", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


make_shapes = load_tool()


def draw(out, *options):
    arguments = ["--train", str(TRAIN), "--val", str(VAL), "--size", *map(str, HW), *options]
    make_shapes.main([str(out), *arguments])


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def square(centre_x, centre_y, half):
    corners = half * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])
    return make_shapes.Shape(1, (np.add(corners, (centre_x, centre_y)),))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    out = tmp_path_factory.mktemp("shapes")
    draw(out)
    return out


@pytest.fixture(scope="module")
def coco(drawn):
    return COCO(drawn / "coco/annotations/instances_train2017.json")


@pytest.fixture
def small(tmp_path):
    out = tmp_path / "small"
    make_shapes.draw_dataset(out, 3, 2, (64, 64))
    return out


def test_same_arguments_draw_same_bytes(drawn, tmp_path):
    draw(tmp_path)
    assert contents(tmp_path) == contents(drawn)


def test_an_image_does_not_depend_on_how_many_there_are(drawn, tmp_path):
    make_shapes.draw_dataset(tmp_path, 2, 1, HW)
    images = {k: v for k, v in contents(tmp_path).items() if k.endswith((".jpg", ".png"))}
    assert len(images) == 3 * (2 + 1)
    everything = contents(drawn)
    assert all(everything[name] == image for name, image in images.items())


@pytest.mark.parametrize(
    "other", [(1, "train", 1), (0, "val", 1), (0, "train", 2)], ids=["seed", "split", "index"]
)
def test_seed_split_and_index_each_change_the_image(other):
    first = make_shapes.draw_picture(0, "train", 1, HW, 5)
    assert (first.image != make_shapes.draw_picture(*other, HW, 5).image).mean() > 0.5


def test_label_maps_agree_with_instance_masks(drawn, coco):
    assert len(coco.imgs) == TRAIN
    for image in coco.imgs.values():
        expected = np.ones(HW, np.uint8)
        owners = np.zeros(HW, int)
        for annotation in coco.imgToAnns[image["id"]]:
            mask = coco.annToMask(annotation).astype(bool)
            owners += mask
            expected[mask] = annotation["category_id"] + 1
        assert owners.max() == 1
        label_file = drawn / "ade/annotations/training" / f"{image['id']:012d}.png"
        np.testing.assert_array_equal(cv2.imread(str(label_file), cv2.IMREAD_UNCHANGED), expected)


def test_boxes_and_areas_are_those_of_the_visible_mask(coco):
    for annotation in coco.anns.values():
        rows, columns = np.nonzero(coco.annToMask(annotation))
        x, y = columns.min(), rows.min()
        assert annotation["bbox"] == [x, y, columns.max() + 1 - x, rows.max() + 1 - y]
        assert annotation["area"] == len(rows) >= make_shapes.MIN_AREA


def test_all_classes_occur_and_some_shapes_are_truncated(coco):
    names = {coco.cats[a["category_id"]]["name"] for a in coco.anns.values()}
    assert names == set(make_shapes.CLASSES)
    at_border = [
        x == 0 or y == 0 or x + w == HW[1] or y + h == HW[0]
        for x, y, w, h in (a["bbox"] for a in coco.anns.values())
    ]
    assert 0.05 < np.mean(at_border) < 0.6


@pytest.mark.parametrize("index", range(1, 9))
def test_pixels_agree_with_labels(index):
    picture = make_shapes.draw_picture(0, "train", index, HW, 8)
    rng = np.random.default_rng([0, 0, index])
    background = np.clip(make_shapes.draw_background(rng, HW), 0, 255).astype(np.uint8)
    changed = (picture.image != background).any(-1)
    shapes = picture.labels > 1
    # Two pixels around a shape are blended; nothing else was painted, dropped shapes least of all.
    around = cv2.dilate(shapes.astype(np.uint8), np.ones((5, 5), np.uint8)).astype(bool)
    assert not changed[~around].any()
    assert changed[shapes].mean() > 0.97


def test_later_shapes_hide_earlier_ones():
    beneath, above = square(30, 30, 12), square(42, 30, 12)
    kept, (first, second) = make_shapes.drop_hidden([beneath, above], (64, 64))
    assert kept == [beneath, above]
    assert second[30, 35]
    assert not first[30, 35]
    assert first[30, 20]
    assert second.sum() > 1.5 * first.sum()


def test_hidden_shapes_are_dropped_and_uncover_what_they_hid():
    bottom, middle, top = square(26, 30, 8), square(33, 30, 10), square(40, 30, 12)
    kept, masks = make_shapes.drop_hidden([bottom, middle, top], (64, 64))
    assert kept == [bottom, top]
    assert masks[0].sum() >= make_shapes.MIN_VISIBLE * bottom.area


@pytest.mark.parametrize(
    "shape", [square(0, 0, 10), square(30, 30, 0.5)], ids=["beyond-border", "tiny"]
)
def test_shapes_hardly_seen_are_dropped(shape):
    assert make_shapes.drop_hidden([shape], (64, 64)) == ([], [])


def test_a_ring_has_a_hole():
    outlines = make_shapes.OUTLINES["ring"]
    ring = make_shapes.Shape(5, tuple(32 + 20 * outline for outline in outlines))
    coverage = ring.coverage((64, 64))
    assert coverage[32, 32] == 0
    assert coverage[32, 32 + 16] == 255
    assert (coverage > 127).sum() == pytest.approx(ring.area, rel=0.2)


def test_both_layouts_share_their_image_files(drawn):
    for coco_folder, ade_folder, count in (
        ("train2017", "training", TRAIN),
        ("val2017", "validation", VAL),
    ):
        images = sorted((drawn / "coco" / coco_folder).iterdir())
        assert len(images) == count
        for image in images:
            assert image.samefile(drawn / "ade/images" / ade_folder / image.name)
            assert cv2.imread(str(image)).shape == (*HW, 3)


def test_images_are_copied_where_links_are_refused(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("no links here")

    monkeypatch.setattr(make_shapes.os, "link", refuse)
    make_shapes.draw_dataset(tmp_path, 1, 1, (64, 64))
    first = tmp_path / "coco/train2017/000000000001.jpg"
    second = tmp_path / "ade/images/training/000000000001.jpg"
    assert not first.samefile(second)
    assert first.read_bytes() == second.read_bytes()


def test_a_repeated_run_does_nothing(small, capsys):
    image = small / "coco/train2017/000000000001.jpg"
    before = image.stat()
    assert not make_shapes.draw_dataset(small, 3, 2, (64, 64))
    assert "nothing to do" in capsys.readouterr().out
    assert image.stat() == before


def test_other_arguments_are_refused_unless_overwriting(small):
    before = contents(small)
    with pytest.raises(SystemExit, match=r"train 3 \(now 4\), seed 0 \(now 7\).*--overwrite"):
        make_shapes.draw_dataset(small, 4, 2, (64, 64), seed=7)
    assert contents(small) == before
    assert make_shapes.draw_dataset(small, 2, 2, (64, 64), seed=7, overwrite=True)
    assert len(list((small / "coco/train2017").iterdir())) == 2
    assert contents(small)["shapes.json"] != before["shapes.json"]


def test_an_interrupted_run_starts_again(small, tmp_path, monkeypatch):
    finish = make_shapes.draw_split

    def interrupt(out, split, settings):
        if split == "val":
            raise KeyboardInterrupt
        return finish(out, split, settings)

    out = tmp_path / "interrupted"
    monkeypatch.setattr(make_shapes, "draw_split", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make_shapes.draw_dataset(out, 5, 2, (64, 64))
    monkeypatch.undo()
    # Other arguments, too: nothing finished would be lost, and nothing of the first run stays.
    assert make_shapes.draw_dataset(out, 3, 2, (64, 64))
    assert contents(out) == contents(small)


def test_lost_files_are_drawn_again(small):
    before = contents(small)
    (small / "ade/annotations/training/000000000002.png").unlink()
    assert make_shapes.draw_dataset(small, 3, 2, (64, 64))
    assert contents(small) == before


@pytest.mark.parametrize("options", [[], ["--overwrite"]], ids=["plain", "overwrite"])
def test_data_of_others_is_left_alone(tmp_path, options):
    photo = tmp_path / "coco/train2017/photo.jpg"
    photo.parent.mkdir(parents=True)
    photo.write_bytes(b"precious")
    with pytest.raises(SystemExit, match="not drawn by this tool"):
        draw(tmp_path, *options)
    assert contents(tmp_path) == {"coco/train2017/photo.jpg": b"precious"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train", "0"], "argument --train: 0 is less than 1"),
        (["--size", "16"], "argument --size: 16 is less than 32"),
        (["--size", "64", "64", "64"], "argument --size: one or two numbers"),
        (["--seed", "x"], "argument --seed: invalid int value: 'x'"),
    ],
    ids=lambda value: "-".join(value).strip("-") if isinstance(value, list) else "",
)
def test_bad_arguments_are_named(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit):
        make_shapes.main([str(tmp_path), *arguments])
    assert message in capsys.readouterr().err


def test_the_command_draws_and_names_a_folder_it_cannot_write(tmp_path):
    def run(out):
        command = [sys.executable, TOOL, out, "--train", "2", "--val", "1", "--size", "64"]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    good = run(tmp_path / "a")
    assert good.returncode == 0
    assert "train: 2 images" in good.stdout
    assert json.loads((tmp_path / "a/shapes.json").read_text())["complete"]

    (tmp_path / "file").touch()
    bad = run(tmp_path / "file")
    assert bad.returncode == 1
    assert bad.stderr.startswith(f"cannot draw into {tmp_path / 'file'}")
    assert "Traceback" not in bad.stderr


def test_mmdet_reads_it(drawn, coco):
    pytest.importorskip("mmdet")
    from mmcv.transforms import LoadImageFromFile
    from mmdet.datasets import CocoDataset
    from mmdet.datasets.transforms import LoadAnnotations

    dataset = CocoDataset(
        data_root=str(drawn / "coco"),
        ann_file="annotations/instances_train2017.json",
        data_prefix={"img": "train2017/"},
        metainfo={"classes": make_shapes.CLASSES, "palette": make_shapes.PALETTE},
        filter_cfg={"filter_empty_gt": True, "min_size": 32},
        pipeline=[LoadImageFromFile(), LoadAnnotations(with_bbox=True, with_mask=True)],
    )
    assert len(dataset) == TRAIN
    for sample in dataset:
        annotations = coco.imgToAnns[sample["img_id"]]
        expected = np.stack([coco.annToMask(annotation) for annotation in annotations])
        np.testing.assert_array_equal(sample["gt_masks"].masks, expected)
        labels = [annotation["category_id"] - 1 for annotation in annotations]
        assert sample["gt_bboxes_labels"].tolist() == labels
        assert not sample["gt_ignore_flags"].any()


@pytest.mark.parametrize("name", ["BaseSegDataset", "ADE20KDataset"])
def test_mmseg_reads_it(drawn, name):
    datasets = pytest.importorskip("mmseg.datasets")
    from mmcv.transforms import LoadImageFromFile
    from mmseg.datasets.transforms import LoadAnnotations

    # ADE20KDataset takes no class names but its own, so it reads the labels under those.
    names = {"classes": make_shapes.SEMANTIC_CLASSES, "palette": make_shapes.SEMANTIC_PALETTE}
    own = {"reduce_zero_label": True, "metainfo": names} if name == "BaseSegDataset" else {}
    dataset = getattr(datasets, name)(
        data_root=str(drawn / "ade"),
        data_prefix={"img_path": "images/validation", "seg_map_path": "annotations/validation"},
        pipeline=[LoadImageFromFile(), LoadAnnotations()],
        **own,
    )
    assert len(dataset) == VAL
    for index, sample in enumerate(dataset, 1):
        picture = make_shapes.draw_picture(0, "val", index, HW, 7)
        np.testing.assert_array_equal(sample["gt_seg_map"], picture.labels - 1)
        assert sample["gt_seg_map"].max() < len(make_shapes.SEMANTIC_CLASSES)
