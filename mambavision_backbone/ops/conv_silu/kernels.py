"""Device code of the depthwise convolution with SiLU.

Tensors are token-major, (rows, D) with rows = batch · L: a program takes BR rows and BD channels of
one of the two branches. A tap beyond an end of its sequence is zero. Arithmetic is float32.

Names: ``p_`` pointer, ``i_`` index, ``m_`` mask, ``s_`` stride; ``w0 w1 w2`` the taps on the token
before, the token itself and the one behind it.
"""

import triton
import triton.language as tl

from ..triton_common import load


@triton.jit
def taps(p, m):
    """The three taps of each channel, which lie together."""
    return load(p, m), load(p + 1, m), load(p + 2, m)


@triton.jit(do_not_specialize=["rows", "L"])
def forward(
    p_xz, p_wx, p_wz, p_x, p_z,
    s_xz, s_x, s_z, rows, L, D,
    BRANCHES: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Write x = silu(conv(xz[:, :D], wx)) and, of 2 branches, z = silu(conv(xz[:, D:], wz))."""
    branch = tl.program_id(1) % BRANCHES
    i_d = (tl.program_id(1) // BRANCHES) * BD + tl.arange(0, BD)[None, :]
    i_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)[:, None]
    m_d = i_d < D
    m = (i_r < rows) & m_d
    i_t = i_r % L
    if branch == 0:
        p_w = p_wx
        p_y = p_x
        s_y = s_x
    else:
        p_w = p_wz
        p_y = p_z
        s_y = s_z
    w0, w1, w2 = taps(p_w + 3 * i_d, m_d)
    p_in = p_xz + i_r * s_xz + branch * D + i_d
    y = w1 * load(p_in, m)
    y += w0 * load(p_in - s_xz, m & (i_t > 0))
    y += w2 * load(p_in + s_xz, m & (i_t < L - 1))
    y *= tl.sigmoid(y)
    tl.store(p_y + i_r * s_y + i_d, y.to(p_y.dtype.element_ty), m)


@triton.jit
def slope(y):
    """The derivative of silu."""
    s = tl.sigmoid(y)
    return s * (1 + y * (1 - s))


@triton.jit(do_not_specialize=["rows", "L", "tiles"])
def backward(
    p_dx, p_dz, p_xz, p_wx, p_wz, p_dxz, p_dw,
    s_dx, s_dz, s_xz, rows, L, D, tiles,
    BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Gradients; a program takes ``tiles`` tiles of rows.

    Writes dxz (rows, 2D) and dw (programs, 2D, 3), to be summed over the programs.
    """
    branch = tl.program_id(1) % 2
    i_d = (tl.program_id(1) // 2) * BD + tl.arange(0, BD)[None, :]
    m_d = i_d < D
    if branch == 0:
        p_w = p_wx
        p_dy = p_dx
        s_dy = s_dx
    else:
        p_w = p_wz
        p_dy = p_dz
        s_dy = s_dz
    w0, w1, w2 = taps(p_w + 3 * i_d, m_d)
    dw0 = tl.zeros((BD,), tl.float32)
    dw1 = tl.zeros((BD,), tl.float32)
    dw2 = tl.zeros((BD,), tl.float32)
    for k in range(0, tiles):
        i_r = (tl.program_id(0).to(tl.int64) * tiles + k) * BR + tl.arange(0, BR)[:, None]
        m = (i_r < rows) & m_d
        i_t = i_r % L
        m_1, m_2 = m & (i_t > 0), m & (i_t > 1)  # the token one or two before exists
        m1, m2 = m & (i_t < L - 1), m & (i_t < L - 2)
        p_in = p_xz + i_r * s_xz + branch * D + i_d
        x_2, x_1 = load(p_in - 2 * s_xz, m_2), load(p_in - s_xz, m_1)
        x0 = load(p_in, m)
        x1, x2 = load(p_in + s_xz, m1), load(p_in + 2 * s_xz, m2)
        p_g = p_dy + i_r * s_dy + i_d
        g_1 = load(p_g - s_dy, m_1) * slope(w0 * x_2 + w1 * x_1 + w2 * x0)
        g0 = load(p_g, m) * slope(w0 * x_1 + w1 * x0 + w2 * x1)
        g1 = load(p_g + s_dy, m1) * slope(w0 * x0 + w1 * x1 + w2 * x2)
        dx = w0 * g1 + w1 * g0 + w2 * g_1
        tl.store(p_dxz + i_r * 2 * D + branch * D + i_d, dx.to(p_dxz.dtype.element_ty), m)
        dw0 += tl.sum(g0 * x_1, 0)
        dw1 += tl.sum(g0 * x0, 0)
        dw2 += tl.sum(g0 * x1, 0)
    p_dw += tl.program_id(0) * 6 * D + 3 * (branch * D + i_d)
    tl.store(p_dw, dw0[None, :], m_d)
    tl.store(p_dw + 1, dw1[None, :], m_d)
    tl.store(p_dw + 2, dw2[None, :], m_d)
