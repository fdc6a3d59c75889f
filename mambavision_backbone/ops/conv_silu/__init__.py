"""Depthwise convolution of width 3 with SiLU, of both branches of a mixer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..functions import call
from ..triton_support import fusible


def conv_silu(xz: Tensor, weight_x: Tensor, weight_z: Tensor) -> tuple[Tensor, Tensor]:
    """Convolve each channel over its sequence, zeros beyond the ends, then apply SiLU.

    One Triton kernel forward and one backward on a GPU; PyTorch's operators elsewhere, and for
    compilers and exporters.

    Args:
        xz: (B, L, 2D) tokens of two branches.
        weight_x: (D, 1, 3) taps of the first D channels, as of ``nn.Conv1d``.
        weight_z: (D, 1, 3) taps of the others.

    Returns:
        The branches, (B, L, D) each, in xz's dtype.
    """
    if fusible(xz):
        from .launch import ConvSiLUFunction

        return call(ConvSiLUFunction, xz, weight_x, weight_z)
    before, here, behind = torch.cat([weight_x, weight_z])[:, 0].unbind(1)
    padded = F.pad(xz, (0, 0, 1, 1))
    y = torch.addcmul(padded[:, :-2] * before, xz, here)
    y = F.silu(torch.addcmul(y, padded[:, 2:], behind)).to(xz.dtype)
    x, z = y.chunk(2, dim=2)
    return x, z
