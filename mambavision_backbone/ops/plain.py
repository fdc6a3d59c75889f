"""Whether kernels can stand in for a module."""

from __future__ import annotations

from typing import TypeGuard, TypeVar

from torch import nn
from torch.nn.modules import module as torch_module

Kind = TypeVar("Kind", bound=nn.Module)

GLOBAL_HOOKS = (  # of all modules
    torch_module._global_forward_hooks,
    torch_module._global_forward_pre_hooks,
    torch_module._global_backward_hooks,
    torch_module._global_backward_pre_hooks,
)


def global_hooks() -> bool:
    """Whether there are hooks of all modules."""
    return any(GLOBAL_HOOKS)


def own_forward(module: nn.Module) -> bool:
    """Whether a module's forward pass is its class's: no other in its place, not compiled."""
    return "forward" not in module.__dict__ and module._compiled_call_impl is None


def plain(module: nn.Module | None, kind: type[Kind]) -> TypeGuard[Kind]:
    """Whether a module is of this very kind, and its forward pass all that is run.

    No adapter or wrapper, no pruning, no hooks, no other forward in its place, not compiled.
    """
    return (
        module is not None
        and type(module) is kind
        and own_forward(module)
        and not (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or global_hooks()
        )
    )
