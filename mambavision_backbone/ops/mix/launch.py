"""The mixer's core by kernels and matrix products, with gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..conv_silu import launch as conv_silu
from ..functions import compute_dtype
from ..selective_scan.triton.launch import Parameters, scan, scan_backward


def forward(
    xz: Tensor,
    conv_x: Tensor,
    conv_z: Tensor,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Arguments as in ``mix``, the projections by their weights transposed, in xz's dtype.

    Returns yz, and for the backward pass step sizes of rank R with B and C (B·L, R + 2N), and the
    states between chunks.
    """
    yz = torch.empty_like(xz, memory_format=torch.contiguous_format)
    y, z = yz.chunk(2, 2)
    x = torch.empty_like(y, memory_format=torch.contiguous_format)
    conv_silu.forward(xz, conv_x, conv_z, x, z)
    odd = len(dt_proj) % 2  # then B and C follow at even addresses, as the scan wants them
    dt_BC = x.new_empty(x.shape[0] * x.shape[1], odd + x_proj.shape[1])[:, odd:]
    torch.mm(x.flatten(0, 1), x_proj, out=dt_BC)
    tokens = _tokens(x, dt_BC, dt_proj, A_log.shape[1])
    _, ends = scan(*tokens, parameters(A_log, D, dt_bias), y)
    return yz, dt_BC, ends


class MixFunction(torch.autograd.Function):
    """``mix`` with gradients; keeps xz, dt, B, C at low rank and a few states, not the rest."""

    @staticmethod
    def forward(ctx: Any, *args: Tensor) -> Tensor:
        """Arguments as in ``mix``, the projections by their weights."""
        xz, conv_x, conv_z, x_proj, dt_proj, *others = args
        dtype = compute_dtype(xz)
        ctx.dtypes = [t.dtype for t in args]
        xz, x_proj, dt_proj = xz.to(dtype), x_proj.to(dtype), dt_proj.to(dtype)
        yz, dt_BC, ends = forward(xz, conv_x, conv_z, x_proj.t(), dt_proj.t(), *others)
        ctx.save_for_backward(xz, conv_x, conv_z, x_proj, dt_proj, *others, dt_BC, ends)
        return yz

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dyz: Tensor) -> tuple[Tensor, ...]:
        """Gradients of all inputs."""
        # Products into given tensors are not autocast's, others are: no mixture of the two.
        with torch.autocast(dyz.device.type, enabled=False):
            return _backward(ctx, dyz)


def _backward(ctx: Any, dyz: Tensor) -> tuple[Tensor, ...]:
    xz, conv_x, conv_z, x_proj, dt_proj, dt_bias, A_log, D, dt_BC, ends = ctx.saved_tensors
    dy, dz = dyz.chunk(2, 2)
    x = torch.empty(dy.shape, dtype=xz.dtype, device=xz.device)
    conv_silu.forward(xz, conv_x, conv_z, x, None)
    batch, _, dim = x.shape
    rank, dstate = dt_proj.shape[1], A_log.shape[1]
    tokens = _tokens(x, dt_BC, dt_proj.t(), dstate)
    ddt_BC = torch.empty_like(dt_BC)
    dB, dC = split_BC(ddt_BC, batch, rank, dstate)
    grads = scan_backward(dy, *tokens, parameters(A_log, D, dt_bias), ends, (dB, dC))

    ddt, dx = grads.dt.view(-1, dim), grads.u.view(-1, dim)
    torch.mm(ddt, dt_proj, out=ddt_BC[:, :rank])
    dx.addmm_(ddt_BC, x_proj)
    dxz, dconv_x, dconv_z = conv_silu.backward(grads.u, dz, xz, conv_x, conv_z)
    given = (
        dxz, dconv_x, dconv_z, ddt_BC.t() @ x.view(-1, dim), ddt.t() @ dt_BC[:, :rank],
        grads.dt_bias, grads.A, grads.D,
    )  # fmt: skip
    return tuple(grad.to(dtype) for grad, dtype in zip(given, ctx.dtypes, strict=True))


def _tokens(
    x: Tensor, dt_BC: Tensor, dt_proj: Tensor, dstate: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The scan's u, dt, B and C; dt_proj (R, D)."""
    rank = len(dt_proj)
    dt = torch.mm(dt_BC[:, :rank], dt_proj).view(x.shape)
    return x, dt, *split_BC(dt_BC, len(x), rank, dstate)


def split_BC(dt_BC: Tensor, batch: int, rank: int, dstate: int) -> tuple[Tensor, Tensor]:
    """B and C (batch, L, N) beside step sizes of a rank, (batch·L, R + 2N); or their gradients."""
    _, B, C = dt_BC.view(batch, -1, dt_BC.shape[1]).split([rank, dstate, dstate], 2)
    return B, C


def parameters(A_log: Tensor, D: Tensor, dt_bias: Tensor) -> Parameters:
    """Those of the mixer's scan; the bias is dt's projection's and once more the scan's."""
    return Parameters(A_log, D, dt_bias, log_A=True, biases=2)
