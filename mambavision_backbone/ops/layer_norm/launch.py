"""Sizes, buffers and launches of the kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..functions import compute_dtype, recorded
from ..row_sum.launch import row_sum
from ..sizes import ceil_div, power_of_2, split_rows
from ..triton_support import Launch, launch
from . import kernels

ROWS = 2  # of a tile
_NOTHING = (None, None, None, None)  # to be added
PROGRAMS = 1056  # of a backward kernel at most: eight on each multiprocessor of a large GPU


def forward_launch(
    rows: int, seqlen: int, channels: int, eps: float | None, given: tuple[bool, ...], stats: bool
) -> Launch:
    """``kernels.forward``; ``given`` says which of y, its bias, gamma and factor there are.

    Without ``eps`` there is no norm.
    """
    block = power_of_2(channels)
    return Launch(
        kernels.forward,
        (ceil_div(rows, ROWS), 1, 1),
        (rows, seqlen, channels, float(eps or 0)),
        (*given, eps is not None, stats, ROWS, block),
        warps=max(1, block // 512),
    )


def forward(
    x: Tensor,
    branch: tuple[Tensor | None, ...] | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    stats: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The sum (without a branch x itself), its norm, with ``stats`` mean and 1/std of each row.

    ``branch`` is what is added to x, if anything: y, its bias, gamma and factor. x and y are
    contiguous tokens (B, L, C), without a factor also rows (R, C).
    """
    branch = branch or _NOTHING
    y, y_bias, gamma, factor = branch
    channels = x.shape[-1]
    rows = x.numel() // channels
    total = x if y is None else _sum_of(x, y, gamma)
    normed = torch.empty_like(x, dtype=compute_dtype(total))
    mean = rstd = None
    if stats:
        padded = ceil_div(rows, 4) * 4  # both aligned, else Triton compiles for either
        mean, rstd = torch.empty(2, padded, dtype=torch.float32, device=x.device).unbind()
    given = tuple(t is not None for t in branch)
    start = forward_launch(rows, x.shape[1], channels, eps, given, stats)
    start(x, y, y_bias, gamma, factor, weight, bias, total, normed, mean, rstd)
    return total, normed, mean, rstd


def _sum_of(x: Tensor, y: Tensor, gamma: Tensor | None) -> Tensor:
    """Memory for x and a branch."""
    dtype = torch.promote_types(x.dtype, y.dtype)
    dtype = dtype if gamma is None else torch.promote_types(dtype, gamma.dtype)
    return torch.empty_like(x, dtype=dtype)


