"""Residual blocks: convolutions on maps, mixers on the tokens of windows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from ..ops.batch_norm import conv_norm
from ..ops.layer_norm import add, add_norm, norm
from ..ops.mlp import mlp
from .windows import Crop


class ConvBlock(nn.Module):
    """Residual block of the first two stages, (B, C, H, W) → same.

    ``x + drop_path(gamma * BN(conv(GELU(BN(conv(x))))))``

    Args:
        dim: C.
        drop_path: probability of skipping the branch, per sample.
        layer_scale: initial value of gamma, or None for no gamma.
    """

    def __init__(self, dim: int, drop_path: float, layer_scale: float | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, 1, 1)
        self.norm1 = nn.BatchNorm2d(dim, eps=1e-5)
        self.act1 = nn.GELU(approximate="tanh")
        self.conv2 = nn.Conv2d(dim, dim, 3, 1, 1)
        self.norm2 = nn.BatchNorm2d(dim, eps=1e-5)
        self.gamma = _gamma(dim, layer_scale)
        self.drop_path_rate = drop_path

    def forward(self, x: Tensor, factor: Tensor | None = None) -> Tensor:
        """Apply the block; ``factor`` is drop path's."""
        y = conv_norm(x, self.conv1, self.norm1, self.act1)
        if self.gamma is None:
            return conv_norm(y, self.conv2, self.norm2, stream=x, factor=factor)
        return add(x, conv_norm(y, self.conv2, self.norm2), self.gamma.view(-1, 1, 1), factor)


class Branch(NamedTuple):
    """A residual branch: its output, and bias, layer scale and factors of drop path, or None."""

    y: Tensor
    bias: Tensor | None
    gamma: Tensor | None
    factor: Tensor | None

    def add_to(self, x: Tensor) -> Tensor:
        """Return ``x + factor * gamma * (y + bias)``."""
        return add(x, self.y, self.gamma, self.factor, self.bias)

    def add_norm_to(self, x: Tensor, layer: nn.LayerNorm) -> tuple[Tensor, Tensor]:
        """The same, and its norm."""
        return add_norm(x, self.y, layer, self.gamma, self.factor, self.bias)


class TokenBlock(nn.Module):
    """Residual block of the last two stages, (B·windows, L, C) → same.

    ``x + drop_path(gamma_1 * mixer(LN(x)))``, then the same with an MLP.

    Args:
        dim: C.
        mixer: module on (B·windows, L, C) that takes ``keep`` as the block does and returns tokens
            and a bias that is still to be added to them, or None.
        mlp_ratio: hidden width of the MLP over C.
        drop_path: probability of skipping a branch, per window.
        layer_scale: initial value of gamma_1 and gamma_2, or None for no gammas.
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        mlp_ratio: float,
        drop_path: float,
        layer_scale: float | None,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-5)
        self.mixer = mixer
        self.drop_path_rate = drop_path
        self.norm2 = nn.LayerNorm(dim, eps=1e-5)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.gamma_1 = _gamma(dim, layer_scale)
        self.gamma_2 = _gamma(dim, layer_scale)

    def forward(
        self,
        x: Tensor,
        branch: Branch | None = None,
        keep: Crop | None = None,
        factors: Sequence[Tensor | None] = (None, None),
    ) -> tuple[Tensor, Branch]:
        """Apply the block, up to the last sum: that is fused with the next block's first norm.

        Args:
            x: the stream.
            branch: what the block before left to be added to it.
            keep: return the kept tokens only.
            factors: drop path's, of both branches.

        Returns:
            The stream, and what is to be added to it.
        """
        if branch is None:
            y = norm(x, self.norm1)
        else:
            x, y = branch.add_norm_to(x, self.norm1)
        y, bias = self.mixer(y, keep)
        x = x if keep is None else keep(x)
        x, y = Branch(y, bias, self.gamma_1, factors[0]).add_norm_to(x, self.norm2)
        y, bias = mlp(y, self.mlp)
        return x, Branch(y, bias, self.gamma_2, factors[1])


def _gamma(dim: int, init: float | None) -> nn.Parameter | None:
    return None if init is None else nn.Parameter(torch.full((dim,), float(init)))
