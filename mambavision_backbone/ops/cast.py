"""Weights in half precision under autocast: cast all at once, and for inference only once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .triton_support import compute_dtype, fusible


class _CastAll(torch.autograd.Function):
    """Copies of tensors in a dtype; their gradients come back in the tensors' own."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.dtypes = [t.dtype for t in tensors]
        return tuple(_cast(tensors, [dtype] * len(tensors)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_cast(grads, ctx.dtypes)


def _cast(tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    copies = [torch.empty_like(t, dtype=d) for t, d in zip(tensors, dtypes, strict=True)]
    torch._foreach_copy_(copies, list(tensors))
    return copies


class WeightCaster:
    """Stands copies in autocast's dtype in for weights while a network runs.

    Autocast casts weights one by one and again in every forward pass, and their gradients one by
    one too: a kernel each, shorter than its launch. Here that is a few launches for all weights;
    and where no gradients are recorded the copies are kept until a weight changes.

    Args:
        network: of which the weights of linear and 2D convolution layers are meant.
        but: modules whose biases are to stay as they are.
    """

    def __init__(self, network: nn.Module, but: Sequence[nn.Module]) -> None:
        self.slots: list[tuple[dict[str, Any], str]] = [
            (module._parameters, name)
            for module in network.modules()
            if isinstance(module, nn.Linear | nn.Conv2d)
            for name in ("weight", "bias")
            if module._parameters[name] is not None and not (name == "bias" and module in but)
        ]
        self.kept: list[Tensor] = []
        self.kept_for: list[Any] = []

    def wanted(self, x: Tensor) -> bool:
        """Whether autocast would cast the weights of a network that is run on x, step by step."""
        return fusible(x) and torch.is_autocast_enabled(x.device.type)

    def forget(self) -> None:
        """Give the memory of kept copies back."""
        self.kept, self.kept_for = [], []

    @contextmanager
    def cast(self, x: Tensor) -> Iterator[None]:
        """Put the copies in the weights' places, inside."""
        dtype = compute_dtype(x)
        training = torch.is_grad_enabled()
        slots = [
            (parameters, name)
            for parameters, name in self.slots
            if not training or parameters[name].requires_grad
        ]
        weights = [parameters[name] for parameters, name in slots]
        if training:
            copies = _CastAll.apply(dtype, *weights)
        else:
            state = [dtype, *((w.data_ptr(), w._version) for w in weights)]
            if state != self.kept_for:
                self.kept, self.kept_for = _cast(weights, [dtype] * len(weights)), state
            copies = self.kept
        try:
            for (parameters, name), copy in zip(slots, copies, strict=True):
                parameters[name] = copy
            yield
        finally:
            for (parameters, name), weight in zip(slots, weights, strict=True):
                parameters[name] = weight
