"""Sizes, buffers and launches of the Triton kernels."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...sizes import ceil_div, power_of_2
from ...triton_support import Launch, launch
from . import kernels

BLOCK_D = 32  # channels of a program: one a thread, in one warp
WARPS = 1
TILE, TILE_BACK = 8, 4  # tokens a thread holds at a time; ``backward`` also two of its tiles
PROGRAMS_EACH = 8  # that a multiprocessor holds at the same time, of ``backward``
MULTIPROCESSORS = 132  # where there is no GPU to ask
MIN_CHUNK, MAX_CHUNKS = 32, 256
FEW_CHUNKS = 32  # up to so many are carried on by those who need their states
CARRY_WARPS = 4
FINISH_TOKENS, FINISH_ROWS, FINISH_COLUMNS, FINISH_WARPS = 1024, 64, 32, 4


class Parameters(NamedTuple):
    """What is not a token's; meanings as in ``api.selective_scan``, but for the last two.

    With ``log_A`` A holds log(-A), and so does its gradient; dt_bias is added ``biases`` times.
    """

    A: Tensor
    D: Tensor
    dt_bias: Tensor
    dt_softplus: bool = True
    log_A: bool = False
    biases: int = 1

    @property
    def options(self) -> tuple[bool, bool, int]:
        """The kernels' SOFTPLUS, LOG_A, BIASES."""
        return self.dt_softplus, self.log_A, self.biases

    def contiguous(self) -> Parameters:
        """The same with contiguous tensors."""
        A, D, dt_bias = (x.contiguous() for x in self[:3])
        return self._replace(A=A, D=D, dt_bias=dt_bias)


class _Sizes(NamedTuple):
    """How a scan is cut up: chunks of ``tokens``, and the kernels' block sizes."""

    batch: int
    seqlen: int
    dim: int
    dstate: int
    tokens: int
    chunks: int
    blocks_d: int

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.blocks_d, self.chunks, self.batch

    @property
    def lengths(self) -> tuple[int, int, int, int]:
        """The kernels' L, D, N, T."""
        return self.seqlen, self.dim, self.dstate, self.tokens

    @property
    def carried(self) -> bool:
        """Whether ``kernels.carry`` finds the states between the chunks."""
        return self.chunks > FEW_CHUNKS

    @property
    def block(self) -> tuple[int, int]:
        """The kernels' BD, BN."""
        return BLOCK_D, power_of_2(self.dstate)