def _backward(
    dtotal: Tensor | None,
    dnormed: Tensor,
    total: Tensor | None,
    branch: tuple[Tensor | None, ...],
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    dx: Tensor | None,
    dy: Tensor | None,
) -> Tensor:
    """Write the gradients of x and, unless None, of y; return those of weight, bias, gamma, y_bias.

    The latter are (4, C) in float32. ``branch`` as for ``forward``, y itself only with gamma.
    Without a norm's weight ``dnormed`` is the gradient of the sum, and of x.
    """
    y, y_bias, gamma, factor = branch
    channels = dnormed.shape[-1]
    rows = dnormed.numel() // channels
    programs, tiles = split_rows(rows, ROWS, PROGRAMS)
    dparam = torch.empty(programs, 4, channels, dtype=torch.float32, device=dnormed.device)
    block = power_of_2(channels)
    options = (t is not None for t in (weight, dtotal, dy, y_bias, gamma, factor))
    launch(
        kernels.backward,
        (programs, 1, 1),
        (dnormed, dtotal, total, y, y_bias, gamma, factor, weight, mean, rstd, dx, dy, dparam),
        (rows, dnormed.shape[1], channels, tiles),
        (*options, ROWS, block),
        warps=max(2, block // 512),
    )  # fmt: skip
    return row_sum(dparam)


class NormFunction(torch.autograd.Function):
    """Layer norm of tokens (B, L, C); keeps its input as it is, not in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """Normalise."""
        x = x.contiguous()
        _, normed, mean, rstd = forward(x, None, weight, bias, eps, recorded(ctx))
        ctx.save_for_backward(x, weight, mean, rstd)
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dnormed: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Gradients of x, weight and bias."""
        x, weight, mean, rstd = ctx.saved_tensors
        dx = torch.empty_like(x)
        dparam = _backward(
            None, dnormed.contiguous(), x, _NOTHING, weight, mean, rstd, dx, None
        ).to(weight.dtype)
        return dx, dparam[0], dparam[1], None


class AddFunction(torch.autograd.Function):
    """``add`` of tokens with gradients; keeps y only where gamma needs it."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        y_bias: Tensor | None,
        gamma: Tensor | None,
        factor: Tensor | None,
    ) -> Tensor:
        """Add."""
        x, y = x.contiguous(), y.contiguous()
        branch = (y, y_bias, gamma, factor)
        batch, seqlen, channels = x.shape
        total = _sum_of(x, y, gamma)
        given = tuple(t is not None for t in branch)
        start = forward_launch(batch * seqlen, seqlen, channels, None, given, False)
        start(x, *branch, None, None, total, None, None, None)
        ctx.save_for_backward(None if gamma is None else y, y_bias, gamma, factor)
        ctx.dtypes = x.dtype, y.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, y, y_bias and gamma."""
        branch = ctx.saved_tensors
        _, y_bias, gamma, _ = branch
        x_dtype, y_dtype = ctx.dtypes
        dtotal = dtotal.contiguous()
        dy = torch.empty_like(dtotal, dtype=y_dtype)
        dparam = _backward(None, dtotal, None, branch, None, None, None, None, dy)
        dgamma = None if gamma is None else dparam[2].to(gamma.dtype)
        dbias = None if y_bias is None else dparam[3].to(y_bias.dtype)
        return dtotal.to(x_dtype), dy, dbias, dgamma, None


class AddNormFunction(torch.autograd.Function):
    """``add_norm`` with gradients; keeps the sum, and y only where gamma needs it."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        y_bias: Tensor | None,
        gamma: Tensor | None,
        factor: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        """Add and normalise."""
        x, y = x.contiguous(), y.contiguous()
        branch = (y, y_bias, gamma, factor)
        total, normed, mean, rstd = forward(x, branch, weight, bias, eps, recorded(ctx))
        kept_y = None if gamma is None else y
        ctx.save_for_backward(total, kept_y, y_bias, gamma, factor, weight, mean, rstd)
        ctx.dtypes = x.dtype, y.dtype
        return total, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor, dnormed: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, y, y_bias, gamma, weight and bias."""
        total, y, y_bias, gamma, factor, weight, mean, rstd = ctx.saved_tensors
        x_dtype, y_dtype = ctx.dtypes
        dx = torch.empty_like(total, dtype=x_dtype)
        same = gamma is None and factor is None and x_dtype == y_dtype
        dy = None if same else torch.empty_like(total, dtype=y_dtype)
        dparam = _backward(
            dtotal.contiguous(), dnormed.contiguous(),
            total, (y, y_bias, gamma, factor), weight, mean, rstd, dx, dy,
        )  # fmt: skip
        dgamma = None if gamma is None else dparam[2].to(gamma.dtype)
        dbias = None if y_bias is None else dparam[3].to(y_bias.dtype)
        dparam = dparam.to(weight.dtype)
        return dx, dx if dy is None else dy, dbias, dgamma, None, dparam[0], dparam[1], None


class MapNormFunction(torch.autograd.Function):
    """Layer norm over the channels of maps (B, C, H, W) with any strides, into contiguous ones."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """Normalise."""
        batch, channels, height, width = x.shape
        pixels = height * width
        y = torch.empty(x.shape, dtype=compute_dtype(x), device=x.device)
        mean = torch.empty(batch, pixels, dtype=torch.float32, device=x.device)
        rstd = torch.empty_like(mean)
        block_c, block_p, warps = _map_blocks(channels)
        launch(
            kernels.map_forward,
            (ceil_div(pixels, block_p), batch, 1),
            (x, weight, bias, y, mean, rstd),
            (*_map_strides(x), channels, float(eps)),
            (block_p, block_c),
            warps,
        )  # fmt: skip
        ctx.save_for_backward(x, weight, mean, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Gradients of x (channels-last), weight and bias."""
        x, weight, mean, rstd = ctx.saved_tensors
        batch, channels, height, width = x.shape
        pixels = height * width
        block_c, block_p, warps = _map_blocks(channels)
        programs, tiles = split_rows(pixels, block_p, PROGRAMS, batch)
        dy = dy.flatten(2)
        dx = torch.empty_like(x, memory_format=torch.channels_last)
        dparam = torch.empty(batch * programs, 2, channels, dtype=torch.float32, device=x.device)
        launch(
            kernels.map_backward,
            (programs, batch, 1),
            (dy, x, weight, mean, rstd, dx, dparam),
            (*dy.stride(), *_map_strides(x), channels, tiles),
            (block_p, block_c),
            warps,
        )  # fmt: skip
        dparam = row_sum(dparam).to(weight.dtype)
        return dx, dparam[0], dparam[1], None


def _map_strides(x: Tensor) -> tuple[int, int, int, int, int, int]:
    """The kernels' sb_x, s_h, s_w, s_c, P, W: of one row, where rows follow each other evenly.

    Then whether they are as long as a multiple of 16 makes no difference, and no other kernels.
    """
    s_batch, s_channel, s_row, s_pixel = x.stride()
    width = x.shape[3]
    pixels = x.shape[2] * width
    if s_row == width * s_pixel:
        s_row, width = 0, pixels
    return s_batch, s_row, s_pixel, s_channel, pixels, width


def _map_blocks(channels: int) -> tuple[int, int, int]:
    """Channels and pixels of a tile, and warps."""
    block_c = power_of_2(channels)
    return block_c, 32 if block_c <= 256 else 16, 4 if block_c <= 512 else 8
