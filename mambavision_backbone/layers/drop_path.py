"""Stochastic depth: which residual branches a pass in training skips."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops.sizes import ceil_div


def drop_factors(rates: Sequence[float], x: Tensor) -> list[Tensor | None]:
    """Factors of residual branches on x, drawn together: few kernels, not some for each branch.

    Source: arXiv 1603.09382.

    Args:
        rates: of each branch, the probability of skipping it, below 1.
        x: (B, …), in whose dtype and on whose device the factors are.

    Returns:
        For each branch (B, 1, …): 0 with its probability, else 1/(1 - it); None where that is 0.
    """
    drawn = [rate for rate in rates if rate]
    if not drawn:
        return [None] * len(rates)
    dtype = torch.promote_types(x.dtype, torch.float32)
    batch = len(x)
    padded = ceil_div(batch, 8) * 8  # rows aligned to 16 bytes, else Triton compiles for either
    draws = torch.rand(len(drawn), padded, dtype=dtype, device=x.device)
    rows = draws.unbind()
    torch._foreach_sub_(rows, drawn)
    torch._foreach_ceil_(rows)
    torch._foreach_div_(rows, [1 - rate for rate in drawn])
    draws = draws.to(x.dtype)[:, :batch]
    factors = iter(draws.view(*draws.shape, *(1,) * (x.dim() - 1)).unbind())
    return [next(factors) if rate else None for rate in rates]
