"""Training passes as CUDA graphs, one for each input shape: the host starts two, not hundreds."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import SyncBatchNorm

from .capture import GraphMemory, unowned
from .ops.triton_support import traced

logger = logging.getLogger("mambavision_backbone")

Maps = tuple[Tensor, ...]
# So often graphs may be of use for less than so many passes: then the network changes all the time.
MAX_SHORT_LIVES, SHORT_LIFE = 16, 10


class TrainingGraphs:
    """Runs a network forward and backward as CUDA graphs, with the results that it has without.

    The first pass of an input shape runs as it is; once that was differentiated, the next one is
    captured, and all later ones are replayed. A graph is for one shape exactly, so results do not
    depend on the shapes seen before. All graphs share their memory: one pass is under way at a
    time, on one stream, and a forward pass that comes before the last one's backward pass runs
    without a graph. Replays do not call hooks inside of the network.

    Args:
        limit: the first so many shapes that come twice are captured, all others run as they are.

    Raises:
        ValueError: a negative limit.
    """

    def __init__(self, limit: int) -> None:
        if limit < 0:
            raise ValueError(f"graphs must not be negative, got {limit}")
        self.limit = limit
        self._stopped = False  # capturing
        self._replays = 0  # since the network changed
        self._short_lives = 0
        self._seen: set[Any] = set()
        self._snapshot: _Snapshot | None = None  # of the network that was captured
        self._passes: dict[Any, _Pass] = {}
        self._memory: GraphMemory | None = None
        self._under_way: Callable[[], _Ticket | None] = lambda: None

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave what was captured out of copies."""
        return TrainingGraphs, (self.limit,)

    def run(self, forward: Callable[[Tensor], Maps], network: nn.Module, x: Tensor) -> Maps:
        """``forward(x)``, by a graph where that can be: in training, of an x without gradients.

        Raises:
            RuntimeError: the pass cannot be captured; the message says why.
        """
        if not self._applies(network, x):
            return forward(x)
        autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
        key = (x.shape, x.dtype, autocast)
        moved = self._memory is not None and self._memory.device != x.device
        if moved or (self._snapshot is not None and not self._snapshot.holds(network)):
            self._forget()
        captured = self._passes.get(key)
        room = len(self._passes) < self.limit and not self._stopped
        if captured is None and room and key in self._seen:
            captured = self._capture(key, forward, network, x)
        if captured is None:
            return self._watched(forward(x), key)
        self._replays += 1
        ticket = _Ticket()
        self._under_way = weakref.ref(ticket)
        return _Replay.apply(captured, ticket, x, *captured.weights)

    def buffers(self) -> list[Tensor]:
        """What tensors are passed by, kept on the GPU and counted as allocated."""
        return list(self._memory.buffers.values()) if self._memory else []

    def _applies(self, network: nn.Module, x: Tensor) -> bool:
        if traced() or not (self.limit and network.training and _capturable(x)):
            return False
        if self._stopped and not self._passes:
            return False
        ticket = self._under_way()
        return (
            (ticket is None or ticket.used)
            and torch.is_grad_enabled()
            and not torch.is_anomaly_enabled()  # it looks at values, which a capture has not
            and not x.requires_grad
            and any(p.requires_grad for p in network.parameters())
        )

    def _watched(self, maps: Maps, key: Any) -> Maps:
        """The maps; when they are differentiated, the shape's kernels are known and compiled."""
        for trained in [m for m in maps if m.requires_grad][:1]:
            trained.register_hook(lambda _: self._seen.add(key))
        return maps

    def _capture(
        self, key: Any, forward: Callable[[Tensor], Maps], network: nn.Module, x: Tensor
    ) -> _Pass | None:
        if any(isinstance(m, SyncBatchNorm) for m in network.modules()):
            self._stop("SyncBatchNorm talks to other processes")
            return None
        self._memory = self._memory or GraphMemory(x.device)
        self._snapshot = self._snapshot or _Snapshot(network)
        try:
            self._passes[key] = _Pass(forward, network, x, self._memory)
        except torch.cuda.OutOfMemoryError as error:
            reason = str(error)
        except RuntimeError as error:  # CUDA is in the middle of a capture: there is no going on
            raise RuntimeError(
                f"a training pass cannot be captured as a CUDA graph, set graphs=0: {error}"
            ) from error
        else:
            self._report()
            return self._passes[key]
        self._stop(reason)
        return None

    def _report(self) -> None:
        """Log the first graph, and the last."""
        count = len(self._passes)
        if count == 1:
            logger.info("training by CUDA graphs, of up to %d input shapes", self.limit)
        if count == self.limit:
            logger.info("no more CUDA graphs than graphs=%d: other shapes run without", count)

    def _stop(self, reason: str) -> None:
        """Capture no more; what was captured stays."""
        self._stopped = True
        if not self._passes:
            self._snapshot = self._memory = None
        logger.warning("no more CUDA graphs, going on without: %s", reason)

    def _forget(self) -> None:
        """Weights were moved, frozen or replaced: all graphs are of the past."""
        self._snapshot = None
        self._passes.clear()
        self._seen.clear()
        self._memory = None
        self._short_lives += self._replays < SHORT_LIFE
        self._replays = 0
        if self._short_lives == MAX_SHORT_LIVES:
            self._stop("the network changes all the time")


class _Ticket:
    """Stands for a forward pass whose backward pass may come; dies with the autograd graph."""

    used = False


class _Pass:
    """The graphs of one input shape, with the tensors that they read and write."""

    def __init__(
        self, forward: Callable[[Tensor], Maps], network: nn.Module, x: Tensor, memory: GraphMemory
    ) -> None:
        self.weights = [p for p in network.parameters() if p.requires_grad]
        self.x = memory.image(x, _input_dtype(x))
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with _other_leaves(network, self.weights) as leaves:
            with memory.capture(self._forward), _autocast():
                maps = forward(self.x)
                values = [m.detach() for m in maps]
                self._maps = [memory.buffer(("map", i), m) for i, m in enumerate(values)]
                _copy(self._maps, values)
            self.trained = [i for i, m in enumerate(maps) if m.requires_grad]
            # Maps were copied away when their gradients come, to the same place.
            self._grad_maps = [self._maps[i] for i in self.trained]
            with torch.autocast("cuda", enabled=False), memory.capture(self._backward):
                trained = [maps[i] for i in self.trained]
                given = torch.autograd.grad(trained, leaves, self._grad_maps, allow_unused=True)
                pairs = zip(given, self.weights, strict=True)
                grads = [_laid_out_as(grad, weight) for grad, weight in pairs]
        self._grads = _Gradients(grads)

    def forward(self, x: Tensor) -> Maps:
        """Maps of x, in memory of their own."""
        self.x.copy_(x)
        self._forward.replay()
        return tuple(m.clone() for m in self._maps)

    def backward(self, grad_maps: Sequence[Tensor]) -> list[Tensor | None]:
        """Gradients of the weights, in memory of their own."""
        _copy(self._grad_maps, [grad_maps[i] for i in self.trained])
        self._backward.replay()
        return self._grads.copies()


class _Snapshot:
    """What captured passes depend on: modules, their settings, tensors and addresses."""

    def __init__(self, network: nn.Module) -> None:
        # Kept, so that nothing else gets their identity; the network, which keeps this, is not.
        self._modules = [module for module in network.modules() if module is not network]
        self._tensors = [*network.parameters(), *network.buffers()]
        self._facts = self._facts_of(network)

    def holds(self, network: nn.Module) -> bool:
        """Whether the network is as it was."""
        return self._facts_of(network) == self._facts

    def _facts_of(self, network: nn.Module) -> list[Any]:
        """Of the modules that were there; their children show whether others are."""
        facts: list[Any] = []
        for module in (network, *self._modules):
            own = module.__dict__
            facts += module.training, own.get("drop_path_rate"), own.get("momentum")
            facts += map(id, own["_modules"].values())
            for tensor in (*own["_parameters"].values(), *own["_buffers"].values()):
                if tensor is not None:
                    facts += id(tensor), tensor.data_ptr(), tensor.requires_grad
        return facts


