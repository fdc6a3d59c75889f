"""A convolution and the batch norm that follows it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .triton_support import fusible


class _Without(torch.autograd.Function):
    """y as it is, and a gradient of zero for a bias that it does not depend on."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(bias)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        (bias,) = ctx.saved_tensors
        return dy, torch.zeros_like(bias)


def conv_norm(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    """``norm(conv(x))``, (B, C, H, W).

    A batch norm in training mode takes the mean away, and with it the convolution's bias: on a GPU
    the bias is neither added nor differentiated, only its share in the running mean is kept. Its
    gradient is zero, as it is otherwise but for rounding.
    """
    share = norm.momentum
    if conv.bias is None or not norm.training or share in (None, 1) or not fusible(x):
        return norm(conv(x))
    y = F.conv2d(x, conv.weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)
    if norm.running_mean is not None:
        # Before the norm, which keeps 1 - share of this. By .data, as batch norm's own update is:
        # an earlier forward's backward pass checks that the version is the same.
        norm.running_mean.data.add_(conv.bias.data, alpha=share / (1 - share))
    return norm(_Without.apply(y, conv.bias))
