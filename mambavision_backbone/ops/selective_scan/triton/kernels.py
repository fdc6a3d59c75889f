"""Device code of the selective scan.

A sequence is cut into chunks of T tokens, and one program walks through one chunk of BD channels in
tiles of S tokens. Tiles are (S, BN, BD) in registers: a thread owns a channel and holds the tile's
tokens and states, so the recurrence over tokens (spelled out on halves of halves of a tile: tl's
own scan shuffles lanes when reversed) and the sums over states stay inside a thread. Sums over
channels (gradients of B and C) are taken of tiles turned round, (BD, S · BN).

Chunks are independent once their incoming states are known: ``chunk_ends`` finds what every chunk
does to its incoming state, ``carry`` runs over the chunks if they are many, ``forward`` and
``backward`` do the rest, ``finish`` sums the gradients' parts. With one chunk ``chunk_ends`` is not
needed. There are no atomics, so results do not depend on the order of programs.

Names: ``p_`` pointer, ``s_`` stride in elements (``sb_`` of the batch), ``i_`` index, ``m_`` mask;
L seqlen, D dim, N dstate. With LOG_A, p_A holds log(-A) and dparam its gradient; p_bias is added
BIASES times. All arithmetic is float32. A token past the end has u = dy = 0 and Δ ≥ 0, and so,
as A ≤ 0, a decay of at most 1: no state and no gradient comes of it.
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
    z = tl.exp2(tl.abs(x) * -LOG2E)
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
    """The same of four tokens."""
    a1, a2 = halve(a)
    q1, q2 = halve(q)
    gs2, r = grads2(a2, q2, r)
    gs1, r = grads2(a1, q1, r)
    return stack(gs1, gs2), r


@triton.jit
def grads(a, q, r, S: tl.constexpr):
    """The same of a tile of S = 4 or 8 tokens."""
    if S == 4:
        gs, r = grads4(a, q, r)
    else:
        tl.static_assert(S == 8)
        a1, a2 = halve(a)
        q1, q2 = halve(q)
        gs2, r = grads4(a2, q2, r)
        gs1, r = grads4(a1, q1, r)
        gs = stack(gs1, gs2)
    return gs, r


@triton.jit
def load(p, o, m):
    """Elements at offsets o in float32, zeros where masked."""
    return tl.load(p + o, mask=m, other=0.0).to(tl.float32)


@triton.jit
def settle(x):
    """Have x (two axes) computed in one layout and copied from there to others.

    The compiler would else compute x in every layout that is wanted, from the loads on, but it does
    not look through a reduction, be it of an axis of one.
    """
    return tl.sum(x[None, :, :], 0)


@triton.jit
def ones_of_load(p, o):
    """Ones for ``sum_channels``, by a load that reads nothing: o is never negative.

    Of elements that do not adjoin, for a thread would take four that do, and so four columns.
    """
    return tl.load(p + 2 * o, mask=o < 0, other=1.0)


@triton.jit
def sum_channels(x, ones):
    """(S, BN, BD) → (1, S · BN).

    The tile is turned round through shared memory, so that a thread sums one column. Left alone the
    compiler sums by shuffles; but it follows the layout of a load, be it of (1, S · BN) ones.
    """
    x = settle(tl.reshape(x, (x.shape[0] * x.shape[1], x.shape[2])))
    return tl.sum(tl.trans(x) * ones, 0)[None, :]


@triton.jit
def by_channel(x):
    """(S, BD) → (S, 1, BD)."""
    return x[:, None, :]


@triton.jit
def by_state(x):
    """(S, BN) → (S, BN, 1)."""
    return x[:, :, None]


@triton.jit
def by_pair(x):
    """(1, BN, BD) → (BN, BD); a sum over the axis, stored, crashes Triton 3.0's compiler."""
    return tl.reshape(x, (x.shape[1], x.shape[2]))


