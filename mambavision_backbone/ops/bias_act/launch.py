"""Sizes and launch of the kernel."""

from __future__ import annotations

from torch import Tensor

from ..sizes import ceil_div
from ..triton_support import launch
from . import kernels

BLOCK, WARPS = 1024, 4


def bias_act_(y: Tensor, bias: Tensor, act: str, x: Tensor | None) -> Tensor:
    """``bias_act`` in place; y and x are channels-last."""
    launch(
        kernels.forward,
        (ceil_div(y.numel(), BLOCK), 1, 1),
        (y, bias, x),
        (y.numel(), y.shape[1]),
        (act, x is not None, BLOCK),
        WARPS,
    )
    return y
