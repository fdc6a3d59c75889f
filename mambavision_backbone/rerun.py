"""A training pass once more, through the modules, for gradients that nothing was made for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

from .passes import (
    Asked,
    Grads,
    TrainingPasses,
    check_version,
    given,
    gradients,
    uncached_autocast,
    version,
)


class Rerun:
    """Gradients by any maps of a pass that was run for some of them: it is run once more for these.

    That has the same draws, so the same maps; it leaves statistics and random numbers alone.

    Args:
        owner: is told of the maps, to make passes for them, too.
        asked: the pass, which starts now.
    """

    def __init__(self, owner: TrainingPasses, asked: Asked) -> None:
        self._owner, self._asked = owner, asked
        self._version = version([asked.x])
        self._autocast = uncached_autocast(asked.x.device.type)
        self._random = torch.get_rng_state(), *get_device_states(asked.x)

    def gradients(self, grad_maps: Sequence[Tensor | None]) -> Grads:
        """Of the trained weights.

        Raises:
            RuntimeError: the image was modified or the network changed since.
        """
        key, forward, network, snapshot, x = self._asked
        check_version([x], self._version)
        if not snapshot.holds(network):
            raise RuntimeError(
                "the network was changed between a forward and a backward pass by maps that had "
                "led to no loss before: set graphs=0 and replay=False in the backbone"
            )
        self._owner.differentiated(key, snapshot, given(grad_maps))
        statistics = {id(buffer): buffer.clone() for buffer in network.buffers()}
        state, devices, states = self._random
        with (
            torch.random.fork_rng(devices),
            other_leaves(network, snapshot.weights) as leaves,
            stand_ins(network, statistics),
            torch.autocast(x.device.type, enabled=False),
        ):
            torch.set_rng_state(state)
            set_device_states(devices, states)
            with torch.enable_grad(), self._autocast:
                maps = forward(x)
            return gradients(maps, grad_maps, leaves)


@contextmanager
def other_leaves(network: nn.Module, weights: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Put other tensors on the same memory in the weights' places, inside.

    PyTorch ties the weights themselves to the stream that they were first used on, which a capture
    must not touch, and calls their hooks.
    """
    leaves = {id(w): w.detach().requires_grad_() for w in weights}
    with stand_ins(network, leaves):
        yield list(leaves.values())


@contextmanager
def stand_ins(network: nn.Module, tensors: Mapping[int, Tensor]) -> Iterator[None]:
    """Put tensors in the places of parameters and buffers of those identities, inside."""
    slots: list[tuple[dict[str, Any], str, Any]] = [
        (members, name, tensor)
        for module in network.modules()
        for members in (module._parameters, module._buffers)
        for name, tensor in members.items()
        if id(tensor) in tensors
    ]
    try:
        for members, name, tensor in slots:
            members[name] = tensors[id(tensor)]
        yield
    finally:
        for members, name, tensor in slots:
            members[name] = tensor
