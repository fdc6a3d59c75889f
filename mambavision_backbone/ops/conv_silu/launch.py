"""Sizes, buffers and launches of the kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..row_sum.launch import row_sum
from ..sizes import ceil_div
from ..triton_support import Launch, launch
from . import kernels

BLOCK_ROWS, BLOCK_D, WARPS = 32, 32, 4
TILES = 4  # of rows for a program of the backward kernel


def forward_launch(
    rows: int, seqlen: int, dim: int, strides: tuple[int, int, int], branches: int
) -> Launch:
    """``kernels.forward``; strides of the rows of xz, x and z."""
    return Launch(
        kernels.forward,
        (ceil_div(rows, BLOCK_ROWS), branches * ceil_div(dim, BLOCK_D), 1),
        (*strides, rows, seqlen, dim),
        (branches, BLOCK_ROWS, BLOCK_D),
        WARPS,
    )


def forward(xz: Tensor, weight_x: Tensor, weight_z: Tensor, x: Tensor, z: Tensor | None) -> None:
    """Write ``conv_silu`` into x and z, whose channels are contiguous and rows evenly spaced.

    Without z only the first branch is computed.
    """
    branches = 1 if z is None else 2
    z = x if z is None else z
    seqlen, dim = x.shape[1:]
    xz, s_xz = _rows_of(xz)
    strides = s_xz, x.stride(1), z.stride(1)
    start = forward_launch(xz.shape[0], seqlen, dim, strides, branches)
    start(xz, weight_x.contiguous(), weight_z.contiguous(), x, z)


def backward(
    dx: Tensor, dz: Tensor, xz: Tensor, weight_x: Tensor, weight_z: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the last three; both weights' are in the first one's dtype."""
    batch, seqlen, dim = dx.shape
    rows = batch * seqlen
    programs = ceil_div(rows, BLOCK_ROWS * TILES)
    dxz = torch.empty(xz.shape, dtype=xz.dtype, device=xz.device)
    (xz, s_xz), (dx, s_dx), (dz, s_dz) = _rows_of(xz), _rows_of(dx), _rows_of(dz)
    dw = torch.empty(programs, 2 * dim, 1, 3, dtype=torch.float32, device=xz.device)
    launch(
        kernels.backward,
        (programs, 2 * ceil_div(dim, BLOCK_D), 1),
        (dx, dz, xz, weight_x.contiguous(), weight_z.contiguous(), dxz, dw),
        (s_dx, s_dz, s_xz, rows, seqlen, dim, TILES),
        (BLOCK_ROWS, BLOCK_D),
        WARPS,
    )  # fmt: skip
    dw = row_sum(dw).to(weight_x.dtype)
    return dxz, dw[:dim], dw[dim:]


class ConvSiLUFunction(torch.autograd.Function):
    """``conv_silu`` with gradients; keeps its inputs only and computes the rest again."""

    @staticmethod
    def forward(ctx: Any, xz: Tensor, weight_x: Tensor, weight_z: Tensor) -> tuple[Tensor, Tensor]:
        """Arguments as in ``conv_silu``."""
        ctx.save_for_backward(xz, weight_x, weight_z)
        batch, seqlen, dim = xz.shape[0], xz.shape[1], xz.shape[2] // 2
        x, z = (xz.new_empty(batch, seqlen, dim) for _ in range(2))
        forward(xz, weight_x, weight_z, x, z)
        return x, z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor, dz: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the three inputs."""
        return backward(dx, dz, *ctx.saved_tensors)


def _rows_of(x: Tensor) -> tuple[Tensor, int]:
    """Tokens (B, L, C) as rows (B·L, C) with contiguous channels, and the stride of the rows."""
    rows = x.reshape(-1, x.shape[2])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    return rows, rows.stride(0)
