"""Training passes that are run otherwise once their input shape is known: what all ways share."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import chain
from operator import attrgetter
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .ops.triton_support import traced

logger = logging.getLogger("mambavision_backbone")

Maps = tuple[Tensor, ...]
Forward = Callable[[Tensor], Maps]
Grads = list[Tensor | None]
Value = TypeVar("Value")
_MEMBERS = "_modules", "_parameters", "_buffers"
_SETTINGS, _TRAINED = attrgetter("__dict__"), attrgetter("requires_grad")  # quicker than loops

# So often passes may be of use for less than so many runs: then the network changes all the time.
MAX_SHORT_LIVES, SHORT_LIFE = 16, 10


class TrainingPasses(ABC):
    """Runs a network in training, in another way where a shape comes again.

    The first pass of an input shape runs as it is. Once that was differentiated, the next one makes
    what later ones are run by, for the maps that led to a loss so far: when another one does, it is
    made anew. All of that is forgotten when the network changes.

    Args:
        what: they are, for the log.
        limit: the first so many shapes that come twice; all others run as they are.
    """

    level = logging.WARNING  # of a message that there will be no more of them

    def __init__(self, what: str, limit: int) -> None:
        self._what = what
        self.limit = limit
        self._stopped = False  # making them
        self._runs = 0  # since the network changed
        self._short_lives = 0
        self._seen: dict[Any, set[int]] = {}  # shapes, and their maps that were differentiated
        self._snapshot: Snapshot | None = None  # of the network that all of this is of
        self._passes: dict[Any, Any] = {}

    def run(
        self, forward: Forward, network: nn.Module, x: Tensor, otherwise: Forward | None = None
    ) -> Maps:
        """``forward(x)``, in the other way where that can be: in training, x without gradients.

        Where it can never be, ``otherwise(x)``.
        """
        otherwise = forward if otherwise is None else otherwise
        if not self._applies(network, x):
            return otherwise(x)
        if self._snapshot is not None and not self._snapshot.holds(network):
            self.forget()
        key = _key(x)
        known = self._passes.get(key)
        full = len(self._passes) >= self.limit or self._stopped
        if known is None and full:
            return otherwise(x)
        self._snapshot = self._snapshot or Snapshot(network)
        asked = Asked(key, forward, network, self._snapshot, x)
        if known is not None:
            self._runs += 1
            return self._again(known, asked)
        if key in self._seen:
            return self._second(asked)
        return self._watched(asked)

    def differentiated(self, key: Any, snapshot: Snapshot, maps: Collection[int]) -> None:
        """Maps of a shape led to a loss: what was made for others only is of no use."""
        if snapshot is not self._snapshot:  # of a network that has changed since
            return
        seen = self._seen.setdefault(key, set())
        seen.update(maps)
        known = self._passes.get(key)
        if known is not None and not known.ends.wanted.issuperset(maps):
            seen.update(known.ends.wanted)
            self._drop(key)

    def forget(self) -> None:
        """Weights were moved, frozen or replaced: what was made is of the past."""
        self._passes.clear()
        self._seen.clear()
        if self._snapshot is None:
            return
        self._snapshot = None
        self._short_lives += self._runs < SHORT_LIFE
        self._runs = 0
        if self._short_lives == MAX_SHORT_LIVES:
            self._stop("the network changes all the time")

    @abstractmethod
    def _second(self, asked: Asked) -> Maps:
        """The maps of a shape that comes again; makes what later passes are run by."""

    @abstractmethod
    def _again(self, known: Any, asked: Asked) -> Maps:
        """The maps by what was made."""

    def _drop(self, key: Any) -> None:
        del self._passes[key]

    def _applies(self, network: nn.Module, x: Tensor) -> bool:
        return (
            self.limit > 0
            and not (self._stopped and not self._passes)
            and not traced()
            and network.training
            and on_gpu(x)
            and torch.is_grad_enabled()
            and not torch.is_anomaly_enabled()  # it looks at values in between
            and not _saves_otherwise()
            and not x.requires_grad
            and any(p.requires_grad for p in network.parameters())
        )

    def _watched(self, asked: Asked) -> Maps:
        """The maps as they are; when any is differentiated, the shape was seen.

        Keeps no image.
        """
        key, forward, _, snapshot, x = asked

        def hook(i: int) -> Callable[[Tensor], None]:
            return lambda _: self.differentiated(key, snapshot, [i])

        maps = forward(x)
        for i, m in enumerate(maps):
            if m.requires_grad:
                m.register_hook(hook(i))
        return maps

    def _stop(self, reason: str) -> None:
        """Make no more; those that were made stay."""
        self._stopped = True
        if not self._passes:
            self._snapshot = None
        logger.log(self.level, "no more %s, going on without: %s", self._what, reason)


class Asked(NamedTuple):
    """A pass that is asked for: the maps ``forward(x)`` of a network that is as in the snapshot."""

    key: Any
    forward: Forward
    network: nn.Module
    snapshot: Snapshot
    x: Tensor


class Snapshot:
    """What passes depend on: modules, their settings, tensors and addresses.

    Attributes:
        parameters: all.
        weights: the trained ones.
    """

    def __init__(self, network: nn.Module) -> None:
        self.parameters: list[Tensor] = list(network.parameters())
        self._tensors = [*self.parameters, *network.buffers()]
        self.weights = [p for p in self.parameters if p.requires_grad]
        # The network, which keeps this, is not kept, nor are its settings.
        self._modules = [module for module in network.modules() if module is not network]
        members = [getattr(m, kind) for m in network.modules() for kind in _MEMBERS]
        self._empty = [group for group in members if not group]
        self._members = [group for group in members if group]
        self._kept = list(self._all_members())  # so that nothing else gets their identity
        self._settings = self._settings_now()
        self._facts = self._facts_of(network)

    def holds(self, network: nn.Module) -> bool:
        """Whether the network is as it was."""
        try:
            same = self._settings_now() == self._settings
        except Exception:  # of values that do not compare
            return False
        return same and not any(self._empty) and self._facts_of(network) == self._facts

    def _settings_now(self) -> list[tuple[Any, ...]]:
        return list(map(tuple, map(dict.values, map(_SETTINGS, self._modules))))

    def _facts_of(self, network: nn.Module) -> list[Any]:
        facts: list[Any] = [network.training, *map(type, self._modules)]
        facts += map(id, self._all_members())
        facts += map(Tensor.data_ptr, self._tensors)
        facts += map(_TRAINED, self._tensors)
        return facts

    def _all_members(self) -> Iterator[Any]:
        return chain.from_iterable(group.values() for group in self._members)


def _saves_otherwise() -> bool:
    """Whether what is saved for the backward pass is to be computed again, say, or moved away."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is not None and top(True) is not None


