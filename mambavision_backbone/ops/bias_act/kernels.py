"""Device code of bias, activation and residual sum. Arithmetic is float32."""

import triton
import triton.language as tl

from ..triton_common import activate, load


@triton.jit
def forward(
    p_y, p_bias, p_x, n, C,
    ACT: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write y = act(y + bias), with ADD + x, of n elements whose channels are innermost."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = i < n
    y = activate(load(p_y + i, m) + load(p_bias + i % C, m), ACT)
    if ADD:
        y += load(p_x + i, m)
    tl.store(p_y + i, y.to(p_y.dtype.element_ty), m)
