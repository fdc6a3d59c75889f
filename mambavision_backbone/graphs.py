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

from .ops.triton_support import traced

logger = logging.getLogger("mambavision_backbone")

Maps = tuple[Tensor, ...]
MAX_CHANGES = 16  # of a network: whoever moves its weights at every step has no use for graphs


class TrainingGraphs:
    """Runs a network forward and backward as CUDA graphs, bit for bit as without them.

    The first pass of an input shape runs as it is, the second is captured, all later ones are
    replayed. A graph is for one shape exactly, so results do not depend on the shapes seen before.
    All graphs share their memory: one pass is under way at a time, and a forward pass that comes
    before the last one's backward pass runs without a graph. Hooks inside of the network are not
    called by replays.

    Args:
        limit: the first so many shapes that come twice are captured, all others run as they are.

    Raises:
        ValueError: a negative limit.
    """

    def __init__(self, limit: int) -> None:
        if limit < 0:
            raise ValueError(f"graphs must not be negative, got {limit}")
        self.limit = limit
        self._seen: set[Any] = set()
        self._passes: dict[Any, _Pass] = {}
        self._memory: _Memory | None = None
        self._forgotten = 0
        self._under_way: Callable[[], _Ticket | None] = lambda: None

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave what was captured out of copies."""
        return TrainingGraphs, (self.limit,)

    def run(self, forward: Callable[[Tensor], Maps], network: nn.Module, x: Tensor) -> Maps:
        """``forward(x)`` with gradients of the network's parameters; x gets none."""
        if not self._applies(network, x):
            return forward(x)
        autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
        key = (x.shape, x.dtype, x.device, autocast)
        captured = self._passes.get(key)
        if captured is not None and not captured.holds():
            captured = None
            self._forget()
        if captured is None:
            if len(self._passes) >= self.limit:
                return forward(x)
            if key not in self._seen:
                self._seen.add(key)
                return forward(x)
            self._memory = self._memory or _Memory(x.device)
            try:
                captured = self._passes[key] = _Pass(forward, network, x, self._memory)
            except RuntimeError as error:
                self.limit = len(self._passes)
                logger.warning("no more CUDA graphs, going on without: %s", error)
                return forward(x)
        ticket = _Ticket()
        self._under_way = weakref.ref(ticket)
        return _Replay.apply(captured, ticket, x, *captured.weights)

    def _forget(self) -> None:
        """Weights were moved, frozen or replaced: all graphs are of the past."""
        self._passes.clear()
        self._memory = None
        self._forgotten += 1
        if self._forgotten == MAX_CHANGES:
            self.limit = 0
            logger.warning("no more CUDA graphs: the network changed %d times", MAX_CHANGES)

    def buffers(self) -> list[Tensor]:
        """What is kept on the GPU beside the graphs' own memory, to pass tensors by."""
        return list(self._memory.buffers.values()) if self._memory else []

    def _applies(self, network: nn.Module, x: Tensor) -> bool:
        ticket = self._under_way()
        return (
            self.limit > 0
            and _capturable(x)
            and network.training
            and torch.is_grad_enabled()
            and not x.requires_grad
            and (ticket is None or ticket.used)
            and not traced()
        )


class _Ticket:
    """Stands for a forward pass whose backward pass may come; dies with the autograd graph."""

    used = False


class _Memory:
    """What all graphs use: their pool, a stream to capture on, and buffers to pass tensors by."""

    def __init__(self, device: torch.device) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)
        self.buffers: dict[Any, Tensor] = {}

    def buffer(self, role: Any, like: Tensor) -> Tensor:
        """A tensor of like's shape, strides and dtype in the memory of its role."""
        memory = self.buffers.get(role)
        if memory is None or memory.nbytes < like.nbytes:
            memory = torch.empty(like.nbytes, dtype=torch.uint8, device=like.device)
            self.buffers[role] = memory  # graphs that use the old one keep it
        return memory[: like.nbytes].view(like.dtype).as_strided(like.shape, like.stride())


