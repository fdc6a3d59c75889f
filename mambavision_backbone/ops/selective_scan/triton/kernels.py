"""Device code of the selective scan.

A sequence is cut into chunks of T tokens, and one program walks through one chunk of BD channels in
tiles of S tokens. Tiles are (S, BN, BD) in registers: a thread owns a channel and holds the tile's
tokens and states, so the recurrence over tokens (spelled out on halves of halves of a tile: tl's
own scan shuffles lanes when reversed) and the sums over states stay inside a thread. Only the sums
over channels (gradients of B and C) cross threads.

Chunks are independent once their incoming states are known: ``chunk_ends`` finds what every chunk
does to its incoming state, ``carry`` runs over the chunks, ``forward`` and ``backward`` do the
rest. With one chunk only the latter are needed. There are no atomics, so results do not depend on
the order of programs.

Names: ``p_`` pointer, ``s_`` stride in elements (``sb_`` of the batch), ``i_`` index, ``m_`` mask;
L seqlen, D dim, N dstate. With LOG_A, p_A holds log(-A) and dparam its gradient; p_bias is added
BIASES times. All arithmetic is float32. A token past the end has Δ = 0 and u = 0: the scan's
identity.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def softplus(x):
    """log(1 + eˣ) = max(x, 0) + log1p(z) with z = e^-|x| in [0, 1].

    log1p(z) / z is a polynomial (Chebyshev interpolation, relative error 1.6e-7 with rounding): a
    third of the instructions that a logarithm and a division to the same accuracy take.
    """
    z = tl.exp(-tl.abs(x))
    p = z * -0.00317605701 + 0.0195425283
    p = p * z - 0.0563736148
    p = p * z + 0.105436236
    p = p * z - 0.152696669
    p = p * z + 0.196632743
    p = p * z - 0.249516159
    p = p * z + 0.333297104
    p = p * z - 0.499998927
    p = p * z + 1.0
    return tl.maximum(x, 0.0) + p * z


@triton.jit
def compose(a1, b1, a2, b2):
    """Compose h → a1 h + b1 and then h → a2 h + b2; tokens may come in either direction."""
    return a1 * a2, a2 * b1 + b2


@triton.jit
def halve(x):
    """(S, BN, BD) → its first and its last S/2 tokens; a renaming of registers."""
    S: tl.constexpr = x.shape[0]
    x = tl.reshape(x, (2, S // 2, x.shape[1], x.shape[2]))
    return tl.split(tl.permute(x, (1, 2, 3, 0)))


@triton.jit
def stack(x, y):
    """Undo ``halve``."""
    S: tl.constexpr = x.shape[0]
    return tl.reshape(tl.permute(tl.join(x, y), (3, 0, 1, 2)), (2 * S, x.shape[1], x.shape[2]))


@triton.jit
def states2(a, x, h):
    """Of two tokens after the state h (1, BN, BD): p_t = a_t h_{t-1}, h_t = p_t + x_t, the last h.

    p is what reaches a token of its past; taken as h - x it would be lost in rounding.
    """
    a1, a2 = halve(a)
    x1, x2 = halve(x)
    p1 = a1 * h
    h1 = p1 + x1
    p2 = a2 * h1
    h2 = p2 + x2
    return stack(p1, p2), stack(h1, h2), h2


@triton.jit
def states4(a, x, h):
    """The same of four tokens."""
    a1, a2 = halve(a)
    x1, x2 = halve(x)
    ps1, hs1, h = states2(a1, x1, h)
    ps2, hs2, h = states2(a2, x2, h)
    return stack(ps1, ps2), stack(hs1, hs2), h


@triton.jit
def states(a, x, h, S: tl.constexpr):
    """The same of a tile of S = 4 or 8 tokens."""
    if S == 4:
        ps, hs, h = states4(a, x, h)
    else:
        tl.static_assert(S == 8)
        a1, a2 = halve(a)
        x1, x2 = halve(x)
        ps1, hs1, h = states4(a1, x1, h)
        ps2, hs2, h = states4(a2, x2, h)
        ps, hs = stack(ps1, ps2), stack(hs1, hs2)
    return ps, hs, h


@triton.jit
def grads2(a, q, r):
    """g_t = q_t + a_{t+1} g_{t+1} of two tokens, and a_t g_t of the first.

    r (1, BN, BD) is a_t g_t of the token behind them.
    """
    a1, a2 = halve(a)
    q1, q2 = halve(q)
    g2 = q2 + r
    g1 = q1 + a2 * g2
    return stack(g1, g2), a1 * g1


@triton.jit
def grads4(a, q, r):
    """The same of a tile of four tokens."""
    a1, a2 = halve(a)
    q1, q2 = halve(q)
    gs2, r = grads2(a2, q2, r)
    gs1, r = grads2(a1, q1, r)
    return stack(gs1, gs2), r


@triton.jit
def load(p, o, m):
    """Elements at offsets o in float32, zeros where masked."""
    return tl.load(p + o, mask=m, other=0.0).to(tl.float32)


@triton.jit
def by_channel(x):
    """(S, BD) → (S, 1, BD)."""
    return x[:, None, :]


@triton.jit
def by_state(x):
    """(S, BN) → (S, BN, 1)."""
    return x[:, :, None]


@triton.jit
def load_delta(p_dt, o, m, bias, SOFTPLUS: tl.constexpr):
    """Return dt + bias and Δ, which is zero past the end."""
    raw = load(p_dt, o, m) + bias
    delta = softplus(raw) if SOFTPLUS else raw
    return raw, tl.where(m, delta, 0.0)


@triton.jit
def load_decay(p_A, o, m, LOG_A: tl.constexpr):
    """A in units of log2, where LOG_A from log(-A); zeros where masked."""
    A = load(p_A, o, m)
    return (tl.where(m, -tl.exp(A), 0.0) if LOG_A else A) * LOG2E


@triton.jit
def load_A(p_A, i_d, D, N, BN: tl.constexpr, LOG_A: tl.constexpr):
    """A transposed, (1, BN, BD); as ``load_decay``."""
    i_n = tl.arange(0, BN)[:, None]
    return load_decay(p_A, i_d * N + i_n, (i_n < N) & (i_d < D), LOG_A)[None, :, :]


@triton.jit
def chunk_ends(
    p_u, p_dt, p_A, p_B, p_C, p_bias, p_dy,
    p_h, p_r, p_sum,
    sb_u, sb_dt, sb_B, sb_C, sb_dy, s_u, s_dt, s_B, s_C, s_dy,
    L, D, N, T,
    SOFTPLUS: tl.constexpr, LOG_A: tl.constexpr, BIASES: tl.constexpr, BACK: tl.constexpr,
    BD: tl.constexpr, BN: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Of every chunk: its last state from a zero state, and the sum of Δ.

    With BACK also the gradient that reaches the state before the chunk, if none comes from behind.
    Writes h, r and sum (the same for all states), each (batch · chunks, N, D).
    """
    i_c, i_b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    i_d = tl.program_id(1) * BD + tl.arange(0, BD)[None, :]
    i_n = tl.arange(0, BN)[None, :]
    i_s = tl.arange(0, S)[:, None]
    m_d, m_n = i_d < D, i_n < N
    i_nd = tl.arange(0, BN)[:, None] * D + i_d
    m_nd = (tl.arange(0, BN)[:, None] < N) & m_d
    A = load_A(p_A, i_d, D, N, BN, LOG_A)
    bias = load(p_bias, i_d, m_d) * BIASES
    p_u += i_b * sb_u
    p_dt += i_b * sb_dt
    p_B += i_b * sb_B

    h = tl.zeros((1, BN, BD), tl.float32)
    r = tl.zeros((1, BN, BD), tl.float32)
    total = tl.zeros((1, BN, BD), tl.float32)  # the same for all states
    stop = tl.minimum(i_c * T + T, L)
    for t in range(i_c * T, stop, S):
        i_t = t + i_s
        m_t = i_t < stop
        m_td, m_tn = m_t & m_d, m_t & m_n
        _raw, delta = load_delta(p_dt, i_t * s_dt + i_d, m_td, bias, SOFTPLUS)
        delta = by_channel(delta)
        delta_u = delta * by_channel(load(p_u, i_t * s_u + i_d, m_td))
        B = load(p_B, i_t * s_B + i_n, m_tn)
        a = tl.exp2(delta * A)
        _ps, _hs, h = states(a, delta_u * by_state(B), h, S)
        if BACK:
            C = load(p_C + i_b * sb_C, i_t * s_C + i_n, m_tn)
            dy = load(p_dy + i_b * sb_dy, i_t * s_dy + i_d, m_td)
            _gs, end = grads4(a, by_state(C) * by_channel(dy), tl.zeros_like(h))
            r += tl.exp2(A * total) * end
        total += tl.sum(tl.broadcast_to(delta, (S, BN, BD)), 0)[None, :, :]
    i_chunk = i_b * tl.num_programs(0) + i_c
    o_nd = i_chunk * N * D + i_nd
    tl.store(p_h + o_nd, tl.sum(h, 0), mask=m_nd)  # a sum of one: it takes the axis away
    tl.store(p_sum + o_nd, tl.sum(total, 0), mask=m_nd)
    if BACK:
        tl.store(p_r + o_nd, tl.sum(r, 0), mask=m_nd)


