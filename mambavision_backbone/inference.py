"""Faster inference with the same weights: folded batch norms, half precision, CUDA graphs."""

from __future__ import annotations

import copy
import logging
import threading
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .backbone import MambaVision
from .capture import GraphMemory, unowned
from .layers.blocks import ConvBlock
from .layers.stage import TokenStage
from .layers.stem import PatchEmbed
from .ops.bias_act import bias_act
from .ops.triton_support import traced
from .straight import StraightStage

logger = logging.getLogger("mambavision_backbone")

_ONE_AT_A_TIME = threading.Lock()  # threads: graphs share their memory
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def accelerate(model: nn.Module, dtype: torch.dtype | None = None, graphs: int = 32) -> nn.Module:
    """Make the backbone of a detector or segmenter fast for inference, in place.

    The rest of the model is left alone: run it under autocast to have it in half precision too.
    ``model`` may be what mmdet's and mmseg's inferencers hold: ``accelerate(inferencer.model)``.

    Args:
        model: a model whose ``backbone`` is a MambaVision, or a MambaVision.
        dtype: of weights and computation: float16, bfloat16 or float32; by default float16 on a
            GPU and float32 on a CPU.
        graphs: how many input shapes to keep a CUDA graph of.

    Returns:
        The model; of a MambaVision, the :class:`FastBackbone` made of it.

    Raises:
        TypeError: the model has no MambaVision as its backbone.
        ValueError: another dtype, or float16 on a CPU; a negative number of graphs.
    """
    if isinstance(model, MambaVision):
        return FastBackbone(model, dtype, graphs)
    backbone = getattr(model, "backbone", None)
    if not isinstance(backbone, MambaVision):
        raise TypeError(
            f"{type(model).__name__} has no MambaVision as its backbone: nothing to accelerate"
        )
    model.backbone = FastBackbone(backbone, dtype, graphs)
    return model


