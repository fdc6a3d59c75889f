"""The oracle: the recurrence as it is written, one token after the other.

Slow, and easy to check against the equations of docs/selective_scan.md. Every other backend is
compared with this one.
"""

from __future__ import annotations

import torch
from torch import Tensor


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    dt_softplus: bool,
) -> Tensor:
    """Scan by a plain loop; differentiable by autograd. Arguments as in ``api.selective_scan``."""
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    y_dtype = u.dtype
    u, dt, A, B, C, D, dt_bias = (t.to(dtype) for t in (u, dt, A, B, C, D, dt_bias))
    delta = dt + dt_bias
    if dt_softplus:
        delta = torch.nn.functional.softplus(delta)
    h = u.new_zeros(u.shape[0], u.shape[2], A.shape[1])  # batch dim dstate
    ys = []
    for t in range(u.shape[1]):
        a = torch.exp(delta[:, t, :, None] * A)
        bu = (delta[:, t] * u[:, t])[..., None] * B[:, t, None, :]
        h = a * h + bu
        ys.append((h * C[:, t, None, :]).sum(-1))
    return (torch.stack(ys, 1) + D * u).to(y_dtype)
