"""Kernels and memory, with as little Python as there can be for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.triton_support import STREAM, Launch, raw_stream
from .steps import Geometry

# By these, code that torch.compile generates makes tensors.
_guards = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
_empty_on_gpu = getattr(_guards, "_empty_strided_cuda", None)
_view = getattr(_guards, "_reinterpret_tensor", None)


def view(base: Tensor, shape: Sequence[int], strides: Sequence[int], shift: int) -> Tensor:
    """A tensor on the base's memory, ``shift`` elements from its start."""
    return base.as_strided(shape, strides, base.storage_offset() + shift)


make_view = _view or view


def empty(
    shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """A tensor of any values."""
    if device.type == "cuda" and _empty_on_gpu:
        return _empty_on_gpu(shape, strides, dtype)
    return torch.empty_strided(shape, strides, dtype=dtype, device=device)


class Operand(NamedTuple):
    """A tensor that a kernel works on: which of the bases it lies on, and its geometry there.

    ``shift`` is the number of elements from the base's start.
    """

    base: int
    geometry: Geometry
    shift: int


class KernelStart:
    """A launch, but for the bases of those tensors that lie elsewhere every time.

    Args:
        launch: which kernel, and how.
        operands: its tensors; constants are given as they are.
    """

    def __init__(self, launch: Launch, operands: Sequence[Operand | Tensor | None]) -> None:
        self.launch, self._operands = launch, operands
        self._known: Any = None

    def start(self, *bases: Tensor) -> None:
        """Start the kernel."""
        if self._known is None:
            self._find(bases)
            return
        run, arguments, device, moving = self._known
        arguments = arguments.copy()
        arguments[STREAM] = raw_stream(device)
        addresses = [base.data_ptr() for base in bases]
        for i, base, nbytes in moving:
            arguments[i] = addresses[base] + nbytes
        run(*arguments)

    def _find(self, bases: Sequence[Tensor]) -> None:
        """Start the kernel the long way, which finds out the short one."""
        tensors = [
            view(bases[operand.base], *operand.geometry[1:3], operand.shift)
            if isinstance(operand, Operand)
            else operand
            for operand in self._operands
        ]
        self.launch(*tensors)
        if self.launch.known is None:
            return
        device = next(t for t in tensors if t is not None).get_device()
        run, arguments, first = self.launch.call_of(tensors)
        moving = [
            (first + i, operand.base, operand.shift * operand.geometry.dtype.itemsize)
            for i, operand in enumerate(self._operands)
            if isinstance(operand, Operand)
        ]
        for i, _, _ in moving:
            arguments[i] = 0
        self._known = run, arguments, device, moving
        self._operands = ()  # many tapes may be kept
