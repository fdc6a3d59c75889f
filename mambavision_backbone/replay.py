"""Training passes as the calls that they come to, recorded for each input shape and made again."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import Any

import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .ops.plain import GLOBAL_HOOKS, own_forward
from .ops.triton_support import aligned
from .passes import (
    Asked,
    Ends,
    Grads,
    Maps,
    OtherTensorsError,
    Snapshot,
    TrainingPasses,
    check_version,
    given,
    gradients,
    uncached_autocast,
    version,
)
from .rerun import Rerun
from .tape import Recorder, Slots, Tape

MAX_SHAPES = 512  # half a megabyte of the host's memory each

_FORWARD, _BACKWARD = 0, 1  # the parts of a tape

# Whether the backward pass under way may be followed by another one; torch 2.4 does not say.
_retains_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)

# Besides this package's own; adapters and parametrised layers may do something in Python.
_USUAL = {nn.ModuleList, nn.Sequential, nn.Identity, nn.Conv2d, nn.Conv1d, nn.Linear, Mlp, nn.GELU}
_USUAL |= {nn.ReLU, nn.Dropout, nn.BatchNorm2d, nn.LayerNorm}


class TrainingReplays(TrainingPasses):
    """Runs a network forward and backward on a GPU without the way through its modules.

    Kernel by kernel, that way takes Python longer than the GPU takes for what it comes to. So the
    second pass of an input shape is recorded while it runs, and later ones make the same calls of
    PyTorch's operators and Triton's kernels, in the same order and on memory of their own: with the
    same results, bit by bit. Only for networks of the usual modules without hooks, and not with
    torch 2.4.

    Args:
        wanted: False runs all passes as they are.
    """

    level = logging.INFO  # nobody asked for them

    def __init__(self, wanted: bool) -> None:
        super().__init__("replays", MAX_SHAPES if wanted and _retains_graph else 0)
        self._wanted = wanted
        self._hooks: list[Any] = []
        self.kept: dict[Any, list[Tensor]] = {}  # of all tapes

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave what was recorded out of copies."""
        return TrainingReplays, (self._wanted,)

    def finish(self, key: Any, replay: _Replay, snapshot: Snapshot, refusal: str | None) -> None:
        """Take a pass that was recorded to its end, unless the network has changed since."""
        if refusal:
            self._stop(refusal)
        elif snapshot is self._snapshot:
            self._passes[key] = replay

    def forget(self) -> None:
        """Drop what was recorded, and the memory that it keeps."""
        self._hooks, self.kept = [], {}
        super().forget()

    def _applies(self, network: nn.Module, x: Tensor) -> bool:
        return super()._applies(network, x) and not any(self._hooks)

    def _second(self, asked: Asked) -> Maps:
        reason = _unusual(asked.network)
        if reason:
            self._stop(reason)
            return asked.forward(asked.x)
        self._hooks = _hooks(asked.network)
        if any(self._hooks):
            return asked.forward(asked.x)
        wanted = self._seen.pop(asked.key)  # until there is a backward pass, too
        recording = _Recording(self, asked.key, asked.snapshot)
        maps = recording.record(asked, wanted)
        if recording.refusal:
            self._stop(recording.refusal)
            return maps
        return _Run.apply(recording, None, asked.x, *recording.weights)

    def _again(self, known: _Replay, asked: Asked) -> Maps:
        x = asked.x
        if x.is_cuda and x.get_device() != torch.cuda.current_device():
            with torch.cuda.device(x.device):
                return self._again(known, asked)
        rerun = None if known.ends.all_wanted else Rerun(self, asked)
        return _Run.apply(known, rerun, x, *known.weights)


class _Run(torch.autograd.Function):
    """A pass as one function of autograd, of an image and the trained weights."""

    @staticmethod
    def forward(
        ctx: Any, known: _Recording | _Replay, rerun: Rerun | None, x: Tensor, *_weights: Tensor
    ) -> Maps:
        ctx.set_materialize_grads(False)
        ctx.known, ctx.rerun, ctx.read = known, rerun, known.read(x)
        ctx.version = version(ctx.read)
        maps, ctx.state = known.forward(x)
        ctx.mark_non_differentiable(*known.ends.frozen(maps))
        return tuple(maps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_maps: Tensor | None) -> tuple[Tensor | None, ...]:
        state = ctx.state
        if state is None:
            raise RuntimeError(
                "trying to backward through the graph a second time: give retain_graph=True "
                "the first time"
            )
        check_version(ctx.read, ctx.version)
        assert _retains_graph is not None
        retain = _retains_graph()
        if not retain:
            ctx.state = None
        if ctx.rerun is None or ctx.known.ends.foreseen(grad_maps):
            grads = ctx.known.backward(state, grad_maps, retain)
        else:
            grads = ctx.rerun.gradients(grad_maps)
        return None, None, None, *grads


class _TapeEnds(Ends):
    """Those of a tape, which takes gradients of all wanted maps, with their strides."""

    def __init__(
        self, maps: Sequence[Tensor], weights: Sequence[Tensor], wanted: Collection[int]
    ) -> None:
        super().__init__(maps, weights, wanted)
        self._like = [(m.shape, m.stride(), m.dtype, m.device) for m in self.pick(maps)]

    def fill(self, grad_maps: Sequence[Tensor | None]) -> list[Tensor]:
        """Gradients of the wanted maps as a tape takes them: zeros where none were given."""
        filled = []
        for grad, (shape, strides, dtype, device) in zip(grad_maps, self._like, strict=True):
            if grad is None:
                grad = torch.empty_strided(shape, strides, dtype=dtype, device=device).zero_()
            filled.append(_laid_out(grad, strides))
        return filled


