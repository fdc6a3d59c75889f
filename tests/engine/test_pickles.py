"""mmengine's own checkpoints pass the strict reader, and nothing slips in with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("mmengine")

from mmengine.logging import HistoryBuffer, MessageHub

from mambavision_backbone.checkpoint import WeightsError, read_checkpoint, read_state_dict


@pytest.mark.openmmlab
def test_training_checkpoint_is_read(tmp_path: Path) -> None:
    hub = MessageHub.get_instance("test_pickles")
    hub.update_scalar("train/loss", torch.tensor(0.5))
    hub.update_info("iter", 3)
    file = tmp_path / "epoch_1.pth"
    content = {"state_dict": {"x": torch.ones(2)}, "message_hub": hub.state_dict()}
    torch.save(content, file)
    assert isinstance(content["message_hub"]["log_scalars"]["train/loss"], HistoryBuffer)
    assert read_state_dict(str(file))["x"].tolist() == [1.0, 1.0]


class _Getattr:
    """Pickles to a call of getattr on an admitted class."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (HistoryBuffer, self.name)


@pytest.mark.parametrize(
    "name", ["__init__", "__subclasses__", "__globals__", "register_statistics"]
)
def test_getattr_reaches_the_statistics_alone(name: str, tmp_path: Path) -> None:
    file = tmp_path / "x.pth"
    torch.save({"state_dict": {}, "x": _Getattr(name)}, file)
    with pytest.raises(WeightsError, match="not admitted"):
        read_state_dict(str(file))


def test_reading_changes_no_statistic_of_the_process(tmp_path: Path) -> None:
    class Crafted(HistoryBuffer):
        def __reduce__(self) -> tuple[Any, ...]:
            state = {**HistoryBuffer([1.0], [1]).__dict__, "statistics_methods": {"mean": "x"}}
            return HistoryBuffer, ([1.0], [1]), state

    file = tmp_path / "x.pth"
    torch.save({"state_dict": {}, "x": Crafted([1.0], [1])}, file)
    found = read_checkpoint(str(file))["x"]
    assert type(found) is HistoryBuffer
    assert found.mean() == 1.0
    assert found.statistics("mean") == 1.0
