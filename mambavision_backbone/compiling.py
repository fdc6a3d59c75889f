"""How the ``compile`` switch compiles."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


def compile_stages(stages: Iterable[nn.Module]) -> None:
    """Compile each module when it first runs, in place, for any height and width.

    Not the network as a whole: behind the stem all sizes are expressions of the image's, of which
    PyTorch's compiler takes minutes; at the start of a stage they are numbers of their own again.
    """
    for stage in stages:
        stage.compile(fullgraph=True, dynamic=True, backend=inductor)


def inductor(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
    """torch.compile's own backend, for training with dynamic heights and widths, too.

    Of views that it keeps for the backward pass it cannot order the strides, if heights and widths
    are symbols (``TypeError: cannot determine truth value of Relational``, torch 2.11,
    https://github.com/pytorch/pytorch/issues/185510). So it is told to compute views again.
    """
    from torch._dynamo import lookup_backend  # takes a second to import
    from torch._functorch import config

    with config.patch(recompute_views=True):
        return lookup_backend("inductor")(graph, inputs)
