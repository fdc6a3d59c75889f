"""Self-attention over the tokens of a window."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .windows import Crop


class Attention(nn.Module):
    """Multi-head self-attention, (B, L, C) → (B, L, C); no position embedding, no mask.

    Args:
        dim: C.
        num_heads: heads; divides C.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, keep: Crop | None = None) -> Tensor:
        """Attend within each window; with ``keep``, compute the output of the kept tokens only."""
        if keep is None:
            q, k, v = self._heads(x, slice(None), 3)
        else:
            dim = x.shape[2]
            (q,) = self._heads(keep(x), slice(dim), 1)
            k, v = self._heads(x, slice(dim, None), 2)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor, rows: slice, parts: int) -> tuple[Tensor, ...]:
        """(B, L, C) → ``parts`` tensors (B, heads, L, C/heads), by some rows of the projection."""
        x = F.linear(x, self.qkv.weight[rows], self.qkv.bias[rows])
        return x.unflatten(2, (parts, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
