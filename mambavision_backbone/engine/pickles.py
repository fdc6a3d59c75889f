"""What mmengine's training checkpoints hold besides tensors and plain data."""

from __future__ import annotations

import pickle
from typing import Any

from mmengine.logging import HistoryBuffer

from ..checkpoint import PLAIN_CLASSES

_STATISTICS = ("min", "max", "current", "mean")


def _statistic(owner: Any, name: str) -> Any:
    """Stand in for getattr, by which a HistoryBuffer's statistics are pickled, and only those."""
    if owner is HistoryBuffer and name in _STATISTICS:
        return getattr(HistoryBuffer, name)
    raise pickle.UnpicklingError(f"getattr of {name!r} is not admitted")


# The unpickler finds a function by these names.
_statistic.__module__ = "builtins"
_statistic.__name__ = _statistic.__qualname__ = "getattr"


def admit_history() -> None:
    """Let the strict reader of ``checkpoint`` accept the curves in mmengine's checkpoints."""
    PLAIN_CLASSES.extend([HistoryBuffer, _statistic])
