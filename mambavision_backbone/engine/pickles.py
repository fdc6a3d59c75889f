"""What mmengine's training checkpoints hold besides tensors and plain data."""

from __future__ import annotations

from typing import Any

import numpy as np
from mmengine.logging import HistoryBuffer

from ..checkpoint.plain import PLAIN_CLASSES, called, refuse

_STATISTICS = ("min", "max", "current", "mean")


@called("builtins", "getattr")
def _statistic(owner: Any, name: str) -> Any:
    """Stand in for getattr, by which a HistoryBuffer's statistics are pickled, and only those."""
    if owner is _History and name in _STATISTICS:
        return getattr(HistoryBuffer, name)
    raise refuse(f"getattr of {name!r}")


@called(HistoryBuffer.__module__, "HistoryBuffer")
class _History(HistoryBuffer):
    """A curve as a pickle tells it, which becomes mmengine's own.

    mmengine's would take over statistics from the pickle, for all curves of the process.
    """

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the numbers."""
        for name in ("_log_history", "_count_history"):
            numbers = np.array(state[name])  # numpy's own class, not a stand-in
            if numbers.dtype.kind not in "biuf":
                raise refuse(f"a curve of {numbers.dtype}")
            setattr(self, name, numbers)
        self.max_length = int(state["max_length"])
        self._set_default_statistics()
        self.__class__ = HistoryBuffer


def admit_history() -> None:
    """Let the strict reader of ``checkpoint`` accept the curves in mmengine's checkpoints."""
    PLAIN_CLASSES.extend([_History, _statistic])