class FastBackbone(nn.Module):
    """A copy of a MambaVision for inference.

    Batch norms are folded into the convolutions and weights are kept in ``dtype``. On a GPU the
    kernels of an input shape that comes a second time are captured as a CUDA graph and replayed
    from then on. A graph is for one shape exactly: shapes are not padded further than the model's
    data preprocessor does (to multiples of 32 in mmdet, some forty shapes in COCO), so results do
    not depend on which shapes were seen before. The first ``graphs`` shapes to come twice are
    captured, all others run as they are. All graphs share their memory, which is what the largest
    shape takes: one pass is under way at a time, on one stream.

    Weights may be changed in place, loaded, cast and moved; layers, and weights otherwise, are not
    to be replaced: they are read when the copy is made.

    Args:
        backbone: the network; it is not changed.
        dtype: see :func:`accelerate`.
        graphs: see :func:`accelerate`.

    Raises:
        ValueError: see :func:`accelerate`.
    """

    dtype: torch.dtype
    _device: torch.device
    _seen: set[tuple[int, ...]]
    _graphs: dict[tuple[int, ...], _Graph]
    _memory: GraphMemory | None

    def __init__(
        self, backbone: MambaVision, dtype: torch.dtype | None = None, graphs: int = 32
    ) -> None:
        super().__init__()
        device = next(backbone.parameters()).device.type
        if dtype is None:
            dtype = torch.float16 if device == "cuda" else torch.float32
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be float16, bfloat16 or float32, got {dtype}")
        if dtype == torch.float16 and device == "cpu":
            raise ValueError("float16 needs a GPU: a CPU has bfloat16 and float32")
        if graphs < 0:
            raise ValueError(f"graphs must not be negative, got {graphs}")
        self.max_graphs = graphs
        net = copy.deepcopy(backbone).eval().requires_grad_(False)
        net.patch_embed = _folded_stem(net.patch_embed)  # type: ignore[assignment]
        for level in net.levels[:2]:
            level.blocks = nn.ModuleList(map(_FoldedConvBlock, level.blocks))  # type: ignore
        for i, level in enumerate(net.levels):
            if type(level) is TokenStage:
                net.levels[i] = StraightStage(level)
        net._caster.slots.clear()  # they hold the layers that were replaced
        self.net = net.to(dtype)
        self.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._forget()
        self._look_at_weights()
        self.register_load_state_dict_post_hook(_graphs_anew)

    @torch.no_grad()
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Features of x (B, in_channels, H, W), as ``MambaVision`` gives them, in x's dtype.

        Under autocast, and of images of integers, in ``dtype``.
        """
        autocast = torch.is_autocast_enabled(x.device.type)
        out_dtype = self.dtype if autocast or not x.is_floating_point() else x.dtype
        with torch.autocast(x.device.type, enabled=False):
            outs = self._run(x)
        return tuple(out.to(out_dtype) for out in outs)

    def train(self, mode: bool = True) -> FastBackbone:
        """Stay in eval mode; RuntimeError for ``mode=True``."""
        if mode:
            raise RuntimeError("a FastBackbone is for inference: train the MambaVision itself")
        return super().train(mode)

    def _run(self, x: Tensor) -> tuple[Tensor, ...]:
        if x.dim() != 4:
            return self.net(x)  # which says what it wants
        replica = getattr(self, "_is_replica", False)
        if not x.is_cuda or x.device != self._device or traced() or replica:
            return self._features(x)
        key = tuple(x.shape)
        graph = self._graphs.get(key)
        if graph is None:
            if len(self._graphs) >= self.max_graphs:
                return self._features(x)
            if key not in self._seen:
                self._seen.add(key)
                return self._features(x)
            graph = self._try_capture(x)
            if graph is None:
                return self._features(x)
            self._graphs[key] = graph
        with _ONE_AT_A_TIME:
            graph.x.copy_(x)
            graph.graph.replay()
            return tuple(out.clone() for out in graph.outs)

    def _features(self, x: Tensor) -> tuple[Tensor, ...]:
        # In the layout that the network wants, by one copy.
        return self.net(x.to(self.dtype, memory_format=torch.channels_last))

    def _try_capture(self, x: Tensor) -> _Graph | None:
        current = torch.cuda.current_stream(x.device)
        try:
            with _ONE_AT_A_TIME:
                return self._capture(x)
        except RuntimeError as error:
            torch.cuda.set_stream(current)  # an invalid capture does not give it back
            self.max_graphs = len(self._graphs)
            logger.warning("no more CUDA graphs, going on without: %s", error)
            return None

    def _capture(self, x: Tensor) -> _Graph:
        self._memory = self._memory or GraphMemory(x.device)
        static = self._memory.image(x, self.dtype)
        stream = self._memory.stream
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.device(x.device), torch.cuda.stream(stream):
            self.net(static.copy_(x))  # libraries choose algorithms
        torch.cuda.current_stream(x.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with self._memory.capture(graph):
            outs = self.net(static)
        return _Graph(graph, static, tuple(unowned(out) for out in outs))

    def _apply(self, *args: Any, **kwargs: Any) -> FastBackbone:
        """Move or cast; the graphs are of the old weights."""
        self._forget()
        super()._apply(*args, **kwargs)
        self._look_at_weights()
        return self

    def _look_at_weights(self) -> None:
        weight = next(self.net.parameters())
        self.dtype, self._device = weight.dtype, weight.device

    def _forget(self) -> None:
        self._graphs, self._seen, self._memory = {}, set(), None

    def __getstate__(self) -> dict[str, Any]:
        """Leave graphs out of copies."""
        return {**self.__dict__, "_graphs": {}, "_seen": set(), "_memory": None}


def _graphs_anew(fast: Any, _keys: Any) -> None:
    """Loading may have replaced weights."""
    fast._forget()
    fast._look_at_weights()


class _Graph(NamedTuple):
    """A captured graph with the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    x: Tensor
    outs: tuple[Tensor, ...]


class _FoldedConv(nn.Module):
    """``act(BN(conv(y)))``, plus x, with the batch norm folded into weight and bias."""

    def __init__(self, conv: Any, norm: Any, act: str, gamma: Tensor | None = None) -> None:
        super().__init__()
        folded = fuse_conv_bn_eval(conv.double(), norm.double())
        assert folded.bias is not None
        weight, bias = folded.weight.detach(), folded.bias.detach()
        if gamma is not None:
            weight, bias = weight * gamma.view(-1, 1, 1, 1), bias * gamma
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)
        self.stride, self.padding, self.act = conv.stride, conv.padding, act

    def forward(self, y: Tensor, x: Tensor | None = None) -> Tensor:
        y = F.conv2d(y, self.weight, None, self.stride, self.padding)
        return bias_act(y, self.bias, self.act, x)


def _folded_stem(stem: PatchEmbed) -> nn.Sequential:
    conv1, norm1, _, conv2, norm2, _ = stem.conv_down
    return nn.Sequential(_FoldedConv(conv1, norm1, "relu"), _FoldedConv(conv2, norm2, "relu"))


class _FoldedConvBlock(nn.Module):
    def __init__(self, block: ConvBlock) -> None:
        super().__init__()
        self.conv1 = _FoldedConv(block.conv1, block.norm1, "gelu_tanh")
        self.conv2 = _FoldedConv(block.conv2, block.norm2, "none", block.gamma)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x), x)
