"""Device code. Arithmetic is float32."""

import triton
import triton.language as tl

from ..triton_common import load


@triton.jit
def _sum(p_parts, p_sum, rows, columns, BR: tl.constexpr, BC: tl.constexpr):
    i_c = tl.program_id(0) * BC + tl.arange(0, BC)[None, :]
    m_c = i_c < columns
    total = tl.zeros((BR, BC), tl.float32)
    for start in range(0, rows, BR):
        i_r = start + tl.arange(0, BR)[:, None]
        total += load(p_parts + i_r * columns + i_c, (i_r < rows) & m_c)
    tl.store(p_sum + i_c, tl.sum(total, 0)[None, :], m_c)


@triton.jit(do_not_specialize=["rows", "columns"])
def row_sum(p_parts, p_sum, rows, columns, BR: tl.constexpr, BC: tl.constexpr):
    """Write sum (columns) of parts (rows, columns)."""
    _sum(p_parts, p_sum, rows, columns, BR, BC)


_NUMBERS = [f"{name}{i}" for name in ("rows", "columns") for i in range(8)]


@triton.jit(do_not_specialize=_NUMBERS)
def eight_row_sums(
    p_parts0, p_parts1, p_parts2, p_parts3, p_parts4, p_parts5, p_parts6, p_parts7,
    p_sum0, p_sum1, p_sum2, p_sum3, p_sum4, p_sum5, p_sum6, p_sum7,
    rows0, rows1, rows2, rows3, rows4, rows5, rows6, rows7,
    columns0, columns1, columns2, columns3, columns4, columns5, columns6, columns7,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The same for eight, each in the programs of its number."""
    i = tl.program_id(1)
    if i == 0:
        _sum(p_parts0, p_sum0, rows0, columns0, BR, BC)
    elif i == 1:
        _sum(p_parts1, p_sum1, rows1, columns1, BR, BC)
    elif i == 2:
        _sum(p_parts2, p_sum2, rows2, columns2, BR, BC)
    elif i == 3:
        _sum(p_parts3, p_sum3, rows3, columns3, BR, BC)
    elif i == 4:
        _sum(p_parts4, p_sum4, rows4, columns4, BR, BC)
    elif i == 5:
        _sum(p_parts5, p_sum5, rows5, columns5, BR, BC)
    elif i == 6:
        _sum(p_parts6, p_sum6, rows6, columns6, BR, BC)
    else:
        _sum(p_parts7, p_sum7, rows7, columns7, BR, BC)