class _Recording:
    """A pass of an input shape, recorded while it runs: ``record``, then ``forward``."""

    ends: _TapeEnds

    def __init__(self, owner: TrainingReplays, key: Any, snapshot: Snapshot) -> None:
        self._owner, self._key, self._snapshot = owner, key, snapshot
        self.weights, self.parameters = snapshot.weights, snapshot.parameters
        self.refusal: str | None = None

    def record(self, asked: Asked, wanted: Collection[int]) -> Maps:
        """The maps as they are without a recording; if there is no ``refusal`` they are kept.

        Args:
            asked: the pass.
            wanted: numbers of the maps that its backward pass is recorded for.
        """
        x = _laid_out(asked.x, torch.empty_like(asked.x, device="meta").stride())
        self._strides = x.stride()
        self._recorder = Recorder([*self.parameters, *asked.network.buffers()], self._owner.kept)
        with self._recorder.part([x]) as outputs, uncached_autocast(x.device.type):
            maps = asked.forward(x)
            self._values = [m.detach() for m in maps]
            outputs += self._values
        self._maps = maps
        self.refusal = self._recorder.refusal
        try:
            self.ends = _TapeEnds(maps, self.weights, wanted)
        except OtherTensorsError as error:
            self.refusal = str(error)
        return maps

    def read(self, _x: Tensor) -> list[Tensor]:
        """What must not be modified before the backward pass, so far as nothing else sees to it."""
        return self.parameters

    def forward(self, _x: Tensor) -> tuple[list[Tensor], Maps]:
        """Maps without a history, and those with theirs, which the backward pass needs."""
        values, maps = self._values, self._maps
        del self._values, self._maps
        return values, maps

    def backward(self, maps: Maps, grad_maps: Sequence[Tensor | None], retain: bool) -> Grads:
        """Gradients of the weights by those of all maps; if to be retained, once more."""
        with torch.autocast(maps[0].device.type, enabled=False):
            if self._recorder.done or not self.ends.foreseen(grad_maps):
                wanted = self.ends.wanted.union(given(grad_maps))
                self._owner.differentiated(self._key, self._snapshot, wanted)
                return gradients(maps, grad_maps, self.weights, retain)
            picked = self.ends.pick(grad_maps)
            filled = self.ends.fill(picked)
            with self._recorder.part(filled) as outputs:
                outputs += gradients(self.ends.pick(maps), filled, self.weights, retain)
        replay = _Replay(self._recorder.tape(), self._strides, self.ends, self._snapshot)
        self._owner.finish(self._key, replay, self._snapshot, self._recorder.refusal)
        return self.ends.choose(picked, outputs)


class _Replay:
    """A pass of an input shape, by its tape."""

    def __init__(
        self, tape: Tape, strides: Sequence[int], ends: _TapeEnds, snapshot: Snapshot
    ) -> None:
        self._tape, self._strides, self.ends = tape, strides, ends
        self.weights, self.parameters = snapshot.weights, snapshot.parameters

    def read(self, x: Tensor) -> list[Tensor]:
        """What must not be modified before the backward pass."""
        return [x, *self.parameters] if self._tape.read_again else self.parameters

    def forward(self, x: Tensor) -> tuple[list[Tensor], Slots]:
        """Maps of x, and what the backward pass needs."""
        slots = self._tape.start()
        return self._tape.play(_FORWARD, slots, [_laid_out(x, self._strides)]), slots

    def backward(self, slots: Slots, grad_maps: Sequence[Tensor | None], retain: bool) -> Grads:
        """Gradients of the weights by those of all maps; if to be retained, once more."""
        play = self._tape.play_again if retain else self._tape.play  # on autograd's device
        grad_maps = self.ends.pick(grad_maps)
        return self.ends.choose(grad_maps, play(_BACKWARD, slots, self.ends.fill(grad_maps)))


def _laid_out(x: Tensor, strides: Sequence[int]) -> Tensor:
    """The same values at the start of a storage, with the strides: as tapes take them."""
    x = x.detach()
    if x.stride() == strides and not x.storage_offset() and aligned(x):
        return x
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)


def _unusual(network: nn.Module) -> str | None:
    """Why a pass might be more than its calls, or None."""
    for module in network.modules():
        own = type(module).__module__.startswith(f"{__package__}.")
        name = type(module).__qualname__
        if not own_forward(module) or not (own or type(module) in _USUAL):
            return f"{name} may do more than its operators"
        if any(isinstance(value, Tensor) for value in module.__dict__.values()):
            return f"{name} has a tensor that is neither parameter nor buffer"
    for parameter in network.parameters():
        alone = parameter.untyped_storage().nbytes() == parameter.nbytes
        if type(parameter) is not nn.Parameter or not alone:
            return "parameters share memory"
        if parameter._backward_hooks:
            return "parameters have hooks"
    return None


def _hooks(network: nn.Module) -> list[Any]:
    """Where hooks of the network's modules, and of all modules, are kept; its own see the pass."""
    kinds = "forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks"
    own = [
        getattr(module, f"_{kind}")
        for module in network.modules()
        if module is not network
        for kind in kinds
    ]
    return [*own, *GLOBAL_HOOKS]
