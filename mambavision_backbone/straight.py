"""Stages of tokens for inference on a GPU, as straight-line code.

Kernel by kernel, the way from module to module takes Python longer than what it comes to takes the
host to start and the GPU to run. Here that way has been gone once, and what is left of it is a
chain of calls on rows of tokens: by the same kernels, hence to the same maps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from .layers.attention import Attention
from .layers.blocks import Branch, TokenBlock
from .layers.mixer import MambaVisionMixer
from .layers.stage import TokenStage
from .layers.windows import merge, partition
from .ops.selective_scan import choose_backend
from .ops.triton_support import fusible

# Of the modules of blocks; adapters and quantised or parametrised layers do something else.
_USUAL = {nn.ModuleList, TokenBlock, MambaVisionMixer, Attention, Mlp, nn.Linear, nn.LayerNorm}
_USUAL |= {nn.Conv1d, nn.GELU, nn.Dropout, nn.Identity}


class StraightStage(TokenStage):
    """Another stage for inference, (B, C, H, W) → same; it takes its modules, hooks included.

    Through the modules, as there, where kernels of ours cannot be used, in float32, for compilers
    and exporters, and where modules have hooks or are not the usual ones. Weights may be changed
    in place, loaded, cast and moved; replaced they, or layers, are not noticed.
    """

    def __init__(self, stage: TokenStage) -> None:
        self.__dict__.update(stage.__dict__)
        self.register_load_state_dict_post_hook(_chain_anew)
        self._set_chain()

    def forward(self, x: Tensor) -> Tensor:
        """Cut into windows, run the blocks, put back."""
        if not self._straight(x):
            return super().forward(x)
        tokens, grid = partition(x, self.window_size, self.window_mode)
        mixer: Any = self.blocks[0].mixer
        if choose_backend(mixer.scan_backend, tokens, mixer.A_log) != "triton":
            return super().forward(x)
        keep, grid = grid.crop()
        shape = tokens.shape
        rows = tokens.contiguous().flatten(0, 1)
        branch: Branch | None = None
        for block in self._chain if keep is None else self._chain[:-1]:
            rows, branch = block(rows, branch, shape)
        tokens = rows.view(shape)
        branch = branch and branch._replace(y=branch.y.view(shape))
        if keep is not None:
            tokens, branch = self.blocks[-1](tokens, branch, keep)
        assert branch is not None  # there is a block
        return merge(branch.add_to(tokens), grid)

    def _straight(self, x: Tensor) -> bool:
        return (
            len(self._chain) > 0
            and fusible(x)
            and x.dtype != torch.float32
            and not torch.is_grad_enabled()
            and not (any(self._hooks) or _global_hooks())
            and not getattr(self, "_is_replica", False)  # of nn.DataParallel: weights not its own
        )

    def _set_chain(self) -> None:
        modules = list(self.blocks.modules())
        usual = all(type(m) in _USUAL for m in modules)
        self._hooks = [h for m in modules for h in (m._forward_hooks, m._forward_pre_hooks)]
        self._chain = [_Block.of(block) for block in self.blocks] if usual else []

    def _apply(self, *args: Any, **kwargs: Any) -> StraightStage:
        """Move or cast; the chain holds views of the weights."""
        super()._apply(*args, **kwargs)
        self._set_chain()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Leave the chain out of copies."""
        return {**self.__dict__, "_chain": [], "_hooks": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make it anew."""
        super().__setstate__(state)
        self._set_chain()


def _chain_anew(stage: nn.Module, _keys: Any) -> None:
    """Loading may have replaced weights."""
    assert isinstance(stage, StraightStage)
    stage._set_chain()


def _global_hooks() -> bool:
    return bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)


@functools.cache
def _add_norm() -> Callable[..., Any]:
    from .ops.layer_norm.launch import forward  # Triton is loaded at first use

    return forward


@functools.cache
def _mix() -> Callable[..., Any]:
    from .ops.mix.launch import forward

    return forward


class _Block(NamedTuple):
    """What ``TokenBlock`` does to rows (tokens of all windows, C)."""

    norm1: tuple[Tensor, Tensor, float]
    mixer: _Mixer | _Attention
    gamma_1: Tensor | None
    norm2: tuple[Tensor, Tensor, float]
    mlp: _Mlp
    gamma_2: Tensor | None

    @classmethod
    def of(cls, block: Any) -> _Block:
        """Pick what is needed."""
        mixer = block.mixer
        return cls(
            (block.norm1.weight, block.norm1.bias, block.norm1.eps),
            _Attention.of(mixer) if isinstance(mixer, Attention) else _Mixer.of(mixer),
            block.gamma_1,
            (block.norm2.weight, block.norm2.bias, block.norm2.eps),
            _Mlp.of(block.mlp),
            block.gamma_2,
        )

    def __call__(
        self, x: Tensor, branch: Branch | None, shape: torch.Size
    ) -> tuple[Tensor, Branch]:
        """As ``TokenBlock.forward``; ``shape`` is that of tokens in windows."""
        add_norm = _add_norm()
        x, y, *_ = add_norm(x, branch, *self.norm1, False)
        y, bias = self.mixer(y, shape)
        x, y, *_ = add_norm(x, (y, bias, self.gamma_1, None), *self.norm2, False)
        y, bias = self.mlp(y)
        return x, Branch(y, bias, self.gamma_2, None)


class _Mixer(NamedTuple):
    in_proj: Tensor
    core: tuple[Tensor, ...]
    out_proj: Tensor

    @classmethod
    def of(cls, layer: MambaVisionMixer) -> _Mixer:
        core = (
            layer.conv1d_x.weight, layer.conv1d_z.weight, layer.x_proj.weight.t(),
            layer.dt_proj.weight.t(), layer.dt_proj.bias, layer.A_log, layer.D,
        )  # fmt: skip
        return cls(layer.in_proj.weight.t(), core, layer.out_proj.weight.t())

    def __call__(self, x: Tensor, shape: torch.Size) -> tuple[Tensor, None]:
        y, *_ = _mix()(torch.mm(x, self.in_proj).view(shape), *self.core)
        return torch.mm(y.view(x.shape), self.out_proj), None


class _Attention(NamedTuple):
    qkv: tuple[Tensor, Tensor]
    proj: tuple[Tensor, Tensor]
    heads: tuple[int, int]

    @classmethod
    def of(cls, layer: Attention) -> _Attention:
        return cls(_linear(layer.qkv), _linear(layer.proj), (layer.num_heads, layer.head_dim))

    def __call__(self, x: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
        weight, bias = self.qkv
        qkv = torch.addmm(bias, x, weight).view(shape[0], shape[1], 3, *self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        weight, bias = self.proj
        return torch.mm(y, weight), bias


class _Mlp(NamedTuple):
    fc1: tuple[Tensor, Tensor]
    fc2: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, layer: Any) -> _Mlp:
        return cls(_linear(layer.fc1), _linear(layer.fc2))

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weight, bias = self.fc1
        x = torch._addmm_activation(bias, x, weight, use_gelu=True)  # as ops.mlp
        weight, bias = self.fc2
        return torch.mm(x, weight), bias


def _linear(layer: nn.Linear) -> tuple[Tensor, Tensor]:
    """Weight, transposed, and bias."""
    return layer.weight.t(), layer.bias
