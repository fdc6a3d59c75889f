"""The backbone: stem → stages → feature norms."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from timm.layers import Mlp, trunc_normal_
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .checkpoint import load_pretrained
from .compiling import compile_stages, compiled
from .graphs import TrainingGraphs
from .layers.attention import Attention
from .layers.blocks import TokenBlock
from .layers.mixer import MambaVisionMixer
from .layers.norms import build_out_norm
from .layers.stage import ConvStage, TokenStage
from .layers.stem import PatchEmbed
from .layers.windows import check_window_mode
from .ops.cast import WeightCaster
from .ops.selective_scan import check_backend
from .registry import BaseModule, register_model
from .replay import TrainingReplays
from .variants import STAGES, resolve_arch


@register_model
class MambaVision(BaseModule):
    """MambaVision as a multi-scale backbone: (B, in_channels, H, W) → maps at strides 4 to 32.

    Source: Hatamizadeh & Kautz, "MambaVision: A Hybrid Mamba-Transformer Vision Backbone",
    arXiv 2407.08083. Parameter names are the published ones.

    Args:
        arch: a published variant (T, T2, S, B, L, L2, L3) or a dict of the fields of
            ``variants.Arch``.
        window_size: four window sides, one a stage, overriding the variant's.
        window_mode: ``pad`` (as published: the map is padded to a multiple of the window) or
            ``fit`` (windows fitted to the map, little or no padding, same weights).
        out_indices: stages whose maps are returned, ascending.
        drop_path_rate: stochastic depth at the last block; grows linearly from 0 at the first.
        frozen_stages: -1 freezes nothing, 0 the stem, i the stem and the first i stages.
        norm_eval: keep batch norms in eval mode while training.
        with_cp: recompute blocks in the backward pass to save memory.
        in_channels: channels of the images.
        out_norm: norm of the returned maps: ``LN`` (over channels), ``BN`` or ``none``.
        scan_backend: ``auto``, ``chunked``, ``triton``, ``mamba_ssm`` or ``reference``; see
            ``ops.selective_scan``.
        compile: run through ``torch.compile``, the stem and each stage as one graph with dynamic
            height and width. The first runs take minutes, and torch.compile needs a C++ compiler.
        graphs: train on a GPU by CUDA graphs, of so many input shapes at most; see
            :class:`~mambavision_backbone.graphs.TrainingGraphs`.
        replay: train on a GPU by the calls that earlier passes of an input shape came to, where
            there are no graphs; see :class:`~mambavision_backbone.replay.TrainingReplays`.
        init_cfg: mmengine's; ``dict(type='Pretrained', checkpoint=...)`` loads a file strictly.

    Raises:
        ValueError: an argument that is out of range; the message names it and what is valid.
    """

    def __init__(
        self,
        arch: str | Mapping[str, Any] = "T",
        window_size: Sequence[int] | None = None,
        window_mode: str = "pad",
        out_indices: Sequence[int] = (0, 1, 2, 3),
        drop_path_rate: float = 0.2,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        in_channels: int = 3,
        out_norm: str = "LN",
        scan_backend: str = "auto",
        compile: bool = False,
        graphs: int = 0,
        replay: bool = True,
        init_cfg: Any = None,
    ) -> None:
        super().__init__(init_cfg)
        self.arch = resolve_arch(arch)
        if window_size is not None:
            self.arch = replace(self.arch, window_size=window_size)  # type: ignore[arg-type]
        check_window_mode(window_mode)
        self.out_indices = _check_out_indices(out_indices)
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f"drop_path_rate must be in [0, 1), got {drop_path_rate}")
        if frozen_stages not in range(-1, STAGES + 1):
            raise ValueError(f"frozen_stages must be in -1..{STAGES}, got {frozen_stages}")
        if in_channels < 1:
            raise ValueError(f"in_channels must be positive, got {in_channels}")
        self.in_channels = in_channels
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.with_cp = with_cp
        check_backend(scan_backend)
        if graphs and (compile or with_cp):
            raise ValueError("graphs cannot be had together with compile or with_cp: set graphs=0")
        self._graphs = TrainingGraphs(graphs)
        self._replays = TrainingReplays(replay and not (compile or with_cp))

        arch_ = self.arch
        channels = arch_.channels
        self.patch_embed = PatchEmbed(in_channels, arch_.in_dim, arch_.dim)
        drop_paths = _drop_paths(drop_path_rate, arch_.depths)
        self.levels = nn.ModuleList()
        for i in range(STAGES):
            stage: nn.Module
            if i < 2:
                stage = ConvStage(channels[i], drop_paths[i], arch_.layer_scale_conv, with_cp)
            else:
                stage = TokenStage(
                    dim=channels[i],
                    drop_paths=drop_paths[i],
                    num_heads=arch_.num_heads[i],
                    window_size=arch_.window_size[i],
                    window_mode=window_mode,
                    mlp_ratio=arch_.mlp_ratio,
                    layer_scale=arch_.layer_scale,
                    scan_backend=scan_backend,
                    downsample=i < STAGES - 1,
                    with_cp=with_cp,
                )
            self.levels.append(stage)
        self.apply(_init_module)
        for i in self.out_indices:
            self.add_module(f"outnorm{i}", build_out_norm(out_norm, channels[i]))
        self._freeze()
        self._caster = WeightCaster(self, but=_with_late_biases(self))
        if compile:
            compile_stages([self.patch_embed, *self.levels])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Features of an image batch.

        Args:
            x: (B, in_channels, H, W), any H and W from 1 up, any memory format.

        Returns:
            One contiguous map for each of ``out_indices``:
            (B, C·2^i, ⌈H/2^(i+2)⌉, ⌈W/2^(i+2)⌉).

        Raises:
            ValueError: not four dimensions or not ``in_channels`` channels.
        """
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"expected images of shape (B, {self.in_channels}, H, W), got {tuple(x.shape)}: "
                "in_channels sets the number of channels"
            )
        if getattr(self, "_is_replica", False):
            return self._cast_features(x)
        return self._graphs.run(self._cast_features, self, x, otherwise=self._replayed)

    def _replayed(self, x: Tensor) -> tuple[Tensor, ...]:
        return self._replays.run(self._cast_features, self, x)

    def _cast_features(self, x: Tensor) -> tuple[Tensor, ...]:
        """Features, with weights cast all at once where autocast would cast each."""
        recomputes = self.with_cp and torch.is_grad_enabled()
        replica = getattr(self, "_is_replica", False)  # of nn.DataParallel: slots not its own
        if self._caster.applies(x) and not (recomputes or replica or compiled(self.patch_embed)):
            with self._caster.cast(x):
                return self._features(x)
        return self._features(x)

    def _features(self, x: Tensor) -> tuple[Tensor, ...]:
        # Channels-last: convolutions are faster so, and a window's tokens are already in order.
        x = self.patch_embed(x.contiguous(memory_format=torch.channels_last))
        outs = []
        for i, level in enumerate(self.levels):
            x = level(x)
            if i in self.out_indices:
                # Plain NCHW on the way out: mmcv's RoIAlign reads other layouts as garbage.
                outs.append(getattr(self, f"outnorm{i}")(x).contiguous())
            if i == self.out_indices[-1]:
                break
            x = level.downsample(x)  # type: ignore[operator]
        return tuple(outs)

    def init_weights(self) -> None:
        """Load ``init_cfg``'s checkpoint, strictly; without one, initialise in mmengine's way.

        Of a list with a ``Pretrained`` in it nothing else is used.

        Raises:
            FileNotFoundError: there is no such file.
            WeightsError: its weights are not this network's; the message says how they differ.
        """
        cfgs = self.init_cfg if isinstance(self.init_cfg, list | tuple) else [self.init_cfg]
        pretrained = [cfg for cfg in cfgs if _is_pretrained(cfg)]
        if not pretrained:
            super().init_weights()
        for cfg in pretrained:  # mmengine's own way would unpickle the file
            load_pretrained(self, cfg["checkpoint"], prefix=cfg.get("prefix"))

    def train(self, mode: bool = True) -> MambaVision:
        """Set the mode, keeping frozen parts (and with ``norm_eval`` all batch norms) in eval."""
        super().train(mode)
        if mode:
            for part in self._frozen_parts():
                part.eval()
            if self.norm_eval:
                for module in self.modules():
                    if isinstance(module, _BatchNorm):
                        module.eval()
        return self

    def _apply(self, *args: Any, **kwargs: Any) -> MambaVision:
        """Move or cast; recorded passes would keep the memory that weights were in."""
        if hasattr(self, "_replays"):
            self._graphs.forget()
            self._replays.forget()
        return super()._apply(*args, **kwargs)

    def _frozen_parts(self) -> list[nn.Module]:
        if self.frozen_stages < 0:
            return []
        norms = [f"outnorm{i}" for i in self.out_indices if i < self.frozen_stages]
        return [
            self.patch_embed,
            *self.levels[: self.frozen_stages],
            *(getattr(self, name) for name in norms),
        ]

    def _freeze(self) -> None:
        """Stop gradients of frozen parts, and of stages behind the last map: they are not run."""
        last = self.out_indices[-1]
        unused: list[nn.Module] = list(self.levels[last + 1 :])
        if last < STAGES - 1:
            unused.append(self.levels[last].downsample)  # type: ignore[arg-type]
        for part in [*self._frozen_parts(), *unused]:
            part.requires_grad_(False)


