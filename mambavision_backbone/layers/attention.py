"""Self-attention over the tokens of a window."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.linear import linear, product
from .windows import Crop


class Attention(nn.Module):
    """Multi-head self-attention, (B, L, C) → same, and a bias to be added or None.

    No position embedding, no mask.

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

    def forward(self, x: Tensor, keep: Crop | None = None) -> tuple[Tensor, Tensor | None]:
        """Attend within each window; with ``keep``, compute the output of the kept tokens only.

        Returns:
            The tokens, and a bias to be added to them, or None.
        """
        if keep is None:
            q, k, v = linear(x, self.qkv).chunk(3, dim=2)
        else:
            dim = x.shape[2]
            q = linear(keep(x), self.qkv, slice(dim))
            k, v = linear(x, self.qkv, slice(dim, None)).chunk(2, dim=2)
        q, k, v = self._heads(q), self._heads(k), self._heads(v)
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return product(x, self.proj)

    def _heads(self, x: Tensor) -> Tensor:
        """(B, L, C) → (B, heads, L, C/heads)."""
        return x.unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2)
