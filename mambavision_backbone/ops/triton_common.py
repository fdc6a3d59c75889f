"""Device code that kernels share, and a kernel that shows whether Triton works."""

import triton
import triton.language as tl


@triton.jit
def load(p, m):
    """Elements in float32, zeros where masked."""
    return tl.load(p, mask=m, other=0.0).to(tl.float32)


@triton.jit
def activate(z, ACT: tl.constexpr):
    """``relu`` or ``gelu_tanh`` of z, z itself if ``none``; a NaN stays one."""
    if ACT == "relu":
        z = tl.where(z < 0, 0.0, z)
    elif ACT == "gelu_tanh":  # tanh(a) = 2 sigmoid(2 a) - 1
        z *= tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    return z


@triton.jit
def double(p_x, n, BN: tl.constexpr):
    """Double n ≤ BN elements in place."""
    i = tl.arange(0, BN)
    tl.store(p_x + i, 2 * tl.load(p_x + i, mask=i < n), mask=i < n)
