"""Cutting a map into windows of tokens and putting it back: a pure pair of functions."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW_MODES = ("pad", "fit")


def check_window_mode(mode: str) -> str:
    """Return the mode if it is one of ``WINDOW_MODES``; ValueError otherwise."""
    if mode not in WINDOW_MODES:
        raise ValueError(f"unknown window_mode {mode!r}: choose one of {WINDOW_MODES}")
    return mode


class Crop(NamedTuple):
    """Picks the positions of a window that are of use: the top left ``kept`` of its ``size``.

    Called with tokens (B·windows, L, C), it returns the kept ones, in raster order.
    """

    size: tuple[int, int]
    kept: tuple[int, int]

    def __call__(self, tokens: Tensor) -> Tensor:
        """Leave the other tokens out."""
        return tokens.unflatten(1, self.size)[:, : self.kept[0], : self.kept[1]].flatten(1, 2)


class WindowGrid(NamedTuple):
    """How a map was cut: its size, the number of windows along each axis, and their size."""

    hw: tuple[int, int]
    counts: tuple[int, int]
    size: tuple[int, int]

    @property
    def pad_hw(self) -> tuple[int, int]:
        """Rows added at the bottom and columns added at the right."""
        return (
            self.counts[0] * self.size[0] - self.hw[0],
            self.counts[1] * self.size[1] - self.hw[1],
        )

    def crop(self) -> tuple[Crop | None, WindowGrid]:
        """The crop that drops padded positions, and the grid of cropped windows.

        Along an axis that one window covers, padding is the end of every window and can go; else
        only some windows have it, and all keep it. No crop if nothing can go.
        """
        height, width = (
            min(size, hw) if count == 1 else size
            for size, hw, count in zip(self.size, self.hw, self.counts, strict=True)
        )
        if (height, width) == self.size:
            return None, self
        kept = (height, width)
        return Crop(self.size, kept), self._replace(size=kept)


def window_grid(hw: tuple[int, int], window: int, mode: str) -> WindowGrid:
    """Decide the windows of a map.

    Both modes use ``n = ceil(size / window)`` windows along an axis. ``pad`` (as published) makes
    them all ``window`` long; ``fit`` makes them ``ceil(size / n)``: no padding where one window
    covers the axis, fewer than n rows otherwise.

    Args:
        hw: height and width of the map.
        window: side of a window.
        mode: ``pad`` or ``fit``.

    Raises:
        ValueError: another mode.
    """
    check_window_mode(mode)
    rows, cols = (_count(side, window) for side in hw)
    size = (window, window) if mode == "pad" else (-(-hw[0] // rows), -(-hw[1] // cols))
    return WindowGrid(hw, (rows, cols), size)


def _count(side: int, window: int) -> int:
    """⌈side / window⌉."""
    if torch.compiler.is_dynamo_compiling() and side <= window:
        return 1  # a number: of an expression torch.compile takes ten times as long
    return -(-side // window)


def partition(x: Tensor, window: int, mode: str) -> tuple[Tensor, WindowGrid]:
    """(B, C, H, W) → tokens (B·windows, L, C) in raster order, and the grid to invert it.

    The map is padded with zeros; padded positions are ordinary tokens afterwards.
    """
    batch, channels, height, width = x.shape
    grid = window_grid((height, width), window, mode)
    (rows, cols), (h, w) = grid.counts, grid.size
    pad_h, pad_w = grid.pad_hw
    if pad_h or pad_w:
        x = F.pad(x, (0, pad_w, 0, pad_h))
    x = x.view(batch, channels, rows, h, cols, w).permute(0, 2, 4, 3, 5, 1)
    return x.reshape(batch * rows * cols, h * w, channels), grid


def merge(tokens: Tensor, grid: WindowGrid) -> Tensor:
    """Tokens (B·windows, L, C) → (B, C, H, W), cropped: the inverse of :func:`partition`."""
    (rows, cols), (h, w) = grid.counts, grid.size
    batch = tokens.shape[0] // (rows * cols)
    channels = tokens.shape[2]
    x = tokens.view(batch, rows, cols, h, w, channels).permute(0, 5, 1, 3, 2, 4)
    x = x.reshape(batch, channels, rows * h, cols * w)
    return x[:, :, : grid.hw[0], : grid.hw[1]]