def _with_late_biases(network: nn.Module) -> list[nn.Module]:
    """Layers whose biases are added by the kernels that follow, in float32."""
    late = ((MambaVisionMixer, "dt_proj"), (Attention, "proj"), (Mlp, "fc2"))
    pairs = ((m, name) for m in network.modules() for kind, name in late if isinstance(m, kind))
    return [getattr(m, name) for m, name in pairs]


def _is_pretrained(cfg: Any) -> bool:
    """Whether an init_cfg, in any of mmengine's spellings, asks for a file's weights."""
    kind = cfg.get("type") if isinstance(cfg, Mapping) else None
    name = kind if isinstance(kind, str) else getattr(kind, "__name__", "")
    return name.rpartition(".")[2] in ("Pretrained", "PretrainedInit")


def _check_out_indices(out_indices: Sequence[int]) -> tuple[int, ...]:
    indices = tuple(out_indices) if isinstance(out_indices, Iterable) else ()
    if not indices or sorted(set(indices)) != list(indices) or not set(indices) <= {0, 1, 2, 3}:
        raise ValueError(
            f"out_indices must be ascending stage numbers out of 0..{STAGES - 1}, got {out_indices}"
        )
    return indices


def _drop_paths(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Probabilities of all blocks, stage by stage: from 0 at the first to ``rate`` at the last."""
    steps = max(sum(depths) - 1, 1)
    return [
        [rate * j / steps for j in range(sum(depths[:i]), sum(depths[: i + 1]))]
        for i in range(len(depths))
    ]


def _init_module(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, MambaVisionMixer):
        module.reset_scan_parameters()  # after its linear layers: apply() visits children first
    elif isinstance(module, TokenBlock):
        # Padded tokens are zeros. If norms kept them so, each would see no variance and multiply
        # gradients by 300: beyond half precision. In all blocks, since drop path skips some.
        trunc_normal_(module.norm1.bias, std=0.02)