@triton.jit
def fetch(p, s, i_t, first, X, stop, WIDTH: tl.constexpr):
    """Elements from ``first`` on, up to X, of tokens i_t; 16-bit ones in pairs as integers.

    Tiles are fetched a round before they are needed: a multiprocessor holds too few programs to
    work on while one waits for its loads. Pairs, for the compiler waits for elements of 16 bits
    where it packs them into a register, in the round that loads them.
    """
    if p.dtype.element_ty == tl.float32:
        i_x = first + tl.arange(0, WIDTH)[None, :]
        return tl.load(p + i_t * s + i_x, mask=(i_t < stop) & (i_x < X), other=0.0)
    else:
        i_x = first // 2 + tl.arange(0, WIDTH // 2)[None, :]
        p_pair = p.to(tl.pointer_type(tl.int32))
        return tl.load(p_pair + i_t * (s // 2) + i_x, mask=(i_t < stop) & (i_x < X // 2), other=0)


@triton.jit
def fetched(x, p):
    """In float32, and settled, what was fetched from p."""
    if p.dtype.element_ty == tl.float32:
        return settle(x)
    else:
        low = x.to(tl.int16).to(p.dtype.element_ty, bitcast=True)
        high = (x >> 16).to(tl.int16).to(p.dtype.element_ty, bitcast=True)
        x = tl.reshape(tl.join(low, high), (x.shape[0], 2 * x.shape[1]))
        return settle(x.to(tl.float32))


@triton.jit
def step_size(dt, bias, m, SOFTPLUS: tl.constexpr):
    """Return dt + bias and Δ; past the end (not m) it is positive with softplus, else zero."""
    raw = dt + bias
    return raw, softplus(raw) if SOFTPLUS else tl.where(m, raw, 0.0)


@triton.jit
def load_A(p_A, i_d, D, N, BN: tl.constexpr, LOG_A: tl.constexpr):
    """A transposed, (1, BN, BD), in units of log2; where LOG_A from log(-A)."""
    i_n = tl.arange(0, BN)[:, None]
    m = (i_n < N) & (i_d < D)
    A = load(p_A, i_d * N + i_n, m)
    A = tl.where(m, -tl.exp(A), 0.0) if LOG_A else A
    return (A * LOG2E)[None, :, :]


@triton.jit(do_not_specialize=["sb_w", "L", "T", "chunks"])
def chunk_ends(
    p_v, p_dt, p_A, p_w, p_bias, p_end, p_decay,
    sb_v, sb_dt, sb_w, s_v, s_dt, s_w,
    L, D, N, T, chunks,
    SOFTPLUS: tl.constexpr, LOG_A: tl.constexpr, BIASES: tl.constexpr, BACK: tl.constexpr,
    BD: tl.constexpr, BN: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Of every chunk but the last: the state behind it if there is none before it; v is u, w is B.

    With BACK, of every chunk but the first, the gradient that reaches the state before it if none
    comes from behind; v is dy, w is C. Writes that, end, and what is left of a state, or of its
    gradient, across the chunk, decay: (batch, chunks, N, D).
    """
    i_c, i_b = tl.program_id(1) + BACK, tl.program_id(2).to(tl.int64)
    first_d = tl.program_id(0) * BD
    i_d = first_d + tl.arange(0, BD)[None, :]
    i_s = tl.arange(0, S)[:, None]
    m_d = i_d < D
    i_nd = tl.arange(0, BN)[:, None] * D + i_d
    m_nd = (tl.arange(0, BN)[:, None] < N) & m_d
    A = load_A(p_A, i_d, D, N, BN, LOG_A)
    bias = load(p_bias, i_d, m_d) * BIASES
    p_v += i_b * sb_v
    p_dt += i_b * sb_dt
    p_w += i_b * sb_w

    end = tl.zeros((1, BN, BD), tl.float32)
    total = tl.zeros((1, BD), tl.float32)
    start = i_c * T
    stop = tl.minimum(start + T, L)
    tiles = tl.cdiv(stop - start, S)
    step = -S if BACK else S
    i_t = (start + (tiles - 1) * S if BACK else start) + i_s
    next_v = fetch(p_v, s_v, i_t, first_d, D, stop, BD)
    next_dt = fetch(p_dt, s_dt, i_t, first_d, D, stop, BD)
    next_w = fetch(p_w, s_w, i_t, 0, N, stop, BN)
    for _ in range(0, tiles):
        v, dt, w = fetched(next_v, p_v), fetched(next_dt, p_dt), fetched(next_w, p_w)
        m_t = i_t < stop
        i_t += step  # in the end past the chunk, for nothing
        next_v = fetch(p_v, s_v, i_t, first_d, D, stop, BD)
        next_dt = fetch(p_dt, s_dt, i_t, first_d, D, stop, BD)
        next_w = fetch(p_w, s_w, i_t, 0, N, stop, BN)
        _raw, delta = step_size(dt, bias, m_t, SOFTPLUS)
        a = tl.exp2(by_channel(delta) * A)
        if BACK:
            _gs, end = grads(a, by_channel(v) * by_state(w), end, S)
        else:
            _ps, _hs, end = states(a, by_channel(delta * v) * by_state(w), end, S)
        total += tl.sum(delta, 0)[None, :]
    o_nd = (i_b * chunks + i_c) * N * D + i_nd
    tl.store(p_end + o_nd, by_pair(end), mask=m_nd)
    tl.store(p_decay + o_nd, by_pair(tl.exp2(A * by_channel(total))), mask=m_nd)


@triton.jit
def compose_ends(p_decay, p_end, i_chunk, step, count, o, m, ND):
    """(BN, BD): what ``carry`` leaves behind ``count`` chunks, from i_chunk on in steps."""
    h = tl.zeros(o.shape, tl.float32)
    for k in range(0, count):
        first = (i_chunk + step * k) * ND
        h = load(p_decay + first, o, m) * h + load(p_end + first, o, m)
    return h


@triton.jit(do_not_specialize=["chunks"])
def carry(
    p_decay, p_end, chunks, D, N, BACK: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """From what ``chunk_ends`` writes: states behind every chunk; with BACK gradients before.

    They replace its ends. One program holds all chunks, at most BK, of BD channels of a state.
    """
    i_n, i_b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    i_d = tl.program_id(0) * BD + tl.arange(0, BD)[None, :]
    i_c = tl.arange(0, BK)[:, None]
    m = (i_c < chunks - 1) & (i_d < D)
    if BACK:
        i_c = chunks - 1 - i_c
    o = ((i_b * chunks + i_c) * N + i_n) * D + i_d
    _decay, end = tl.associative_scan((load(p_decay, o, m), load(p_end, o, m)), 0, compose)
    tl.store(p_end + o, end, mask=m)


@triton.jit(do_not_specialize=["sb_B", "sb_C", "L", "T"])
def forward(
    p_u, p_dt, p_A, p_B, p_C, p_D, p_bias, p_decay, p_h, p_y,
    sb_u, sb_dt, sb_B, sb_C, sb_y, s_u, s_dt, s_B, s_C, s_y,
    L, D, N, T,
    SOFTPLUS: tl.constexpr, LOG_A: tl.constexpr, BIASES: tl.constexpr, CARRIED: tl.constexpr,
    BD: tl.constexpr, BN: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Write y (batch, L, D) of every chunk.

    With CARRIED p_h is ``carry``'s, else ``chunk_ends``'s, which a few chunks are composed of here.
    """
    i_c, i_b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    first_d = tl.program_id(0) * BD
    i_d = first_d + tl.arange(0, BD)[None, :]
    i_s = tl.arange(0, S)[:, None]
    m_d = i_d < D
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

    i_chunk = i_b * tl.num_programs(1) + i_c
    if CARRIED:
        h = load(p_h + (i_chunk - 1) * N * D, i_nd, m_nd & (i_c > 0))[None, :, :]
    else:
        h = compose_ends(p_decay, p_h, i_chunk - i_c, 1, i_c, i_nd, m_nd, N * D)[None, :, :]
    stop = tl.minimum(i_c * T + T, L)
    i_t = i_c * T + i_s
    next_u = fetch(p_u, s_u, i_t, first_d, D, stop, BD)
    next_dt = fetch(p_dt, s_dt, i_t, first_d, D, stop, BD)
    next_B = fetch(p_B, s_B, i_t, 0, N, stop, BN)
    next_C = fetch(p_C, s_C, i_t, 0, N, stop, BN)
    for t in range(i_c * T, stop, S):
        u, dt = fetched(next_u, p_u), fetched(next_dt, p_dt)
        B, C = fetched(next_B, p_B), fetched(next_C, p_C)
        i_t = t + S + i_s
        next_u = fetch(p_u, s_u, i_t, first_d, D, stop, BD)
        next_dt = fetch(p_dt, s_dt, i_t, first_d, D, stop, BD)
        next_B = fetch(p_B, s_B, i_t, 0, N, stop, BN)
        next_C = fetch(p_C, s_C, i_t, 0, N, stop, BN)
        i_t = t + i_s
        m_td = (i_t < stop) & m_d
        _raw, delta = step_size(dt, bias, m_td, SOFTPLUS)
        a = tl.exp2(by_channel(delta) * A)
        _ps, hs, h = states(a, by_channel(delta * u) * by_state(B), h, S)
        y = tl.sum(hs * by_state(C), 1) + skip * u
        tl.store(p_y + i_t * s_y + i_d, y.to(p_y.dtype.element_ty), mask=m_td)


@triton.jit(do_not_specialize=["sb_B", "sb_C", "L", "T"])
def backward(
    p_u, p_dt, p_A, p_B, p_C, p_D, p_bias, p_dy, p_h_decay, p_h, p_r_decay, p_r,
    p_h_tile, p_du, p_ddt, p_dB, p_dC, p_dparam,
    sb_u, sb_dt, sb_B, sb_C, sb_dy, s_u, s_dt, s_B, s_C, s_dy,
    L, D, N, T,
    SOFTPLUS: tl.constexpr, LOG_A: tl.constexpr, BIASES: tl.constexpr, CARRIED: tl.constexpr,
    BD: tl.constexpr, BN: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Gradients of every chunk; CARRIED, p_h and p_r as in ``forward``.

    Walks forward to note the state before each tile in h_tile (batch, tiles, N, D), then backward.
    Writes du, ddt (batch, L, D); and to be summed by ``finish``: dB, dC as one part for each block
    of channels, (batch, channel blocks, L, N), and dparam (batch · chunks, N + 2, D), the chunk's
    dA transposed, dD, ddt_bias.
    """
    i_c, i_b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    first_d = tl.program_id(0) * BD
    i_d = first_d + tl.arange(0, BD)[None, :]
    i_s = tl.arange(0, S)[:, None]
    m_d = i_d < D
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
    i_part = i_b * tl.num_programs(0) + tl.program_id(0)
    p_dB += i_part * L * N
    p_dC += i_part * L * N

    i_chunk = i_b * tl.num_programs(1) + i_c
    behind = tl.num_programs(1) - 1 - i_c
    ND = tl.cast(N, tl.int64) * D
    if CARRIED:
        h = load(p_h + (i_chunk - 1) * ND, i_nd, m_nd & (i_c > 0))[None, :, :]
        r = load(p_r + (i_chunk + 1) * ND, i_nd, m_nd & (behind > 0))[None, :, :]
    else:
        h = compose_ends(p_h_decay, p_h, i_chunk - i_c, 1, i_c, i_nd, m_nd, ND)[None, :, :]
        last = i_chunk + behind
        r = compose_ends(p_r_decay, p_r, last, -1, behind, i_nd, m_nd, ND)[None, :, :]
    start = i_c * T
    stop = tl.minimum(start + T, L)
    tiles = tl.cdiv(stop - start, S)
    p_h_tile += i_chunk * (T // S) * ND
    i_2s = tl.arange(0, 2 * S)[:, None]  # two tiles at a time: more to do while loads are under way
    i_t = start + i_2s
    next_u = fetch(p_u, s_u, i_t, first_d, D, stop, BD)
    next_dt = fetch(p_dt, s_dt, i_t, first_d, D, stop, BD)
    next_B = fetch(p_B, s_B, i_t, 0, N, stop, BN)
    for k in range(0, tiles, 2):
        u, dt, B = fetched(next_u, p_u), fetched(next_dt, p_dt), fetched(next_B, p_B)
        m_t = i_t < stop
        i_t += 2 * S
        next_u = fetch(p_u, s_u, i_t, first_d, D, stop, BD)
        next_dt = fetch(p_dt, s_dt, i_t, first_d, D, stop, BD)
        next_B = fetch(p_B, s_B, i_t, 0, N, stop, BN)
        _raw, delta = step_size(dt, bias, m_t, SOFTPLUS)
        a1, a2 = halve(tl.exp2(by_channel(delta) * A))
        x1, x2 = halve(by_channel(delta * u) * by_state(B))
        _ps, _hs, middle = states(a1, x1, h, S)
        tl.store(p_h_tile + k * ND + i_nd, by_pair(h), mask=m_nd)
        tl.store(p_h_tile + (k + 1) * ND + i_nd, by_pair(middle), mask=m_nd)
        _ps, _hs, h = states(a2, x2, middle, S)

    tl.debug_barrier()  # h_tile is read below
    # Of a tile turned round: side by side, the states of its tokens.
    j_t = tl.arange(0, S * BN)[None, :] // BN
    j_n = tl.arange(0, S * BN)[None, :] % BN
    j_tn = j_t * N + j_n
    ones = ones_of_load(p_dC, j_tn)
    dA = tl.zeros((BN, BD), tl.float32)
    dD = tl.zeros((1, BD), tl.float32)
    dbias = tl.zeros((1, BD), tl.float32)
    i_t = start + (tiles - 1) * S + i_s
    next_h = load(p_h_tile + (tiles - 1) * ND, i_nd, m_nd)
    next_u = fetch(p_u, s_u, i_t, first_d, D, stop, BD)
    next_dt = fetch(p_dt, s_dt, i_t, first_d, D, stop, BD)
    next_dy = fetch(p_dy, s_dy, i_t, first_d, D, stop, BD)
    next_B = fetch(p_B, s_B, i_t, 0, N, stop, BN)
    next_C = fetch(p_C, s_C, i_t, 0, N, stop, BN)
    for back in range(0, tiles):
        k = tiles - 1 - back
        h = next_h[None, :, :]
        u, dt, dy = fetched(next_u, p_u), fetched(next_dt, p_dt), fetched(next_dy, p_dy)
        B, C = fetched(next_B, p_B), fetched(next_C, p_C)
        t = start + k * S
        more = tl.maximum(k - 1, 0)  # the first tile is fetched once more, for nothing
        i_t = start + more * S + i_s
        next_h = load(p_h_tile + more * ND, i_nd, m_nd)
        next_u = fetch(p_u, s_u, i_t, first_d, D, stop, BD)
        next_dt = fetch(p_dt, s_dt, i_t, first_d, D, stop, BD)
        next_dy = fetch(p_dy, s_dy, i_t, first_d, D, stop, BD)
        next_B = fetch(p_B, s_B, i_t, 0, N, stop, BN)
        next_C = fetch(p_C, s_C, i_t, 0, N, stop, BN)
        i_t = t + i_s
        m_td = (i_t < stop) & m_d
        raw, delta = step_size(dt, bias, m_td, SOFTPLUS)
        a = tl.exp2(by_channel(delta) * A)
        delta_u = by_channel(delta * u)
        ps, hs, _h = states(a, delta_u * by_state(B), h, S)
        m_tn = (t + j_t < stop) & (j_n < N)
        tl.store(p_dC + t * N + j_tn, sum_channels(hs * by_channel(dy), ones), m_tn)

        g, r = grads(a, by_state(C) * by_channel(dy), r, S)
        r = settle(by_pair(r))[None, :, :]  # else two layouts of it are carried on
        ddu = tl.sum(g * by_state(B), 1)
        g_ps = g * ps
        ddt = tl.sum(g_ps * A, 1) / LOG2E + ddu * u
        if SOFTPLUS:
            ddt *= tl.exp2((raw - delta) * LOG2E)  # the logistic function of raw
        o_td = i_t * D + i_d
        tl.store(p_du + o_td, (ddu * delta + skip * dy).to(p_du.dtype.element_ty), m_td)
        tl.store(p_ddt + o_td, ddt.to(p_ddt.dtype.element_ty), m_td)
        tl.store(p_dB + t * N + j_tn, sum_channels(g * delta_u, ones), m_tn)
        dA += tl.sum(g_ps * by_channel(delta), 0)
        dD += tl.sum(dy * u, 0)[None, :]
        dbias += tl.sum(ddt, 0)[None, :]
    if LOG_A:
        dA *= by_pair(A) / LOG2E
    p_dparam += i_chunk * (N + 2) * D
    tl.store(p_dparam + i_nd, dA, mask=m_nd)
    tl.store(p_dparam + N * D + i_d, dD, mask=m_d)
    tl.store(p_dparam + (N + 1) * D + i_d, BIASES * dbias, mask=m_d)


@triton.jit
def sum_parameters(
    p_dparam, p_dA, p_dD, p_dbias, i_c, D, N, rows, BR: tl.constexpr, BC: tl.constexpr
):
    """Sum columns i_c (1, BC) of dparam."""
    total = tl.zeros((BR, BC), tl.float32)
    for k in range(0, rows, BR):
        i_r = k + tl.arange(0, BR)[:, None]
        o = i_r.to(tl.int64) * (N + 2) * D + i_c
        total += load(p_dparam, o, (i_r < rows) & (i_c < (N + 2) * D))
    total = tl.sum(total, 0)[None, :]
    i_n, i_d = i_c // D, i_c % D
    tl.store(p_dA + i_d * N + i_n, total.to(p_dA.dtype.element_ty), i_n < N)
    tl.store(p_dD + i_d, total.to(p_dD.dtype.element_ty), i_n == N)
    tl.store(p_dbias + i_d, total.to(p_dbias.dtype.element_ty), i_n == N + 1)


@triton.jit
def sum_tokens(p_parts, p_sum, sb_sum, s_sum, i_b, i_tn, L, N, parts, BP: tl.constexpr):
    """Sum elements i_tn (BP,) of dB or dC of one batch item."""
    m = i_tn < L * N
    total = tl.zeros((BP,), tl.float32)
    for part in range(0, parts):
        total += load(p_parts + (i_b * parts + part) * L * N, i_tn, m)
    o = i_b * sb_sum + i_tn // N * s_sum + i_tn % N
    tl.store(p_sum + o, total.to(p_sum.dtype.element_ty), m)


@triton.jit(do_not_specialize=["sb_dB", "sb_dC", "batch", "parts", "rows", "blocks"])
def finish(
    p_dB_parts, p_dC_parts, p_dparam, p_dB, p_dC, p_dA, p_dD, p_dbias,
    sb_dB, sb_dC, s_dB, s_dC,
    L, D, N, batch, parts, rows, blocks,
    BP: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Sum dB, dC and dparam over their parts.

    The first ``blocks`` programs take BC columns of dparam's ``rows`` each, BR rows at a time, the
    others BP elements of a batch item's dB or dC.
    """
    i_p = tl.program_id(0)
    if i_p < blocks:
        i_c = i_p * BC + tl.arange(0, BC)[None, :]
        sum_parameters(p_dparam, p_dA, p_dD, p_dbias, i_c, D, N, rows, BR, BC)
    else:
        i_p -= blocks
        per = tl.cdiv(L * N, BP)
        i_b = (i_p // per).to(tl.int64)  # dB's items come first, then dC's
        i_tn = i_p % per * BP + tl.arange(0, BP)
        if i_b < batch:
            sum_tokens(p_dB_parts, p_dB, sb_dB, s_dB, i_b, i_tn, L, N, parts, BP)
        else:
            sum_tokens(p_dC_parts, p_dC, sb_dC, s_dC, i_b - batch, i_tn, L, N, parts, BP)
