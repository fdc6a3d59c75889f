"""How the ``compile`` switch compiles."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def compile_stages(stages: Iterable[nn.Module]) -> None:
    """Compile each module when it first runs, in place, for any height and width.

    Not the network as a whole: behind the stem all sizes are expressions of the image's, of which
    PyTorch's compiler takes minutes; at the start of a stage they are numbers of their own again.

    Each is one graph. It is not asked for (``fullgraph``), since then a stage that has been
    compiled too often, for training, evaluation and so on, would be an error, not a warning.
    """
    for stage in stages:
        stage.compile(dynamic=True)


def compiled(module: nn.Module) -> bool:
    """Whether a module is compiled in place; copies are not."""
    return module._compiled_call_impl is not None