@functools.cache
def _multiprocessors(device: int) -> int:
    if device < 0:
        return MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def _sizes(u: Tensor, A: Tensor) -> _Sizes:
    """As many chunks as a GPU works on at once: a few more would make all wait for them."""
    batch, seqlen, dim = u.shape
    blocks_d = ceil_div(dim, BLOCK_D)
    programs = PROGRAMS_EACH * _multiprocessors(u.get_device())
    wanted = min(programs // (batch * blocks_d), MAX_CHUNKS, seqlen // MIN_CHUNK)
    tokens = seqlen if wanted < 2 else ceil_div(seqlen, wanted)
    tile = max(TILE, 2 * TILE_BACK)
    tokens = ceil_div(tokens, tile) * tile
    chunks = ceil_div(seqlen, tokens)
    return _Sizes(batch, seqlen, dim, A.shape[1], tokens, chunks, blocks_d)


def takes(tokens: Tensor) -> bool:
    """Whether ``_rows`` would leave halves of tokens (batch, seqlen, 2 dim) as they are.

    Of contiguous ones of 16 bits; and dt of a rank up to 2 dim, B and C beside it, of an even
    dstate up to 64.
    """
    _, seqlen, channels = tokens.shape
    return channels % 4 == 0 and seqlen * (channels + 129) < 2**31


def _rows(x: Tensor) -> Tensor:
    """The tensor with contiguous channels; other strides are the kernels' to follow.

    They count the elements of one batch item in 32 bits, and read those of 16 bits in pairs, others
    as float32.
    """
    pairs = x.element_size() == 2 and x.shape[2] % 2 == 0
    if not pairs and x.dtype != torch.float32:
        return x.float().contiguous()
    s_batch, s_token, s_channel = x.stride()
    fits = s_channel == 1 and x.shape[1] * s_token < 2**31
    if pairs:
        fits = fits and (s_batch | s_token) % 2 == 0 and x.data_ptr() % 4 == 0
    # Not contiguous(), which keeps odd addresses, and odd strides of axes of one.
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def _like(x: Tensor) -> Tensor:
    """Return a new contiguous tensor."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


class _EndsLaunch(NamedTuple):
    """The launches that find what chunks do to states before them, or to gradients behind them."""

    chunk_ends: Launch
    carry: Launch | None
    shape: tuple[int, ...]  # of what they find: decays and ends, each (batch, chunks, dstate, dim)

    @classmethod
    def of(
        cls, sizes: _Sizes, v: Tensor, dt: Tensor, w: Tensor, parameters: Parameters, back: bool
    ) -> _EndsLaunch:
        """For tensors laid out like these; with ``back`` for gradients."""
        chunk_ends = Launch(
            kernels.chunk_ends,
            (sizes.blocks_d, sizes.chunks - 1, sizes.batch),
            (
                v.stride(0), dt.stride(0), w.stride(0), v.stride(1), dt.stride(1), w.stride(1),
                *sizes.lengths, sizes.chunks,
            ),
            (*parameters.options, back, *sizes.block, TILE),
            WARPS,
        )  # fmt: skip
        carry = None
        if sizes.carried:
            carry = Launch(
                kernels.carry,
                (sizes.blocks_d, sizes.dstate, sizes.batch),
                (sizes.chunks, sizes.dim, sizes.dstate),
                (back, BLOCK_D, power_of_2(sizes.chunks)),
                CARRY_WARPS,
            )
        return cls(chunk_ends, carry, (2, sizes.batch, sizes.chunks, sizes.dstate, sizes.dim))

    def __call__(self, v: Tensor, dt: Tensor, w: Tensor, parameters: Parameters) -> Tensor:
        ends = torch.empty(self.shape, dtype=torch.float32, device=v.device)
        decay, end = ends.unbind()
        self.chunk_ends(v, dt, parameters.A, w, parameters.dt_bias, end, decay)
        if self.carry:
            self.carry(decay, end)
        return ends


class ScanLaunch(NamedTuple):
    """The launches of a scan."""

    ends: _EndsLaunch | None
    forward: Launch

    @classmethod
    def of(
        cls, u: Tensor, dt: Tensor, B: Tensor, C: Tensor, parameters: Parameters, y: Tensor
    ) -> ScanLaunch:
        """For tensors laid out like these, as ``_rows`` gives them, and contiguous parameters."""
        sizes = _sizes(u, parameters.A)
        forward = Launch(
            kernels.forward,
            sizes.grid,
            (
                u.stride(0), dt.stride(0), B.stride(0), C.stride(0), y.stride(0),
                u.stride(1), dt.stride(1), B.stride(1), C.stride(1), y.stride(1),
                *sizes.lengths,
            ),
            (*parameters.options, sizes.carried, *sizes.block, TILE),
            WARPS,
        )  # fmt: skip
        if sizes.chunks == 1:
            return cls(None, forward)
        return cls(_EndsLaunch.of(sizes, u, dt, B, parameters, False), forward)

    def __call__(
        self, u: Tensor, dt: Tensor, B: Tensor, C: Tensor, parameters: Parameters, y: Tensor
    ) -> Tensor | None:
        """Scan into y; return decays and states between chunks, None for one chunk."""
        ends = self.ends(u, dt, B, parameters) if self.ends else None
        A, D, dt_bias = parameters[:3]
        decay, h = (A, A) if ends is None else ends.unbind()  # stand-ins
        self.forward(u, dt, A, B, C, D, dt_bias, decay, h, y)
        return ends


def scan(
    u: Tensor, dt: Tensor, B: Tensor, C: Tensor, parameters: Parameters, y: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Scan; into y (batch, seqlen, dim) where it is given, whose channels are contiguous.

    Returns y and what ``scan_backward`` wants of it, see :class:`ScanLaunch`.
    """
    if y is None:
        y = _like(u)
    u, dt, B, C = (_rows(x) for x in (u, dt, B, C))
    tensors = u, dt, B, C, parameters.contiguous(), y
    return y, ScanLaunch.of(*tensors)(*tensors)


class Gradients(NamedTuple):
    """Of a scan's tensors, in their dtypes; in the order of ``api.selective_scan``."""

    u: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    dt_bias: Tensor


def scan_backward(
    dy: Tensor,
    u: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    parameters: Parameters,
    ends: Tensor | None = None,
    dBC: tuple[Tensor, Tensor] | None = None,
) -> Gradients:
    """Gradients; B's and C's into dBC where it is given, whose states are contiguous.

    ``ends`` are what ``scan`` returned. All other states are computed again.
    """
    parameters = parameters.contiguous()
    dB, dC = dBC or (_like(B), _like(C))
    A, D, dt_bias = (_like(x) for x in parameters[:3])
    grads = Gradients(_like(u), _like(dt), A, dB, dC, D, dt_bias)
    dy, u, dt, B, C = (_rows(x) for x in (dy, u, dt, B, C))
    sizes = _sizes(u, parameters.A)
    batch, seqlen, dim, dstate, tokens, chunks, blocks_d = sizes

    def scratch(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=u.device)

    parts = scratch(2, batch, blocks_d, seqlen, dstate)
    dparam = scratch(batch * chunks, dstate + 2, dim)
    h_tile = scratch(batch * chunks * (tokens // TILE_BACK), dstate, dim)
    decay = h = r_decay = r = parameters.A  # stand-ins
    if chunks > 1:
        if ends is None:
            ends = _EndsLaunch.of(sizes, u, dt, B, parameters, False)(u, dt, B, parameters)
        decay, h = ends
        r_decay, r = _EndsLaunch.of(sizes, dy, dt, C, parameters, True)(dy, dt, C, parameters)
    launch(
        kernels.backward,
        sizes.grid,
        (
            u, dt, parameters.A, B, C, parameters.D, parameters.dt_bias, dy, decay, h, r_decay, r,
            h_tile, grads.u, grads.dt, parts[0], parts[1], dparam,
        ),
        (
            u.stride(0), dt.stride(0), B.stride(0), C.stride(0), dy.stride(0),
            u.stride(1), dt.stride(1), B.stride(1), C.stride(1), dy.stride(1),
            *sizes.lengths,
        ),
        (*parameters.options, sizes.carried, *sizes.block, TILE_BACK),
        WARPS,
    )  # fmt: skip
    columns = ceil_div((dstate + 2) * dim, FINISH_COLUMNS)
    programs = columns + 2 * batch * ceil_div(seqlen * dstate, FINISH_TOKENS)
    launch(
        kernels.finish,
        (programs, 1, 1),
        (
            parts[0], parts[1], dparam, grads.B, grads.C, grads.A, grads.D, grads.dt_bias,
        ),
        (
            grads.B.stride(0), grads.C.stride(0), grads.B.stride(1), grads.C.stride(1),
            seqlen, dim, dstate, batch, blocks_d, batch * chunks, columns,
        ),
        (FINISH_TOKENS, FINISH_ROWS, FINISH_COLUMNS),
        FINISH_WARPS,
    )  # fmt: skip
    return grads


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
    """Scan. Arguments as in ``api.selective_scan``."""
    return scan(u, dt, B, C, Parameters(A, D, dt_bias, dt_softplus))[0]


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
    """Gradients of u, dt, A, B, C, D, dt_bias."""
    return scan_backward(dy, u, dt, B, C, Parameters(A, D, dt_bias, dt_softplus))


class SelectiveScanFunction(torch.autograd.Function):
    """The scan with gradients, without the detour through PyTorch's dispatcher."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        """Arguments as in ``api.selective_scan``, in order."""
        u, dt, A, B, C, D, dt_bias, ctx.dt_softplus = args
        y, ends = scan(u, dt, B, C, Parameters(A, D, dt_bias, ctx.dt_softplus))
        ctx.save_for_backward(u, dt, A, B, C, D, dt_bias, ends)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the tensors."""
        u, dt, A, B, C, D, dt_bias, ends = ctx.saved_tensors
        parameters = Parameters(A, D, dt_bias, ctx.dt_softplus)
        grads = scan_backward(dy, u, dt, B, C, parameters, ends)
        return *grads, None
