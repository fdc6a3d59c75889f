"""A convolution, the batch norm that follows it, and what comes after that."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functions import call
from ..layer_norm import add
from ..plain import plain
from ..triton_support import fusible


def conv_norm(
    x: Tensor,
    conv: nn.Module,
    norm: nn.Module,
    act: nn.Module | None = None,
    stream: Tensor | None = None,
    factor: Tensor | None = None,
) -> Tensor:
    """``act(norm(conv(x)))``; where there is a stream, ``stream + factor`` times that.

    In training on a GPU all but the convolution is two kernels, and two in the backward pass. A
    batch norm in training mode takes the mean away, and with it the convolution's bias: there the
    bias is neither added nor differentiated, only its share in the running mean is kept. Its
    gradient is zero, as it is otherwise but for rounding.

    Args:
        x: (B, C, H, W).
        conv: a 2D convolution, C → D.
        norm: a batch norm of D channels.
        act: the activation, or None.
        stream: (B, D, H', W'), or None.
        factor: (B, 1, 1, 1) factors of drop path, or None.

    Returns:
        (B, D, H', W').

    Raises:
        ValueError: sizes that do not fit, by the kernels; by the modules PyTorch's RuntimeError.
    """
    kind = _ACTS.get(type(act))
    if not (
        plain(conv, nn.Conv2d)
        and conv.padding_mode == "zeros"
        and plain(norm, nn.BatchNorm2d)
        and norm.training
        and norm.affine
        and norm.momentum is not None
        and norm.num_features == conv.out_channels
        and len(norm.weight) == len(conv.weight)
        and kind is not None
        and (act is None or plain(act, type(act)))
        and getattr(act, "approximate", "tanh") == "tanh"  # GELU's
        and fusible(x)
    ):
        y = norm(conv(x))
        y = y if act is None else act(y)
        return y if stream is None else add(stream, y, None, factor)
    from .launch import BatchNormFunction, Running

    y = F.conv2d(x, conv.weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)
    if y.numel() == y.shape[1]:
        return norm(y)  # which raises an error: one value has no variance
    layout = torch.channels_last
    y = y.contiguous(memory_format=layout)
    if stream is None:
        factor = None
    elif stream.shape == y.shape:
        stream = stream.contiguous(memory_format=layout)
    else:
        raise ValueError(f"a stream {tuple(stream.shape)} does not fit a branch {tuple(y.shape)}")
    tracked = norm.running_mean, norm.running_var, norm.num_batches_tracked
    if not norm.track_running_stats:
        tracked = None, None, None
    running = Running(*tracked, norm.momentum)
    weights = conv.bias, norm.weight, norm.bias
    return call(BatchNormFunction, y, *weights, stream, factor, kind, norm.eps, running)


_ACTS = {type(None): "none", nn.ReLU: "relu", nn.GELU: "gelu_tanh"}
