"""Selective scan in plain PyTorch operators, vectorised over chunks of the sequence.

The recurrence ``h_t = a_t * h_{t-1} + x_t`` (``a = exp(delta A)``, ``x = delta u B``) is linear, so
a chunk of T tokens maps its incoming state h_in to ``P * h_in + h_local``, where h_local is the
chunk's own scan from zero and ``P = exp(A * sum(delta))``. Hence three short loops instead of one
long one: T steps over all n chunks at once for h_local, n steps for the incoming states, and T
steps over all chunks again, now from the right states, which produce y. Nothing is divided, so
nothing overflows. The backward pass is the same scheme in reverse.

Sizes: batch, dim, dstate, seqlen; T tokens a chunk, n chunks, ``M = batch * n``. States are kept as
(M, dstate, dim) so that the innermost loop runs over contiguous channels. Long sequences or large
batches are cut into segments that hold at most ``SEGMENT`` state elements, which bounds the memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..sizes import ceil_div

SEGMENT = 2**24  # state elements (64 MiB in float32) a segment may hold
STEP = 2**17  # state elements worth one vectorised step: enough to hide call overhead, fits caches


class _Segment(NamedTuple):
    """One segment, time-major: x[t] is a step of all chunks."""

    start: int
    stop: int
    delta: Tensor  # T M 1 dim
    du: Tensor  # T M 1 dim
    B: Tensor  # T M dstate 1
    C: Tensor  # T M dstate 1


def _chunks(seqlen: int, row: int) -> int:
    """How many chunks to cut ``seqlen`` tokens into when a token's states are ``row`` elements."""
    n = min(STEP // row, int((2 * seqlen) ** 0.5))
    return n if n >= 4 else 1  # two passes over few chunks cost more than one long pass


def _pack(x: Tensor, n: int) -> Tensor:
    """(batch, tokens, c) → (T, batch * n, c), the end padded with zeros (the scan's identity)."""
    batch, tokens, c = x.shape
    T = ceil_div(tokens, n)
    x = F.pad(x, (0, 0, 0, n * T - tokens))
    return x.view(batch, n, T, c).permute(2, 0, 1, 3).reshape(T, batch * n, c)


def _unpack(x: Tensor, batch: int, tokens: int) -> Tensor:
    """The inverse of :func:`_pack`."""
    T, M, c = x.shape
    return x.view(T, batch, M // batch, c).permute(1, 2, 0, 3).reshape(batch, -1, c)[:, :tokens]


class _Scan:
    """The inputs in the computing dtype, cut into segments."""

    def __init__(
        self,
        u: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        dt_bias: Tensor,
        dt_softplus: bool,
    ) -> None:
        self.dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
        self.batch, self.seqlen, self.dim = u.shape
        self.dstate = A.shape[1]
        self.At = A.to(self.dtype).t().contiguous()  # dstate dim
        self.u, self.dt, self.B, self.C = u, dt, B, C
        self.dt_bias, self.dt_softplus = dt_bias.to(self.dtype), dt_softplus
        row = self.batch * self.dim * self.dstate
        self.tokens = min(self.seqlen, max(16, SEGMENT // row))  # of a segment
        self.n = _chunks(self.tokens, row)

    def starts(self) -> range:
        return range(0, self.seqlen, self.tokens)

    def dt_raw(self, start: int, stop: int) -> Tensor:
        return self.dt[:, start:stop].to(self.dtype) + self.dt_bias

    def segment(self, start: int) -> _Segment:
        stop = min(start + self.tokens, self.seqlen)
        delta = self.dt_raw(start, stop)
        if self.dt_softplus:
            delta = F.softplus(delta)
        du = delta * self.u[:, start:stop]
        B, C = (x[:, start:stop].to(self.dtype) for x in (self.B, self.C))
        n = self.n
        return _Segment(
            start,
            stop,
            _pack(delta, n)[:, :, None, :],
            _pack(du, n)[:, :, None, :],
            _pack(B, n)[..., None],
            _pack(C, n)[..., None],
        )

    def zeros(self, *lead: int) -> Tensor:
        return self.u.new_zeros((*lead, self.dstate, self.dim), dtype=self.dtype)

    def decay(self, seg: _Segment) -> Tensor:
        """P of every chunk: (batch, n, dstate, dim)."""
        return torch.exp(seg.delta.sum(0) * self.At).view(self.batch, self.n, *self.At.shape)

    def incoming(self, seg: _Segment, h: Tensor) -> tuple[Tensor, Tensor]:
        """States before every chunk (M, dstate, dim) and after the segment, from the one before.

        Args:
            seg: the segment.
            h: (batch, dstate, dim) state before the segment.
        """
        local = self.zeros(self.batch * self.n)
        a, x = torch.empty_like(local), torch.empty_like(local)
        for delta_t, du_t, B_t in zip(seg.delta, seg.du, seg.B, strict=True):
            torch.mul(delta_t, self.At, out=a).exp_()
            torch.mul(du_t, B_t, out=x)
            local.mul_(a).add_(x)
        local = local.view(self.batch, self.n, *self.At.shape)
        decay = self.decay(seg)
        h_in = torch.empty_like(local)
        for k in range(self.n):
            h_in[:, k] = h
            h = torch.addcmul(local[:, k], decay[:, k], h)
        return h_in.flatten(0, 1), h


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    dt_softplus: bool,
) -> Tensor:
    """Scan. Arguments as in ``api.selective_scan``; runs on any device."""
    scan = _Scan(u, dt, A, B, C, dt_bias, dt_softplus)
    y = torch.empty(u.shape, dtype=scan.dtype, device=u.device)
    h_last = scan.zeros(scan.batch)
    for start in scan.starts():
        seg = scan.segment(start)
        if scan.n > 1:
            h, h_last = scan.incoming(seg, h_last)
        else:
            h = h_last
        a, x = torch.empty_like(h), torch.empty_like(h)
        ys = h.new_empty(len(seg.du), len(h), scan.dim)
        for t, (delta_t, du_t, B_t, C_t) in enumerate(
            zip(seg.delta, seg.du, seg.B, seg.C, strict=True)
        ):
            torch.mul(delta_t, scan.At, out=a).exp_()
            torch.mul(du_t, B_t, out=x)
            h.mul_(a).add_(x)
            torch.mul(h, C_t, out=x)
            torch.sum(x, 1, out=ys[t])
        y[:, seg.start : seg.stop] = _unpack(ys, scan.batch, seg.stop - seg.start)
    return torch.addcmul(y, D.to(scan.dtype), u.to(scan.dtype)).to(u.dtype)


def selective_scan_backward(
    dy: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    dt_softplus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, dt, A, B, C, D, dt_bias; states are recomputed a segment at a time."""
    scan = _Scan(u, dt, A, B, C, dt_bias, dt_softplus)
    batch = scan.batch
    du, ddt = (torch.empty(u.shape, dtype=scan.dtype, device=u.device) for _ in range(2))
    dB, dC = (torch.empty(B.shape, dtype=scan.dtype, device=u.device) for _ in range(2))
    dAt = torch.zeros_like(scan.At)

    h_before = [scan.zeros(batch)]  # state before each segment
    for start in scan.starts()[:-1]:
        h_before.append(scan.incoming(scan.segment(start), h_before[-1])[1])

    r = scan.zeros(batch)  # gradient that reaches the state before the segment to come
    for start, h in zip(reversed(scan.starts()), reversed(h_before), strict=True):
        seg = scan.segment(start)
        dys = _pack(dy[:, seg.start : seg.stop].to(scan.dtype), scan.n)[:, :, None, :]
        T = len(dys)

        hs = scan.zeros(T + 1, batch * scan.n)  # hs[t] is the state before token t
        hs[0] = scan.incoming(seg, h)[0] if scan.n > 1 else h
        a = torch.exp(seg.delta * scan.At)
        x = torch.empty_like(hs[0])
        for t in range(T):
            torch.mul(seg.du[t], seg.B[t], out=x)
            torch.addcmul(x, a[t], hs[t], out=hs[t + 1])

        r, r_in = _outgoing(scan, seg, dys, a, r)
        g = torch.empty_like(x)
        acc_A = torch.zeros_like(x)
        ddus, ddeltas = torch.empty_like(seg.du), torch.empty_like(seg.du)
        dBs = torch.empty_like(seg.B)
        for t in reversed(range(T)):
            torch.addcmul(r_in, seg.C[t], dys[t], out=g)  # gradient of h_t
            torch.matmul(g, seg.du[t].mT, out=dBs[t])
            torch.mul(g, seg.B[t], out=x)
            torch.sum(x, 1, keepdim=True, out=ddus[t])
            torch.mul(a[t], g, out=r_in)
            torch.mul(r_in, hs[t], out=g)  # gradient of delta_t * A
            acc_A.addcmul_(g, seg.delta[t])
            torch.mul(g, scan.At, out=x)
            torch.sum(x, 1, keepdim=True, out=ddeltas[t])
        dCs = torch.matmul(hs[1:], dys.mT)
        dAt += acc_A.sum(0)

        part = slice(seg.start, seg.stop)
        tokens = seg.stop - seg.start
        ddu = _unpack(ddus.squeeze(2), batch, tokens)
        delta = _unpack(seg.delta.squeeze(2), batch, tokens)
        du[:, part] = ddu * delta
        ddelta = _unpack(ddeltas.squeeze(2), batch, tokens) + ddu * u[:, part]
        if dt_softplus:
            ddelta = ddelta * torch.sigmoid(scan.dt_raw(seg.start, seg.stop))
        ddt[:, part] = ddelta
        dB[:, part] = _unpack(dBs.squeeze(3), batch, tokens)
        dC[:, part] = _unpack(dCs.squeeze(3), batch, tokens)

    dy = dy.to(scan.dtype)
    du.addcmul_(dy, D.to(scan.dtype))
    dD = (dy * u).sum((0, 1))
    ddt_bias = ddt.sum((0, 1))
    return (
        du.to(u.dtype),
        ddt.to(dt.dtype),
        dAt.t().contiguous().to(A.dtype),
        dB.to(B.dtype),
        dC.to(C.dtype),
        dD.to(D.dtype),
        ddt_bias.to(dt_bias.dtype),
    )


def _outgoing(
    scan: _Scan, seg: _Segment, dys: Tensor, a: Tensor, r: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients that flow backwards across the chunks' borders; the mirror of ``incoming``.

    Args:
        scan: the inputs.
        seg: the segment.
        dys: (T, M, 1, dim) gradient of y.
        a: (T, M, dstate, dim) decays.
        r: (batch, dstate, dim) gradient reaching the segment's last state from the next segment.

    Returns:
        The gradient reaching the state before the segment, (batch, dstate, dim), and the one that
        reaches each chunk's last state from the next chunk, (M, dstate, dim).
    """
    shape = (scan.batch, scan.n, *scan.At.shape)
    local = scan.zeros(scan.batch * scan.n)
    for t in reversed(range(len(dys))):
        local.addcmul_(seg.C[t], dys[t]).mul_(a[t])
    local = local.view(shape)
    decay = scan.decay(seg)
    r_in = torch.empty_like(local)
    for k in reversed(range(scan.n)):
        r_in[:, k] = r
        r = torch.addcmul(local[:, k], decay[:, k], r)
    return r, r_in.flatten(0, 1)
