"""What follows a convolution whose batch norm is folded: bias, activation, residual sum."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..triton_support import fusible


def bias_act(y: Tensor, bias: Tensor, act: str, x: Tensor | None = None) -> Tensor:
    """``act(y + bias)``, plus x; for inference only, and y may be overwritten.

    One Triton kernel for channels-last maps on a GPU, PyTorch's operators elsewhere.

    Args:
        y: (B, C, H, W) output of a convolution.
        bias: (C,).
        act: ``none``, ``relu`` or ``gelu_tanh``.
        x: (B, C, H, W), or None.
    """
    layout = torch.channels_last
    if (
        fusible(y)
        and y.is_contiguous(memory_format=layout)
        and (x is None or x.is_contiguous(memory_format=layout))
    ):
        from .launch import bias_act_

        return bias_act_(y, bias, act, x)
    y = y + bias.view(-1, 1, 1)
    if act == "relu":
        y = F.relu(y)
    elif act == "gelu_tanh":
        y = F.gelu(y, approximate="tanh")
    return y if x is None else x + y
