"""Sizes, buffers and launches."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..functions import compute_dtype
from ..linear.launch import BLOCK_C, BLOCK_ROWS, PROGRAMS, WARPS
from ..row_sum.launch import row_sum
from ..sizes import ceil_div, split_rows
from ..triton_support import launch
from . import kernels


def _gelu_backward(dg: Tensor, h: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """gelu(h), the gradient of h, and in a dtype its sum over rows; all (rows, C)."""
    rows, channels = h.shape
    programs, tiles = split_rows(rows, BLOCK_ROWS, PROGRAMS)
    g, dh = torch.empty_like(h), torch.empty_like(h)
    db = torch.empty(programs, channels, dtype=torch.float32, device=h.device)
    launch(
        kernels.backward,
        (programs, ceil_div(channels, BLOCK_C), 1),
        (dg, h, dh, g, db),
        (rows, channels, tiles),
        (BLOCK_ROWS, BLOCK_C),
        WARPS,
    )
    return g, dh, row_sum(db, dtype)


class MlpFunction(torch.autograd.Function):
    """``mlp`` with gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor) -> Tensor:
        """Both layers but the last bias, in autocast's dtype where that is on."""
        dtype = compute_dtype(x)
        ctx.x_dtype, ctx.dtypes = x.dtype, [weight1.dtype, bias1.dtype, weight2.dtype]
        x, weight1, bias1, weight2 = (t.to(dtype) for t in (x, weight1, bias1, weight2))
        ctx.save_for_backward(x, weight1, bias1, weight2)
        h = torch.addmm(bias1, x.flatten(0, 1), weight1.t())
        return torch.mm(F.gelu(h), weight2.t()).view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        """Gradients of the four inputs."""
        x, weight1, bias1, weight2 = ctx.saved_tensors
        x_rows, dy_rows = x.flatten(0, 1), dy.flatten(0, 1)
        h = torch.addmm(bias1, x_rows, weight1.t())
        g, dh, dbias1 = _gelu_backward(dy_rows @ weight2, h, ctx.dtypes[1])
        grads = (dh.t() @ x_rows, dbias1, dy_rows.t() @ g)
        dx = (dh @ weight1).view_as(x).to(ctx.x_dtype)
        return dx, *(grad.to(dtype) for grad, dtype in zip(grads, ctx.dtypes, strict=True))
