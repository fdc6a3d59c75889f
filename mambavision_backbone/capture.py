"""What CUDA graphs of one network share, whether they train or infer: memory, and their capture."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class GraphMemory:
    """A pool, a stream and buffers for graphs that are replayed one at a time, on one stream.

    What a graph leaves in the pool lasts until the next replay of any of them.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)
        self.buffers: dict[Any, Tensor] = {}

    def buffer(self, role: Any, like: Tensor) -> Tensor:
        """A tensor of like's shape, strides and dtype in the memory of its role, which is kept."""
        memory = self.buffers.get(role)
        if memory is None or memory.nbytes < like.nbytes:
            memory = torch.empty(like.nbytes, dtype=torch.uint8, device=self.device)
            self.buffers[role] = memory  # graphs that use the old one keep it
        return memory[: like.nbytes].view(like.dtype).as_strided(like.shape, like.stride())

    def image(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The buffer that images of x's shape are passed by, channels-last."""
        like = torch.empty_like(x, dtype=dtype, device="meta", memory_format=torch.channels_last)
        return self.buffer("x", like)

    @contextmanager
    def capture(self, graph: torch.cuda.CUDAGraph) -> Iterator[None]:
        """Capture what is run inside."""
        # A graph that dies while another one is captured spoils that, so no garbage is collected;
        # nor before, which would take longer than all the rest.
        collects = gc.isenabled()
        # thread_local: other threads, say a loader's that pins memory, may go on
        captured = torch.cuda.graph(
            graph, self.pool, self.stream, capture_error_mode="thread_local"
        )
        try:
            gc.disable()
            _clear_workspaces()  # no graph may use what lies outside of the pool
            with torch.cuda.device(self.device), captured:
                yield
        finally:
            if collects:
                gc.enable()
            _clear_workspaces()


def _clear_workspaces() -> None:
    """Give back cuBLAS's memory of all streams: 30 MiB for each thread that runs products.

    Kernels that were captured go on with theirs in the pool, which is free for other graphs then.
    PyTorch can do it for the whole process only, and does it itself for ``torch.compile``.
    """
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if clear and torch.cuda.is_available():
        clear()


def unowned(tensor: Tensor) -> Tensor:
    """The same memory, free for other graphs of the pool once the tensor itself is gone.

    On a CPU, which has no such pool, the tensor.
    """
    if not (tensor.is_cuda and tensor.numel()):
        return tensor
    nbytes = tensor.element_size() * (
        1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    )
    memory = torch.as_tensor(_Address(tensor.data_ptr(), nbytes), device=tensor.device)
    return memory.view(tensor.dtype).as_strided(tensor.shape, tensor.stride())


class _Address:
    """Bytes on a GPU, by the protocol that libraries pass arrays to each other with."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }
