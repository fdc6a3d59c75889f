"""Reading checkpoint files without executing anything in them."""

from __future__ import annotations

import logging
import re
import threading
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .errors import WeightsError
from .fetching import local_file
from .plain import PLAIN_CLASSES

logger = logging.getLogger("mambavision_backbone")

# The first torch whose weights_only has no known hole: CVE-2025-32434 is mended in 2.6,
# CVE-2026-24747 in 2.10.
SAFE_TORCH = (2, 10)
_warned = [False]
_reading = threading.Lock()  # the list of admitted classes is the process's


def read_state_dict(source: str, mmap: bool = False) -> dict[str, Tensor]:
    """The tensors of a checkpoint; arguments and errors as :func:`read_checkpoint`'s."""
    return state_dict_of(read_checkpoint(source, mmap=mmap))


def state_dict_of(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a checkpoint's content: of ``state_dict``, ``model``, or its own."""
    for key in ("state_dict", "model"):
        if isinstance(checkpoint.get(key), Mapping):
            checkpoint = checkpoint[key]
            break
    return {k: v for k, v in checkpoint.items() if isinstance(v, Tensor)}


def read_checkpoint(
    source: str, map_location: Any = "cpu", mmap: bool = False, trust: bool = False
) -> Mapping[str, Any]:
    """Read a checkpoint.

    Pickles are read with ``weights_only=True`` and a short list of harmless classes: nothing in the
    file is executed.

    Args:
        source: path, published name or address; see ``fetching.local_file``.
        map_location: torch.load's.
        mmap: let the tensors lie in the file until they are used. The file must not change
            meanwhile, so this is for tensors that are copied at once.
        trust: unpickle whatever the file holds. Whoever made it can run any program as you.

    Raises:
        FileNotFoundError: no such file.
        WeightsError: the file is not a checkpoint, or holds objects besides tensors and plain data,
            or cannot be fetched.
    """
    content = _read_file(local_file(source), map_location, mmap, trust)
    if not isinstance(content, Mapping):
        raise WeightsError(f"{source!r} holds a {type(content).__name__}, not a dict of tensors")
    return content


def _read_file(path: str, map_location: Any, mmap: bool, trust: bool) -> Any:
    with open(path, "rb") as opened:
        head = opened.read(2)
    if path.endswith(".safetensors"):
        return _read_safetensors(path, map_location)
    archive = zipfile.is_zipfile(path)
    if head == b"PK" and not archive:  # a zip file's directory is at its end
        raise WeightsError(f"{path!r} cannot be read as a checkpoint: its end is missing")
    mmap = mmap and archive  # files of old versions of torch are plain pickles
    if trust:
        logger.warning("%s is unpickled without limits, as asked: code in it is executed", path)
    else:
        _warn_of_old_torch()
    try:
        with _plain_classes():
            return torch.load(path, map_location=map_location, mmap=mmap, weights_only=not trust)
    except MemoryError:
        raise
    except Exception as error:  # a file that is no pickle fails in any way
        found = re.search(r"(?:WeightsUnpickler error:\s*|(?=Trying to load ))(\S.*)", str(error))
        if found:
            raise WeightsError(
                f"{path!r} is not a checkpoint of tensors and plain data, so it is not loaded: "
                f"{found[1].split('. ')[0]}"
            ) from error
        reason = next(iter(str(error).splitlines()), "")
        raise WeightsError(
            f"{path!r} cannot be read as a checkpoint (damaged?): {type(error).__name__}: {reason}"
        ) from error


def _read_safetensors(path: str, map_location: Any) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    device = map_location if isinstance(map_location, str | torch.device) else "cpu"
    try:
        return load_file(path, device=str(device))
    except SafetensorError as error:
        raise WeightsError(f"{path!r} is not a safetensors file: {error}") from error


def _warn_of_old_torch() -> None:
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < SAFE_TORCH and not _warned[0]:
        _warned[0] = True
        logger.warning(
            "torch %s can be made to run code by a crafted checkpoint even with weights_only=True "
            "(CVE-2026-24747%s): take torch 2.10 or later, or safetensors, for files of strangers",
            torch.__version__,
            ", CVE-2025-32434" if version < (2, 6) else "",
        )


@contextmanager
def _plain_classes() -> Iterator[None]:
    """Admit, while reading, these classes and no others that the process may have admitted."""
    with _reading:
        before = torch.serialization.get_safe_globals()
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(PLAIN_CLASSES)
        try:
            yield
        finally:
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(before)
