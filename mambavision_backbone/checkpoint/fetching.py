"""From a name, an address or a path to a file on this machine."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from pathlib import Path
from urllib.parse import urlparse

import torch

from ..version import __version__
from .catalog import LICENCE, SCHEME, PublishedFile, find_published
from .errors import WeightsError

logger = logging.getLogger("mambavision_backbone")

_SHA256 = re.compile(r"[0-9a-f]{64}")


def local_file(source: str) -> str:
    """The file that a source names, downloaded if it is not here yet.

    Args:
        source: a path; ``mambavision://NAME`` or ``mambavision://NAME@REVISION`` of
            ``catalog.PUBLISHED``; or an http(s) address, to which ``#sha256=DIGEST`` may be added.

    Raises:
        FileNotFoundError: no such path.
        WeightsError: no such name, an HTML page, or the download failed or is not what it should
            be. Nothing of it stays in the cache.
    """
    if source.startswith(SCHEME):
        return _published(source)
    if source.startswith(("http://", "https://")):
        return _address(source)
    scheme = re.match(r"[a-z][a-z0-9+.-]+://", source)
    if scheme:
        raise WeightsError(
            f"{source!r}: files of {scheme[0]} are not read safely here. Fetch it and give its path"
        )
    path = os.path.expanduser(source)
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"checkpoint {source!r} does not exist (relative to {os.getcwd()}): check the path "
            "in init_cfg, load_from or on the command line"
        )
    _check_content(Path(path), source)
    return path


def _published(source: str) -> str:
    """A published file in the hub's own cache; a copy that is there is not asked for again."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    name, file, revision = find_published(source)

    def download(cached: bool) -> str:
        return huggingface_hub.hf_hub_download(
            file.repo,
            file.file,
            revision=revision,
            local_files_only=cached,
            endpoint=os.environ.get("HF_ENDPOINT"),
            library_name="mambavision-backbone",
            library_version=__version__,
        )

    try:
        path = download(cached=True)
    except LocalEntryNotFoundError:
        logger.info("fetching %s from %s (licence %s)", name, file.repo, LICENCE)
        try:
            path = download(cached=False)
        except Exception as error:  # of the HTTP library, which differs with the hub's version
            address = huggingface_hub.hf_hub_url(file.repo, file.file, revision=revision)
            raise WeightsError(
                f"{source} cannot be fetched: {_reason(error)}. Fetch {address} in another way and "
                "give its path, or name a mirror of the hub in HF_ENDPOINT"
            ) from error
    _check_cached(Path(path), source, file)
    return path


def _check_cached(path: Path, source: str, file: PublishedFile) -> None:
    """Compare a file of the hub's cache with its digest; what is wrong leaves the cache.

    The hub's cache names large files by their SHA-256 and points to them by a symbolic link.
    """
    blob = path.parent / os.readlink(path) if path.is_symlink() else path
    expected = file.sha256 or (blob.name if _SHA256.fullmatch(blob.name) else None)
    try:
        _check_content(path, source, expected)
    except WeightsError:
        blob.unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        raise


def _address(source: str) -> str:
    """Download an address into torch's hub folder, unless it is there."""
    from filelock import FileLock
    from huggingface_hub.file_download import http_get

    address, _, fragment = source.partition("#")
    digest = fragment.removeprefix("sha256=").lower() if fragment else None
    if digest is not None and not _SHA256.fullmatch(digest):
        raise WeightsError(f"{source}: what follows '#' must be sha256= and 64 hexadecimal digits")
    name = Path(urlparse(address).path).name or "checkpoint"
    folder = Path(torch.hub.get_dir(), "checkpoints")
    # many files have the same name, such as model.pth
    path = folder / f"{hashlib.sha256(address.encode()).hexdigest()[:8]}-{name}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if path.exists():
            try:
                _check_content(path, source, digest)
            except WeightsError:
                path.unlink()
                raise
            return str(path)
        partial = path.with_name(f"{path.name}.partial")
        try:
            with partial.open("wb") as opened:
                logger.info("fetching %s", address)
                http_get(address, opened)
            _check_content(partial, source, digest)
            os.replace(partial, path)
        except WeightsError:
            raise
        except Exception as error:  # of the HTTP library, which differs with the hub's version
            raise WeightsError(f"{address} cannot be fetched: {_reason(error)}") from error
        finally:
            partial.unlink(missing_ok=True)
    return str(path)


def _check_content(path: Path, source: str, sha256: str | None = None) -> None:
    with path.open("rb") as opened:
        if opened.read(64).lstrip().startswith(b"<"):
            raise WeightsError(f"{source} is an HTML page, not a checkpoint: a login or an error?")
    if sha256 is None:
        return
    found = file_sha256(path)
    if found != sha256:
        raise WeightsError(
            f"{source} is not the file it should be: its SHA-256 is {found}, not {sha256}. A "
            "damaged download is removed: try again; if it stays so, the file was exchanged"
        )


def file_sha256(path: str | Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}".rstrip(".")
