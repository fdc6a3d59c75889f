"""The scan as a torch.library operator, so that compile, export and FLOP counting see one node.

``mambavision::selective_scan`` and its backward take the backend's name as their last argument; the
implementations are looked up here, and only here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, shape_wrapper

from . import chunked, mamba_ssm, reference, triton

_FORWARD: dict[str, Callable[..., Tensor]] = {
    "chunked": chunked.selective_scan,
    "mamba_ssm": mamba_ssm.selective_scan,
    "reference": reference.selective_scan,
    "triton": triton.selective_scan,
}
_BACKWARD: dict[str, Callable[..., tuple[Tensor, ...]]] = {  # the others: by autograd, from u on
    "chunked": chunked.selective_scan_backward,
    "triton": triton.selective_scan_backward,
}
BACKENDS = tuple(_FORWARD)

_TENSORS = "Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor D, Tensor dt_bias"
_OPTIONS = "bool dt_softplus, str backend"
torch.library.define("mambavision::selective_scan", f"({_TENSORS}, {_OPTIONS}) -> Tensor")
torch.library.define(
    "mambavision::selective_scan_backward",
    f"(Tensor dy, {_TENSORS}, {_OPTIONS}) -> ({', '.join(['Tensor'] * 7)})",
)


@torch.library.impl("mambavision::selective_scan", "CompositeExplicitAutograd")
def _forward(*args: Any) -> Tensor:
    *inputs, backend = args
    with torch.no_grad():
        return _FORWARD[backend](*inputs)


@torch.library.impl("mambavision::selective_scan_backward", "CompositeExplicitAutograd")
def _backward(dy: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *inputs, dt_softplus, backend = args
    if backend in _BACKWARD:
        with torch.no_grad():
            return _BACKWARD[backend](dy, *args[:-1])
    leaves = [x.detach().requires_grad_() for x in inputs]
    with torch.enable_grad():
        y = _FORWARD[backend](*leaves, dt_softplus)
        grads = torch.autograd.grad(y, leaves, dy)
    return tuple(g.to(x.dtype).contiguous() for g, x in zip(grads, inputs, strict=True))


@torch.library.register_fake("mambavision::selective_scan")
def _forward_fake(u: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(u, memory_format=torch.contiguous_format)


@torch.library.register_fake("mambavision::selective_scan_backward")
def _backward_fake(_dy: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in args[:7])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    *tensors, ctx.dt_softplus, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    grads = torch.ops.mambavision.selective_scan_backward(
        dy, *ctx.saved_tensors, ctx.dt_softplus, ctx.backend
    )
    return (*grads, None, None)


torch.library.register_autograd(
    "mambavision::selective_scan", _autograd, setup_context=_setup_context
)


def selective_scan_flops(u: Any, _dt: Any, A: Any, *_: Any, **__: Any) -> int:
    """FLOPs of one forward scan: ``batch * seqlen * dim * (9 * dstate + 1)``.

    The field's count (VMamba, and after it most vision Mambas): 9 per state element, 1 for the D
    skip. docs/selective_scan.md lists what is in the 9. The arguments are shapes.
    """
    return math.prod(u) * (9 * A[1] + 1)


def selective_scan_backward_flops(_dy: Any, *args: Any, **__: Any) -> int:
    """FLOPs of the backward pass, by the convention for matrix products: twice the forward's."""
    return 2 * selective_scan_flops(*args)


# Not register_flop_formula: in torch 2.4 it stores the formula where the counter never looks.
flop_registry[torch.ops.mambavision.selective_scan] = shape_wrapper(selective_scan_flops)
flop_registry[torch.ops.mambavision.selective_scan_backward] = shape_wrapper(
    selective_scan_backward_flops
)