class _Gradients:
    """The gradients that a graph leaves in the pool."""

    ALIGNMENT = 128  # elements

    def __init__(self, grads: Sequence[Tensor | None]) -> None:
        self._lengths: dict[torch.dtype, int] = {}
        self._places: list[Any] = []  # dtype, shape, strides and offset; None without a gradient
        self._grads: list[Tensor] = []
        for grad in grads:
            if grad is None:
                self._places.append(None)
                continue
            self._grads.append(unowned(grad))
            start = self._lengths.get(grad.dtype, 0)
            self._places.append((grad.dtype, grad.shape, grad.stride(), start))
            length = -(-grad.numel() // self.ALIGNMENT) * self.ALIGNMENT
            self._lengths[grad.dtype] = start + length

    def copies(self) -> list[Tensor | None]:
        """The gradients in memory of their own: one tensor of a dtype, so few launches."""
        device = self._grads[0].device
        memory = {d: torch.empty(n, dtype=d, device=device) for d, n in self._lengths.items()}
        views = [
            place and memory[place[0]].as_strided(place[1], place[2], place[3])
            for place in self._places
        ]
        torch._foreach_copy_([view for view in views if view is not None], self._grads)
        return views


@contextmanager
def _other_leaves(network: nn.Module, weights: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Put other tensors on the same memory in the weights' places, inside.

    PyTorch ties the weights themselves to the stream that they were first used on, which a capture
    must not touch.
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


def _laid_out_as(grad: Tensor | None, weight: Tensor) -> Tensor | None:
    """A gradient with its weight's strides, as optimizers expect it."""
    like = torch.empty_like(weight, device="meta")
    if grad is None or grad.stride() == like.stride():
        return grad
    return torch.empty_like(weight).copy_(grad)


def _input_dtype(x: Tensor) -> torch.dtype:
    """What the first convolution reads: under autocast half as much."""
    if torch.is_autocast_enabled("cuda") and x.dtype != torch.float64:
        return torch.get_autocast_dtype("cuda")
    return x.dtype


def _autocast() -> torch.autocast:
    """Autocast as it is, but without weights that were cast before."""
    enabled = torch.is_autocast_enabled("cuda")
    dtype = torch.get_autocast_dtype("cuda")
    return torch.autocast("cuda", dtype, enabled=enabled, cache_enabled=False)


def _capturable(x: Tensor) -> bool:
    return x.is_cuda and not torch.cuda.is_current_stream_capturing()


def _copy(into: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    """Copy in one launch what has the same strides, and the rest one by one."""
    targets, sources = [], []
    for target, source in zip(into, tensors, strict=True):
        if target.stride() == source.stride():
            targets.append(target)
            sources.append(source)
        else:
            target.copy_(source)
    if targets:
        torch._foreach_copy_(targets, sources)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, captured: _Pass, ticket: _Ticket, x: Tensor, *_weights: Tensor) -> Maps:
        ctx.captured, ctx.ticket = captured, ticket
        maps = captured.forward(x)
        frozen = [m for i, m in enumerate(maps) if i not in captured.trained]
        ctx.mark_non_differentiable(*frozen)
        return maps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_maps: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.ticket.used:
            raise RuntimeError(
                "a pass run as a CUDA graph can be differentiated once: "
                "set graphs=0 in the backbone to differentiate it again"
            )
        grads = ctx.captured.backward(grad_maps)
        ctx.ticket.used = True
        return None, None, None, *grads
