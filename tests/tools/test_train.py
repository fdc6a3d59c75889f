"""train.py, test.py and dist_train.sh as a user starts them, on drawn shapes and tiny networks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import ROOT

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")

from mambavision_backbone import MambaVision

TINY = [
    "model.backbone.arch.dim=16",
    "model.backbone.arch.in_dim=8",
    "model.backbone.arch.depths=(1,1,2,2)",
    "model.backbone.arch.num_heads=(2,2,4,4)",
]
ONE_ITERATION = {
    "mmdet": ["train_cfg.max_epochs=1", "default_hooks.logger.interval=1"],
    "mmseg": [
        "train_cfg.max_iters=1",
        "train_cfg.val_interval=1",
        "default_hooks.logger.interval=1",
        "default_hooks.checkpoint.interval=1",
    ],
}
CONFIGS = {
    "mmdet": ROOT / "mmdet_configs/cascade_mambavision_demo.py",
    "mmseg": ROOT / "mmseg_configs/upernet_mambavision_demo.py",
}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    command = [sys.executable, ROOT / "tools/make_shapes.py", folder / "data"]
    subprocess.run([*command, "--train", "8", "--val", "4", "--size", "128"], check=True)
    return folder / "data"


def roots(shapes: Path) -> dict[str, Path]:
    return {"mmdet": shapes / "coco", "mmseg": shapes / "ade"}


def run(*command: object, timeout: float = 300, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(c) for c in command],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=env.pop("cwd", ROOT),
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **env},
        check=False,
    )


def tool(name: str, *arguments: object, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, ROOT / "tools" / name, *arguments, **kwargs)


def options(scope: str, *more: str) -> list[str]:
    channels = "[16,32,64,128]"
    heads = {
        "mmdet": [f"model.neck.in_channels={channels}"],
        "mmseg": [
            f"model.decode_head.in_channels={channels}",
            "model.auxiliary_head.in_channels=64",
        ],
    }
    return ["--cfg-options", *TINY, *heads[scope], *ONE_ITERATION[scope], *more]


def checkpoint(work_dir: Path, scope: str) -> Path:
    return work_dir / {"mmdet": "epoch_1.pth", "mmseg": "iter_1.pth"}[scope]


@pytest.mark.slow
@pytest.mark.openmmlab
@pytest.mark.parametrize("scope", ["mmdet", "mmseg"])
def test_train_test_and_resume(scope: str, shapes: Path, tmp_path: Path) -> None:
    """One iteration or epoch, an evaluation, a fast one in bfloat16, and a resumed run."""
    work_dir = tmp_path / "run"
    common = ["--data-root", roots(shapes)[scope], "--work-dir", work_dir]
    trained = tool("train.py", CONFIGS[scope], *common, "--amp", *options(scope))
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert "no GPU: SyncBN replaced by BN" in trained.stdout + trained.stderr
    (log,) = work_dir.glob("*/*.log")
    assert log.read_text().count("selective scan: using the backend chunked") == 1
    scalars = next(work_dir.glob("*/vis_data/scalars.json")).read_text().splitlines()
    rows = [json.loads(row) for row in scalars]
    assert all(row["loss"] > 0 for row in rows if "loss" in row)
    metric = {"mmdet": "coco/bbox_mAP", "mmseg": "mIoU"}[scope]
    assert any(metric in row for row in rows)

    pictures = tmp_path / "pictures"
    out = tmp_path / ("out.pkl" if scope == "mmdet" else "out")
    tested = tool(
        "test.py",
        CONFIGS[scope],
        checkpoint(work_dir, scope),
        *["--data-root", roots(shapes)[scope], "--work-dir", tmp_path / "test"],
        *["--out", out, "--show-dir", pictures, "--amp", "--fast"],
        *options(scope),
    )
    assert tested.returncode == 0, tested.stdout + tested.stderr
    assert out.exists()
    assert metric in tested.stdout + tested.stderr

    more = {"mmdet": "train_cfg.max_epochs=2", "mmseg": "train_cfg.max_iters=2"}[scope]
    resumed = tool("train.py", CONFIGS[scope], *common, "--resume", *options(scope, more))
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert {"mmdet": "resumed epoch: 1", "mmseg": "resumed epoch: 0, iter: 1"}[
        scope
    ] in resumed.stdout + resumed.stderr


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["mmdet", "mmseg"])
def test_configs_run_under_the_libraries_own_tools(
    scope: str, shapes: Path, tmp_path: Path
) -> None:
    """The own tools of mmdet and mmseg, from another folder, on a shipped config."""
    import importlib

    library = Path(importlib.import_module(scope).__file__ or "").parent
    script = library / ".mim/tools/train.py"
    if not script.exists():
        pytest.skip(f"this {scope} ships no tools")
    root = roots(shapes)[scope]
    config = tmp_path / "mine.py"  # AMP, which the recipes use, is for GPUs
    config.write_text(
        f"_base_ = {str(CONFIGS[scope])!r}\n"
        "optim_wrapper = dict(_delete_=True, type='OptimWrapper', optimizer=dict(type='AdamW'))\n"
    )
    data = [f"{s}_dataloader.dataset.data_root={root}/" for s in ("train", "val", "test")]
    if scope == "mmdet":
        annotations = f"{root}/annotations/instances_val2017.json"
        data += [f"{s}_evaluator.ann_file={annotations}" for s in ("val", "test")]
    done = run(
        sys.executable,
        script,
        *[config, "--work-dir", tmp_path / "run", *options(scope, *data)],
        cwd=str(tmp_path),
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert checkpoint(tmp_path / "run", scope).exists()


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["mmdet", "mmseg"])
def test_two_processes_on_the_cpu(scope: str, shapes: Path, tmp_path: Path) -> None:
    done = run(
        "bash",
        ROOT / "tools/dist_train.sh",
        *[CONFIGS[scope], 2, "--data-root", roots(shapes)[scope], "--work-dir", tmp_path],
        *options(scope),
        PYTHON=sys.executable,
        PORT="29617" if scope == "mmdet" else "29618",
    )
    text = done.stdout + done.stderr
    assert done.returncode == 0, text[-4000:]
    assert "processes talk through gloo" in text
    assert checkpoint(tmp_path, scope).exists()


def _corrupt(shapes: Path, tmp_path: Path) -> Path:
    """A copy of the shapes with two training images: one good, one damaged."""
    root = tmp_path / "ade"
    shutil.copytree(shapes / "ade", root)
    images = sorted((root / "images/training").iterdir())
    images[3].unlink()  # it may be a hard link to the other layout's
    images[3].write_bytes(b"not a picture")
    return images[3]


@pytest.mark.slow
def test_corrupt_image_in_the_middle_of_training_is_named(shapes: Path, tmp_path: Path) -> None:
    bad = _corrupt(shapes, tmp_path)
    done = tool(
        "train.py",
        CONFIGS["mmseg"],
        *["--data-root", tmp_path / "ade", "--work-dir", tmp_path / "run"],
        *options("mmseg", "train_cfg.max_iters=8", "train_dataloader.batch_size=4"),
    )
    assert done.returncode != 0
    assert f"cannot prepare the sample {bad}" in done.stderr
    assert "tools/check_data.py" in done.stderr


@pytest.mark.slow
def test_killed_training_goes_on(shapes: Path, tmp_path: Path) -> None:
    """A process killed for real resumes from its last checkpoint."""
    command = [sys.executable, ROOT / "tools/train.py", CONFIGS["mmseg"]]
    command += ["--data-root", shapes / "ade", "--work-dir", tmp_path, "--resume"]
    command += options("mmseg", "train_cfg.max_iters=6", "train_cfg.val_interval=6")
    command += ["default_hooks.checkpoint.max_keep_ckpts=2"]
    process = subprocess.Popen(
        [str(c) for c in command],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.time() + 200
    while not (tmp_path / "iter_2.pth").exists() and time.time() < deadline:
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.05)
    time.sleep(0.3)  # the file is complete
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "iter_6.pth").exists()
    done = run(*command)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "iter_6.pth").exists()
    assert "resumed epoch: 0, iter: " in done.stdout + done.stderr


def test_half_written_checkpoint_is_passed_over(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(99)}, tmp_path / "iter_1.pth")
    (tmp_path / "iter_2.pth").write_bytes((tmp_path / "iter_1.pth").read_bytes()[:-50])
    (tmp_path / "last_checkpoint").write_text(str(tmp_path / "iter_2.pth"))
    code = (
        "import sys; sys.path.insert(0, 'tools'); import train; from argparse import Namespace;"
        "print(train.newest_checkpoint(Namespace(work_dir=sys.argv[1])))"
    )
    done = run(sys.executable, "-c", code, tmp_path)
    first, last = done.stdout.splitlines()
    assert "iter_2.pth is not complete" in first
    assert last == str(tmp_path / "iter_1.pth")


@pytest.mark.parametrize("kind", ["missing", "empty"])
@pytest.mark.parametrize("scope", ["mmdet", "mmseg"])
def test_data_root_is_checked_before_the_model_is_built(
    scope: str, kind: str, tmp_path: Path
) -> None:
    root = tmp_path / "data"
    if kind == "empty":
        root.mkdir()
    config = (
        ROOT
        / {
            "mmdet": "mmdet_configs/cascade_mambavision_t.py",
            "mmseg": "mmseg_configs/upernet_mambavision_t.py",
        }[scope]
    )
    done = tool(
        "train.py",
        *[config, "--data-root", root, "--work-dir", tmp_path / "run"],
        *["--cfg-options", "model.backbone.arch=no-such"],  # building it would be another error
    )
    assert done.returncode == 1
    state = {"missing": "does not exist", "empty": "is empty"}[kind]
    assert f"error: train data: '{root}' {state}" in done.stderr
    assert {"mmdet": "COCO 2017", "mmseg": "ADE20K"}[scope] in done.stderr
    assert "--data-root" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_missing_config_and_checkpoint_are_named(tmp_path: Path) -> None:
    done = tool("train.py", "no/config.py")
    assert "error: config 'no/config.py' does not exist" in done.stderr
    done = tool("test.py", CONFIGS["mmdet"], "no/file.pth")
    assert "error: checkpoint 'no/file.pth' does not exist" in done.stderr
    done = tool(
        "train.py",
        *[CONFIGS["mmdet"], "--resume", "no/file.pth", "--work-dir", tmp_path],
    )
    assert "error: checkpoint 'no/file.pth' does not exist" in done.stderr
    assert "Traceback" not in done.stderr


def test_missing_pretrained_file_is_named(shapes: Path, tmp_path: Path) -> None:
    init = ["model.backbone.init_cfg.type=Pretrained", "model.backbone.init_cfg.checkpoint=no.pth"]
    done = tool(
        "train.py",
        *[CONFIGS["mmdet"], "--data-root", shapes / "coco", "--work-dir", tmp_path],
        *options("mmdet", *init),
    )
    assert done.returncode == 1
    assert "error: checkpoint 'no.pth' does not exist" in done.stderr


@pytest.mark.slow
def test_other_heads_are_not_evaluated(shapes: Path, tmp_path: Path) -> None:
    """Mmengine would log the misfit and evaluate random heads."""
    from mmengine.config import Config
    from mmengine.registry import MODELS, init_default_scope

    cfg = Config.fromfile(CONFIGS["mmseg"])
    init_default_scope("mmseg")
    cfg.model.decode_head.num_classes = 9
    for part in (cfg.model.decode_head, cfg.model.auxiliary_head):
        part.norm_cfg = dict(type="BN")
    file = tmp_path / "nine.pth"
    torch.save({"state_dict": MODELS.build(cfg.model).state_dict()}, file)
    done = tool(
        "test.py",
        *[CONFIGS["mmseg"], file, "--data-root", shapes / "ade", "--work-dir", tmp_path / "run"],
    )
    assert done.returncode == 1
    assert "does not fit the config's model: decode_head.conv_seg.weight: file (9, " in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("how", ["init_cfg", "load_from", "test"])
def test_wrong_variant_stops(how: str, shapes: Path, tmp_path: Path) -> None:
    file = tmp_path / "small.pth"
    other = MambaVision("S").state_dict()
    torch.save({"state_dict": {f"backbone.{k}": v for k, v in other.items()}}, file)
    common = ["--data-root", shapes / "coco", "--work-dir", tmp_path / "run"]
    if how == "test":
        done = tool("test.py", CONFIGS["mmdet"], file, *common, *options("mmdet"))
    elif how == "load_from":
        more = [f"load_from={file}"]
        done = tool("train.py", CONFIGS["mmdet"], *common, *options("mmdet", *more))
    else:
        more = ["model.backbone.init_cfg.type=Pretrained"]
        more += [f"model.backbone.init_cfg.checkpoint={file}"]
        done = tool("train.py", CONFIGS["mmdet"], *common, *options("mmdet", *more))
    assert done.returncode == 1
    assert "does not fit this backbone" in done.stderr
    assert "patch_embed.conv_down.0.weight: file (64, 3, 3, 3), network (8, 3, 3, 3)" in done.stderr
    assert "it looks like arch='S'" in done.stderr
    assert not list((tmp_path / "run").glob("*.pth"))


def test_library_that_is_not_installed_is_named(tmp_path: Path) -> None:
    """A config for mmseg where only mmdet is installed."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda n, *a: None if n == 'mmseg' else find(n, *a)\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = tool("train.py", CONFIGS["mmseg"], PYTHONPATH=path)
    assert done.returncode == 1
    assert "is a config for mmseg, which is not installed: pip install" in done.stderr


