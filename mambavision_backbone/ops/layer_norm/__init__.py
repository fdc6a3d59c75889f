"""Residual sums, and layer norms: of tokens, of tokens after a residual sum, and of maps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functions import call, compute_dtype
from ..plain import plain
from ..triton_support import fusible


def norm(x: Tensor, layer: nn.LayerNorm) -> Tensor:
    """``layer(x)`` of tokens (B, L, C), in one pass and x's dtype on a GPU.

    PyTorch's operator elsewhere, and for compilers and exporters.
    """
    if _usual(layer) and fusible(x):
        from .launch import NormFunction

        return call(NormFunction, x, layer.weight, layer.bias, layer.eps)
    return layer(x)


def add_norm(
    x: Tensor,
    y: Tensor,
    layer: nn.LayerNorm,
    gamma: Tensor | None,
    factor: Tensor | None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum of a residual branch and the layer norm of the sum, in one pass on a GPU.

    Args:
        x: (B, L, C) the stream.
        y: (B, L, C) what the branch adds to it.
        layer: the norm over C.
        gamma: (C,) layer scale of y, or None.
        factor: (B, 1, 1) factors of drop path, or None.
        bias: (C,) bias of y that is still to be added, or None.

    Returns:
        ``x + factor * gamma * (y + bias)`` and the norm of it, (B, L, C) each.
    """
    if _usual(layer) and fusible(x):
        from .launch import AddNormFunction

        return call(AddNormFunction, x, y, bias, gamma, factor, layer.weight, layer.bias, layer.eps)
    total = add(x, y, gamma, factor, bias)
    return total, layer(total)


def map_norm(x: Tensor, layer: nn.LayerNorm) -> Tensor:
    """Layer norm over C of maps (B, C, H, W) of any layout, in one pass on a GPU.

    Returns:
        A contiguous map of the same shape, in autocast's dtype where that is on.
    """
    if fusible(x):
        from .launch import MapNormFunction

        return call(MapNormFunction, x, layer.weight, layer.bias, layer.eps)
    pixels = x.permute(0, 2, 3, 1).flatten(1, 2)
    y = F.layer_norm(pixels, layer.normalized_shape, layer.weight, layer.bias, layer.eps)
    return y.to(compute_dtype(x)).transpose(1, 2).contiguous().view_as(x)


def add(
    x: Tensor,
    y: Tensor,
    gamma: Tensor | None,
    factor: Tensor | None,
    bias: Tensor | None = None,
) -> Tensor:
    """``x + factor * gamma * (y + bias)``; arguments as in :func:`add_norm`, or maps.

    Of tokens in one pass on a GPU.
    """
    if x.dim() == 3 and any(t is not None for t in (gamma, factor, bias)) and fusible(x):
        from .launch import AddFunction

        return call(AddFunction, x, y, bias, gamma, factor)
    if bias is not None:
        y = y + bias.to(y.dtype)
    if gamma is not None:
        y = y * gamma
    return x + y if factor is None else torch.addcmul(x, y, factor)


def _usual(layer: nn.LayerNorm) -> bool:
    """Whether a layer is a norm with weight and bias, and nothing else."""
    return plain(layer, nn.LayerNorm) and layer.weight is not None and layer.bias is not None
