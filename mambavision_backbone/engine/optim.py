"""What the optimizer is told about each parameter: learning rate by depth, weight decay, groups."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mmengine.dist import is_main_process
from mmengine.logging import MMLogger, print_log
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from ..backbone import MambaVision


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """mmengine's constructor with learning rates that fall towards the image, and few groups.

    The backbone's layers are its stem (0), its blocks, counted from 1 through all stages, and
    whatever follows (``blocks + 1``: its out norms, the neck, the heads). A stage's downsampling
    belongs to the next stage's first block. Layer i learns at ``decay_rate ** (blocks + 1 - i)``
    of the rate that mmengine's options give its parameters. The backbone's norms, biases, gammas,
    ``A_log`` and ``D`` get no weight decay, whatever those options say.

    mmengine makes a group of every parameter, and an optimizer steps through groups one by one.
    Here parameters of equal settings share one: about two a layer, or two in all without
    ``decay_rate``. A parameter that the model holds twice counts once, by its first place, and
    frozen ones are left out.

    Args:
        optim_wrapper_cfg: mmengine's.
        paramwise_cfg: mmengine's options and ``decay_rate``, in (0, 1] (default 1).

    Raises:
        ValueError: ``decay_rate`` is out of range, or below 1 without ``optimizer.lr`` or for a
            model without a MambaVision.
    """

    paramwise_cfg: dict[str, Any]

    def __init__(
        self, optim_wrapper_cfg: dict[str, Any], paramwise_cfg: dict[str, Any] | None = None
    ) -> None:
        super().__init__(optim_wrapper_cfg, paramwise_cfg)
        rate = self.paramwise_cfg.get("decay_rate", 1.0)
        if not isinstance(rate, (int, float)) or not 0 < rate <= 1:
            raise ValueError(f"paramwise_cfg.decay_rate must be in (0, 1], got {rate!r}")
        if rate < 1 and self.base_lr is None:
            raise ValueError("paramwise_cfg.decay_rate needs optimizer.lr, the rate to be scaled")
        self.decay_rate = rate
        # Never empty: without any option mmengine would not ask add_params.
        self.paramwise_cfg = {**self.paramwise_cfg, "decay_rate": rate}

    def add_params(
        self,
        params: list[dict[str, Any]],
        module: nn.Module,
        prefix: str = "",
        is_dcn_module: int | float | None = None,
    ) -> None:
        """Add the groups of all parameters of the model.

        Args:
            params: the groups, extended in place.
            module: the model; mmengine calls this method again for every module in it.
            prefix: name of the module, empty for the model.
            is_dcn_module: whether the module is part of a deformable convolution.
        """
        if prefix:
            super().add_params(params, module, prefix, is_dcn_module)
            return
        singles: list[dict[str, Any]] = []
        with _quiet():  # mmengine logs every setting of every parameter
            super().add_params(singles, module)
        groups = self._merge(singles, module)
        if is_main_process():
            print_log(f"Parameter groups:\n{_table(groups)}", logger="current")
        params.extend(groups)

    def _merge(self, singles: list[dict[str, Any]], model: nn.Module) -> list[dict[str, Any]]:
        """Scale the rates, and put parameters of equal settings into one group, layer by layer."""
        backbones = [m for m in model.modules() if isinstance(m, MambaVision)]
        slowed = self._slowed(backbones) if self.decay_rate < 1 else {}
        top = max((_depth(backbone) + 1 for backbone in backbones), default=0)
        plain = set(_undecayed(backbones))
        usual = {"lr": self.base_lr, "weight_decay": self.base_wd}
        usual = {k: v for k, v in usual.items() if v is not None}
        groups: dict[Any, dict[str, Any]] = {}
        seen = set()
        for single in singles:
            (parameter,) = single["params"]
            if parameter in seen:
                continue
            seen.add(parameter)
            settings = {**usual, **single}
            for key in ("params", "lr_mult", "decay_mult"):  # mmengine has multiplied already
                settings.pop(key, None)
            if parameter in plain:
                settings["weight_decay"] = 0.0
            layer, scale = slowed.get(parameter, (top, 1.0))
            # The name says every setting but the scale.
            name = self._name(layer, settings)
            if "lr" in settings:
                settings["lr"] *= scale
            group = groups.setdefault((layer, name, scale), {"params": [], "name": name})
            group.update(settings)
            group["params"].append(parameter)
        # The top first: mmengine's logs show the rate of the first group.
        return [groups[key] for key in sorted(groups, key=lambda key: (-key[0], *key[1:]))]

    def _slowed(self, backbones: list[MambaVision]) -> dict[nn.Parameter, tuple[int, float]]:
        """Layer and scale of the rate of every parameter below the top of its backbone."""
        if not backbones:
            raise ValueError(
                f"paramwise_cfg.decay_rate={self.decay_rate} needs a MambaVision in the model: the "
                "layers of other backbones are not known. Leave decay_rate out, or take the "
                "constructor of that backbone's library"
            )
        return {
            parameter: (layer, self.decay_rate ** (_depth(backbone) + 1 - layer))
            for backbone in backbones
            for layer, part in _layers(backbone)
            for parameter in part.parameters()
        }

    def _name(self, layer: int, settings: dict[str, Any]) -> str:
        """Such as "layer 3, no decay"; settings other than the optimizer's own are added."""
        parts = [f"layer {layer}"] if self.decay_rate < 1 else []
        decays = settings.get("weight_decay") != 0
        parts.append("decay" if decays else "no decay")
        for key, value in settings.items():
            usual = {"lr": self.base_lr, "weight_decay": self.base_wd if decays else 0}.get(key)
            if value != usual:
                parts.append(f"{key} {value}")
        return ", ".join(parts)


def _depth(backbone: MambaVision) -> int:
    return sum(backbone.arch.depths)


def _layers(backbone: MambaVision) -> Iterator[tuple[int, nn.Module]]:
    """The parts of a backbone below its top, each with its layer."""
    yield 0, backbone.patch_embed
    layer = 0
    for level in backbone.levels:
        for block in level.blocks:  # type: ignore[union-attr]
            layer += 1
            yield layer, block
        if level.downsample is not None:
            yield layer + 1, level.downsample  # type: ignore[misc]


def _undecayed(backbones: list[MambaVision]) -> Iterator[nn.Parameter]:
    """Norms, biases, gammas and D, which have one dimension, and A_log."""
    for backbone in backbones:
        for name, parameter in backbone.named_parameters():
            if parameter.dim() == 1 or name.endswith("A_log"):
                yield parameter


def _table(groups: list[dict[str, Any]]) -> str:
    head = ("group", "lr", "weight decay", "tensors", "parameters")
    rows = [
        (
            group["name"],
            *(f"{group[key]:.4g}" if key in group else "default" for key in ("lr", "weight_decay")),
            str(len(group["params"])),
            f"{sum(p.numel() for p in group['params']):,}",
        )
        for group in groups
    ]
    width = max(len(name) for name, *_ in [head, *rows])
    return "\n".join(
        f"{name:{width}}" + "".join(f"{cell:>14}" for cell in cells)
        for name, *cells in [head, *rows]
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep mmengine's logger silent."""
    logger = MMLogger.get_current_instance()
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before
