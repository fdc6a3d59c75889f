"""Each kind of damage is found and named with its file; sound data and COCO's own habits pass."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_utils

TOOLS = Path(__file__).parents[2] / "tools"
WIDTH, HEIGHT = 48, 32


def load_tool():
    spec = importlib.util.spec_from_file_location("check_data", TOOLS / "check_data.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


check_data = load_tool()


def write_image(path, seed, size=(WIDTH, HEIGHT), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path, **options)


def write_labels(path, labels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(labels, np.uint8)).save(path)


def annotation(id_, image_id, **fields):
    return {
        "id": id_,
        "image_id": image_id,
        "category_id": 1,
        "bbox": [4.0, 5.0, 10.0, 8.0],
        "area": 80.0,
        "iscrowd": 0,
        "segmentation": [[4, 5, 14, 5, 14, 13, 4, 13]],
        **fields,
    }


def runs(counts, size=(HEIGHT, WIDTH)):
    return {"size": list(size), "counts": counts}


def compressed():
    mask = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
    mask[5:13, 4:14] = 1
    return mask_utils.encode(mask)["counts"].decode()


@pytest.fixture
def coco(tmp_path):
    """Three training images and one for validation; polygons and both kinds of run lengths."""
    root = tmp_path / "coco"
    (root / "annotations").mkdir(parents=True)
    for split, ids in (("train2017", (1, 2, 3)), ("val2017", (4,))):
        for id_ in ids:
            write_image(root / split / f"{id_:012d}.jpg", id_)
        content = {
            "images": [
                {"id": id_, "file_name": f"{id_:012d}.jpg", "width": WIDTH, "height": HEIGHT}
                for id_ in ids
            ],
            "annotations": [
                annotation(10, ids[0]),
                annotation(11, ids[-1], category_id=2, segmentation=runs(compressed())),
                annotation(12, ids[0], iscrowd=1, segmentation=runs([40, 8, HEIGHT * WIDTH - 48])),
            ],
            "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        }
        (root / f"annotations/instances_{split}.json").write_text(json.dumps(content))
    return root


@pytest.fixture
def ade(tmp_path):
    """Two training images and one for validation, with labels 0 to 3 and 255."""
    root = tmp_path / "ade"
    for split, names in (("training", "ab"), ("validation", "c")):
        for seed, name in enumerate(names):
            write_image(root / f"images/{split}/{name}.jpg", seed)
            labels = np.random.default_rng(seed).integers(0, 4, (HEIGHT, WIDTH))
            labels[0] = 255
            write_labels(root / f"annotations/{split}/{name}.png", labels)
    return root


def check(root, *options):
    """Exit code and JSON report."""
    report_file = root.parent / "report.json"
    code = check_data.main([str(root), "--json", str(report_file), "--workers", "1", *options])
    report = json.loads(report_file.read_text())
    assert report["exit_code"] == code
    return code, report


def assert_only_problem(root, kind, *named, options=()):
    code, report = check(root, *options)
    assert code == 1
    assert [problem["kind"] for problem in report["problems"]] == [kind]
    (problem,) = report["problems"]
    for part in named:
        assert part in problem["examples"][0]


def edit(root, change, split="train2017"):
    file = root / f"annotations/instances_{split}.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def blank_tail(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + bytes(len(data) // 2))


def test_sound_coco_is_clean(coco, capsys):
    code, report = check(coco)
    assert (code, report["problems"], report["notes"]) == (0, [], [])
    assert report["splits"]["train2017"] == {
        "images": 3,
        "annotations": 3,
        "crowd": 1,
        "images_without_annotations": 1,
        "classes": {"cat": 2, "dog": 1},
    }
    assert report["splits"]["val2017"]["images"] == 1
    out = capsys.readouterr().out
    assert "cat 2, dog 1" in out
    assert out.splitlines()[-1] == f"CLEAN: {coco}: 4 images checked in full"


def test_sound_ade_is_clean(ade, capsys):
    code, report = check(ade)
    assert (code, report["problems"], report["notes"]) == (0, [], [])
    training = report["splits"]["training"]
    assert (training["images"], training["label_maps"]) == (2, 2)
    assert list(training["classes"]) == ["1", "2", "3"]
    shares = [label["pixel_share"] for label in training["classes"].values()]
    assert training["unlabeled_share"] + sum(shares) == pytest.approx(1)
    assert "unlabeled share 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.write_bytes(b""), "empty file"),
        (truncate, "truncated"),
        (blank_tail, ""),
        (lambda path: path.write_text("version https://git-lfs"), "begins with b'version"),
    ],
    ids=["empty", "truncated", "zeros", "text"],
)
@pytest.mark.parametrize(
    ("task", "file", "kind"),
    [
        ("coco", "train2017/000000000002.jpg", "unreadable image"),
        ("ade", "images/training/a.jpg", "unreadable image"),
        ("ade", "annotations/training/a.png", "unreadable label map"),
    ],
    ids=["coco-image", "ade-image", "ade-label"],
)
def test_damaged_files(request, task, file, kind, damage, reason):
    root = request.getfixturevalue(task)
    damage(root / file)
    assert_only_problem(root, kind, str(root / file), reason)


def test_bytes_after_the_end_of_a_jpeg_do_no_harm(coco):
    path = coco / "train2017/000000000001.jpg"
    path.write_bytes(path.read_bytes() + b"\0camera data")
    assert check(coco)[0] == 0


def test_missing_image(coco):
    path = coco / "train2017/000000000002.jpg"
    path.unlink()
    assert_only_problem(coco, "missing image", str(path), "image id 2")


def test_missing_image_folder(coco):
    (coco / "val2017/000000000004.jpg").unlink()
    (coco / "val2017").rmdir()
    assert_only_problem(coco, "missing image folder", str(coco / "val2017"), "1 images")


@pytest.mark.parametrize("options", [(), ("--quick",)], ids=["full", "quick"])
def test_size_that_differs_from_the_annotations(coco, options):
    path = coco / "train2017/000000000002.jpg"
    write_image(path, 0, (WIDTH, HEIGHT + 1))
    sizes = f"{WIDTH} x {HEIGHT + 1}, annotated as {WIDTH} x {HEIGHT}"
    assert_only_problem(coco, "wrong size", str(path), "image id 2", sizes, options=options)


def test_photographs_on_their_side_count_as_loaded(coco):
    on_its_side = Image.Exif()
    on_its_side[check_data.EXIF_ORIENTATION] = 6
    write_image(coco / "train2017/000000000002.jpg", 0, (HEIGHT, WIDTH), exif=on_its_side)
    assert check(coco)[0] == 0


@pytest.mark.parametrize(
    ("box", "kind"),
    [
        ([4, 5, 0, 8], "box without width or height"),
        ([4, 5, 10, -8], "box without width or height"),
        ([4, 5, float("nan"), 8], "box without width or height"),
        ([-3, 5, 10, 8], "box outside of the image"),
        ([4, 5, 10, HEIGHT], "box outside of the image"),
        ([WIDTH + 9, 5, 10, 8], "box outside of the image"),
        ([float("nan"), 5, 10, 8], "box outside of the image"),
        ([4, 5, 10], "malformed annotation"),
        (["4", 5, 10, 8], "malformed annotation"),
    ],
    ids=str,
)
def test_bad_boxes(coco, box, kind):
    edit(coco, lambda content: content["annotations"][0].update(bbox=box))
    assert_only_problem(coco, kind, "instances_train2017.json", "annotation id 10", "001.jpg")


def test_boxes_may_end_a_rounding_error_beyond_the_border(coco):
    edit(coco, lambda content: content["annotations"][0].update(bbox=[0, 0, WIDTH + 0.5, HEIGHT]))
    assert check(coco)[0] == 0


PIXELS = HEIGHT * WIDTH


@pytest.mark.parametrize(
    ("segmentation", "reason"),
    [
        ([], "empty"),
        ([[]], "three pairs"),
        ([[1, 2, 3, 4]], "three pairs"),
        ([[1, 2, 3, 4, 5, 6, 7]], "three pairs"),
        ([1, 2, 3, 4, 5, 6], "three pairs"),
        ([[1, 2, 3, 4, 5, "6"]], "other than numbers"),
        ([[1, 2, 3, 4, 5, float("inf")]], "not finite"),
        (runs([PIXELS]), "empty"),
        (runs([40, 8]), "do not add up"),
        (runs([40, -8, PIXELS - 32]), "do not add up"),
        (runs([40, 8, PIXELS - 48], (WIDTH, HEIGHT)), "run lengths of a mask of"),
        (runs(compressed()[:-2]), ""),
        (runs("no run lengths"), "' '"),
        (runs(""), "do not add up"),
        ({"size": [HEIGHT, WIDTH]}, "counts"),
        ("polygon", "neither polygons nor run lengths"),
    ],
    ids=[
        "no-polygon",
        "empty-polygon",
        "two-points",
        "odd-count",
        "not-nested",
        "text",
        "infinite",
        "empty-mask",
        "short-runs",
        "negative-run",
        "other-size",
        "cut-off",
        "bad-character",
        "empty-string",
        "no-counts",
        "not-a-mask",
    ],
)
def test_bad_segmentations(coco, segmentation, reason):
    edit(coco, lambda content: content["annotations"][0].update(segmentation=segmentation))
    code, report = check(coco)
    assert code == 1
    (problem,) = report["problems"]
    assert problem["kind"] in ("bad segmentation", "malformed annotation")
    assert "annotation id 10" in problem["examples"][0]
    assert reason in problem["examples"][0]


@pytest.mark.parametrize("density", [0.02, 0.5, 0.98], ids=str)
def test_run_lengths_are_those_of_pycocotools(density):
    mask = np.random.default_rng(0).random((211, 307)) < density
    encoded = mask_utils.encode(np.asfortranarray(mask, np.uint8))
    lengths = check_data.decode_runs(encoded["counts"].decode())
    values = np.arange(len(lengths)) % 2 == 1
    np.testing.assert_array_equal(np.repeat(values, lengths), mask.ravel(order="F"))


@pytest.mark.parametrize(
    ("change", "kind", "named"),
    [
        (lambda c: c["images"][1].update(id=3), "duplicate image id", "image id 3"),
        (lambda c: c["images"][1].pop("id"), "image with a missing or bad field", "number 1"),
        (lambda c: c["images"][1].update(width="x"), "image with a missing or bad field", "width"),
        (
            lambda c: c["images"][1].update(file_name="000000000001.jpg"),
            "image listed twice",
            "000000000001.jpg (image id 2)",
        ),
        (lambda c: c["annotations"][1].update(id=10), "duplicate annotation id", "id 10"),
        (lambda c: c["annotations"][1].pop("id"), "annotation without a field", "id None"),
        (lambda c: c["annotations"][1].pop("bbox"), "annotation without a field", "bbox"),
        (lambda c: c["annotations"][1].update(area=0), "annotation without area", "id 11"),
        (lambda c: c["annotations"][1].update(category_id=9), "unknown category", "id 9"),
        (
            lambda c: c["annotations"][1].update(image_id=99),
            "annotation of an unknown image",
            "image id 99",
        ),
        (
            lambda c: c["categories"].append({"id": 2, "name": "cow"}),
            "duplicate category id",
            "category id 2",
        ),
        (lambda c: c["annotations"].clear(), "split without annotations", "train2017"),
        (lambda c: c.pop("categories"), "unreadable annotation file", "categories"),
        (lambda c: c["annotations"].append(5), "unreadable annotation file", "train2017"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_entries(coco, change, kind, named):
    edit(coco, change)
    assert_only_problem(coco, kind, "train2017", named)


def test_annotation_file_that_is_no_json(coco):
    file = coco / "annotations/instances_val2017.json"
    truncate(file)
    assert_only_problem(coco, "unreadable annotation file", str(file), "JSONDecodeError")


def test_number_of_categories(coco):
    assert check(coco, "--num-classes", "2")[0] == 0
    code, report = check(coco, "--num-classes", "80")
    assert code == 1
    assert {p["kind"] for p in report["problems"]} == {"unexpected number of categories"}


def test_flaws_of_coco_itself_are_only_noted(coco):
    def add_flaw(content):
        image = {"id": 200365, "file_name": "x.jpg", "width": WIDTH, "height": HEIGHT}
        content["images"].append(image)
        flat = {"bbox": [9.98, 18.56, 5.54, 0.0], "area": 0.0}
        content["annotations"].append(annotation(918, 200365, **flat))

    write_image(coco / "train2017/x.jpg", 0)
    edit(coco, add_flaw)
    code, report = check(coco)
    assert code == 0
    assert [note["kind"] for note in report["notes"]] == ["flaw of COCO 2017 as published"]
    assert "annotation id 918" in report["notes"][0]["examples"][0]


def test_files_without_an_entry_are_only_noted(coco):
    write_image(coco / "train2017/extra.jpg", 0)
    code, report = check(coco)
    assert code == 0
    assert report["notes"][0]["examples"] == [str(coco / "train2017/extra.jpg")]


def test_first_ten_of_a_kind_are_shown_and_all_are_counted(coco, capsys):
    def add_images(content):
        entry = content["images"][0]
        content["images"] += [{**entry, "id": i, "file_name": f"{i}.jpg"} for i in range(100, 112)]

    edit(coco, add_images)
    code, report = check(coco)
    assert code == 1
    assert report["problems"][0]["count"] == 12
    assert len(report["problems"][0]["examples"]) == 10
    out = capsys.readouterr().out
    assert "109.jpg" in out
    assert "110.jpg" not in out
    assert "and 2 more" in out
    assert out.splitlines()[-1] == f"PROBLEMS: {coco}: 12 found: 12 x missing image"


def test_image_without_a_label_map(ade):
    path = ade / "annotations/training/b.png"
    path.unlink()
    image = str(ade / "images/training/b.jpg")
    assert_only_problem(ade, "image without a label map", image, str(path))


def test_label_map_without_an_image(ade):
    path = ade / "images/training/b.jpg"
    path.unlink()
    label = str(ade / "annotations/training/b.png")
    assert_only_problem(ade, "label map without an image", label, str(path))


@pytest.mark.parametrize("options", [(), ("--quick",)], ids=["full", "quick"])
def test_label_map_of_another_size(ade, options):
    path = ade / "annotations/training/a.png"
    write_labels(path, np.ones((HEIGHT, WIDTH - 1)))
    sizes = f"{WIDTH - 1} x {HEIGHT}", f"{WIDTH} x {HEIGHT}"
    assert_only_problem(ade, "wrong size", str(path), *sizes, options=options)


@pytest.mark.parametrize(
    ("label", "options"), [(151, ()), (3, ("--num-classes", "2"))], ids=["default", "2-classes"]
)
def test_label_out_of_range(ade, label, options):
    for path in ade.rglob("*.png"):
        write_labels(path, np.ones((HEIGHT, WIDTH)))
    path = ade / "annotations/validation/c.png"
    labels = np.ones((HEIGHT, WIDTH))
    labels[3, 4:6] = label
    write_labels(path, labels)
    named = f"{path}: {label} (2 px)"
    assert_only_problem(ade, "label out of range", named, options=options)


def test_label_map_in_colour(ade):
    path = ade / "annotations/training/a.png"
    write_image(path, 0)
    assert_only_problem(ade, "unreadable label map", str(path), "mode RGB")


def test_empty_split(ade):
    for path in ade.glob("*/validation/*"):
        path.unlink()
    assert_only_problem(ade, "split without images", str(ade / "images/validation"))


def test_what_mmseg_passes_over_is_only_noted(ade):
    write_image(ade / "images/training/b.jpeg", 0)
    write_labels(ade / "annotations/training/a.png", np.zeros((HEIGHT, WIDTH)))
    code, report = check(ade)
    assert code == 0
    assert {note["kind"]: note["examples"] for note in report["notes"]} == {
        "file that mmseg does not read": [str(ade / "images/training/b.jpeg")],
        "label map without any label": [str(ade / "annotations/training/a.png")],
    }


def test_quick_says_that_it_did_not_decode(coco):
    truncate(coco / "train2017/000000000001.jpg")
    code, report = check(coco, "--quick")
    assert code == 0
    assert "without decoding" in report["verdict"]
    assert check(coco)[0] == 1


@pytest.mark.parametrize("task", ["coco", "ade"])
def test_processes_find_what_one_finds(request, monkeypatch, task):
    root = request.getfixturevalue(task)
    for path in root.rglob("*.jpg"):
        truncate(path)
    alone = check(root)
    monkeypatch.setattr(check_data, "SMALL", 0)
    assert check(root, "--workers", "2") == alone
    assert alone[0] == 1


def test_folder_that_is_not_there(tmp_path, capsys):
    assert check_data.main([str(tmp_path / "nowhere")]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'nowhere'} is not a folder" in error
    assert "make_shapes.py" in error


@pytest.mark.parametrize("options", [[], ["--task", "coco"], ["--task", "ade"]], ids=str)
def test_folder_without_data(tmp_path, capsys, options):
    assert check_data.main([str(tmp_path), *options]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path) in error
    assert "cocodataset.org" in error


def test_data_of_the_other_task(coco, capsys):
    assert check_data.main([str(coco), "--task", "ade"]) == 2
    assert "no images/training" in capsys.readouterr().err


def test_data_one_level_down(coco, ade, capsys):
    assert check_data.main([str(coco.parent)]) == 2
    assert f"check {ade} or {coco}" in capsys.readouterr().err


def test_both_layouts_in_one_folder(coco, capsys):
    (coco / "images/training").mkdir(parents=True)
    assert check_data.main([str(coco)]) == 2
    assert "--task coco or --task ade" in capsys.readouterr().err
    assert check(coco, "--task", "coco")[0] == 0


def run(tool, *arguments):
    command = [sys.executable, TOOLS / tool, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_drawn_shapes_are_clean_by_the_command(tmp_path):
    drawn = run("make_shapes.py", tmp_path, "--train", 3, "--val", 2, "--size", 64)
    assert drawn.returncode == 0, drawn.stderr
    for arguments in (["coco", "--num-classes", 6], ["ade", "--num-classes", 7]):
        result = run("check_data.py", tmp_path / arguments[0], *arguments[1:])
        assert result.returncode == 0, result.stdout + result.stderr
        assert result.stdout.splitlines()[-1].startswith("CLEAN: ")


def test_exit_codes_of_the_command(coco):
    (coco / "train2017/000000000001.jpg").unlink()
    damaged = run("check_data.py", coco)
    assert damaged.returncode == 1
    assert damaged.stdout.splitlines()[-1].startswith("PROBLEMS: ")
    absent = run("check_data.py", coco / "nowhere")
    assert absent.returncode == 2
    assert "Traceback" not in absent.stderr
