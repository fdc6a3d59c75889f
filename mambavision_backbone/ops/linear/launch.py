"""Sizes, buffers and launches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..functions import compute_dtype
from ..row_sum.launch import row_sum
from ..sizes import ceil_div, split_rows
from ..triton_support import launch
from . import kernels

BLOCK_ROWS, BLOCK_C, WARPS = 16, 128, 4
PROGRAMS = 128  # along the rows, at most


def column_sum(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over rows of (rows, C), added up in float32; PyTorch's takes thrice the time."""
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, channels = x.shape
    programs, tiles = split_rows(rows, BLOCK_ROWS, PROGRAMS)
    parts = torch.empty(programs, channels, dtype=torch.float32, device=x.device)
    launch(
        kernels.column_sum,
        (programs, ceil_div(channels, BLOCK_C), 1),
        (x, parts),
        (x.stride(0), rows, channels, tiles),
        (BLOCK_ROWS, BLOCK_C),
        WARPS,
    )
    return row_sum(parts, dtype)


class LinearFunction(torch.autograd.Function):
    """``linear`` with gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Apply the layer, in autocast's dtype where that is on."""
        dtype = compute_dtype(x)
        ctx.dtypes = x.dtype, weight.dtype, bias.dtype
        x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
        ctx.save_for_backward(x, weight)
        return torch.addmm(bias, x.flatten(0, 1), weight.t()).view(*x.shape[:2], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        """Gradients of the three inputs."""
        x, weight = ctx.saved_tensors
        dy = dy.flatten(0, 1)
        grads = ((dy @ weight).view_as(x), dy.t() @ x.flatten(0, 1), column_sum(dy, ctx.dtypes[2]))
        return tuple(grad.to(dtype) for grad, dtype in zip(grads, ctx.dtypes, strict=True))
