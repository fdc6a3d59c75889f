"""Sums of parts, one after the other or several at once."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import relative_error

pytest.importorskip("triton")

from mambavision_backbone.ops.row_sum import launch as row_sum
from mambavision_backbone.ops.triton_support import Launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(1, 1), (3, 5), (256, 16), (257, 17), (600, 3, 40)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    parts = torch.randn(shape, device=DEVICE)
    total = row_sum.row_sum(parts, dtype)
    exact = parts.double().sum(0)
    assert total.dtype == dtype
    assert total.shape == exact.shape
    assert relative_error(total, exact) < torch.finfo(dtype).eps + 1e-6


@pytest.mark.parametrize("count", [2, 5, 8])
def test_several_at_once_are_the_same(count: int) -> None:
    starts, tensors, alone = [], [], []
    for i in range(count):
        parts = torch.randn(SHAPES[i % len(SHAPES)], device=DEVICE)
        alone.append(row_sum.row_sum(parts))
        tensors.append((parts, torch.full_like(alone[-1], torch.nan)))
        columns = alone[-1].numel()
        grid = (-(-columns // row_sum.BLOCK_COLUMNS), 1, 1)
        starts.append(Launch(row_sum.kernels.row_sum, grid, (len(parts), columns), (), 1))
    launch, arguments = row_sum.merge_launches(starts, tensors)
    launch(*arguments)
    for (_, total), wanted in zip(tensors, alone, strict=True):
        assert torch.equal(total, wanted)
