"""How work is shared out: arithmetic of launches."""

from __future__ import annotations


def ceil_div(a: int, b: int) -> int:
    """⌈a / b⌉; ``triton.cdiv`` takes many times as long."""
    return -(-a // b)


def split_rows(rows: int, block: int, programs: int, batch: int = 1) -> tuple[int, int]:
    """How ``rows`` of each of ``batch`` items are shared out, in tiles of ``block`` rows.

    Returns:
        Programs an item, which are about ``programs`` at most for all items, and tiles a program.
    """
    tiles = ceil_div(rows * batch, block * programs)
    return ceil_div(rows, block * tiles), tiles


def power_of_2(n: int) -> int:
    """The next power of 2 from n up."""
    return 1 << (n - 1).bit_length()
