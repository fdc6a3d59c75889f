"""A stage: blocks on a map or on its windows, and the downsampling that follows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..ops.sizes import ceil_div
from .attention import Attention
from .blocks import ConvBlock, TokenBlock
from .drop_path import drop_factors
from .mixer import MambaVisionMixer
from .stem import Downsample
from .windows import merge, partition


class _Stage(nn.Module):
    """Blocks and, unless it is the last stage, a ``downsample`` that the backbone calls.

    The returned features are taken between the two, hence they are separate calls.
    """

    def __init__(self, blocks: Sequence[nn.Module], dim: int, downsample: bool, with_cp: bool):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = Downsample(dim) if downsample else None
        self.with_cp = with_cp

    def _drop_path_rates(self) -> list[float]:
        """The blocks', in their modes; 0 of those that know no drop path."""
        return [getattr(b, "drop_path_rate", 0.0) if b.training else 0.0 for b in self.blocks]

    def _run(self, block: nn.Module, *args: Any) -> Any:
        if self.with_cp and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)


class ConvStage(_Stage):
    """Stages 1 and 2, (B, C, H, W) → same.

    Args:
        dim: C.
        drop_paths: one probability a block; their number is the stage's depth.
        layer_scale: initial gamma of the blocks, or None.
        with_cp: recompute the blocks in the backward pass to save memory.
    """

    def __init__(
        self, dim: int, drop_paths: Sequence[float], layer_scale: float | None, with_cp: bool
    ) -> None:
        blocks = [ConvBlock(dim, p, layer_scale) for p in drop_paths]
        super().__init__(blocks, dim, downsample=True, with_cp=with_cp)

    def forward(self, x: Tensor) -> Tensor:
        """Run the blocks."""
        factors = drop_factors(self._drop_path_rates(), x)
        for block, factor in zip(self.blocks, factors, strict=True):
            x = self._run(block, x) if factor is None else self._run(block, x, factor)
        return x


class TokenStage(_Stage):
    """Stages 3 and 4, (B, C, H, W) → same: windows once, then all blocks, then the map again.

    The first ⌈depth/2⌉ blocks have a MambaVision mixer, the others self-attention.

    Args:
        dim: C.
        drop_paths: one probability a block; their number is the stage's depth.
        num_heads: attention heads.
        window_size: side of a window.
        window_mode: ``pad`` or ``fit``, see ``windows``.
        mlp_ratio: hidden width of the MLPs over C.
        layer_scale: initial gammas of the blocks, or None.
        scan_backend: see ``ops.selective_scan``.
        downsample: whether a stage follows.
        with_cp: recompute the blocks in the backward pass to save memory.
    """

    def __init__(
        self,
        dim: int,
        drop_paths: Sequence[float],
        num_heads: int,
        window_size: int,
        window_mode: str,
        mlp_ratio: float,
        layer_scale: float | None,
        scan_backend: str,
        downsample: bool,
        with_cp: bool,
    ) -> None:
        mixers = ceil_div(len(drop_paths), 2)
        blocks = [
            TokenBlock(
                dim,
                MambaVisionMixer(dim, scan_backend) if i < mixers else Attention(dim, num_heads),
                mlp_ratio,
                p,
                layer_scale,
            )
            for i, p in enumerate(drop_paths)
        ]
        super().__init__(blocks, dim, downsample, with_cp)
        self.window_size = window_size
        self.window_mode = window_mode

    def forward(self, x: Tensor) -> Tensor:
        """Cut into windows, run the blocks, put back."""
        tokens, grid = partition(x, self.window_size, self.window_mode)
        keep, grid = grid.crop()  # nobody reads what the last block makes of padding
        *others, last = self.blocks
        depth = len(self.blocks)
        factors = drop_factors(2 * self._drop_path_rates(), tokens)
        pairs = list(zip(factors[:depth], factors[depth:], strict=True))  # of a block's branches
        branch = None
        for block, pair in zip(others, pairs[:-1], strict=True):
            tokens, branch = self._run(block, tokens, branch, None, pair)
        tokens, branch = self._run(last, tokens, branch, keep, pairs[-1])
        return merge(branch.add_to(tokens), grid)