def on_gpu(x: Tensor) -> bool:
    """Whether kernels that work on x are started now, not captured."""
    return x.is_cuda and not torch.cuda.is_current_stream_capturing()


def gradients(
    maps: Sequence[Tensor],
    grad_maps: Sequence[Tensor | None],
    leaves: Sequence[Tensor],
    retain_graph: bool = False,
) -> Grads:
    """Gradients of the leaves, each with its leaf's strides, as optimizers expect it.

    None for leaves that the maps with gradients do not depend on, and those that were frozen
    meanwhile.
    """
    trained = [leaf for leaf in leaves if leaf.requires_grad]
    pairs = [(m, grad) for m, grad in zip(maps, grad_maps, strict=True) if grad is not None]
    grads = torch.autograd.grad(
        [m for m, _ in pairs],
        trained,
        [grad for _, grad in pairs],
        retain_graph=retain_graph,
        allow_unused=True,
    )
    by_leaf = {id(leaf): grad for leaf, grad in zip(trained, grads, strict=True)}
    return [_laid_out_as(by_leaf.get(id(leaf)), leaf) for leaf in leaves]


class OtherTensorsError(Exception):
    """Maps depend on more than the network's parameters, whose gradients would be lost."""

    def __init__(self) -> None:
        super().__init__("maps depend on tensors that are no parameters of the network")


