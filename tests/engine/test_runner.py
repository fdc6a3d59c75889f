"""The runner that executes nothing of a checkpoint, in real trainings of a small model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch

pytest.importorskip("mmengine")

from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, METRICS, MODELS, RUNNERS
from mmengine.runner import CheckpointLoader
from torch import nn

from mambavision_backbone.checkpoint import WeightsError, read_checkpoint
from mambavision_backbone.engine import SafeRunner
from tests.conftest import ROOT, Call
from tests.hub import Hub, Served


@MODELS.register_module(name="RunnerTestModel", force=True)
class Model(BaseModel):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))

    def forward(self, inputs: Any, targets: Any, mode: str = "tensor") -> Any:
        error = self.layers(inputs) - targets
        if mode == "predict":
            return [error]
        return {"loss": error.square().mean()} if mode == "loss" else error


@DATASETS.register_module(name="RunnerTestData", force=True)
class Data(torch.utils.data.Dataset):
    def __init__(self) -> None:
        self.inputs = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"inputs": self.inputs[index], "targets": self.inputs[index].sum()[None]}


def build(
    work_dir: Path,
    epochs: int = 2,
    checkpoint: Mapping[str, Any] = MappingProxyType({}),
    **more: Any,
) -> Any:
    torch.manual_seed(3)
    return RUNNERS.build(
        Config(
            dict(
                runner_type="SafeRunner",
                model=dict(type="RunnerTestModel"),
                work_dir=str(work_dir),
                experiment_name=f"{work_dir.name}_{os.urandom(4).hex()}",
                train_dataloader=dict(
                    batch_size=4,
                    num_workers=0,
                    collate_fn=dict(type="default_collate"),
                    dataset=dict(type="RunnerTestData"),
                    sampler=dict(type="DefaultSampler", shuffle=True),
                ),
                train_cfg=dict(by_epoch=True, max_epochs=epochs),
                optim_wrapper=dict(optimizer=dict(type="AdamW", lr=0.01)),
                param_scheduler=[
                    dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=5),
                    dict(type="MultiStepLR", milestones=[1], by_epoch=True),
                ],
                custom_hooks=[dict(type="EMAHook", momentum=0.1)],
                default_hooks=dict(
                    logger=dict(type="LoggerHook", interval=1),
                    checkpoint=dict(type="CheckpointHook", interval=1, **checkpoint),
                ),
                randomness=dict(seed=7),
                log_level="WARNING",
                default_scope="mmengine",
            )
            | more
        )
    )


def change(source: Path, target: Path, edit: Callable[[dict[str, Any]], None]) -> str:
    content = dict(read_checkpoint(str(source)))
    edit(content)
    torch.save(content, target)
    return str(target)


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """The checkpoint of one epoch."""
    build(tmp_path / "run", epochs=1).train()
    return tmp_path / "run/epoch_1.pth"


def test_resumed_training_is_the_same(tmp_path: Path) -> None:
    build(tmp_path / "whole", epochs=3).train()
    file = str(tmp_path / "whole/epoch_1.pth")
    resumed = build(tmp_path / "resumed", epochs=3, load_from=file, resume=True)
    assert isinstance(resumed, SafeRunner)
    resumed.train()
    first, last = (
        read_checkpoint(str(tmp_path / name / "epoch_3.pth")) for name in ("whole", "resumed")
    )
    for key in ("state_dict", "ema_state_dict"):
        assert first[key].keys() == last[key].keys()
        for name, value in first[key].items():
            assert torch.equal(value, last[key][name]), name
    assert last["meta"]["epoch"] == 3
    losses = last["message_hub"]["log_scalars"]["train/loss"]
    assert isinstance(losses, HistoryBuffer)
    assert len(losses.data[0]) == 12, "the curve of the first run is continued"


def test_resume_finds_the_last_checkpoint(trained: Path) -> None:
    runner = build(trained.parent, epochs=2, resume=True)
    runner.train()
    assert runner.epoch == 2


def test_config_text_is_not_executed(trained: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"

    def edit(content: dict[str, Any]) -> None:
        content["meta"]["config"] = f"open({str(marker)!r}, 'w').close()\ngpu_ids = [0]"
        content["meta"]["cfg"] = content["meta"]["config"]

    file = change(trained, tmp_path / "evil.pth", edit)
    build(tmp_path / "safe", load_from=file, resume=True).train()
    assert not marker.exists()


@pytest.mark.parametrize("resume", [False, True])
def test_pickled_code_is_not_executed(resume: bool, trained: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    file = change(trained, tmp_path / "evil.pth", lambda c: c.update(x=Call(Path.touch, marker)))
    options: dict[str, Any] = {"load_from": file, "resume": resume}
    with pytest.raises(WeightsError, match="not a checkpoint of tensors and plain data"):
        build(tmp_path / "refused", **options).train()
    assert not marker.exists()
    trusting = build(tmp_path / "trusted", **options)
    trusting.trust_checkpoint = True
    trusting.train()
    assert marker.exists(), "the file would have done it"


def test_weights_alone_are_loaded_but_not_resumed(trained: Path, tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    weights = read_checkpoint(str(trained))["state_dict"]
    torch.save({f"module.{k}": v for k, v in weights.items()}, file)
    runner = build(tmp_path / "a", load_from=str(file), custom_hooks=[])
    runner.load_or_resume()
    assert torch.equal(runner.model.layers[0].weight, weights["layers.0.weight"])
    with pytest.raises(WeightsError, match=r"no checkpoint of a training.*without --resume"):
        build(tmp_path / "b", load_from=str(file), resume=True, custom_hooks=[]).train()


@METRICS.register_module(name="RunnerTestMetric", force=True)
class Metric(BaseMetric):
    """Better from one evaluation to the next."""

    def process(self, *_args: Any) -> None:
        self.results.append(1)

    def compute_metrics(self, *_args: Any) -> dict[str, float]:
        Metric.value = getattr(Metric, "value", 0.0) + 1
        return {"value": Metric.value}


EVALUATED = {
    "val_dataloader": {
        "batch_size": 4,
        "num_workers": 0,
        "collate_fn": {"type": "default_collate"},
        "dataset": {"type": "RunnerTestData"},
        "sampler": {"type": "DefaultSampler", "shuffle": False},
    },
    "val_cfg": {},
    "val_evaluator": {"type": "RunnerTestMetric"},
}
BEST = {"save_best": "value", "rule": "greater", "max_keep_ckpts": 2}


def test_best_and_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    """What is superseded is deleted, also after a resume in the same folder."""
    folder = tmp_path / "run"
    build(folder, 3, BEST, **EVALUATED).train()
    names = ["best_value_epoch_3.pth", "epoch_2.pth", "epoch_3.pth"]
    assert sorted(p.name for p in folder.glob("*.pth")) == names
    build(folder, 4, BEST, resume=True, **EVALUATED).train()
    names = ["best_value_epoch_4.pth", "epoch_3.pth", "epoch_4.pth"]
    assert sorted(p.name for p in folder.glob("*.pth")) == names


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_files_elsewhere_are_not_deleted(kind: str, tmp_path: Path) -> None:
    """A checkpoint says which file is its best; mmengine deletes that one for a better."""
    first = tmp_path / "first"
    build(first, 2, BEST, **EVALUATED).train()
    best = first / "best_value_epoch_2.pth"
    victim = best
    if kind == "folder":
        victim = tmp_path / "precious"
        victim.mkdir()
        (victim / "file").touch()

    def edit(content: dict[str, Any]) -> None:
        info = content["message_hub"]["runtime_info"]
        assert Path(info["best_ckpt"]).parent == first
        info.update(best_ckpt=str(victim), last_ckpt=str(victim), best_score=-1.0)
        info["keep_ckpt_ids"] = ["/../../x"]

    file = change(first / "epoch_2.pth", tmp_path / "evil.pth", edit)
    build(tmp_path / "second", 3, BEST, load_from=file, resume=True, **EVALUATED).train()
    assert victim.exists()
    assert best.exists()
    assert (tmp_path / "second/best_value_epoch_3.pth").exists()


KILLED = """
import os, signal, sys, types
from pathlib import Path
sys.modules["tests"] = types.ModuleType("tests")  # another package may be called so
sys.modules["tests"].__path__ = [{root!r} + "/tests"]
import mmengine.runner.runner as runner
from tests.engine.test_runner import build

