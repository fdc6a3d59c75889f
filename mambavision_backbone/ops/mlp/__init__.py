"""Two linear layers with GELU in between, which keep less for the backward pass."""

from __future__ import annotations

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from ..linear import product
from ..plain import plain
from ..triton_support import fusible, traced


def mlp(x: Tensor, layer: Mlp) -> tuple[Tensor, Tensor | None]:
    """``layer(x)`` of tokens (B, L, C), in two parts as of ``ops.linear.product``.

    In training on a GPU the hidden tokens, the largest of a block, are computed again in the
    backward pass: a fifth more products for a fifth to a quarter less memory of the whole network.
    In inference GELU overwrites them; in half precision on a GPU it is cuBLAS's, by its tanh form,
    which differs by less than a rounding.
    """
    fc1, fc2 = layer.fc1, layer.fc2
    if not (plain(fc1, nn.Linear) and plain(fc2, nn.Linear) and _with_gelu(layer)):
        return layer(x), None
    if torch.is_grad_enabled():
        if fusible(x):
            from .launch import MlpFunction

            return MlpFunction.apply(x, fc1.weight, fc1.bias, fc2.weight), fc2.bias
    elif not (layer.training or traced()):
        if fusible(x) and x.dtype == fc1.weight.dtype != torch.float32:
            rows = torch._addmm_activation(fc1.bias, x.flatten(0, 1), fc1.weight.t(), use_gelu=True)
            return product(rows.view(*x.shape[:2], -1), fc2)
        return product(torch.ops.aten.gelu_(fc1(x)), fc2)  # hidden tokens need no second memory
    return layer(x), None


def _with_gelu(layer: Mlp) -> bool:
    """Whether there is GELU between a layer's products, and nothing else."""
    drops = layer.drop1, layer.drop2
    return (
        plain(layer, Mlp)
        and layer.fc1.bias is not None
        and plain(layer.act, nn.GELU)
        and layer.act.approximate == "none"
        and plain(layer.norm, nn.Identity)
        and all(plain(drop, nn.Dropout) and not (drop.p and drop.training) for drop in drops)
    )