@triton.jit
def carry(
    p_h, p_r, p_A, p_sum, p_h_in, p_r_in,
    chunks, D, N,
    LOG_A: tl.constexpr, BACK: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """States before every chunk from ``chunk_ends``; with BACK also gradients behind every chunk.

    One program takes all chunks (at most BK) of a state n and BD channels.
    """
    i_n, i_b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    i_d = tl.program_id(0) * BD + tl.arange(0, BD)[None, :]
    i_k = tl.arange(0, BK)[:, None]
    m = (i_k < chunks) & (i_d < D)
    A = load_decay(p_A, i_d * N + i_n, i_d < D, LOG_A)
    i_chunk = i_b * chunks + i_k
    o = (i_chunk * N + i_n) * D + i_d
    decay = tl.exp2(A * load(p_sum, o, m))
    _decay, h = tl.associative_scan((decay, load(p_h, o, m)), 0, compose)
    zero = tl.zeros((BK, BD), tl.float32)
    tl.store(p_h_in + o, zero, mask=m & (i_k == 0))
    tl.store(p_h_in + o + N * D, h, mask=m & (i_k < chunks - 1))
    if BACK:
        _decay, r = tl.associative_scan((decay, load(p_r, o, m)), 0, compose, reverse=True)
        tl.store(p_r_in + o, zero, mask=m & (i_k == chunks - 1))
        tl.store(p_r_in + o - N * D, r, mask=m & (i_k > 0))


@triton.jit
def forward(
    p_u, p_dt, p_A, p_B, p_C, p_D, p_bias, p_h_in, p_y,
    sb_u, sb_dt, sb_B, sb_C, sb_y, s_u, s_dt, s_B, s_C, s_y,
    L, D, N, T,
    SOFTPLUS: tl.constexpr, LOG_A: tl.constexpr, BIASES: tl.constexpr, CHUNKED: tl.constexpr,
    BD: tl.constexpr, BN: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Write y (batch, L, D) of every chunk."""
    i_c, i_b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    i_d = tl.program_id(1) * BD + tl.arange(0, BD)[None, :]
    i_n = tl.arange(0, BN)[None, :]
    i_s = tl.arange(0, S)[:, None]
    m_d, m_n = i_d < D, i_n < N
    i_nd = tl.arange(0, BN)[:, None] * D + i_d
    m_nd = (tl.arange(0, BN)[:, None] < N) & m_d
    A = load_A(p_A, i_d, D, N, BN, LOG_A)
    bias = load(p_bias, i_d, m_d) * BIASES
    skip = load(p_D, i_d, m_d)
    p_u += i_b * sb_u
    p_dt += i_b * sb_dt
    p_B += i_b * sb_B
    p_C += i_b * sb_C
    p_y += i_b * sb_y

    if CHUNKED:
        i_chunk = i_b * tl.num_programs(0) + i_c
        h = load(p_h_in + i_chunk * N * D, i_nd, m_nd)[None, :, :]
    else:
        h = tl.zeros((1, BN, BD), tl.float32)
    stop = tl.minimum(i_c * T + T, L)
    for t in range(i_c * T, stop, S):
        i_t = t + i_s
        m_t = i_t < stop
        m_td, m_tn = m_t & m_d, m_t & m_n
        u = load(p_u, i_t * s_u + i_d, m_td)
        _raw, delta = load_delta(p_dt, i_t * s_dt + i_d, m_td, bias, SOFTPLUS)
        B = load(p_B, i_t * s_B + i_n, m_tn)
        C = load(p_C, i_t * s_C + i_n, m_tn)
        a = tl.exp2(by_channel(delta) * A)
        _ps, hs, h = states(a, by_channel(delta * u) * by_state(B), h, S)
        y = tl.sum(hs * by_state(C), 1) + skip * u
        tl.store(p_y + i_t * s_y + i_d, y.to(p_y.dtype.element_ty), mask=m_td)


@triton.jit
def backward(
    p_u, p_dt, p_A, p_B, p_C, p_D, p_bias, p_dy, p_h_in, p_r_in,
    p_h_tile, p_du, p_ddt, p_dB, p_dC, p_dparam,
    sb_u, sb_dt, sb_B, sb_C, sb_dy, s_u, s_dt, s_B, s_C, s_dy,
    L, D, N, T,
    SOFTPLUS: tl.constexpr, LOG_A: tl.constexpr, BIASES: tl.constexpr, CHUNKED: tl.constexpr,
    BD: tl.constexpr, BN: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Gradients of every chunk.

    Walks forward to note the state before each tile in h_tile (batch, tiles, N, D), then backward.
    Writes du, ddt (batch, L, D); dB, dC as one part for each block of channels, (batch, channel
    blocks, L, N); and dparam (batch · chunks, N + 2, D): the chunk's dA transposed, dD, ddt_bias.
    """
    i_c, i_b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    i_d = tl.program_id(1) * BD + tl.arange(0, BD)[None, :]
    i_n = tl.arange(0, BN)[None, :]
    i_s = tl.arange(0, S)[:, None]
    m_d, m_n = i_d < D, i_n < N
    i_nd = tl.arange(0, BN)[:, None] * D + i_d
    m_nd = (tl.arange(0, BN)[:, None] < N) & m_d
    A = load_A(p_A, i_d, D, N, BN, LOG_A)
    bias = load(p_bias, i_d, m_d) * BIASES
    skip = load(p_D, i_d, m_d)
    p_u += i_b * sb_u
    p_dt += i_b * sb_dt
    p_B += i_b * sb_B
    p_C += i_b * sb_C
    p_dy += i_b * sb_dy
    p_du += i_b * L * D
    p_ddt += i_b * L * D
    i_part = i_b * tl.num_programs(1) + tl.program_id(1)
    p_dB += i_part * L * N
    p_dC += i_part * L * N

    i_chunk = i_b * tl.num_programs(0) + i_c
    if CHUNKED:
        h = load(p_h_in + i_chunk * N * D, i_nd, m_nd)[None, :, :]
        r = load(p_r_in + i_chunk * N * D, i_nd, m_nd)[None, :, :]
    else:
        h = tl.zeros((1, BN, BD), tl.float32)
        r = tl.zeros((1, BN, BD), tl.float32)
    start = i_c * T
    stop = tl.minimum(start + T, L)
    tiles = tl.cdiv(stop - start, S)
    p_h_tile += (i_chunk * (T // S)) * N * D
    for k in range(0, tiles):
        tl.store(p_h_tile + k * N * D + i_nd, tl.sum(h, 0), mask=m_nd)
        i_t = start + k * S + i_s
        m_t = i_t < stop
        m_td, m_tn = m_t & m_d, m_t & m_n
        _raw, delta = load_delta(p_dt, i_t * s_dt + i_d, m_td, bias, SOFTPLUS)
        delta_u = delta * load(p_u, i_t * s_u + i_d, m_td)
        B = load(p_B, i_t * s_B + i_n, m_tn)
        _ps, _hs, h = states(
            tl.exp2(by_channel(delta) * A), by_channel(delta_u) * by_state(B), h, S
        )

    tl.debug_barrier()  # h_tile is read below
    dA = tl.zeros((BN, BD), tl.float32)
    dD = tl.zeros((BD,), tl.float32)
    dbias = tl.zeros((BD,), tl.float32)
    for back in range(0, tiles):
        k = tiles - 1 - back
        h = load(p_h_tile + k * N * D, i_nd, m_nd)[None, :, :]
        i_t = start + k * S + i_s
        m_t = i_t < stop
        m_td, m_tn = m_t & m_d, m_t & m_n
        u = load(p_u, i_t * s_u + i_d, m_td)
        dy = load(p_dy, i_t * s_dy + i_d, m_td)
        raw, delta = load_delta(p_dt, i_t * s_dt + i_d, m_td, bias, SOFTPLUS)
        B = load(p_B, i_t * s_B + i_n, m_tn)
        C = load(p_C, i_t * s_C + i_n, m_tn)
        a = tl.exp2(by_channel(delta) * A)
        x = by_channel(delta * u) * by_state(B)
        ps, hs, _h = states(a, x, h, S)
        g, r = grads4(a, by_state(C) * by_channel(dy), r)

        ga = g * ps  # the gradient of Δ A
        dA += tl.sum(ga * by_channel(delta), 0)
        ddu = tl.sum(g * by_state(B), 1)
        ddt = tl.sum(ga * A, 1) / LOG2E + ddu * u
        if SOFTPLUS:
            ddt *= tl.sigmoid(raw)
        ddt = tl.where(m_td, ddt, 0.0)
        dD += tl.sum(dy * u, 0)
        dbias += tl.sum(ddt, 0)
        o_td = i_t * D + i_d
        tl.store(p_du + o_td, (ddu * delta + skip * dy).to(p_du.dtype.element_ty), m_td)
        tl.store(p_ddt + o_td, ddt.to(p_ddt.dtype.element_ty), m_td)
        o_tn = i_t * N + i_n
        tl.store(p_dB + o_tn, tl.sum(g * by_channel(delta * u), 2), m_tn)
        tl.store(p_dC + o_tn, tl.sum(hs * by_channel(dy), 2), m_tn)
    if LOG_A:
        dA *= tl.sum(A, 0) / LOG2E
    p_dparam += i_chunk * (N + 2) * D
    tl.store(p_dparam + i_nd, dA, mask=m_nd)
    tl.store(p_dparam + N * D + i_d, dD[None, :], mask=m_d)
    tl.store(p_dparam + (N + 1) * D + i_d, (BIASES * dbias)[None, :], mask=m_d)
