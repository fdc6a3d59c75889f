"""Reading, checking and loading weights."""

from __future__ import annotations

import argparse
import codecs
import os
import pickle
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlparse

import numpy as np
import torch
from torch import Tensor, nn

from .variants import VARIANTS

_CLASSIFIER = re.compile(r"(norm|head)\.")  # of published classification files
_MAY_MISS = re.compile(r"outnorm\d\.|.*num_batches_tracked$")  # made anew where a file lacks them
_MAY_ADD = re.compile(r"outnorm\d\.")  # of stages that this backbone does not return
_SHOWN = 5  # names listed in a message


def _numpy_constructors() -> list[Any]:
    """What numpy's scalars and arrays are pickled with, under numpy 1's name and numpy 2's."""
    constructors: list[Any] = []
    function: Any
    for function in (np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0]):
        for module in ("numpy.core.multiarray", "numpy._core.multiarray"):

            def construct(*args: Any, _function: Any = function) -> Any:
                return _function(*args)

            # The unpickler finds a function by these names.
            construct.__module__ = module
            construct.__name__ = construct.__qualname__ = function.__name__
            constructors.append(construct)
    return constructors


# Read from a pickle besides tensors and plain data; engine adds mmengine's own.
PLAIN_CLASSES: list[Any] = [
    argparse.Namespace,  # timm's training arguments
    codecs.encode,  # the bytes of numpy's numbers; newer torch admits it itself
    np.dtype,
    np.ndarray,
    *_numpy_constructors(),
    *{type(np.dtype(name)) for name in ("f2", "f4", "f8", "i4", "i8", "b1")},
]


class WeightsError(ValueError):
    """Weights that do not belong to this network; the message says which and what to do."""


def load_pretrained(model: nn.Module, source: str, prefix: str | None = None) -> None:
    """Load a file's weights into a backbone, strictly.

    Args:
        model: a ``MambaVision``.
        source: path or http(s) address of a published classification file, a detector or
            segmenter (its ``backbone.`` part is taken), or a backbone's own state dict; torch or
            safetensors format.
        prefix: take only the names under this prefix.

    Raises:
        FileNotFoundError: no such file.
        WeightsError: unreadable, or tensors that are missing, left over or of another shape.
    """
    weights = backbone_weights(read_state_dict(source), prefix)
    check_weights(model, weights, source)
    own = model.state_dict().keys()
    model.load_state_dict({k: v for k, v in weights.items() if k in own}, strict=False)


def read_state_dict(source: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint file or http(s) address; errors as :func:`read_checkpoint`'s."""
    content = read_checkpoint(source)
    for key in ("state_dict", "model"):
        if isinstance(content.get(key), Mapping):
            content = content[key]
            break
    return {k: v for k, v in content.items() if isinstance(v, Tensor)}


def read_checkpoint(source: str) -> Mapping[str, Any]:
    """Read a checkpoint file or http(s) address onto the CPU.

    Pickles are read with ``weights_only=True``: nothing in the file is executed.

    Raises:
        FileNotFoundError: no such file.
        WeightsError: the file is not a checkpoint, or holds objects besides tensors and plain data.
    """
    path = os.path.expanduser(source)
    if source.startswith(("http://", "https://")):
        path = _download(source)
    elif not os.path.isfile(path):
        raise FileNotFoundError(
            f"checkpoint {source!r} does not exist (relative to {os.getcwd()}): check the path "
            "in init_cfg, load_from or on the command line"
        )
    content = _read_file(path)
    if not isinstance(content, Mapping):
        raise WeightsError(f"{source!r} holds a {type(content).__name__}, not a dict of tensors")
    return content


def _download(address: str) -> str:
    """Fetch a file into torch's hub folder, unless it is there."""
    path = Path(torch.hub.get_dir(), "checkpoints", Path(urlparse(address).path).name)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(address, str(path))
        except URLError as error:
            raise WeightsError(f"{address} cannot be fetched: {error}") from error
    return str(path)


def _read_file(path: str) -> Any:
    if path.endswith(".safetensors"):
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise WeightsError(f"{path!r} is not a safetensors file: {error}") from error
    try:
        with _plain_classes():
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"WeightsUnpickler error:\s*(\S.*)", str(error))
        reason = found[1].split(". ")[0] if found else str(error).splitlines()[0]
        raise WeightsError(
            f"{path!r} is not a checkpoint of tensors and plain data, so it is not loaded: {reason}"
        ) from error
    except (RuntimeError, EOFError) as error:
        raise WeightsError(
            f"{path!r} cannot be read as a checkpoint (truncated download?): {error}"
        ) from error


@contextmanager
def _plain_classes() -> Iterator[None]:
    """Admit, while reading, the harmless classes that training checkpoints hold."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.add_safe_globals(PLAIN_CLASSES)
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


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

    Feature norms may be missing (classification files have none), and those of stages that the
    backbone does not return may be left over.

    Args:
        model: a ``MambaVision``.
        weights: names as the backbone has them.
        source: where they come from, for the message.
    """
    own = model.state_dict()
    missing = [k for k in own if k not in weights and not _MAY_MISS.match(k)]
    extra = [k for k in weights if k not in own and not _MAY_ADD.match(k)]
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
