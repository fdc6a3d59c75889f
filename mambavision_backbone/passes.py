"""Training passes that are run otherwise once their input shape is known: what all ways share."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from .ops.triton_support import traced

logger = logging.getLogger("mambavision_backbone")

Maps = tuple[Tensor, ...]
Forward = Callable[[Tensor], Maps]
_MEMBERS = "_modules", "_parameters", "_buffers"
_SETTINGS = "training", "drop_path_rate", "momentum"

# So often passes may be of use for less than so many runs: then the network changes all the time.
MAX_SHORT_LIVES, SHORT_LIFE = 16, 10


class TrainingPasses(ABC):
    """Runs a network in training, in another way where a shape comes again.

    The first pass of an input shape runs as it is. Once that was differentiated, the next one makes
    what later ones are run by. All of that is forgotten when the network changes.

    Args:
        what: they are, for the log.
        limit: the first so many shapes that come twice; all others run as they are.
    """

    def __init__(self, what: str, limit: int) -> None:
        self._what = what
        self.limit = limit
        self._stopped = False  # making them
        self._runs = 0  # since the network changed
        self._short_lives = 0
        self._seen: set[Any] = set()
        self._snapshot: Snapshot | None = None  # of the network when they were made
        self._passes: dict[Any, Any] = {}

    def run(self, forward: Forward, network: nn.Module, x: Tensor) -> Maps:
        """``forward(x)``, in the other way where that can be: in training, x without gradients."""
        if not self._applies(network, x):
            return forward(x)
        if self._snapshot is not None and not self._snapshot.holds(network):
            self._forget()
        key = _key(x)
        known = self._passes.get(key)
        room = len(self._passes) < self.limit and not self._stopped
        if known is None and room and key in self._seen:
            self._snapshot = self._snapshot or Snapshot(network)
            known = self._make(key, forward, network, x)
        if known is None:
            return self._watched(forward(x), key)
        self._runs += 1
        return self._run(known, x)

    @abstractmethod
    def _make(self, key: Any, forward: Forward, network: nn.Module, x: Tensor) -> Any:
        """A pass of the shape that ``_run`` takes, or None; kept under the key when it is done."""

    @abstractmethod
    def _run(self, known: Any, x: Tensor) -> Maps:
        """The maps of x by a pass that was made."""

    def _applies(self, network: nn.Module, x: Tensor) -> bool:
        return (
            self.limit > 0
            and not (self._stopped and not self._passes)
            and network.training
            and on_gpu(x)
            and not traced()
            and torch.is_grad_enabled()
            and not torch.is_anomaly_enabled()  # it looks at values in between
            and not x.requires_grad
            and any(p.requires_grad for p in network.parameters())
        )

    def _watched(self, maps: Maps, key: Any) -> Maps:
        """The maps; when any is differentiated, the shape's kernels are known and compiled."""
        for trained in [m for m in maps if m.requires_grad]:
            trained.register_hook(lambda _: self._seen.add(key))
        return maps

    def _stop(self, reason: str) -> None:
        """Make no more; those that were made stay."""
        self._stopped = True
        if not self._passes:
            self._snapshot = None
        logger.warning("no more %s, going on without: %s", self._what, reason)

    def _forget(self) -> None:
        """Weights were moved, frozen or replaced: what was made is of the past."""
        self._snapshot = None
        self._passes.clear()
        self._seen.clear()
        self._short_lives += self._runs < SHORT_LIFE
        self._runs = 0
        if self._short_lives == MAX_SHORT_LIVES:
            self._stop("the network changes all the time")


class Snapshot:
    """What passes depend on: modules, their settings, tensors and addresses.

    Attributes:
        weights: the trained ones.
    """

    def __init__(self, network: nn.Module) -> None:
        self._tensors = [*network.parameters(), *network.buffers()]
        self.weights = [p for p in network.parameters() if p.requires_grad]
        # The network, which keeps this, is not kept, nor are its settings.
        self._settings = [module.__dict__ for module in network.modules() if module is not network]
        members = [getattr(m, kind) for m in network.modules() for kind in _MEMBERS]
        self._empty = [group for group in members if not group]
        self._members = [group for group in members if group]
        self._kept = list(self._all_members())  # so that nothing else gets their identity
        self._facts = self._facts_of(network)

    def holds(self, network: nn.Module) -> bool:
        """Whether the network is as it was."""
        return not any(self._empty) and self._facts_of(network) == self._facts

    def _facts_of(self, network: nn.Module) -> list[Any]:
        facts: list[Any] = [network.training, *map(id, self._all_members())]
        facts += [tensor.data_ptr() for tensor in self._tensors]
        facts += [tensor.requires_grad for tensor in self._tensors]
        for name in _SETTINGS:
            facts += [own.get(name) for own in self._settings]
        return facts

    def _all_members(self) -> Iterator[Any]:
        return chain.from_iterable(group.values() for group in self._members)


def on_gpu(x: Tensor) -> bool:
    """Whether kernels that work on x are started now, not captured."""
    return x.is_cuda and not torch.cuda.is_current_stream_capturing()


@contextmanager
def other_leaves(network: nn.Module, weights: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Put other tensors on the same memory in the weights' places, inside.

    So the weights themselves are no part of what is differentiated. Besides, PyTorch ties them to
    the stream that they were first used on, which a capture must not touch.
    """
    leaves = {id(w): w.detach().requires_grad_() for w in weights}
    slots = [
        (module._parameters, name, weight)
        for module in network.modules()
        for name, weight in module._parameters.items()
        if id(weight) in leaves
    ]
    try:
        for parameters, name, weight in slots:
            parameters[name] = leaves[id(weight)]  # type: ignore[assignment]
        yield list(leaves.values())
    finally:
        for parameters, name, weight in slots:
            parameters[name] = weight


def gradients(
    maps: Sequence[Tensor],
    grad_maps: Sequence[Tensor],
    leaves: Sequence[Tensor],
    retain_graph: bool = False,
) -> list[Tensor | None]:
    """Gradients of the leaves, each with its leaf's strides, as optimizers expect it."""
    grads = torch.autograd.grad(
        maps, leaves, grad_maps, retain_graph=retain_graph, allow_unused=True
    )
    return [_laid_out_as(grad, leaf) for grad, leaf in zip(grads, leaves, strict=True)]


def reached(maps: Sequence[Tensor], leaves: Sequence[Tensor]) -> list[set[int]]:
    """For each map, which of the leaves it depends on."""
    numbers = {id(leaf): i for i, leaf in enumerate(leaves)}
    return [_reached_from((m.grad_fn, m.output_nr), numbers) for m in maps]


def _reached_from(edge: Any, numbers: dict[int, int]) -> set[int]:
    found, seen, edges = set(), set(), [edge]
    while edges:
        function, output = edges.pop()
        if function is None:
            continue
        separate = getattr(getattr(function, "_forward_cls", None), "separate", False)
        key = function, output if separate else None
        if key in seen:
            continue
        seen.add(key)
        leaf = getattr(function, "variable", None)
        if leaf is not None and id(leaf) in numbers:
            found.add(numbers[id(leaf)])
        following = function.next_functions
        edges += following[output : output + 1] if separate else following
    return found


def _laid_out_as(grad: Tensor | None, weight: Tensor) -> Tensor | None:
    like = torch.empty_like(weight, device="meta")
    if grad is None or grad.stride() == like.stride():
        return grad
    return torch.empty_like(weight).copy_(grad)


def _key(x: Tensor) -> Any:
    """What passes are made for."""
    device = x.device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    return x.shape, x.dtype, autocast
