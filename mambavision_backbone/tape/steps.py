"""What was recorded: steps on storages, which are numbered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.triton_support import Launch


class Geometry(NamedTuple):
    """What a tensor is besides its storage; strides and offset count elements."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    @staticmethod
    def of(x: Tensor) -> Geometry:
        """That of x."""
        return Geometry(x.dtype, tuple(x.shape), x.stride(), int(x.storage_offset()))


class Storage(NamedTuple):
    """A storage by the first tensor on it, its root; that is kept if it is a constant."""

    root: Geometry
    constant: Tensor | None


class View(NamedTuple):
    """A tensor: on which storage, and how."""

    storage: int
    geometry: Geometry


class Listed(NamedTuple):
    """An argument that is a list with tensors in it."""

    items: Sequence[Any]


class Empty(NamedTuple):
    """Memory was allocated."""

    storage: int
    device: torch.device


class Operation(NamedTuple):
    """An operator was run, on views, lists and constants."""

    function: Callable[..., Any]
    arguments: Sequence[Any]
    results: Sequence[int | None]  # storages of those that are new
    several: bool  # whether they come in a tuple


class Start(NamedTuple):
    """A kernel was started."""

    launch: Launch
    tensors: Sequence[View | None]


class Section(NamedTuple):
    """Steps in a row, the storages of what they were given, and what was wanted of them."""

    steps: Sequence[Empty | Operation | Start]
    inputs: Sequence[int]
    outputs: Sequence[View | None]


def views_in(arguments: Sequence[Any]) -> list[View]:
    """The tensors among arguments, those in lists included."""
    found = []
    for argument in arguments:
        if isinstance(argument, View):
            found.append(argument)
        elif isinstance(argument, Listed):
            found += views_in(argument.items)
    return found
