"""Which tensors of a checkpoint belong to a backbone, and putting them there."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..variants import VARIANTS
from .errors import WeightsError
from .fetching import local_file
from .reading import read_state_dict

logger = logging.getLogger("mambavision_backbone")

STEM = "patch_embed.conv_down.0.weight"
_CLASSIFIER = re.compile(r"(norm|head)\.")  # of classification files
_OUT_NORM = re.compile(r"(outnorm\d)\.")
_COUNTER = "num_batches_tracked"  # of batch norms; files of old versions of torch lack it
_SHOWN = 5  # names listed in a message
_PART = 1 << 28  # bytes copied from a mapped file at a time


def load_pretrained(model: nn.Module, source: str, prefix: str | None = None) -> None:
    """Load a file's weights into a backbone, strictly.

    Windows may differ from those the weights were trained with: no weight depends on them. Where
    the network takes another number of channels than the file's three, the first convolution is
    converted as timm does it: for one channel its weights are summed over the colours; for more
    they are repeated (R, G, B, R, …) and scaled by 3 / channels, so that equal channels give the
    same response.

    Args:
        model: a ``MambaVision``.
        source: path, published name or http(s) address of a published classification file, a
            detector or segmenter (its ``backbone.`` part is taken), or a backbone's own state
            dict; torch or safetensors format.
        prefix: take only the names under this prefix.

    Raises:
        FileNotFoundError: no such file.
        WeightsError: unreadable, or tensors that are missing, left over or of another shape.
    """
    own = model.state_dict()
    path = local_file(source)
    weights = _read_for(own, path, prefix)
    check_weights(model, weights, source)
    fresh = sorted({match[1] for k in own if k not in weights and (match := _OUT_NORM.match(k))})
    logger.info("loading %s%s", source, f"; made anew: {', '.join(fresh)}" if fresh else "")
    # A part at a time, since pages of a mapped file stay in memory as long as it is mapped.
    for names in _parts({k: v for k, v in weights.items() if k in own}):
        weights = _read_for(own, path, prefix)
        with torch.no_grad():
            for name in names:
                own[name].copy_(weights[name])


def _read_for(own: Mapping[str, Tensor], path: str, prefix: str | None) -> dict[str, Tensor]:
    """A file's weights, mapped, with the stem of the network's number of channels."""
    weights = backbone_weights(read_state_dict(path, mmap=True), prefix)
    channels = own[STEM].shape[1]
    stem = weights.get(STEM)
    if stem is not None and stem.dim() == 4 and stem.shape[1] == 3 != channels:
        from timm.models import adapt_input_conv

        weights[STEM] = adapt_input_conv(channels, stem)
    return weights


def _parts(weights: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """Names of tensors that have about ``_PART`` bytes together."""
    names: list[str] = []
    size = 0
    for name, tensor in weights.items():
        names.append(name)
        size += tensor.nbytes
        if size >= _PART:
            yield names
            names, size = [], 0
    if names:
        yield names


def backbone_weights(
    state_dict: Mapping[str, Tensor], prefix: str | None = None
) -> dict[str, Tensor]:
    """Names as the backbone has them: ``module.`` and ``backbone.`` cut, the classifier dropped.

    Args:
        state_dict: of a classification file, a detector or segmenter, or a backbone.
        prefix: take only the names under this prefix; by default ``backbone.`` where there is one.
    """
    weights = {k.removeprefix("module."): v for k, v in state_dict.items()}
    if prefix is None and any(k.startswith("backbone.") for k in weights):
        prefix = "backbone."
    if prefix:
        prefix = prefix.rstrip(".") + "."
        weights = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    return {k: v for k, v in weights.items() if not _CLASSIFIER.match(k)}


def check_weights(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Raise WeightsError unless the weights fit the backbone.

    Whole feature norms may be missing (classification files have none) or left over (those of
    stages that the backbone does not return), and batch norms' counters may be missing.

    Args:
        model: a ``MambaVision``.
        weights: names as the backbone has them.
        source: where they come from, for the message.
    """
    own = model.state_dict()
    in_file, in_network = _out_norms(weights), _out_norms(own)
    missing = [
        k
        for k in own
        if k not in weights
        and not k.endswith(_COUNTER)
        and not ((norm := _OUT_NORM.match(k)) and norm[1] not in in_file)
    ]
    extra = [
        k
        for k in weights
        if k not in own and not ((norm := _OUT_NORM.match(k)) and norm[1] not in in_network)
    ]
    wrong = [
        f"{k}: file {tuple(v.shape)}, network {tuple(own[k].shape)}"
        for k, v in weights.items()
        if k in own and v.shape != own[k].shape
    ]
    if not (missing or extra or wrong):
        return
    parts = [f"{source!r} does not fit this backbone"]
    for title, names in (("different shape", wrong), ("missing", missing), ("left over", extra)):
        if names:
            more = f", … {len(names)} in all" if len(names) > _SHOWN else ""
            parts.append(f"{title}: {'; '.join(names[:_SHOWN])}{more}")
    looks = guess_variant(weights)
    if looks is None:
        parts.append("it looks like no published MambaVision")
    elif looks == guess_variant(own):
        parts.append(f"it looks like a {looks}, as this backbone does")
    else:
        parts.append(f"it looks like arch={looks!r}: set arch to that or take the other file")
    raise WeightsError("\n  ".join(parts))


def _out_norms(names: Mapping[str, Any]) -> set[str]:
    return {match[1] for name in names if (match := _OUT_NORM.match(name))}


def guess_variant(weights: Mapping[str, Tensor]) -> str | None:
    """The variant whose width and depths these weights have, or None."""
    stem = weights.get("patch_embed.conv_down.3.weight")
    if stem is None or stem.dim() != 4:
        return None
    depths = [0, 0, 0, 0]
    for key in weights:
        if match := re.match(r"levels\.([0-3])\.blocks\.(\d+)\.", key):
            stage = int(match[1])
            depths[stage] = max(depths[stage], int(match[2]) + 1)
    for name, arch in VARIANTS.items():
        if (arch.dim, arch.in_dim, arch.depths) == (*stem.shape[:2], tuple(depths)):
            return name
    return None