class _Pass:
    """The graphs of one input shape, with the tensors that they read and write."""

    def __init__(
        self, forward: Callable[[Tensor], Maps], network: nn.Module, x: Tensor, memory: _Memory
    ) -> None:
        self.weights = [p for p in network.parameters() if p.requires_grad]
        self._modules = list(network.modules())
        self._tensors = [*network.parameters(), *network.buffers()]
        self._state = self._current()
        if any(isinstance(m, SyncBatchNorm) for m in self._modules):
            raise RuntimeError("SyncBatchNorm talks to other processes")
        if not self.weights:
            raise RuntimeError("all weights are frozen")
        self.x = memory.buffer("x", torch.empty_like(x, memory_format=torch.channels_last))
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.device(x.device), _other_leaves(network, self.weights) as leaves:
            with self._capture(self._forward, memory), _uncached_autocast():
                maps = forward(self.x)
                self._maps = [memory.buffer(("map", i), m.detach()) for i, m in enumerate(maps)]
                _copy(self._maps, maps)
            self.trained = [i for i, m in enumerate(maps) if m.requires_grad]
            self._grad_maps = [memory.buffer(("grad", i), self._maps[i]) for i in self.trained]
            with self._capture(self._backward, memory):
                trained = [maps[i] for i in self.trained]
                grads = torch.autograd.grad(trained, leaves, self._grad_maps, allow_unused=True)
                self._grads = _Gradients(grads, self.weights, memory)

    @staticmethod
    def _capture(graph: torch.cuda.CUDAGraph, memory: _Memory) -> torch.cuda.graph:
        # thread_local: other threads, say a loader's that pins memory, may go on
        return torch.cuda.graph(
            graph, memory.pool, memory.stream, capture_error_mode="thread_local"
        )

    def _current(self) -> list[Any]:
        return [
            *((t.data_ptr(), t.requires_grad) for t in self._tensors),
            *(m.training for m in self._modules),
        ]

    def holds(self) -> bool:
        """Whether the network is as it was when it was captured."""
        return self._current() == self._state

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


class _Gradients:
    """Gradients side by side in one tensor, or one for each dtype: one launch copies them."""

    ALIGNMENT = 128  # elements

    def __init__(
        self, grads: Sequence[Tensor | None], weights: Sequence[Tensor], memory: _Memory
    ) -> None:
        lengths: dict[torch.dtype, int] = {}
        self._places: list[Any] = []  # dtype, shape, strides and offset; None without a gradient
        for grad, weight in zip(grads, weights, strict=True):
            if grad is None:
                self._places.append(None)
                continue
            start = lengths.get(weight.dtype, 0)
            lengths[weight.dtype] = start - (-weight.numel() // self.ALIGNMENT) * self.ALIGNMENT
            shape = weight.shape, torch.empty_like(weight).stride()
            self._places.append((weight.dtype, *shape, start))
        device = weights[0].device
        self._all = {
            dtype: memory.buffer(("weights", dtype), torch.empty(n, dtype=dtype, device=device))
            for dtype, n in lengths.items()
        }
        into = [view for view in self._views(self._all) if view is not None]
        _copy(into, [grad for grad in grads if grad is not None])

    def copies(self) -> list[Tensor | None]:
        """The gradients in memory of their own."""
        return self._views({dtype: memory.clone() for dtype, memory in self._all.items()})

    def _views(self, memory: dict[torch.dtype, Tensor]) -> list[Tensor | None]:
        return [
            place and memory[place[0]].as_strided(place[1], place[2], place[3])
            for place in self._places
        ]


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


def _uncached_autocast() -> torch.autocast:
    """Autocast as it is, but without weights that were cast before the capture."""
    return torch.autocast(
        "cuda",
        torch.get_autocast_dtype("cuda"),
        enabled=torch.is_autocast_enabled("cuda"),
        cache_enabled=False,
    )


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
