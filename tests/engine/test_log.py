"""What the package logs reaches mmengine's log."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

pytest.importorskip("mmengine")
from mmengine.logging import MMLogger

from mambavision_backbone.engine.log import ForwardingHandler, forward_to_mmengine

logger = logging.getLogger("mambavision_backbone")


def test_into_the_log_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MMLogger, "_instance_dict", {})
    run = MMLogger.get_instance("a run", log_file=str(tmp_path / "run.log"))
    logger.info("said by the package")
    for handler in run.handlers:
        handler.close()
    (line,) = (tmp_path / "run.log").read_text().splitlines()
    assert line.endswith("mambavision_backbone - INFO - said by the package")


def test_without_a_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(MMLogger, "_instance_dict", {})
    logger.info("not worth a line")
    logger.warning("worth a line")
    assert capsys.readouterr().err == "worth a line\n"
    assert not MMLogger._instance_dict


def test_importing_twice_says_nothing_twice() -> None:
    forward_to_mmengine()
    assert sum(isinstance(handler, ForwardingHandler) for handler in logger.handlers) == 1
