"""Training passes as CUDA graphs, one for each input shape: the host starts two, not hundreds."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .capture import GraphMemory, unowned
from .ops.sizes import ceil_div
from .passes import (
    Asked,
    Ends,
    Grads,
    Maps,
    OtherTensorsError,
    TrainingPasses,
    check_version,
    gradients,
    uncached_autocast,
    version,
)
from .rerun import Rerun, other_leaves

logger = logging.getLogger("mambavision_backbone")


class TrainingGraphs(TrainingPasses):
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
        super().__init__("CUDA graphs", limit)
        self._memory: GraphMemory | None = None
        self._under_way: Callable[[], _Ticket | None] = lambda: None

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave what was captured out of copies."""
        return TrainingGraphs, (self.limit,)

    def buffers(self) -> list[Tensor]:
        """What tensors are passed by, kept on the GPU and counted as allocated."""
        return list(self._memory.buffers.values()) if self._memory else []

    def _applies(self, network: nn.Module, x: Tensor) -> bool:
        ticket = self._under_way()
        free = ticket is None or ticket.used
        return free and super()._applies(network, x)

    def _second(self, asked: Asked) -> Maps:
        captured = self._capture(asked)
        return asked.forward(asked.x) if captured is None else self._again(captured, asked)

    def _capture(self, asked: Asked) -> _Pass | None:
        """Capture a pass.

        Raises:
            RuntimeError: it cannot be captured; the message says why.
        """
        if any(map(_talks, asked.network.modules())):
            self._stop("SyncBatchNorm talks to other processes")
            return None
        self._memory = self._memory or GraphMemory(asked.x.device)
        try:
            captured = _Pass(asked, self._seen[asked.key], self._memory)
        except (torch.cuda.OutOfMemoryError, OtherTensorsError) as error:
            reason = str(error)
        except RuntimeError as error:  # CUDA is in the middle of a capture: there is no going on
            raise RuntimeError(
                f"a training pass cannot be captured as a CUDA graph, set graphs=0: {error}"
            ) from error
        else:
            self._passes[asked.key] = captured
            self._report()
            return captured
        self._stop(reason)
        return None

    def _again(self, known: _Pass, asked: Asked) -> Maps:
        ticket = _Ticket()
        self._under_way = weakref.ref(ticket)
        rerun = None if known.ends.all_wanted else Rerun(self, asked)
        return _Replay.apply(known, ticket, rerun, asked.x, *known.weights)

    def _report(self) -> None:
        """Log the first graph, and the last."""
        count = len(self._passes)
        if count == 1:
            logger.info("training by CUDA graphs, of up to %d input shapes", self.limit)
        if count == self.limit:
            logger.info("no more CUDA graphs than graphs=%d: other shapes run without", count)

    def _stop(self, reason: str) -> None:
        super()._stop(reason)
        self._free()

    def _drop(self, key: Any) -> None:
        super()._drop(key)
        self._free()

    def _free(self) -> None:
        """Give the memory up with the last graph: PyTorch takes no more into such a pool."""
        if not self._passes:
            self._memory = None

    def forget(self) -> None:
        """Drop what was captured, and the memory that it keeps."""
        self._memory = None
        super().forget()


class _Ticket:
    """Stands for a forward pass whose backward pass may come; dies with the autograd graph."""

    used = False


class _Pass:
    """The graphs of one input shape, with the tensors that they read and write."""

    def __init__(self, asked: Asked, wanted: Collection[int], memory: GraphMemory) -> None:
        self.weights, self.parameters = asked.snapshot.weights, asked.snapshot.parameters
        self.x = memory.image(asked.x, _input_dtype(asked.x))
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with other_leaves(asked.network, self.weights) as leaves:
            with memory.capture(self._forward), uncached_autocast("cuda"):
                maps = asked.forward(self.x)
                values = [m.detach() for m in maps]
                self._maps = [memory.buffer(("map", i), m) for i, m in enumerate(values)]
                _copy(self._maps, values)
            self.ends = Ends(maps, leaves, wanted)
            # Maps were copied away when their gradients come, to the same place.
            self._grad_maps = self.ends.pick(self._maps)
            wanted_maps = self.ends.pick(maps)
            del maps  # and what leads to the others only
            with torch.autocast("cuda", enabled=False), memory.capture(self._backward):
                grads = gradients(wanted_maps, self._grad_maps, leaves)
        self._grads = _Gradients(grads)

    def forward(self, x: Tensor) -> Maps:
        """Maps of x, in memory of their own."""
        self.x.copy_(x)
        self._forward.replay()
        return tuple(m.clone() for m in self._maps)

    def backward(self, grad_maps: Sequence[Tensor | None]) -> Grads:
        """Gradients of the weights by those of all maps, in memory of their own."""
        grad_maps = self.ends.pick(grad_maps)
        _copy(self._grad_maps, grad_maps)
        self._backward.replay()
        return self.ends.choose(grad_maps, self._grads.copies())


class _Gradients:
    """The gradients that a graph leaves in the pool."""

    ALIGNMENT = 128  # elements

    def __init__(self, grads: Grads) -> None:
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
            length = ceil_div(grad.numel(), self.ALIGNMENT) * self.ALIGNMENT
            self._lengths[grad.dtype] = start + length

    def copies(self) -> Grads:
        """The gradients in memory of their own: one tensor of a dtype, so few launches."""
        device = self._grads[0].device
        memory = {d: torch.empty(n, dtype=d, device=device) for d, n in self._lengths.items()}
        views = [
            place and memory[place[0]].as_strided(place[1], place[2], place[3])
            for place in self._places
        ]
        torch._foreach_copy_([view for view in views if view is not None], self._grads)
        return views


def _talks(module: nn.Module) -> bool:
    """Whether it is a synchronised batch norm, PyTorch's or mmcv's."""
    return any(kind.__name__ == "SyncBatchNorm" for kind in type(module).__mro__)


def _input_dtype(x: Tensor) -> torch.dtype:
    """What the first convolution reads: under autocast half as much."""
    if torch.is_autocast_enabled("cuda") and x.dtype != torch.float64:
        return torch.get_autocast_dtype("cuda")
    return x.dtype


def _copy(into: Sequence[Tensor], tensors: Sequence[Tensor | None]) -> None:
    """Copy in one launch what has the same strides, and the rest one by one; zeros for None."""
    targets, sources = [], []
    for target, source in zip(into, tensors, strict=True):
        if source is None:
            target.zero_()
        elif target.stride() == source.stride():
            targets.append(target)
            sources.append(source)
        else:
            target.copy_(source)
    if targets:
        torch._foreach_copy_(targets, sources)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        captured: _Pass,
        ticket: _Ticket,
        rerun: Rerun | None,
        x: Tensor,
        *_weights: Tensor,
    ) -> Maps:
        ctx.set_materialize_grads(False)
        ctx.captured, ctx.ticket, ctx.rerun = captured, ticket, rerun
        ctx.version = version(captured.parameters)
        maps = captured.forward(x)
        ctx.mark_non_differentiable(*captured.ends.frozen(maps))
        return maps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_maps: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.ticket.used:
            raise RuntimeError(
                "a pass run as a CUDA graph can be differentiated once: "
                "set graphs=0 in the backbone to differentiate it again"
            )
        check_version(ctx.captured.parameters, ctx.version)
        foreseen = ctx.captured.ends.foreseen(grad_maps)
        grads = (ctx.captured.backward if foreseen else ctx.rerun.gradients)(grad_maps)
        ctx.ticket.used = True
        return None, None, None, None, *grads
