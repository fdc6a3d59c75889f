"""The scan as Triton kernels: ``kernels`` is the device code, ``launch`` sizes and starts it.

Triton is loaded at first use.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

MAX_BATCH = 65535  # of a grid's last axis
MAX_DSTATE = 16  # a thread holds the states of its channel in registers
MIN_CAPABILITY = (7, 0)


def interpreted() -> bool:
    """Whether TRITON_INTERPRET=1 asks for kernels run on the CPU, slowly, to debug them."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def refusal(batch: int, dstate: int) -> str | None:
    """Why these sizes cannot be scanned, or None."""
    if batch > MAX_BATCH:
        return f"batch {batch} is above {MAX_BATCH}"
    return None if dstate <= MAX_DSTATE else f"dstate {dstate} is above {MAX_DSTATE}"


@functools.cache
def unavailable() -> str | None:
    """Why the kernels cannot be used on this machine, or None if they can."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"importing triton failed: {error}"
    if interpreted():
        return None
    if not torch.cuda.is_available():
        return "no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability < MIN_CAPABILITY:
        return "compute capability {}.{} is below {}.{}".format(*capability, *MIN_CAPABILITY)
    try:
        _probe()
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:
        return f"a Triton kernel failed: {type(error).__name__}: {error}"
    return None


def _probe() -> None:
    """Compile and run every kernel once: Triton needs a C compiler, and may not know the GPU."""
    with _disable_current_modes():  # real tensors, also while a model is exported or compiled
        x = torch.zeros(1, 64, 8, device="cuda")  # two chunks
        inputs = (x, x, x[0, :8], x, x, x[0, 0], x[0, 0], True)
        selective_scan(*inputs)
        selective_scan_backward(x, *inputs)
        torch.cuda.synchronize()


def selective_scan(*args: Any) -> Tensor:
    """Scan, as ``launch.selective_scan``."""
    from . import launch

    return launch.selective_scan(*args)


def selective_scan_backward(*args: Any) -> tuple[Tensor, ...]:
    """Gradients, as ``launch.selective_scan_backward``."""
    from . import launch

    return launch.selective_scan_backward(*args)
