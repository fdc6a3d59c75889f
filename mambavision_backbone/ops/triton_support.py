"""Whether Triton kernels can run, on this machine and here in the program; and their launch."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode

logger = logging.getLogger("mambavision_backbone")

MIN_CAPABILITY = (7, 0)

_WIDE = 2**31  # the first integer that takes 64 bits

_compiled: dict[tuple[Any, ...], Any] = {}  # what starts each kernel, by what it is compiled for
_starts: dict[tuple[Any, ...], Any] = {}  # the same, by its arguments but for addresses
MAX_STARTS = 10_000  # then forgotten: images of many sizes
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", lambda _device: 0)
_starts_compiled = [True]  # whether compiled kernels are started without Triton: see _probe


def interpreted() -> bool:
    """Whether TRITON_INTERPRET=1 asks for kernels run on the CPU, slowly, to debug them."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


@functools.cache
def unavailable() -> str | None:
    """Why kernels cannot be used on this machine, or None if they can."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"importing triton failed: {error}"
    if interpreted():
        return None
    if not torch.cuda.is_available():
        return "no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability < MIN_CAPABILITY:
        return "compute capability {}.{} is below {}.{}".format(*capability, *MIN_CAPABILITY)
    try:
        _probe()
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:
        return f"a Triton kernel failed: {type(error).__name__}: {error}"
    return None


def _probe() -> None:
    """Compile and run a small kernel: Triton needs a C compiler, and may not know the GPU."""
    from .triton_common import double

    with _disable_current_modes():  # a real tensor, also while a model is exported or compiled
        x = torch.ones(8, device="cuda")
        probe = functools.partial(launch, double, (1, 1, 1), (x,), (8,), (8,), warps=1)
        probe()
        try:
            probe()
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception:  # a Triton that wants other arguments there
            _starts_compiled[:] = [False]
            _compiled.clear()
            _starts.clear()
            probe()
        if not torch.equal(x, torch.full_like(x, 4)):
            raise RuntimeError("it gave a wrong result")


def traced() -> bool:
    """Whether the program is being compiled, exported or watched, say by a FLOP counter."""
    # Not is_in_torch_dispatch_mode(): torch 2.4's stays true after an export.
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or _get_current_dispatch_mode() is not None
    )


def fusible(x: Tensor) -> bool:
    """Whether kernels that compute several operators in one may stand in for them on x.

    Not in a traced program: compilers fuse for themselves, and exporters and FLOP counters want to
    see PyTorch's operators.
    """
    return (
        x.is_cuda
        and not traced()
        and x.dtype in (torch.float16, torch.bfloat16, torch.float32)
        and x.numel() > 0
        and _usable()
    )


@functools.cache
def _usable() -> bool:
    reason = unavailable()
    if reason:
        logger.warning("fused kernels are off: %s", reason)
    else:
        logger.info("Triton kernels are compiled in the first passes, up to a minute, and kept")
    return reason is None


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    tensors: Sequence[Tensor | None],
    numbers: tuple[int | float, ...],
    constants: tuple[Any, ...],
    warps: int,
) -> None:
    """Start a kernel on the GPU of its first tensor.

    ``kernel[grid](...)`` finds the compiled kernel anew at every call, which takes longer than most
    of our kernels run; here it is found by its arguments, and if those are new by what Triton
    compiles for.

    Args:
        kernel: a ``triton.jit`` function.
        grid: programs along three axes.
        tensors: its first arguments.
        numbers: the next ones.
        constants: its ``tl.constexpr`` arguments, in order; they come last.
        warps: of a program.
    """
    device = tensors[0].get_device()  # type: ignore[union-attr]
    if device >= 0 and device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch(kernel, grid, tensors, numbers, constants, warps)
    facts: list[Any] = [id(kernel), constants, warps, device]
    addresses: list[int | None] = []  # of a tensor Triton would ask the driver where it lies
    for tensor in tensors:
        if tensor is None:
            addresses.append(None)
            facts.append(None)
        else:
            address = tensor.data_ptr()
            addresses.append(address)
            # Triton refuses other dtypes and a CPU's tensors, compiled kernels do not.
            facts += (tensor.dtype, tensor.is_cuda, not address & 15)
    key = (*facts, numbers)
    start = _starts.get(key)
    if start is None:
        if len(_starts) == MAX_STARTS:
            _starts.clear()
        general = (*facts, *map(_specialisation, numbers))
        start = _compiled.get(general)
        if start is None:
            compiled = kernel[grid](*tensors, *numbers, *constants, num_warps=warps)
            if compiled is not None and _starts_compiled[0]:  # None if interpreted
                _compiled[general] = _starts[key] = _starter(compiled)
            return None
        _starts[key] = start
    run, more = start
    run(*grid, _raw_stream(device), *more, *addresses, *numbers, *constants)
    return None


def _starter(compiled: Any) -> tuple[Any, tuple[Any, ...]]:
    """What starts a compiled kernel, and what that takes between a stream and the arguments.

    ``compiled[grid](...)`` comes to this with launch hooks, which ours have none of.
    """
    run, packed = compiled.run, compiled.packed_metadata
    hooks = None, None, None  # the first is what they would be called with
    try:  # as Triton 3.6 has it: less of Python
        if not (run.global_scratch_size or run.profile_scratch_size):
            flags = run.launch_cooperative_grid, run.launch_pdl
            return run.launch, (compiled.function, *flags, None, None, packed, *hooks)
    except AttributeError:
        pass
    return run, (compiled.function, packed, *hooks)


def _specialisation(value: float) -> Any:
    """What Triton compiles for: 0 and 1, then whether it is a multiple of 16 and has 32 bits."""
    if not isinstance(value, int):
        return type(value)
    if value < 2:
        return value
    return (2 if value < _WIDE else 4) + (not value & 15)


def call(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply``, or where no gradients are recorded its forward pass alone: quicker."""
    if torch.is_grad_enabled():
        return function.apply(*args)
    return function.forward(_NO_CONTEXT, *args)


class _NoContext:
    """Stands for the context of an autograd function that will not be differentiated."""

    def save_for_backward(self, *_: Any) -> None:
        """Drop what would be saved."""


_NO_CONTEXT = _NoContext()


def recorded(ctx: Any) -> bool:
    """Whether an autograd function's forward pass may be followed by a backward pass."""
    return ctx is not _NO_CONTEXT


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that the layers behind x compute in: autocast's where it is on, else x's."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


def ceil_div(a: int, b: int) -> int:
    """⌈a / b⌉; ``triton.cdiv`` takes many times as long."""
    return -(-a // b)


def split_rows(rows: int, block: int, programs: int, batch: int = 1) -> tuple[int, int]:
    """How ``rows`` of each of ``batch`` items are shared out, in tiles of ``block`` rows.

    Returns:
        Programs an item, which are about ``programs`` at most for all items, and tiles a program.
    """
    tiles = ceil_div(rows * batch, block * programs)
    return ceil_div(rows, block * tiles), tiles


def power_of_2(n: int) -> int:
    """The next power of 2 from n up."""
    return 1 << (n - 1).bit_length()


def rows_of(x: Tensor) -> tuple[Tensor, int]:
    """Tokens (B, L, C) as rows (B·L, C) with contiguous channels, and the stride of the rows."""
    rows = x.reshape(-1, x.shape[2])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    return rows, rows.stride(0)
