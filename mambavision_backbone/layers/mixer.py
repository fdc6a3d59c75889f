"""The MambaVision mixer: a selective scan beside a plain gate-free branch."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..ops.linear import product
from ..ops.mix import mix
from .windows import Crop

D_STATE = 8
DT_MIN, DT_MAX = 1e-3, 1e-1  # range of the initial step sizes (Mamba)


class MambaVisionMixer(nn.Module):
    """Tokens of a window in raster order, (B, L, C) → same, and a bias to be added or None.

    Two branches of C/2 channels, each through a depthwise convolution of width 3 and SiLU; one is
    scanned, then both are concatenated and projected. Source: arXiv 2407.08083, section 3.2.

    Args:
        dim: C, even.
        scan_backend: see ``ops.selective_scan``.
    """

    def __init__(self, dim: int, scan_backend: str = "auto") -> None:
        super().__init__()
        self.dim_inner = dim // 2
        self.dt_rank = math.ceil(dim / 16)
        self.scan_backend = scan_backend
        self.in_proj = nn.Linear(dim, dim, bias=False)
        self.conv1d_x = self._depthwise()
        self.conv1d_z = self._depthwise()
        self.x_proj = nn.Linear(self.dim_inner, self.dt_rank + 2 * D_STATE, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, self.dim_inner)
        self.A_log = nn.Parameter(torch.empty(self.dim_inner, D_STATE))
        self.D = nn.Parameter(torch.empty(self.dim_inner))
        self.out_proj = nn.Linear(dim, dim, bias=False)
        self.reset_scan_parameters()

    def _depthwise(self) -> nn.Conv1d:
        channels = self.dim_inner
        return nn.Conv1d(channels, channels, 3, padding="same", groups=channels, bias=False)

    def reset_scan_parameters(self) -> None:
        """Mamba's initialisation of A, D and the step sizes (arXiv 2312.00752, section 3.6)."""
        with torch.no_grad():
            self.A_log.copy_(torch.arange(1, D_STATE + 1, dtype=torch.float32).log())
            self.D.fill_(1.0)
            self.dt_proj.weight.uniform_(-(self.dt_rank**-0.5), self.dt_rank**-0.5)
            steps = torch.empty(self.dim_inner).uniform_(math.log(DT_MIN), math.log(DT_MAX)).exp()
            # The bias enters twice (see ops.mix), so half of softplus's inverse each time.
            self.dt_proj.bias.copy_(torch.log(torch.expm1(steps)) / 2)

    def forward(self, x: Tensor, keep: Crop | None = None) -> tuple[Tensor, Tensor | None]:
        """Mix the tokens of each window; with ``keep``, return the kept tokens only.

        Returns:
            The tokens, and a bias to be added to them, or None.
        """
        y = mix(
            self.in_proj(x),
            self.conv1d_x.weight,
            self.conv1d_z.weight,
            self.x_proj,
            self.dt_proj,
            self.A_log,
            self.D,
            self.scan_backend,
        )
        return product(y if keep is None else keep(y), self.out_proj)
