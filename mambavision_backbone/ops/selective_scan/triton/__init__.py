"""The scan as Triton kernels: ``kernels`` is the device code, ``launch`` sizes and starts it.

Triton is loaded at first use.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...functions import call
from ...triton_support import interpreted, unavailable

__all__ = [
    "direct",
    "interpreted",
    "refusal",
    "selective_scan",
    "selective_scan_backward",
    "unavailable",
]

MAX_BATCH = 65535  # of a grid's last axis
MAX_DSTATE = 16  # a thread holds the states of its channel in registers


def refusal(batch: int, dstate: int) -> str | None:
    """Why these sizes cannot be scanned, or None."""
    if batch > MAX_BATCH:
        return f"batch {batch} is above {MAX_BATCH}"
    return None if dstate <= MAX_DSTATE else f"dstate {dstate} is above {MAX_DSTATE}"


def direct(*args: Any) -> Tensor:
    """Scan, with gradients recorded here and not by PyTorch's dispatcher."""
    from .launch import SelectiveScanFunction

    return call(SelectiveScanFunction, *args)


def selective_scan(*args: Any) -> Tensor:
    """Scan, as ``launch.selective_scan``."""
    from . import launch

    return launch.selective_scan(*args)


def selective_scan_backward(*args: Any) -> tuple[Tensor, ...]:
    """Gradients, as ``launch.selective_scan_backward``."""
    from . import launch

    return launch.selective_scan_backward(*args)
