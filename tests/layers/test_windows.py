"""Windows: a pure pair, in both modes, at any size."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mambavision_backbone.layers.windows import merge, partition, window_grid

SIZES = [(1, 1), (1, 7), (8, 8), (9, 8), (16, 24), (13, 5), (3, 31)]


@pytest.mark.parametrize("mode", ["pad", "fit"])
@pytest.mark.parametrize("hw", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_merge_inverts_partition(mode: str, hw: tuple[int, int], channels_last: bool) -> None:
    x = torch.randn(2, 3, *hw)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    tokens, grid = partition(x, 8, mode)
    assert tokens.shape == (2 * grid.counts[0] * grid.counts[1], grid.size[0] * grid.size[1], 3)
    assert torch.equal(merge(tokens, grid), x)


def test_pad_mode_pads_bottom_and_right_to_multiples() -> None:
    grid = window_grid((50, 84), 112, "pad")
    assert (grid.counts, grid.size, grid.pad_hw) == ((1, 1), (112, 112), (62, 28))
    x = torch.randn(1, 2, 5, 7)
    tokens, _ = partition(x, 4, "pad")
    padded = F.pad(x, (0, 1, 0, 3))
    second = padded[0, :, :4, 4:8].flatten(1).t()  # raster order of windows and in them
    assert torch.equal(tokens[1], second)


def test_fit_mode_has_no_padding_where_a_window_covers_the_map() -> None:
    grid = window_grid((50, 84), 112, "fit")
    assert (grid.counts, grid.size, grid.pad_hw) == ((1, 1), (50, 84), (0, 0))


@pytest.mark.parametrize("size", range(1, 60))
def test_fit_mode_wastes_fewer_rows_than_windows(size: int) -> None:
    grid = window_grid((size, size), 7, "fit")
    assert grid.counts == window_grid((size, size), 7, "pad").counts
    assert grid.size[0] <= 7
    assert 0 <= grid.pad_hw[0] < grid.counts[0]
