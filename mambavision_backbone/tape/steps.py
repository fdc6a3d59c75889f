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


Step = Empty | Operation | Start


class Section(NamedTuple):
    """Steps in a row, the storages of what they were given, and what was wanted of them."""

    steps: Sequence[Step]
    inputs: Sequence[int]
    outputs: Sequence[View | None]


def touched(step: Step) -> set[int]:
    """The storages that a step reads or writes."""
    if isinstance(step, Empty):
        return {step.storage}
    arguments = step.tensors if isinstance(step, Start) else step.arguments
    return {view.storage for view in _views_in(arguments)}


def nbytes(geometry: Geometry) -> int:
    """From a tensor's first element to the end of its last one."""
    if 0 in geometry.shape:
        return 0
    spans = zip(geometry.shape, geometry.strides, strict=True)
    return geometry.dtype.itemsize * (1 + sum((n - 1) * stride for n, stride in spans))


def _views_in(arguments: Sequence[Any]) -> list[View]:
    """The tensors among arguments, those in lists included."""
    found = []
    for argument in arguments:
        if isinstance(argument, View):
            found.append(argument)
        elif isinstance(argument, Listed):
            found += _views_in(argument.items)
    return found
