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
        self.head_dim = dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, keep: Crop | None = None) -> Tensor:
        """Attend within each window; with ``keep``, compute the output of the kept tokens only."""
        if keep is None:
            q, k, v = self._heads(self.qkv(x))
        else:
            dim = x.shape[2]
            weight, bias = self.qkv.weight, self.qkv.bias
            (q,) = self._heads(F.linear(keep(x), weight[:dim], bias[:dim]))
            k, v = self._heads(F.linear(x, weight[dim:], bias[dim:]))
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, L, parts·C) → for each part (B, heads, L, C/heads)."""
        x = x.unflatten(2, (-1, self.num_heads, self.head_dim))
        return x.permute(2, 0, 3, 1, 4).unbind(0)
