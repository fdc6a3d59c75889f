"""The stem and the downsampling between stages: where the map shrinks."""

from __future__ import annotations

from torch import Tensor, nn

from ..ops.batch_norm import conv_norm
from ..ops.plain import plain


class PatchEmbed(nn.Module):
    """(B, in_channels, H, W) → (B, dim, ⌈H/4⌉, ⌈W/4⌉) by two strided 3×3 convolutions.

    Args:
        in_channels: channels of the image.
        in_dim: channels in between.
        dim: channels of the first stage.
    """

    def __init__(self, in_channels: int, in_dim: int, dim: int) -> None:
        super().__init__()
        self.conv_down = nn.Sequential(
            nn.Conv2d(in_channels, in_dim, 3, 2, 1, bias=False),
            nn.BatchNorm2d(in_dim, eps=1e-4),
            nn.ReLU(),
            nn.Conv2d(in_dim, dim, 3, 2, 1, bias=False),
            nn.BatchNorm2d(dim, eps=1e-4),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Embed the image."""
        layers = self.conv_down
        if not plain(layers, nn.Sequential) or len(layers) != 6:
            return layers(x)
        conv1, norm1, act1, conv2, norm2, act2 = layers
        return conv_norm(conv_norm(x, conv1, norm1, act1), conv2, norm2, act2)


class Downsample(nn.Module):
    """(B, C, H, W) → (B, 2C, ⌈H/2⌉, ⌈W/2⌉) by one strided 3×3 convolution.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduction = nn.Sequential(
            nn.Conv2d(channels, 2 * channels, 3, 2, 1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Halve the map."""
        return self.reduction(x)
