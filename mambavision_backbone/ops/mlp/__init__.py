"""Two linear layers with GELU in between, which keep less for the backward pass."""

from __future__ import annotations

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from ..triton_support import fusible, traced


def mlp(x: Tensor, layer: Mlp) -> Tensor:
    """``layer(x)`` of tokens (B, L, C) → same.

    In training on a GPU the hidden tokens, the largest of a block, are computed again in the
    backward pass: a fifth more products for a fifth to a quarter less memory of the whole network.
    In inference GELU overwrites them.
    """
    fc1, fc2 = layer.fc1, layer.fc2
    if not type(fc1) is type(fc2) is nn.Linear:
        return layer(x)
    if torch.is_grad_enabled():
        if fusible(x):
            from .launch import MlpFunction

            return MlpFunction.apply(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias)
    elif not (layer.training or traced()):
        return fc2(torch.ops.aten.gelu_(fc1(x)))  # the hidden tokens need no second memory
    return layer(x)
