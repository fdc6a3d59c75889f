"""Sizes, buffers and launches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ..sizes import ceil_div
from ..triton_support import Launch, launch
from . import kernels

BLOCK_ROWS, BLOCK_COLUMNS, WARPS = 256, 16, 8
MANY = 8  # at once, at most

T = TypeVar("T")


def row_sum(parts: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The sum of contiguous parts (P, …) → (…), added up in float32."""
    total = torch.empty(parts.shape[1:], dtype=dtype, device=parts.device)
    rows, columns = len(parts), total.numel()
    launch(
        kernels.row_sum,
        (ceil_div(columns, BLOCK_COLUMNS), 1, 1),
        (parts, total),
        (rows, columns),
        (BLOCK_ROWS, BLOCK_COLUMNS),
        WARPS,
    )
    return total


def is_row_sum(start: Launch) -> bool:
    """Whether a launch is one of ``row_sum``."""
    return start.kernel is kernels.row_sum


def merge_launches(
    starts: Sequence[Launch], tensors: Sequence[Sequence[T]]
) -> tuple[Launch, list[T]]:
    """Launches of ``row_sum`` as one with the same results, and its tensors.

    Args:
        starts: up to ``MANY``, of the same dtypes.
        tensors: parts and total of each.
    """
    count = len(starts)
    numbers = [start.numbers for start in starts] + [(0, 0)] * (MANY - count)
    pairs = [*tensors, *[tensors[0]] * (MANY - count)]
    columns = max(start.grid[0] for start in starts)
    merged = Launch(
        kernels.eight_row_sums,
        (columns, count, 1),
        (*(rows for rows, _ in numbers), *(columns for _, columns in numbers)),
        (BLOCK_ROWS, BLOCK_COLUMNS),
        WARPS,
    )
    return merged, [*(parts for parts, _ in pairs), *(total for _, total in pairs)]
