"""An adapter that reads configs written for the published code."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from .backbone import MambaVision
from .registry import register_model

PUBLISHED_DROP_PATH = 0.2  # what the published code trains with, whatever the config says


@register_model
class MM_mamba_vision(MambaVision):
    """:class:`MambaVision` under the published type name and argument names.

    New configs should say ``MambaVision``. This class builds the same network, unchanged, from a
    published config: arguments that the published code swallows without effect (its
    ``drop_path_rate``, and those that detection configs inherit from a ResNet) are accepted, named
    once in a warning, and have no effect here either.

    Args:
        dim: channels of the first stage.
        in_dim: channels between the two convolutions of the stem.
        depths: blocks of each stage.
        window_size: window sides of each stage.
        mlp_ratio: hidden width of the MLPs over the channels.
        num_heads: attention heads of each stage.
        in_chans: channels of the images.
        qkv_bias: must be True.
        qk_scale: must be None.
        drop_rate: must be 0.
        attn_drop_rate: must be 0.
        layer_scale: initial gammas of stages 3 and 4, or None.
        layer_scale_conv: the same for stages 1 and 2.
        out_indices: stages whose maps are returned.
        norm_layer: norm of the returned maps: ``ln2d`` (layer norm) or ``bn``.
        pretrained: file of the classification weights, or None.
        num_classes: without effect.
        drop_path_rate: without effect: the published code trains with 0.2 whatever it says.
        depth: without effect.
        num_stages: without effect.
        frozen_stages: without effect.
        norm_cfg: without effect.
        norm_eval: without effect.
        style: without effect.
        init_cfg: ``Pretrained`` on a MambaVision file is loaded; a ``torchvision://`` or
            ``open-mmlab://`` one, inherited from a ResNet, is without effect.
        with_cp: as in MambaVision.
        window_mode: as in MambaVision.
        scan_backend: as in MambaVision.

    Raises:
        ValueError: a value that the network has no counterpart for; the message names it.
    """

    def __init__(
        self,
        dim: int,
        in_dim: int,
        depths: Sequence[int],
        window_size: Sequence[int],
        mlp_ratio: float,
        num_heads: Sequence[int],
        in_chans: int = 3,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        layer_scale: float | None = None,
        layer_scale_conv: float | None = None,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        norm_layer: str = "ln2d",
        pretrained: str | None = None,
        num_classes: int | None = None,
        drop_path_rate: float | None = None,
        depth: int | None = None,
        num_stages: int | None = None,
        frozen_stages: int | None = None,
        norm_cfg: Mapping[str, Any] | None = None,
        norm_eval: bool | None = None,
        style: str | None = None,
        init_cfg: Mapping[str, Any] | None = None,
        with_cp: bool = False,
        window_mode: str = "pad",
        scan_backend: str = "auto",
    ) -> None:
        _refuse(qkv_bias=(qkv_bias, True), qk_scale=(qk_scale, None))
        _refuse(drop_rate=(drop_rate, 0.0), attn_drop_rate=(attn_drop_rate, 0.0))
        norms = {"ln2d": "LN", "bn": "BN"}
        if norm_layer not in norms:
            raise ValueError(f"unknown norm_layer {norm_layer!r}: choose one of {sorted(norms)}")
        inherited = _is_resnet_init(init_cfg)
        _warn_ignored(
            num_classes=num_classes,
            drop_path_rate=drop_path_rate,
            depth=depth,
            num_stages=num_stages,
            frozen_stages=frozen_stages,
            norm_cfg=norm_cfg,
            norm_eval=norm_eval,
            style=style,
            init_cfg=init_cfg if inherited else None,
        )
        if inherited:
            init_cfg = None
        if pretrained:
            init_cfg = {"type": "Pretrained", "checkpoint": pretrained}
        super().__init__(
            arch={
                "dim": dim,
                "in_dim": in_dim,
                "depths": tuple(depths),
                "num_heads": tuple(num_heads),
                "window_size": tuple(window_size),
                "mlp_ratio": mlp_ratio,
                "layer_scale": layer_scale,
                "layer_scale_conv": layer_scale_conv,
            },
            window_mode=window_mode,
            out_indices=out_indices,
            drop_path_rate=PUBLISHED_DROP_PATH,
            with_cp=with_cp,
            in_channels=in_chans,
            out_norm=norms[norm_layer],
            scan_backend=scan_backend,
            init_cfg=init_cfg,
        )


def _refuse(**arguments: tuple[Any, Any]) -> None:
    for name, (value, valid) in arguments.items():
        if value != valid:
            raise ValueError(f"{name}={value!r} is not supported: it must be {valid!r}")


def _is_resnet_init(init_cfg: Mapping[str, Any] | None) -> bool:
    source = str((init_cfg or {}).get("checkpoint", ""))
    return source.startswith(("torchvision://", "open-mmlab://"))


def _warn_ignored(**arguments: Any) -> None:
    for name, value in arguments.items():
        if value is not None:
            warnings.warn(
                f"MM_mamba_vision: {name}={value!r} has no effect, as in the published code",
                stacklevel=3,
            )
