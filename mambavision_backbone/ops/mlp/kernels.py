"""Device code of GELU's backward pass. Arithmetic is float32."""

import triton
import triton.language as tl

from ..triton_common import load


@triton.jit(do_not_specialize=["rows", "tiles"])
def backward(
    p_dg, p_h, p_dh, p_g, p_db,
    rows, C, tiles,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Write g = gelu(h), dh = dg · gelu'(h) and db (programs, C), to be summed: dh's over rows.

    Tensors are (rows, C); a program takes ``tiles`` tiles of BR rows of BC channels.
    """
    i_c = tl.program_id(1) * BC + tl.arange(0, BC)[None, :]
    m_c = i_c < C
    db = tl.zeros((BC,), tl.float32)
    for k in range(0, tiles):
        i_r = (tl.program_id(0).to(tl.int64) * tiles + k) * BR + tl.arange(0, BR)[:, None]
        m = (i_r < rows) & m_c
        o = i_r * C + i_c
        h = load(p_h + o, m)
        cdf = 0.5 + 0.5 * tl.erf(h * 0.7071067811865476)
        pdf = 0.3989422804014327 * tl.exp(-0.5 * h * h)
        dh = load(p_dg + o, m) * (cdf + h * pdf)
        tl.store(p_g + o, (h * cdf).to(p_g.dtype.element_ty), m)
        tl.store(p_dh + o, dh.to(p_dh.dtype.element_ty), m)
        db += tl.sum(dh, 0)
    tl.store(p_db + tl.program_id(0) * C + i_c, db[None, :], m_c)
