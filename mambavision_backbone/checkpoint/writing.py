"""Writing weights, whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import WeightsError

LAYOUTS = ("backbone", "classifier", "detector")


def write_weights(
    weights: Mapping[str, Tensor],
    path: str | Path,
    layout: str = "backbone",
    meta: Mapping[str, str] | None = None,
) -> None:
    """Write a backbone's weights to a file, which is replaced in one step if it exists.

    Args:
        weights: names as the backbone has them.
        path: ends in ``.safetensors`` (preferred: it can hold nothing but tensors), ``.pth``,
            ``.pt`` or ``.tar``.
        layout: ``backbone``: the names alone; ``classifier``: under ``state_dict``, without feature
            norms, as published classification files; ``detector``: under ``state_dict`` with the
            prefix ``backbone.``, as detectors and segmenters.
        meta: facts about the weights, kept where the file has room for them: in ``.safetensors``,
            and beside ``state_dict``.

    Raises:
        WeightsError: unknown layout or suffix.
    """
    path = Path(path)
    if layout not in LAYOUTS:
        raise WeightsError(f"unknown layout {layout!r}: choose one of {', '.join(LAYOUTS)}")
    if path.suffix not in (".safetensors", ".pth", ".pt", ".tar"):
        raise WeightsError(f"{str(path)!r} must end in .safetensors, .pth, .pt or .tar")
    tensors = {k: v.contiguous() for k, v in weights.items()}
    if layout == "classifier":
        tensors = {k: v for k, v in tensors.items() if not k.startswith("outnorm")}
    elif layout == "detector":
        tensors = {f"backbone.{k}": v for k, v in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import save_file

            save_file(tensors, str(partial), metadata={"format": "pt", **(meta or {})})
        else:
            content: dict[str, Any] = dict(tensors)
            if layout != "backbone":
                content = {"state_dict": tensors, "meta": dict(meta or {})}
            torch.save(content, partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