def half(checkpoint, path, **kwargs):
    Path(path).write_bytes(b"half of a checkpoint")
    os.kill(os.getpid(), signal.SIGKILL)

run = build(Path({folder!r}), epochs=3, resume=True)
runner.save_checkpoint = half
run.train()
"""


def test_killed_while_saving(trained: Path) -> None:
    """The older checkpoint is whole, no half one is found, and the next save clears up."""
    folder = trained.parent
    before = trained.read_bytes()
    code = KILLED.format(root=str(ROOT), folder=str(folder))
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert trained.read_bytes() == before
    assert [p.name for p in folder.glob("*.pth")] == ["epoch_1.pth"]
    assert (folder / ".epoch_2.pth.partial").exists(), "it was killed in the middle"
    runner = build(folder, epochs=2, resume=True)
    runner.train()
    assert sorted(p.name for p in folder.glob("*.pth")) == ["epoch_1.pth", "epoch_2.pth"]
    assert not list(folder.glob(".*.partial"))


def test_mmengine_knows_published_names(hub: Hub, tmp_path: Path) -> None:
    file = tmp_path / "x.pth"
    torch.save({"state_dict": {"x": torch.ones(2)}}, file)
    hub.files["nvidia/MambaVision-T-1K/mambavision_tiny_1k.pth.tar"] = Served(file.read_bytes())
    content = CheckpointLoader.load_checkpoint("mambavision://T-1K", "cpu")
    assert content["state_dict"]["x"].tolist() == [1, 1]
