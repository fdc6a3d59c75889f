"""What a MambaVision mixer does between its first and its last projection."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..conv_silu import conv_silu
from ..functions import call
from ..linear import linear
from ..plain import plain
from ..selective_scan import choose_backend, selective_scan
from ..triton_support import fusible


def mix(
    xz: Tensor,
    conv_x: Tensor,
    conv_z: Tensor,
    x_proj: nn.Linear,
    dt_proj: nn.Linear,
    A_log: Tensor,
    D: Tensor,
    backend: str,
) -> Tensor:
    """Both branches through their convolutions, and the first through its selective scan.

    On a GPU where the scan is Triton's, one step for autograd; elsewhere, and for compilers and
    exporters, the operators one by one. Source: arXiv 2407.08083, section 3.2.

    Args:
        xz: (B, L, 2D) tokens of two branches.
        conv_x: (D, 1, 3) taps of the first branch.
        conv_z: (D, 1, 3) taps of the second.
        x_proj: D → R + 2N: step sizes of rank R, input and output projections of the scan.
        dt_proj: R → D, with a bias.
        A_log: (D, N) logarithms of the decay rates.
        D: (D,) skip of the scan.
        backend: the scan's; see ``ops.selective_scan``.

    Returns:
        (B, L, 2D): the scanned branch, then the other.
    """
    fused = plain(x_proj, nn.Linear) and x_proj.bias is None and plain(dt_proj, nn.Linear)
    if fused and fusible(xz) and choose_backend(backend, xz, A_log) == "triton":
        from .launch import MixFunction

        weights = (x_proj.weight, dt_proj.weight, dt_proj.bias)
        return call(MixFunction, xz, conv_x, conv_z, *weights, A_log, D)
    x, z = conv_silu(xz, conv_x, conv_z)
    dstate = A_log.shape[1]
    dt, B, C = x_proj(x).split([dt_proj.in_features, dstate, dstate], dim=2)
    A = -torch.exp(A_log.float())
    # The published model adds dt_proj.bias in the projection and again in the scan; its weights
    # depend on that.
    y = selective_scan(x, linear(dt, dt_proj), A, B, C, D, dt_proj.bias, backend=backend)
    return torch.cat([y, z], dim=2)
