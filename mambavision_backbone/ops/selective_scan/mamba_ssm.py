"""Adapter to the CUDA kernel of the mamba-ssm package (optional; loaded at first use)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

MAX_DSTATE = 256


def refusal(_batch: int, dstate: int) -> str | None:
    """Why these sizes cannot be scanned, or None."""
    return None if dstate <= MAX_DSTATE else f"dstate {dstate} is above {MAX_DSTATE}"


@functools.cache
def unavailable() -> str | None:
    """Why mamba-ssm cannot be used, or None if it can."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    try:
        from mamba_ssm.ops import selective_scan_interface  # noqa: F401
    except Exception as error:  # a broken binary raises more than ImportError
        return f"importing mamba_ssm failed: {type(error).__name__}: {error}"
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
    """Scan by mamba-ssm's kernel (state in float32). Arguments as in ``api.selective_scan``."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    y = selective_scan_fn(
        u.transpose(1, 2).contiguous(),
        dt.to(u.dtype).transpose(1, 2).contiguous(),
        A.float(),
        B.to(u.dtype).transpose(1, 2).contiguous(),
        C.to(u.dtype).transpose(1, 2).contiguous(),
        D=D.float(),
        delta_bias=dt_bias.float(),
        delta_softplus=dt_softplus,
    )
    return y.transpose(1, 2).contiguous()