@pytest.mark.parametrize("name", ["train.py", "test.py"])
def test_help(name: str) -> None:
    done = tool(name, "--help")
    for word in ("--data-root", "--cfg-options", "--work-dir", "--launcher", "mmdet_configs"):
        assert word in done.stdout


@pytest.mark.parametrize("name", ["dist_train", "dist_test", "slurm_train", "slurm_test"])
def test_launchers_say_how_they_are_used(name: str) -> None:
    done = run("bash", ROOT / "tools" / f"{name}.sh")
    assert done.returncode == 2
    assert f"bash tools/{name}.sh" in done.stdout


def test_slurm_launcher_asks_for_what_it_is_told(tmp_path: Path) -> None:
    """A stand-in srun shows the command line."""
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    srun.chmod(0o755)
    done = run(
        "bash",
        *[ROOT / "tools/slurm_train.sh", "part", "job", "config.py", "--amp"],
        PATH=f"{tmp_path}:{os.environ['PATH']}",
        GPUS="16",
        SRUN_ARGS="--time=1 --exclusive",
    )
    words = done.stdout.splitlines()
    for word in ("--partition=part", "--ntasks=16", "--gres=gpu:8", "--time=1", "--exclusive"):
        assert word in words
    assert words[-4:] == ["config.py", "--launcher", "slurm", "--amp"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has float16")
def test_no_float16_on_a_cpu(tmp_path: Path) -> None:
    (tmp_path / "x.pth").touch()
    done = tool("test.py", CONFIGS["mmdet"], tmp_path / "x.pth", "--amp", "--amp-dtype", "float16")
    assert done.returncode == 1
    assert "--amp-dtype float16 needs a GPU: a CPU has bfloat16" in done.stderr


def test_amp_and_scaled_learning_rate_reach_the_runner() -> None:
    """The arguments change the config as mmdet's and mmseg's do."""
    code = (
        "import sys; sys.path.insert(0, 'tools'); import train, common;"
        "from mmengine.config import Config; from argparse import Namespace;"
        "cfg = Config(dict(optim_wrapper=dict(type='OptimWrapper'),"
        " auto_scale_lr=dict(enable=False, base_batch_size=16)));"
        "train.apply_train_arguments(cfg, Namespace(amp=True, auto_scale_lr=True, resume=None,"
        " pretrained=None));"
        "print(cfg.optim_wrapper.type, cfg.optim_wrapper.loss_scale, cfg.auto_scale_lr.enable)"
    )
    done = run(sys.executable, "-c", code)
    assert done.stdout.splitlines()[-1].split() == ["AmpOptimWrapper", "dynamic", "True"]


@pytest.mark.parametrize(
    ("wish", "checkpoint"),
    [
        ("--pretrained", "mambavision://T-1K"),
        ("--pretrained=b-21k", "mambavision://b-21k"),
        ("--pretrained=mine.safetensors", "mine.safetensors"),
        ("--pretrained=https://example.org/x.pth", "https://example.org/x.pth"),
        ("", ""),
    ],
)
def test_pretrained(wish: str, checkpoint: str) -> None:
    """Published weights are taken when asked for, and not otherwise."""
    code = (
        "import sys; sys.path.insert(0, 'tools'); import train, common;"
        "args = train.parse_args(); cfg = common.load_config(args);"
        "train.apply_train_arguments(cfg, args);"
        "print('found', (cfg.model.backbone.get('init_cfg') or {}).get('checkpoint', ''))"
    )
    config = ROOT / "mmdet_configs/cascade_mambavision_t.py"
    done = run(sys.executable, "-c", code, config, *filter(None, [wish]))
    assert done.stdout.splitlines()[-1].split() == ["found", *filter(None, [checkpoint])]
    assert ("starts from random weights" in done.stdout + done.stderr) == (not wish)


def test_pretrained_needs_a_variant(tmp_path: Path) -> None:
    done = tool("train.py", CONFIGS["mmdet"], "--pretrained", "--work-dir", tmp_path)
    assert done.returncode == 1
    assert "--pretrained needs a name or file here" in done.stderr
