"""Weights in half precision under autocast, cast all at once."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .functions import compute_dtype
from .sizes import ceil_div
from .triton_support import fusible, launch_recorder

_ALIGNMENT = 64  # elements: 128 bytes in half precision


class _CastAll(torch.autograd.Function):
    """Copies of tensors in a dtype; their gradients come back in the tensors' own."""

    separate = True  # each output depends on the input of its number alone

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        recorder = launch_recorder()
        if recorder is None:
            return tuple(_cast(tensors, dtype))
        copies = recorder.kept((_CastAll, dtype), lambda: _empty(tensors, dtype))
        torch._foreach_copy_(copies, list(tensors))
        # Not detach(), which would count other passes' copies as changes of what this one saves.
        return tuple(c.data for c in copies)

    @staticmethod
    @once_differentiable
    def backward(_ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        given = iter(_cast([g for g in grads if g is not None], torch.float32))
        return None, *(None if g is None else next(given) for g in grads)


def _cast(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    copies = _empty(tensors, dtype)
    if copies:
        torch._foreach_copy_(copies, list(tensors))
    return copies


def _empty(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Tensors like these in another dtype, in one piece of memory."""
    ends = list(itertools.accumulate(ceil_div(t.numel(), _ALIGNMENT) * _ALIGNMENT for t in tensors))
    if not ends:
        return []
    memory = torch.empty(ends[-1], dtype=dtype, device=tensors[0].device)
    places = zip(tensors, [0, *ends], strict=False)
    return [memory.as_strided(t.shape, _dense_strides(t), start) for t, start in places]


def _dense_strides(x: Tensor) -> Sequence[int]:
    """What ``empty_like`` gives; without copies of expanded or sliced tensors' gaps."""
    return x.stride() if x.is_contiguous() else torch.empty_like(x, device="meta").stride()


class WeightCaster:
    """Stands copies in autocast's dtype in for float32 weights while a network runs.

    Autocast casts weights one by one, and their gradients one by one too: a kernel each, shorter
    than its launch. Here that is a few launches for all weights. Passes inside ``cast`` take turns,
    so that none reads another thread's copies; passes outside (compiled, checkpointed) do not.

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
            if not (name == "bias" and module in but)
        ]
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        """Leave the lock out of copies."""
        return {"slots": self.slots}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.RLock())

    def applies(self, x: Tensor) -> bool:
        """Whether copies may stand in for the weights in a pass of x; such passes take turns."""
        return fusible(x) and bool(self.slots)  # in this order: Dynamo cannot trace the second

    @contextmanager
    def cast(self, x: Tensor) -> Iterator[None]:
        """Put copies in the weights' places, inside, if autocast would cast them step by step."""
        with self._lock:
            slots = []
            if torch.is_autocast_enabled(x.device.type):
                slots = [slot for slot in self.slots if self._is_cast(*slot)]
            weights = [parameters[name] for parameters, name in slots]
            copies = _CastAll.apply(compute_dtype(x), *weights) if weights else ()
            try:
                for (parameters, name), copy in zip(slots, copies, strict=True):
                    parameters[name] = copy
                yield
            finally:
                for (parameters, name), weight in zip(slots, weights, strict=True):
                    parameters[name] = weight

    @staticmethod
    def _is_cast(parameters: dict[str, Any], name: str) -> bool:
        """Leave out absent weights (parametrised, sharded), and frozen ones, which get no gradient.

        Autocast casts those.
        """
        weight = parameters.get(name)
        if weight is None or weight.dtype != torch.float32:
            return False
        return weight.requires_grad or not torch.is_grad_enabled()
