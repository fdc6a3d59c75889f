"""Device code of batch norm in training, with what follows it. Arithmetic is float32.

Maps are channels-last, so rows (R, C) of pixels: a program takes ``tiles`` tiles of BR rows of BC
channels. What is summed over all rows is written as parts (programs, 2, C), which every program of
the next kernel adds up for itself, in the same order.

Names: ``p_`` pointer, ``i_`` index, ``m_`` mask.
"""

import triton
import triton.language as tl

from ..triton_common import activate, load


@triton.jit
def places(C, tiles, BR: tl.constexpr, BC: tl.constexpr):
    """Channels of a program, which of them exist, its first row, and rows and offsets of a tile."""
    i_c = tl.program_id(1) * BC + tl.arange(0, BC)[None, :]
    i_r = tl.arange(0, BR)[:, None]
    return i_c, i_c < C, tl.program_id(0) * tiles * BR, i_r, i_r * C + i_c


@triton.jit
def near_mean(p_x, rows, i_r, o, m_c, BR: tl.constexpr):
    """Mean of the first tile, (1, BC): without it, squares would drown a small variance."""
    first = tl.sum(load(p_x + o, (i_r < rows) & m_c), 0)[None, :]
    return first / tl.minimum(rows, BR).to(tl.float32)


@triton.jit
def write_parts(p_parts, a, b, i_c, m_c, C):
    """Sums over a tile's rows, as a program's parts."""
    p_parts += tl.program_id(0) * 2 * C + i_c
    tl.store(p_parts, tl.sum(a, 0)[None, :], m_c)
    tl.store(p_parts + C, tl.sum(b, 0)[None, :], m_c)


@triton.jit
def read_parts(p_parts, parts, i_c, m_c, C, BP: tl.constexpr, BC: tl.constexpr):
    """Both sums of all parts, (1, BC)."""
    a = tl.zeros((BP, BC), tl.float32)
    b = tl.zeros((BP, BC), tl.float32)
    for start in range(0, parts, BP):
        i_p = start + tl.arange(0, BP)[:, None]
        m = (i_p < parts) & m_c
        a += load(p_parts + i_p * 2 * C + i_c, m)
        b += load(p_parts + i_p * 2 * C + C + i_c, m)
    return tl.sum(a, 0)[None, :], tl.sum(b, 0)[None, :]


@triton.jit
def slope(z, ACT: tl.constexpr):
    """The derivative of ``activate``."""
    if ACT == "relu":
        d = tl.where(z <= 0, 0.0, 1.0)
    else:
        s = tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
        d = s * (1 + z * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * z * z))
    return d


