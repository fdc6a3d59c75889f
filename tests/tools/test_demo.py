"""The demo: what is done is skipped, what was broken off goes on, and failures say why."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")

from mmengine.config import Config

from mambavision_backbone.layers.windows import window_grid

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / "tools"


def load_tool(name):
    sys.path.insert(0, str(TOOLS))
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    sys.path.remove(str(TOOLS))
    return module


demo = load_tool("demo")
demo_report = load_tool("demo_report")
make_shapes = load_tool("make_shapes")


@pytest.fixture
def work(tmp_path):
    (tmp_path / "logs").mkdir()
    return tmp_path


def script(code, name, result):
    """A step that runs a line of Python."""
    return demo.Step(name, lambda: [sys.executable, "-c", code], result)


def run_chains(chains, work, state, environment=None):
    with demo.sole_user(work) as lock:
        demo.run_chains(chains, demo.Run(work, state, environment or {}, lock))


def append(folder, name):
    """A step that leaves a trace each time that it runs."""
    code = f"open({str(folder / 'trace')!r}, 'a').write({name!r} + ' ')"
    return script(code, name, folder / "trace")


def trace(folder):
    return (folder / "trace").read_text().split()


@pytest.mark.parametrize("task", demo.TASKS, ids=lambda t: t.name)
def test_config_is_the_real_thing_made_small(task):
    cfg = Config.fromfile(task.config)
    backbone = cfg.model.backbone
    assert backbone.window_mode == "pad"
    assert len(backbone.out_indices) == 4
    for stage in (2, 3):
        side = 128 // 2 ** (stage + 2)
        assert window_grid((side, side), backbone.window_size[stage], "pad").pad_hw != (0, 0)
    if task.layout == "coco":
        assert len(cfg.model.roi_head.bbox_head) == cfg.model.roi_head.num_stages == 3
        assert cfg.model.roi_head.mask_head.type == "FCNMaskHead"
        assert {head.num_classes for head in cfg.model.roi_head.bbox_head} == {6}


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_configs_know_the_drawn_classes(split):
    detection, segmentation = (
        Config.fromfile(task.config)[f"{split}_dataloader"].dataset.metainfo for task in demo.TASKS
    )
    assert tuple(detection.classes) == make_shapes.CLASSES
    assert tuple(map(tuple, detection.palette)) == make_shapes.PALETTE
    assert tuple(segmentation.classes) == make_shapes.SEMANTIC_CLASSES
    assert tuple(map(tuple, segmentation.palette)) == make_shapes.SEMANTIC_PALETTE


def test_done_steps_are_skipped_and_those_after_a_missing_result_are_not(work):
    state = demo.State("smoke", done=["a", "b", "c"])
    for name in "abc":
        (work / name).touch()
    chain = [script("", name, work / name) for name in "abcd"]
    assert [s.name for s in demo.pending(chain, state)] == ["d"]
    (work / "b").unlink()
    assert [s.name for s in demo.pending(chain, state)] == ["b", "c", "d"]


def test_a_failed_step_stops_the_others_and_the_next_run_goes_on_there(work, capfd):
    state = demo.State("smoke")
    fails = script("print('the reason'); raise SystemExit(3)", "fails", work / "never")
    endless = script("import time; time.sleep(600)", "endless", work / "never")
    started = time.monotonic()
    with pytest.raises(demo.StepFailedError, match=r"fails failed \(exit code 3\)"):
        run_chains([[append(work, "first"), fails], [endless]], work, state)
    assert time.monotonic() - started < 60
    assert "the reason" in capfd.readouterr().err

    state = demo.read_state(work, demo.SMOKE)
    assert state.done == ["first"]
    chain = [append(work, "first"), append(work, "second")]
    run_chains([demo.pending(chain, state)], work, state)
    assert trace(work) == ["first", "second"]
    assert demo.read_state(work, demo.SMOKE).done == ["first", "second"]


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_stopped_programs_take_their_children_along(work):
    note = work / "child"
    code = (
        "import pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"draft = pathlib.Path({str(note)!r} + '.part')\n"
        f"draft.write_text(str(child.pid)); draft.rename({str(note)!r})\n"
        "time.sleep(600)"
    )
    wait = (
        f"import pathlib, time\nwhile not pathlib.Path({str(note)!r}).exists(): time.sleep(0.01)\n"
        "raise SystemExit(1)"
    )
    chains = [[script(code, "parent", work / "never")], [script(wait, "fails", work / "never")]]
    with pytest.raises(demo.StepFailedError, match="fails failed"):
        run_chains(chains, work, demo.State("smoke"))
    pid = int(note.read_text())
    deadline = time.monotonic() + 10
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(pid)


def test_chains_run_beside_each_other(work):
    # each waits for the other: one after the other they would never end
    def meet(mine, other):
        return (
            f"import pathlib, time; pathlib.Path({str(work / mine)!r}).touch()\n"
            f"while not pathlib.Path({str(work / other)!r}).exists(): time.sleep(0.01)"
        )

    chains = [[script(meet(a, b), a, work / a)] for a, b in ("xy", "yx")]
    state = demo.State("smoke")
    run_chains(chains, work, state)
    assert sorted(state.done) == ["x", "y"]
    assert state.total > 0
    assert set(state.seconds) == {"x", "y"}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            "11/22 00:21 - mmengine - INFO - Epoch(train)  [3][ 60/400]  base_lr: 6e-04 lr: 6e-04  "
            "eta: 0:05:40  time: 0.33  loss: 1.7743  loss_rpn_cls: 0.01  s0.loss_cls: 0.45",
            "train [3][60/400] loss 1.7743 eta 0:05:40",
        ),
        (
            "INFO - Iter(train) [ 500/2000]  lr: 2e-03  eta: 0:07:00  loss: 1.1580  aux.loss_ce: 1",
            "train [500/2000] loss 1.1580 eta 0:07:00",
        ),
        ("INFO - Epoch(val)   [2][10/25]    eta: 0:00:09  time: 0.6", "val [2][10/25] eta 0:00:09"),
        ("no progress yet", "starting"),
    ],
    ids=["detector", "segmenter", "validation", "start"],
)
def test_progress_is_read_from_the_log(line, words):
    assert demo.last_progress(f"{line}\nsomething else\n") == words


def test_a_folder_of_another_scale_is_left_alone(work):
    demo.write_state(work, demo.State("full"))
    with pytest.raises(SystemExit, match=r"full scale: delete it or choose another --work-dir"):
        demo.main(["--smoke", "--work-dir", str(work)])
    assert not (work / "data").exists()


def test_a_second_demo_in_the_same_folder_is_refused(work):
    with (
        demo.sole_user(work),
        pytest.raises(demo.ToolError, match="another demo is running"),
        demo.sole_user(work),
    ):
        pass
    with demo.sole_user(work):
        pass


def test_programs_of_a_killed_demo_keep_its_folder(work):
    program = "import time; time.sleep(600)"
    step = script(program, "endless", work / "never")
    with demo.sole_user(work) as lock:
        job = demo.start(step, demo.Run(work, demo.State("smoke"), {}, lock))
    try:
        with pytest.raises(demo.ToolError, match="or programs of one"), demo.sole_user(work):
            pass
    finally:
        job.process.kill()
        job.process.wait()
    with demo.sole_user(work):
        pass


def test_a_full_disk_is_one_line(work, monkeypatch):
    usage = shutil.disk_usage(work)._replace(free=10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(SystemExit, match=r"is full \(1 MB left.*choose another --work-dir") as e:
        demo.main(["--smoke", "--work-dir", str(work)])
    assert "\n" not in str(e.value)


def test_a_finished_demo_prints_its_results_again(work, monkeypatch, capsys):
    steps = [demo.data_step(work, demo.SMOKE), demo.report_step(work)]
    for task in demo.TASKS:
        steps += demo.task_steps(work, demo.SMOKE, task)
    for step in steps:
        step.result.parent.mkdir(parents=True, exist_ok=True)
        step.result.touch()
    demo.write_state(work, demo.State("smoke", done=[step.name for step in steps]))
    (work / demo.RESULTS).write_text(json.dumps({"summary": [["mIoU", "0.812"]]}))
    monkeypatch.setattr(demo, "start", lambda *_: pytest.fail("started a step"))
    demo.main(["--smoke", "--work-dir", str(work)])
    out = capsys.readouterr().out
    assert "0.812" in out
    assert str(work / demo.REPORT) in out


@pytest.mark.parametrize(
    ("cuda", "compiled", "device", "hidden"),
    [
        (False, "13.0", "CPU (no GPU found)", True),
        (True, "not available", "CPU (mmcv was installed without CUDA operators)", True),
        (True, "13.0", "Card", False),
    ],
    ids=["no-gpu", "no-operators", "gpu"],
)
def test_device(monkeypatch, cuda, compiled, device, hidden):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Card")
    monkeypatch.setattr("mmcv.ops.get_compiling_cuda_version", lambda: compiled)
    assert demo.find_device() == device
    assert ("CUDA_VISIBLE_DEVICES" in demo.environment_of(device)) == hidden


def test_enlarged_pictures_shrink_to_the_pixels_that_were_drawn(work):
    make_shapes.draw_dataset(work / "data", 1, 2, (128, 128))
    demo.enlarge_pictures(work)
    names = sorted(p.stem for p in (work / "pictures/held-out").iterdir())
    assert names == [f"{i:012d}" for i in (1, 2)]
    for name in names:
        drawn = cv2.imread(str(work / f"data/coco/val2017/{name}.jpg"))
        picture = cv2.imread(str(work / f"pictures/held-out/{name}.png"))
        assert picture.shape == (384, 384, 3)
        shrunk = cv2.resize(picture, (128, 128), interpolation=cv2.INTER_LINEAR)
        assert np.abs(shrunk.astype(int) - drawn).max() <= 1


def test_class_tables_of_perfect_and_wrong_predictions(work):
    make_shapes.draw_dataset(work / "data", 1, 6, (64, 64))
    annotations = work / "data/coco/annotations/instances_val2017.json"
    content = json.loads(annotations.read_text())
    results = [{**a, "score": 1.0} for a in content["annotations"]]
    present = {make_shapes.CLASSES[a["category_id"] - 1] for a in results}
    predictions = work / "predictions.json"
    predictions.write_text(json.dumps(results))
    for kind in ("bbox", "segm"):
        found = demo_report.average_precisions(annotations, predictions, kind)
        assert {name for name, ap in found.items() if ap == pytest.approx(1.0)} == present
    predictions.write_text("[]")
    found = demo_report.average_precisions(annotations, predictions, "bbox")
    assert set(found.values()) == {0.0}

    labels = work / "data/ade/annotations/validation"
    classes = make_shapes.SEMANTIC_CLASSES
    ious = demo_report.intersections_over_unions(labels, labels, classes)
    assert {name for name, iou in ious.items() if iou == 1.0} == {"background", *present}
    wrong = work / "wrong"
    wrong.mkdir()
    areas = np.zeros(len(classes))
    for path in labels.iterdir():
        truth = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        areas += np.bincount(truth.ravel() - 1, minlength=len(classes))
        cv2.imwrite(str(wrong / path.name), np.ones_like(truth))
    ious = demo_report.intersections_over_unions(labels, wrong, classes)
    assert ious["background"] == pytest.approx(areas[0] / areas.sum())
    assert {ious[name] for name in present} == {0.0}


@pytest.mark.slow
def test_a_killed_training_resumes_from_its_checkpoint(work):
    task = demo.TASKS[1]
    make_shapes.draw_dataset(work / "data", 8, 2, (128, 128))
    train = demo.task_steps(work, demo.SMOKE, task)[0]
    environment = {**os.environ, **demo.environment_of("CPU")}
    process = subprocess.Popen(
        list(map(str, train.command())),
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 300
    while not train.result.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert demo.last_checkpoint(work / task.name).name == "iter_3.pth"

    state = demo.read_state(work, demo.SMOKE)
    assert demo.pending([train], state)
    run_chains([demo.pending([train], state)], work, state, demo.environment_of("CPU"))
    assert demo.last_checkpoint(work / task.name).name == "iter_6.pth"
    log = (work / "logs" / f"{train.name}.log").read_text()
    assert "resumed epoch: 0, iter: 3" in log
    assert "Iter(train) [2/6]" not in log
    assert not demo.pending([train], state)
