"""Whether Triton kernels can run, on this machine and here in the program; and their launch."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode,
)

logger = logging.getLogger("mambavision_backbone")

MIN_CAPABILITY = (7, 0)

_WIDE = 2**31  # the first integer that takes 64 bits

# What starts each kernel, by what Triton compiles for, and by its arguments but for addresses: so
# many, then they are forgotten, as images come in many sizes.
_by_specialisation: dict[tuple[Any, ...], Any] = {}
_by_arguments: dict[tuple[Any, ...], Any] = {}
_MAX_ARGUMENTS = 10_000
raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", lambda _device: 0)
STREAM = 3  # of what a kernel is started with: behind the grid
_starter: list[Any] = [None]  # makes that of a compiled kernel; None: Triton's lookup, always


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
        _start_by(None)
        probe()
        if not torch.equal(x, torch.full_like(x, 2)):
            raise RuntimeError("it gave a wrong result")
        for starter in (_by_function, _by_call):  # versions of Triton differ
            _start_by(starter)
            x.fill_(1)
            try:
                probe()
                probe()
                if torch.equal(x, torch.full_like(x, 4)):
                    return
            except torch.cuda.OutOfMemoryError:
                raise
            except Exception as error:
                logger.debug("%s: %s", starter.__name__, error)
        _start_by(None)


def _start_by(starter: Any) -> None:
    _starter[:] = [starter]
    _by_specialisation.clear()
    _by_arguments.clear()


def traced() -> bool:
    """Whether the program is being compiled, exported or watched, say by a FLOP counter."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    # Not is_in_torch_dispatch_mode(): torch 2.4's stays true after an export.
    mode = _get_current_dispatch_mode()
    return mode is not None and not isinstance(mode, LaunchRecorder)


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
) -> Any:
    """Start a kernel on the GPU of its first tensor.

    ``kernel[grid](...)`` finds the compiled kernel anew at every call, which takes longer than most
    of our kernels run; here it is found by its arguments, or if those are new by what Triton
    compiles for.

    Args:
        kernel: a ``triton.jit`` function.
        grid: programs along three axes.
        tensors: its first arguments.
        numbers: the next ones.
        constants: its ``tl.constexpr`` arguments, in order; they come last.
        warps: of a program.

    Returns:
        What started the kernel, for ``Launch``; None if Triton did.
    """
    device = tensors[0].get_device()  # type: ignore[union-attr]
    if device >= 0 and device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch(kernel, grid, tensors, numbers, constants, warps)
    recorder = launch_recorder()
    if recorder:
        recorder.launched(Launch(kernel, grid, numbers, constants, warps), tensors)
        with _disable_current_modes():  # Triton's interpreter is a program itself
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
    start = _by_arguments.get(key)
    if start is None:
        general = (*facts, *map(_specialisation, numbers))
        start = _by_specialisation.get(general)
        if start is None:
            compiled = kernel[grid](*tensors, *numbers, *constants, num_warps=warps)
            if compiled is not None and _starter[0]:  # None if interpreted
                _by_specialisation[general] = _starter[0](compiled)
            return None
        if len(_by_arguments) >= _MAX_ARGUMENTS:
            _by_arguments.clear()
        _by_arguments[key] = start
    run, more = start
    run(*grid, raw_stream(device), *more, *addresses, *numbers, *constants)
    return start


class Launch:
    """``launch`` but for the tensors: called with them, and quicker once the kernel is known.

    They must then be as the first ones were: on the current device, of the same dtypes, as well
    ``aligned``, and None where those were. All that is looked at is where they lie.

    Args:
        kernel, grid, numbers, constants, warps: see :func:`launch`.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        numbers: tuple[int | float, ...],
        constants: tuple[Any, ...],
        warps: int,
    ) -> None:
        self.kernel, self.grid, self.warps = kernel, grid, warps
        self.numbers, self.constants = numbers, constants
        self.known: Any = None  # what starts the kernel

    def __call__(self, *tensors: Tensor | None) -> None:
        """Start the kernel."""
        if self.known is None or launch_recorder():
            self.known = launch(
                self.kernel, self.grid, tensors, self.numbers, self.constants, self.warps
            )
            return
        run, more = self.known
        stream = raw_stream(tensors[0].get_device())  # type: ignore[union-attr]
        addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        run(*self.grid, stream, *more, *addresses, *self.numbers, *self.constants)

    def call_of(self, tensors: Sequence[Tensor | None]) -> tuple[Any, list[Any], int]:
        """What starts a kernel that is known, with which arguments, and where addresses begin.

        The stream, at ``STREAM``, is left to the caller.
        """
        run, more = self.known
        addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        first = STREAM + 1 + len(more)
        return run, [*self.grid, 0, *more, *addresses, *self.numbers, *self.constants], first


class LaunchRecorder(TorchDispatchMode):
    """A mode that sees operators, and launches of ``launch`` as well; kernels go on as without."""

    def launched(self, launch: Launch, tensors: Sequence[Tensor | None]) -> None:
        """Called with what is launched, and with its tensors."""
        raise NotImplementedError

    def kept(self, role: Any, make: Callable[[], list[Tensor]]) -> list[Tensor]:
        """What was made for a role: always the same tensors, for values of one pass at a time."""
        raise NotImplementedError


def launch_recorder() -> LaunchRecorder | None:
    """The innermost mode, if it is one."""
    mode = _get_current_dispatch_mode()
    return mode if isinstance(mode, LaunchRecorder) else None


def aligned(x: Tensor) -> bool:
    """Whether a tensor lies where Triton compiles for: at a multiple of 16 bytes."""
    return not x.data_ptr() & 15


# What ``compiled[grid](...)`` comes to: a function, and what it takes between a stream and a
# kernel's arguments. The last two are launch hooks, of profilers say; they are not called.


def _by_call(compiled: Any) -> tuple[Any, tuple[Any, ...]]:
    return compiled.run, (compiled.function, compiled.packed_metadata, None, None, None)


def _by_function(compiled: Any) -> tuple[Any, tuple[Any, ...]]:
    """What the call comes to, less Python: as of Triton 3.6."""
    run = compiled.run
    if run.global_scratch_size or run.profile_scratch_size:  # to be allocated
        return _by_call(compiled)
    flags = run.launch_cooperative_grid, run.launch_pdl
    hooks = None, None, None
    return run.launch, (compiled.function, *flags, None, None, compiled.packed_metadata, *hooks)


def _specialisation(value: float) -> Any:
    """What Triton compiles for: 0 and 1, then whether it is a multiple of 16 and has 32 bits."""
    if not isinstance(value, int):
        return type(value)
    if value < 2:
        return value
    return (2 if value < _WIDE else 4) + (not value & 15)
