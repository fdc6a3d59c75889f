"""Windows: a pure pair, in both modes, at any size."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mambavision_backbone.layers.attention import Attention
from mambavision_backbone.layers.blocks import TokenBlock
from mambavision_backbone.layers.mixer import MambaVisionMixer
from mambavision_backbone.layers.windows import Crop, merge, partition, window_grid

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


def test_other_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown window_mode 'same'"):
        window_grid((50, 84), 112, "same")


@pytest.mark.parametrize("size", range(1, 60))
def test_fit_mode_wastes_fewer_rows_than_windows(size: int) -> None:
    grid = window_grid((size, size), 7, "fit")
    assert grid.counts == window_grid((size, size), 7, "pad").counts
    assert grid.size[0] <= 7
    assert 0 <= grid.pad_hw[0] < grid.counts[0]


@pytest.mark.parametrize(
    ("hw", "kept"),
    [((5, 7), (5, 7)), ((9, 7), (8, 7)), ((5, 9), (5, 8)), ((9, 9), None), ((8, 8), None)],
)
def test_crop_drops_padding_that_all_windows_share(
    hw: tuple[int, int], kept: tuple[int, int] | None
) -> None:
    x = torch.randn(2, 3, *hw)
    tokens, grid = partition(x, 8, "pad")
    crop, cropped = grid.crop()
    assert (None if crop is None else crop.kept) == kept
    assert torch.equal(merge(tokens if crop is None else crop(tokens), cropped), x)


@pytest.mark.parametrize("mixer", [MambaVisionMixer(16), Attention(16, 2)], ids=["scan", "attn"])
def test_a_block_that_keeps_some_tokens_computes_what_the_whole_block_does(
    mixer: nn.Module,
) -> None:
    block = TokenBlock(16, mixer, 2.0, 0.0, 0.5).double()
    keep = Crop((4, 6), (3, 5))
    x = torch.randn(2, 24, 16, dtype=torch.float64, requires_grad=True)
    out, branch = block(x, keep=keep)
    whole, whole_branch = block(x)
    out, wanted = branch.add_to(out), keep(whole_branch.add_to(whole))
    torch.testing.assert_close(out, wanted)
    dy = torch.randn_like(out)
    inputs = (x, *block.parameters())
    grads = torch.autograd.grad(out, inputs, dy)
    torch.testing.assert_close(grads, torch.autograd.grad(wanted, inputs, dy))
