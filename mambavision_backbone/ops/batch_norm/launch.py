"""Sizes, buffers and launches of the kernels."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..sizes import ceil_div, split_rows
from ..triton_support import launch
from . import kernels

BLOCK_CHANNELS, BLOCK_PARTS = 32, 32
PROGRAMS = 528  # at most: four on each multiprocessor of a large GPU


class _Tiles(NamedTuple):
    """Rows and warps of a program, and how many programs sum up at most."""

    rows: int
    warps: int
    parts: int


FORWARD, BACKWARD = _Tiles(128, 8, 264), _Tiles(64, 4, 528)


class Running(NamedTuple):
    """Statistics of the images seen so far, and the share of new ones; None where not tracked."""

    mean: Tensor | None
    var: Tensor | None
    batches: Tensor | None
    share: float


class BatchNormFunction(torch.autograd.Function):
    """Batch norm in training with what follows it; keeps its input and computes the rest again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        conv_bias: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        stream: Tensor | None,
        factor: Tensor | None,
        act: str,
        eps: float,
        running: Running,
    ) -> Tensor:
        """``act(norm(x))`` of channels-last x (B, C, H, W); to a stream add ``factor`` times that.

        Updates the running statistics, whose mean is that of x with the bias, which x lacks.
        """
        dtype = x.dtype if stream is None else torch.promote_types(x.dtype, stream.dtype)
        y = torch.empty_like(x, dtype=dtype)
        channels = x.shape[1]
        stats = torch.empty(2, channels, dtype=torch.float32, device=x.device)
        rows, pixels, columns = _sizes(x)
        block, warps, most = FORWARD
        programs, tiles = _split(rows, columns, block, most)
        parts = torch.empty(programs, 2, channels, dtype=torch.float32, device=x.device)
        launch(
            kernels.statistics,
            (programs, columns, 1),
            (x, parts),
            (rows, channels, tiles),
            (block, BLOCK_CHANNELS),
            warps,
        )
        given = [t is not None for t in (stream, factor, conv_bias, running.mean, running.batches)]
        grid, tiles = _split(rows, columns, block, PROGRAMS)
        launch(
            kernels.forward,
            (grid, columns, 1),
            (x, parts, weight, bias, stream, factor, conv_bias, y, stats, *running[:3]),
            (rows, pixels, channels, tiles, programs, float(eps), float(running.share)),
            (act, *given, block, BLOCK_CHANNELS, BLOCK_PARTS),
            warps,
        )
        ctx.save_for_backward(x, weight, bias, factor, stats)
        ctx.act, ctx.stream_dtype = act, None if stream is None else stream.dtype
        ctx.conv_bias_dtype = None if conv_bias is None else conv_bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, conv_bias (zeros), weight, bias and stream."""
        x, weight, bias, factor, stats = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last)
        channels = x.shape[1]
        dx = torch.empty_like(x)
        dparam = torch.empty(2, channels, dtype=torch.float32, device=x.device)
        dtype = ctx.conv_bias_dtype
        dconv_bias = None if dtype is None else torch.empty(channels, dtype=dtype, device=x.device)
        rows, pixels, columns = _sizes(x)
        block, warps, most = BACKWARD
        programs, tiles = _split(rows, columns, block, most)
        parts = torch.empty(programs, 2, channels, dtype=torch.float32, device=x.device)
        given = dy, x, stats, weight, bias, factor, parts
        options = ctx.act, factor is not None
        launch(
            kernels.gradient_sums,
            (programs, columns, 1),
            given,
            (rows, pixels, channels, tiles),
            (*options, block, BLOCK_CHANNELS),
            warps,
        )
        grid, tiles = _split(rows, columns, block, PROGRAMS)
        launch(
            kernels.backward,
            (grid, columns, 1),
            (*given, dx, dparam, dconv_bias),
            (rows, pixels, channels, tiles, programs),
            (*options, dtype is not None, block, BLOCK_CHANNELS, BLOCK_PARTS),
            warps,
        )
        dweight, dbias = dparam.to(weight.dtype).unbind()
        dstream = None if ctx.stream_dtype is None else dy.to(ctx.stream_dtype)
        return dx, dconv_bias, dweight, dbias, dstream, None, None, None, None


def _sizes(x: Tensor) -> tuple[int, int, int]:
    """Rows of all images, rows of one, and blocks of channels."""
    batch, channels, height, width = x.shape
    pixels = height * width
    return batch * pixels, pixels, ceil_div(channels, BLOCK_CHANNELS)


def _split(rows: int, columns: int, block: int, programs: int) -> tuple[int, int]:
    """Programs for each block of channels, of so many in all at most, and tiles for each."""
    return split_rows(rows, block, max(1, programs // columns))
