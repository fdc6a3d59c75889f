"""Device code of sums over rows. Arithmetic is float32."""

import triton
import triton.language as tl

from ..triton_common import load


@triton.jit(do_not_specialize=["rows", "tiles"])
def column_sum(
    p_x, p_sum,
    s_x, rows, C, tiles,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Write sum (programs, C), to be summed: x's (rows, C) over ``tiles`` tiles of BR rows."""
    i_c = tl.program_id(1) * BC + tl.arange(0, BC)[None, :]
    m_c = i_c < C
    total = tl.zeros((BR, BC), tl.float32)
    for k in range(0, tiles):
        i_r = (tl.program_id(0).to(tl.int64) * tiles + k) * BR + tl.arange(0, BR)[:, None]
        total += load(p_x + i_r * s_x + i_c, (i_r < rows) & m_c)
    tl.store(p_sum + tl.program_id(0) * C + i_c, tl.sum(total, 0)[None, :], m_c)
