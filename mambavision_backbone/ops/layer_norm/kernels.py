"""Device code of the residual sum and of layer norm.

A program takes BR rows of C ≤ BC channels. Arithmetic is float32.

Names: ``p_`` pointer, ``i_`` index, ``m_`` mask.
"""

import triton
import triton.language as tl

from ..triton_common import load


@triton.jit(do_not_specialize=["rows", "L"])
def forward(
    p_x, p_y, p_bias, p_gamma, p_factor, p_w, p_b, p_sum, p_n, p_mean, p_rstd,
    rows, L, C, eps,
    ADD: tl.constexpr, BIAS: tl.constexpr, GAMMA: tl.constexpr, FACTOR: tl.constexpr,
    NORM: tl.constexpr, STATS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Write sum = x + factor · gamma · (y + bias) (with ADD) and n = norm(sum) · w + b (with NORM).

    With STATS also mean and 1/std.
    """
    i_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    i_c = tl.arange(0, BC)[None, :]
    m_r, m_c = i_r < rows, i_c < C
    m = m_r[:, None] & m_c
    o = i_r[:, None] * C + i_c
    x = load(p_x + o, m)
    if ADD:
        y = load(p_y + o, m)
        if BIAS:
            y += load(p_bias + i_c, m_c)
        if GAMMA:
            y *= load(p_gamma + i_c, m_c)
        if FACTOR:
            y *= load(p_factor + i_r // L, m_r)[:, None]
        x = (x + y).to(p_sum.dtype.element_ty)
        tl.store(p_sum + o, x, m)
        x = x.to(tl.float32)  # as rounded: the norm of what the next block sees
    if NORM:
        mean = tl.sum(x, 1)[:, None] / C
        d = tl.where(m, x - mean, 0.0)
        rstd = tl.rsqrt(tl.sum(d * d, 1)[:, None] / C + eps)
        n = d * rstd * load(p_w + i_c, m_c) + load(p_b + i_c, m_c)
        tl.store(p_n + o, n.to(p_n.dtype.element_ty), m)
        if STATS:
            tl.store(p_mean + i_r[:, None], mean, m_r[:, None])
            tl.store(p_rstd + i_r[:, None], rstd, m_r[:, None])


@triton.jit(do_not_specialize=["rows", "L", "tiles"])
def backward(
    p_dn, p_dsum, p_sum, p_y, p_bias, p_gamma, p_factor, p_w, p_mean, p_rstd,
    p_dx, p_dy, p_dparam,
    rows, L, C, tiles,
    NORM: tl.constexpr, DSUM: tl.constexpr, DY: tl.constexpr, BIAS: tl.constexpr,
    GAMMA: tl.constexpr, FACTOR: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Gradients; a program takes ``tiles`` tiles of rows.

    Writes dx, with DY also dy (else it equals dx), and dparam (programs, 4, C), to be summed
    over the programs: dw, db, with GAMMA dgamma and with BIAS dbias. Without NORM dx is dn.
    """
    i_c = tl.arange(0, BC)[None, :]
    m_c = i_c < C
    if NORM:
        w = load(p_w + i_c, m_c)
    if GAMMA:
        gamma = load(p_gamma + i_c, m_c)
    if BIAS:
        bias = load(p_bias + i_c, m_c)
    dw = tl.zeros((BC,), tl.float32)
    db = tl.zeros((BC,), tl.float32)
    dgamma = tl.zeros((BC,), tl.float32)
    dbias = tl.zeros((BC,), tl.float32)
    for k in range(0, tiles):
        i_r = (tl.program_id(0).to(tl.int64) * tiles + k) * BR + tl.arange(0, BR)
        m_r = i_r < rows
        m = m_r[:, None] & m_c
        o = i_r[:, None] * C + i_c
        dx = load(p_dn + o, m)
        if NORM:
            rstd = load(p_rstd + i_r, m_r)[:, None]
            n = (load(p_sum + o, m) - load(p_mean + i_r, m_r)[:, None]) * rstd
            n = tl.where(m, n, 0.0)
            dw += tl.sum(dx * n, 0)
            db += tl.sum(dx, 0)
            g = dx * w
            along_n = tl.sum(g * n, 1)[:, None] / C
            dx = (g - tl.sum(g, 1)[:, None] / C - n * along_n) * rstd
            if DSUM:
                dx += load(p_dsum + o, m)
            tl.store(p_dx + o, dx.to(p_dx.dtype.element_ty), m)
        dy = dx
        if FACTOR:
            dy *= load(p_factor + i_r // L, m_r)[:, None]
        if GAMMA:
            y = load(p_y + o, m)
            if BIAS:
                y += bias
            dgamma += tl.sum(dy * y, 0)
            dy *= gamma
        if DY:
            tl.store(p_dy + o, dy.to(p_dy.dtype.element_ty), m)
        if BIAS:
            dbias += tl.sum(tl.where(m, dy, 0.0), 0)
    p_dparam += tl.program_id(0) * 4 * C + i_c
    tl.store(p_dparam, dw[None, :], m_c)
    tl.store(p_dparam + C, db[None, :], m_c)
    if GAMMA:
        tl.store(p_dparam + 2 * C, dgamma[None, :], m_c)
    if BIAS:
        tl.store(p_dparam + 3 * C, dbias[None, :], m_c)


@triton.jit
def map_offsets(i_p, i_c, W, s_h, s_w, s_c):
    """Offsets (BP, BC) of pixels p of a map with any strides."""
    return ((i_p // W) * s_h + (i_p % W) * s_w)[:, None] + i_c * s_c


@triton.jit
def map_forward(
    p_x, p_w, p_b, p_y, p_mean, p_rstd,
    sb_x, s_h, s_w, s_c, P, W, C, eps,
    BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Write y (B, C, P) = norm over C of x (B, C, H, W) · w + b, for BP pixels of an image."""
    i_b = tl.program_id(1).to(tl.int64)
    i_p = tl.program_id(0) * BP + tl.arange(0, BP)
    i_c = tl.arange(0, BC)[None, :]
    m_p, m_c = i_p < P, i_c < C
    m = m_p[:, None] & m_c
    x = load(p_x + i_b * sb_x + map_offsets(i_p, i_c, W, s_h, s_w, s_c), m)
    mean = tl.sum(x, 1) / C
    d = tl.where(m, x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(d * d, 1) / C + eps)
    y = d * rstd[:, None] * load(p_w + i_c, m_c) + load(p_b + i_c, m_c)
    tl.store(p_y + i_b * C * P + i_c * P + i_p[:, None], y.to(p_y.dtype.element_ty), m)
    tl.store(p_mean + i_b * P + i_p, mean, m_p)
    tl.store(p_rstd + i_b * P + i_p, rstd, m_p)


@triton.jit(do_not_specialize=["tiles"])
def map_backward(
    p_dy, p_x, p_w, p_mean, p_rstd, p_dx, p_dparam,
    sb_dy, sc_dy, sp_dy, sb_x, s_h, s_w, s_c, P, W, C, tiles,
    BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Gradients of ``tiles`` tiles of pixels of an image.

    Writes dx (B, P, C) and dparam (B · programs, 2, C), to be summed: dw and db.
    """
    i_b = tl.program_id(1).to(tl.int64)
    i_c = tl.arange(0, BC)[None, :]
    m_c = i_c < C
    w = load(p_w + i_c, m_c)
    dw = tl.zeros((BC,), tl.float32)
    db = tl.zeros((BC,), tl.float32)
    for k in range(0, tiles):
        i_p = (tl.program_id(0) * tiles + k) * BP + tl.arange(0, BP)
        m_p = i_p < P
        m = m_p[:, None] & m_c
        dy = load(p_dy + i_b * sb_dy + i_c * sc_dy + i_p[:, None] * sp_dy, m)
        x = load(p_x + i_b * sb_x + map_offsets(i_p, i_c, W, s_h, s_w, s_c), m)
        rstd = load(p_rstd + i_b * P + i_p, m_p)[:, None]
        n = tl.where(m, (x - load(p_mean + i_b * P + i_p, m_p)[:, None]) * rstd, 0.0)
        dw += tl.sum(dy * n, 0)
        db += tl.sum(dy, 0)
        g = dy * w
        dx = (g - tl.sum(g, 1)[:, None] / C - n * (tl.sum(g * n, 1)[:, None] / C)) * rstd
        o = (i_b * P + i_p[:, None]) * C + i_c
        tl.store(p_dx + o, dx.to(p_dx.dtype.element_ty), m)
    p_dparam += (i_b * tl.num_programs(0) + tl.program_id(0)) * 2 * C + i_c
    tl.store(p_dparam, dw[None, :], m_c)
    tl.store(p_dparam + C, db[None, :], m_c)
