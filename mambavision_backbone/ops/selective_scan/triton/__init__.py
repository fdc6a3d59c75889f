"""The scan as Triton kernels: ``kernels`` is the device code, ``launch`` sizes and starts it.

Triton is loaded at first use.
"""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

MAX_DSTATE = 16  # a thread holds the states of its channel in registers
MIN_CAPABILITY = (7, 0)


def interpreted() -> bool:
    """Whether TRITON_INTERPRET=1 asks for kernels run on the CPU, slowly, to debug them."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def unavailable() -> str | None:
    """Why the kernels cannot be used on this machine, or None if they can."""
    if interpreted():
        return None
    if not torch.cuda.is_available():
        return "no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability < MIN_CAPABILITY:
        return "compute capability {}.{} is below {}.{}".format(*capability, *MIN_CAPABILITY)
    try:  # compile and run once: Triton needs a C compiler, and may not know the GPU
        x = torch.zeros(1, 2, 8, device="cuda")
        selective_scan(x, x, x[0].t(), x[..., :2], x[..., :2], x[0, 0], x[0, 0], True)
        torch.cuda.synchronize()
    except Exception as error:
        return f"a Triton kernel failed: {type(error).__name__}: {error}"
    return None


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    dt_softplus: bool,
) -> Tensor:
    """Scan. Arguments as in ``api.selective_scan``; dstate up to ``MAX_DSTATE``."""
    from . import launch

    return launch.selective_scan(u, dt, A, B, C, D, dt_bias, dt_softplus)


def selective_scan_backward(
    dy: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    dt_softplus: bool,
) -> tuple[Tensor, ...]:
    """Gradients of u, dt, A, B, C, D, dt_bias; states are computed again."""
    from . import launch

    return launch.selective_scan_backward(dy, u, dt, A, B, C, D, dt_bias, dt_softplus)
