"""What our autograd functions share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def call(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply``, or where no gradients are recorded its forward pass alone: quicker."""
    if torch.is_grad_enabled():
        return function.apply(*args)
    return function.forward(_NO_CONTEXT, *args)


class _NoContext:
    """Stands for the context of an autograd function that will not be differentiated."""

    def save_for_backward(self, *_: Any) -> None:
        """Drop what would be saved."""


_NO_CONTEXT = _NoContext()


def recorded(ctx: Any) -> bool:
    """Whether an autograd function's forward pass may be followed by a backward pass."""
    return ctx is not _NO_CONTEXT


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that the layers behind x compute in: autocast's where it is on, else x's."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)