@triton.jit(do_not_specialize=["rows", "tiles"])
def statistics(
    p_x, p_parts,
    rows, C, tiles,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Write parts: sums of d, x less ``near_mean``, and of its square."""
    i_c, m_c, start, i_r, o = places(C, tiles, BR, BC)
    shift = near_mean(p_x, rows, i_r, o, m_c, BR)
    total = tl.zeros((BR, BC), tl.float32)
    squares = tl.zeros((BR, BC), tl.float32)
    for k in range(0, tiles):
        first = start + k * BR
        m = (i_r < rows - first) & m_c
        d = tl.where(m, load(p_x + first.to(tl.int64) * C + o, m) - shift, 0.0)
        total += d
        squares += d * d
    write_parts(p_parts, total, squares, i_c, m_c, C)


@triton.jit(do_not_specialize=["rows", "pixels", "tiles", "parts"])
def forward(
    p_x, p_parts, p_w, p_b, p_stream, p_factor, p_conv_bias,
    p_y, p_stats, p_running_mean, p_running_var, p_count,
    rows, pixels, C, tiles, parts, eps, share,
    ACT: tl.constexpr, ADD: tl.constexpr, FACTOR: tl.constexpr, CONV_BIAS: tl.constexpr,
    RUNNING: tl.constexpr, COUNT: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Write y = act(norm(x) · w + b), with ADD stream + factor · that; stats (2, C): mean, 1/std.

    ``parts`` are those of ``statistics``. Running statistics take their share of the new ones, the
    mean with the bias that x lacks. Images have so many ``pixels``.
    """
    i_c, m_c, start, i_r, o = places(C, tiles, BR, BC)
    total, squares = read_parts(p_parts, parts, i_c, m_c, C, BP, BC)
    count = rows.to(tl.float32)
    mean = total / count
    variance = squares / count - mean * mean
    variance = tl.where(variance < 0, 0.0, variance)  # a NaN stays one
    rstd = tl.rsqrt(variance + eps)
    mean += near_mean(p_x, rows, i_r, o, m_c, BR)
    if start == 0:
        tl.store(p_stats + i_c, mean, m_c)
        tl.store(p_stats + C + i_c, rstd, m_c)
        if RUNNING:
            seen = mean
            if CONV_BIAS:
                seen += load(p_conv_bias + i_c, m_c)
            old = load(p_running_mean + i_c, m_c)
            tl.store(p_running_mean + i_c, old + share * (seen - old), m_c)
            old = load(p_running_var + i_c, m_c)
            unbiased = variance * (count / (count - 1))
            tl.store(p_running_var + i_c, old + share * (unbiased - old), m_c)
        if COUNT and tl.program_id(1) == 0:
            tl.store(p_count, tl.load(p_count) + 1)
    w, b = load(p_w + i_c, m_c) * rstd, load(p_b + i_c, m_c)
    for k in range(0, tiles):
        first = start + k * BR
        skipped = first.to(tl.int64) * C
        m_r = i_r < rows - first
        m = m_r & m_c
        y = activate((load(p_x + skipped + o, m) - mean) * w + b, ACT)
        if ADD:
            if FACTOR:
                y *= load(p_factor + (first + i_r) // pixels, m_r)
            y += load(p_stream + skipped + o, m)
        tl.store(p_y + skipped + o, y.to(p_y.dtype.element_ty), m)


@triton.jit
def gradient(
    p_dy, p_x, p_factor, mean, rstd, w, b, first, i_r, o, m_r, m_c, pixels, C,
    ACT: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """The normalised values of a tile, and the gradient of norm(x) · w + b."""
    m = m_r & m_c
    skipped = first.to(tl.int64) * C
    n = tl.where(m, (load(p_x + skipped + o, m) - mean) * rstd, 0.0)
    g = load(p_dy + skipped + o, m)
    if ACT != "none":
        g *= slope(n * w + b, ACT)
    if FACTOR:
        g *= load(p_factor + (first + i_r) // pixels, m_r)
    return n, g


@triton.jit
def known(p_stats, p_w, p_b, i_c, m_c, C):
    """Mean, 1/std, w and b, (1, BC)."""
    mean, rstd = load(p_stats + i_c, m_c), load(p_stats + C + i_c, m_c)
    return mean, rstd, load(p_w + i_c, m_c), load(p_b + i_c, m_c)


@triton.jit(do_not_specialize=["rows", "pixels", "tiles"])
def gradient_sums(
    p_dy, p_x, p_stats, p_w, p_b, p_factor, p_parts,
    rows, pixels, C, tiles,
    ACT: tl.constexpr, FACTOR: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Write parts: sums of g, the gradient of norm(x) · w + b, and of g · norm(x)."""
    i_c, m_c, start, i_r, o = places(C, tiles, BR, BC)
    mean, rstd, w, b = known(p_stats, p_w, p_b, i_c, m_c, C)
    db = tl.zeros((BR, BC), tl.float32)
    dw = tl.zeros((BR, BC), tl.float32)
    for k in range(0, tiles):
        first = start + k * BR
        m_r = i_r < rows - first
        n, g = gradient(
            p_dy, p_x, p_factor, mean, rstd, w, b, first, i_r, o, m_r, m_c, pixels, C, ACT, FACTOR
        )
        db += g
        dw += g * n
    write_parts(p_parts, db, dw, i_c, m_c, C)


@triton.jit(do_not_specialize=["rows", "pixels", "tiles", "parts"])
def backward(
    p_dy, p_x, p_stats, p_w, p_b, p_factor, p_parts, p_dx, p_dparam, p_dconv_bias,
    rows, pixels, C, tiles, parts,
    ACT: tl.constexpr, FACTOR: tl.constexpr, CONV_BIAS: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Write dx, dparam (2, C): dw and db, and zeros for a bias that the norm takes away.

    ``parts`` are those of ``gradient_sums``.
    """
    i_c, m_c, start, i_r, o = places(C, tiles, BR, BC)
    mean, rstd, w, b = known(p_stats, p_w, p_b, i_c, m_c, C)
    db, dw = read_parts(p_parts, parts, i_c, m_c, C, BP, BC)
    if start == 0:
        tl.store(p_dparam + i_c, dw, m_c)
        tl.store(p_dparam + C + i_c, db, m_c)
        if CONV_BIAS:
            zeros = tl.zeros((1, BC), tl.float32)
            tl.store(p_dconv_bias + i_c, zeros.to(p_dconv_bias.dtype.element_ty), m_c)
    count = rows.to(tl.float32)
    db, dw = db / count, dw / count
    for k in range(0, tiles):
        first = start + k * BR
        m_r = i_r < rows - first
        n, g = gradient(
            p_dy, p_x, p_factor, mean, rstd, w, b, first, i_r, o, m_r, m_c, pixels, C, ACT, FACTOR
        )
        dx = w * rstd * (g - db - n * dw)
        p = p_dx + first.to(tl.int64) * C + o
        tl.store(p, dx.to(p_dx.dtype.element_ty), m_r & m_c)
