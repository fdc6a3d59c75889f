"""Residual blocks: convolutions on maps, mixers on the tokens of windows."""

from __future__ import annotations

import torch
from timm.layers import DropPath, Mlp
from torch import Tensor, nn

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
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        y = self.act1(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        if self.gamma is not None:
            y = y * self.gamma.view(1, -1, 1, 1)
        return x + self.drop_path(y)


class TokenBlock(nn.Module):
    """Residual block of the last two stages, (B·windows, L, C) → same.

    ``x + drop_path(gamma_1 * mixer(LN(x)))``, then the same with an MLP.

    Args:
        dim: C.
        mixer: module on (B·windows, L, C); takes ``keep`` as the block does.
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
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=1e-5)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.gamma_1 = _gamma(dim, layer_scale)
        self.gamma_2 = _gamma(dim, layer_scale)

    def forward(self, x: Tensor, keep: Crop | None = None) -> Tensor:
        """Apply the block; with ``keep``, return the kept tokens only."""
        y = self.drop_path(_scale(self.mixer(self.norm1(x), keep), self.gamma_1))
        x = (x if keep is None else keep(x)) + y
        return x + self.drop_path(_scale(self.mlp(self.norm2(x)), self.gamma_2))


def _gamma(dim: int, init: float | None) -> nn.Parameter | None:
    return None if init is None else nn.Parameter(torch.full((dim,), float(init)))


def _scale(y: Tensor, gamma: Tensor | None) -> Tensor:
    return y if gamma is None else y * gamma
