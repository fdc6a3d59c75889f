"""Norms of the returned feature maps."""

from __future__ import annotations

from torch import Tensor, nn

from ..ops.layer_norm import map_norm

OUT_NORMS = ("LN", "BN", "none")


class MapNorm(nn.LayerNorm):
    """Layer norm over the channels of maps, (B, C, H, W) of any layout → contiguous."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise every pixel."""
        return map_norm(x, self)


def build_out_norm(kind: str, channels: int) -> nn.Module:
    """Norm of one (B, C, H, W) feature map.

    Args:
        kind: ``LN`` (over channels, eps 1e-5, as published), ``BN`` or ``none``.
        channels: C.

    Raises:
        ValueError: another kind.
    """
    if kind == "LN":
        return MapNorm(channels, eps=1e-5)
    if kind == "BN":
        return nn.BatchNorm2d(channels)
    if kind == "none":
        return nn.Identity()
    raise ValueError(f"unknown out_norm {kind!r}: choose one of {', '.join(OUT_NORMS)}")