class Ends:
    """What a pass is given and gives: gradients of its maps, and those that they lead to.

    Args:
        maps: of the pass.
        weights: the trained ones.
        wanted: numbers of the maps that it is to be differentiated by.

    Attributes:
        wanted: those of them that can be.
        all_wanted: whether all that can be are.

    Raises:
        OtherTensorsError: see there.
    """

    def __init__(
        self, maps: Sequence[Tensor], weights: Sequence[Tensor], wanted: Collection[int]
    ) -> None:
        self._trained = [i for i, m in enumerate(maps) if m.requires_grad]
        self.wanted = set(wanted).intersection(self._trained)
        self.all_wanted = len(self.wanted) == len(self._trained)
        reached = _reached([maps[i] for i in self._trained], weights)
        self._reached = [r for i, r in zip(self._trained, reached, strict=True) if i in self.wanted]

    def pick(self, values: Sequence[Value]) -> list[Value]:
        """Of one value for each map, those of the wanted ones."""
        return [values[i] for i in sorted(self.wanted)]

    def frozen(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The maps that cannot be differentiated."""
        return [m for i, m in enumerate(maps) if i not in self._trained]

    def foreseen(self, grad_maps: Sequence[Tensor | None]) -> bool:
        """Whether only wanted maps have gradients."""
        return self.wanted.issuperset(given(grad_maps))

    def choose(self, grad_maps: Sequence[Tensor | None], grads: Grads) -> Grads:
        """The weights' gradients, but for those that the maps with gradients do not depend on.

        Args:
            grad_maps: of the wanted maps.
            grads: of all weights.
        """
        if all(grad is not None for grad in grad_maps):
            return grads
        pairs = zip(self._reached, grad_maps, strict=True)
        led_to = set().union(*(weights for weights, grad in pairs if grad is not None))
        return [grad if i in led_to else None for i, grad in enumerate(grads)]


def given(grad_maps: Sequence[Tensor | None]) -> list[int]:
    """Numbers of the maps that have gradients."""
    return [i for i, grad in enumerate(grad_maps) if grad is not None]


def _reached(maps: Sequence[Tensor], weights: Sequence[Tensor]) -> list[set[int]]:
    """For each map, numbers of the weights that it depends on."""
    numbers = {id(weight): i for i, weight in enumerate(weights)}
    found = [_leaves(m) for m in maps]
    if not numbers.keys() >= set().union(*found):
        raise OtherTensorsError
    return [{numbers[leaf] for leaf in leaves} for leaves in found]


def _leaves(x: Tensor) -> set[int]:
    """Identities of what a tensor can be differentiated by."""
    leaves: set[int] = set()
    seen: set[Any] = set()
    edges: list[Any] = [(x.grad_fn, x.output_nr)]
    while edges:
        function, output = edges.pop()
        # Some have outputs that each depend on one input.
        separate = getattr(getattr(function, "_forward_cls", None), "separate", False)
        key = function, output if separate else None
        if function is None or key in seen:
            continue
        seen.add(key)
        if hasattr(function, "variable"):
            leaves.add(id(function.variable))
        following = function.next_functions
        edges += following[output : output + 1] if separate else following
    return leaves


def _laid_out_as(grad: Tensor | None, weight: Tensor) -> Tensor | None:
    like = torch.empty_like(weight, device="meta")
    if grad is None or grad.stride() == like.stride():
        return grad
    return torch.empty_like(weight).copy_(grad)


def version(tensors: Sequence[Tensor]) -> int:
    """Grows when any of the tensors is modified in place."""
    return sum(map(attrgetter("_version"), tensors))


def check_version(tensors: Sequence[Tensor], before: int) -> None:
    """Refuse to go on, as autograd does, with tensors that are not as they were.

    Raises:
        RuntimeError: they were modified in place.
    """
    if version(tensors) != before:
        raise RuntimeError(
            "the image or weights needed for gradient computation have been modified by an "
            "inplace operation: step optimizers after backward()"
        )


def uncached_autocast(device: str) -> torch.autocast:
    """Autocast as it is, but without weights that were cast before."""
    enabled = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device)
    return torch.autocast(device, dtype, enabled=enabled, cache_enabled=False)


def _key(x: Tensor) -> Any:
    """What passes are made for."""
    device = x.device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    return x.shape, x.dtype, autocast, *_switches()


def _switches() -> tuple[bool, ...]:
    """What PyTorch chooses operators by."""
    cuda = torch.backends.cuda
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.enabled,
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
    )
