"""The public function: its meaning, the checks, and the choice of backend."""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from ..triton_support import traced
from . import mamba_ssm, triton
from .schema import BACKENDS

logger = logging.getLogger("mambavision_backbone")

CHOICES = ("auto", *BACKENDS)
_GPU_BACKENDS = {"triton": triton, "mamba_ssm": mamba_ssm}  # the first that works is taken
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Selective state-space scan of one direction.

    ``h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t``, ``y_t = C_t . h_t + D u_t``, with
    ``h_0 = 0`` and ``delta = softplus(dt + dt_bias)``. The state is kept in float32 (float64 for
    float64 inputs) whatever the inputs are.
    Source: Gu & Dao, "Mamba", arXiv 2312.00752, section 3; docs/selective_scan.md.

    Args:
        u: (batch, seqlen, dim) input.
        dt: (batch, seqlen, dim) step sizes before bias and softplus.
        A: (dim, dstate) decay rates, negative.
        B: (batch, seqlen, dstate) input projection.
        C: (batch, seqlen, dstate) output projection.
        D: (dim,) skip, or None for none.
        dt_bias: (dim,), or None for none.
        dt_softplus: whether softplus is applied to ``dt + dt_bias``.
        backend: ``auto`` (for CUDA tensors the first that works of triton and mamba_ssm, else
            chunked), ``chunked`` (PyTorch operators, any device), ``triton`` (kernels of this
            package, dstate up to 16), ``mamba_ssm`` (its CUDA kernel), ``reference`` (a plain
            loop).

    Returns:
        (batch, seqlen, dim) in u's dtype.

    Raises:
        ValueError: a wrong shape, dtype, device or backend; the message names the argument.
        RuntimeError: a backend asked for by name that cannot run here; the message says why.
    """
    _check(u, dt, A, B, C, D, dt_bias)
    D = u.new_zeros(u.shape[2], dtype=A.dtype) if D is None else D
    dt_bias = u.new_zeros(u.shape[2], dtype=A.dtype) if dt_bias is None else dt_bias
    backend = choose_backend(backend, u, A)
    if backend == "triton" and not traced():  # a dispatched call takes longer than the scan
        return triton.direct(u, dt, A, B, C, D, dt_bias, dt_softplus)
    return torch.ops.mambavision.selective_scan(u, dt, A, B, C, D, dt_bias, dt_softplus, backend)


def check_backend(backend: str) -> str:
    """Return the name if it is one of the backends or ``auto``; ValueError otherwise."""
    if backend not in CHOICES:
        raise ValueError(f"unknown scan backend {backend!r}: choose one of {', '.join(CHOICES)}")
    return backend


def choose_backend(backend: str, u: Tensor, A: Tensor) -> str:
    """Resolve ``auto`` and refuse a named backend that cannot run on these tensors.

    Args:
        backend: one of ``CHOICES``.
        u: (batch, L, dim), as for :func:`selective_scan`.
        A: (dim, dstate).

    Returns:
        The backend's name, never ``auto``.

    Raises:
        ValueError: an unknown name, or a named backend that does not take these tensors.
        RuntimeError: a named backend that does not work on this machine.
    """
    check_backend(backend)
    batch, dstate = u.shape[0], A.shape[1]
    if backend == "auto":
        if not u.is_cuda or u.dtype == torch.float64:
            return _choose_chunked()
        return _choose_for_cuda(
            *(module.refusal(batch, dstate) for module in _GPU_BACKENDS.values())
        )
    if backend in _GPU_BACKENDS:
        module = _GPU_BACKENDS[backend]
        if u.dtype == torch.float64:
            raise ValueError(f"scan backend {backend!r} has no float64: use 'chunked'")
        if not (u.is_cuda or (module is triton and triton.interpreted())):
            raise ValueError(f"scan backend {backend!r} needs CUDA tensors, u is on {u.device}")
        if reason := module.refusal(batch, dstate):
            raise ValueError(f"scan backend {backend!r} cannot take this: {reason}. Use 'chunked'")
        if reason := _unavailable(backend):
            raise RuntimeError(f"scan backend {backend!r} cannot be used: {reason}")
    return backend


# Constants for torch.compile: the probes import, launch and log, which cannot be traced.
@torch.compiler.assume_constant_result
def _unavailable(backend: str) -> str | None:
    return _GPU_BACKENDS[backend].unavailable()


@torch.compiler.assume_constant_result
def _choose_chunked() -> str:
    return _say("chunked")


@functools.cache
def _say(backend: str) -> str:
    """Return the backend, and log it the first time."""
    logger.info("selective scan: using the backend %s", backend)
    return backend


@torch.compiler.assume_constant_result
def _choose_for_cuda(*refusals: str | None) -> str:
    return _cuda_choice(*refusals)


@functools.cache
def _cuda_choice(*refusals: str | None) -> str:
    """What ``auto`` means on CUDA, decided once for each way to be refused, and logged.

    Args:
        refusals: of each GPU backend, why it cannot take the sizes at hand, or None.
    """
    reasons = []
    for (name, module), refusal in zip(_GPU_BACKENDS.items(), refusals, strict=True):
        reason = refusal or module.unavailable()
        if reason is None:
            return _say(name)
        reasons.append(f"{name}: {reason}")
    listed = "; ".join(reasons)
    logger.warning("selective scan: using plain PyTorch operators on the GPU (%s)", listed)
    return "chunked"


def _check(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None
) -> None:
    if u.dim() != 3 or A.dim() != 2:
        raise ValueError(
            f"u must be (batch, seqlen, dim) and A (dim, dstate), got {tuple(u.shape)} and "
            f"{tuple(A.shape)}"
        )
    batch, seqlen, dim = u.shape
    dstate = A.shape[1]
    expected = {
        "dt": (dt, (batch, seqlen, dim)),
        "A": (A, (dim, dstate)),
        "B": (B, (batch, seqlen, dstate)),
        "C": (C, (batch, seqlen, dstate)),
        "D": (D, (dim,)),
        "dt_bias": (dt_bias, (dim,)),
    }
    if u.dtype not in _FLOATS:
        raise ValueError(f"u must be a float tensor, got {u.dtype}")
    if seqlen == 0:
        raise ValueError("seqlen is 0: the scan needs at least one token")
    if 0 in (batch, dim, dstate):
        raise ValueError(f"empty input: batch {batch}, dim {dim}, dstate {dstate}")
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
        if tensor.device != u.device:
            raise ValueError(f"{name} is on {tensor.device}, u on {u.device}")
        if tensor.dtype not in _FLOATS:
            raise ValueError(f"{name} must be a float tensor, got {tensor.dtype}")
