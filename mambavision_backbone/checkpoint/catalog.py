"""The published weights, by name (standard library only)."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from .errors import WeightsError

SCHEME = "mambavision://"
LICENCE = "CC-BY-NC-SA-4.0"  # of all published weights


@dataclass(frozen=True)
class PublishedFile:
    """A file on the Hugging Face hub.

    Attributes:
        arch: variant of the backbone.
        repo: repository on the hub.
        file: name in the repository.
        params: parameters in millions, heads included, as published.
        result: the published result.
        config: the config of a detector or segmenter; None for a classifier.
        revision: branch, tag or commit of the repository.
        sha256: digest of the file, where it is known; the hub's own is checked in any case.
    """

    arch: str
    repo: str
    file: str
    params: float
    result: str
    config: str | None = None
    revision: str = "main"
    sha256: str | None = None


def _classifier(arch: str, repo: str, file: str, params: float, result: str) -> PublishedFile:
    return PublishedFile(arch, f"nvidia/{repo}", file, params, result)


def _detector(arch: str, size: str, params: float, result: str) -> PublishedFile:
    name = f"cascade_mask_rcnn_mamba_vision_{size}_3x_coco"
    config = f"mmdet_configs/cascade_mambavision_{arch.lower()}.py"
    return PublishedFile(arch, f"nvidia/{name}", f"{name}.pth", params, result, config)


def _segmenter(arch: str, size: str, crop: str, params: float, result: str) -> PublishedFile:
    name = f"mamba_vision_160k_ade20k-{crop}_{size}"
    config = f"mmseg_configs/upernet_mambavision_{arch.lower()}.py"
    return PublishedFile(arch, f"nvidia/{name}", f"{name}.pth", params, result, config)


PUBLISHED: dict[str, PublishedFile] = {
    "T-1K": _classifier("T", "MambaVision-T-1K", "mambavision_tiny_1k.pth.tar", 31.8, "82.3 top-1"),
    "T2-1K": _classifier(
        "T2", "MambaVision-T2-1K", "mambavision_tiny2_1k.pth.tar", 35.1, "82.7 top-1"
    ),
    "S-1K": _classifier(
        "S", "MambaVision-S-1K", "mambavision_small_1k.pth.tar", 50.1, "83.3 top-1"
    ),
    "B-1K": _classifier("B", "MambaVision-B-1K", "mambavision_base_1k.pth.tar", 97.7, "84.2 top-1"),
    "B-21K": _classifier("B", "MambaVision-B-21K", "mambavision_base_21k.pth.tar", 97.7, ""),
    "L-1K": _classifier(
        "L", "MambaVision-L-1K", "mambavision_large_1k.pth.tar", 227.9, "85.0 top-1"
    ),
    "L-21K": _classifier("L", "MambaVision-L-21K", "mambavision_large_21k.pth.tar", 227.9, ""),
    "L2-1K": _classifier(
        "L2", "MambaVision-L2-1K", "mambavision_large2_1k.pth.tar", 241.5, "85.3 top-1"
    ),
    "L2-512-21K": _classifier(
        "L2", "MambaVision-L2-512-21K", "mambavision_L2_21k_240m_512.pth.tar", 241.5, ""
    ),
    "L3-256-21K": _classifier(
        "L3", "MambaVision-L3-256-21K", "mambavision_L3_21k_740m_256.pth.tar", 739.6, ""
    ),
    "L3-512-21K": _classifier(
        "L3", "MambaVision-L3-512-21K", "mambavision_L3_21k_740m_512.pth.tar", 739.6, "88.1 top-1"
    ),
    "cascade-T-3x-COCO": _detector("T", "tiny", 86, "51.1 box / 44.3 mask AP"),
    "cascade-S-3x-COCO": _detector("S", "small", 108, "52.3 box / 45.2 mask AP"),
    "cascade-B-3x-COCO": _detector("B", "base", 145, "52.8 box / 45.7 mask AP"),
    "upernet-T-160k-ADE20K": _segmenter("T", "tiny", "512x512", 55, "46.0 mIoU"),
    "upernet-S-160k-ADE20K": _segmenter("S", "small", "512x512", 84, "48.2 mIoU"),
    "upernet-B-160k-ADE20K": _segmenter("B", "base", "512x512", 126, "49.1 mIoU"),
    "upernet-L3-160k-ADE20K": _segmenter("L3", "l3_21k", "640x640", 780, "53.2 mIoU"),
}


def find_published(source: str) -> tuple[str, PublishedFile, str]:
    """Look up ``mambavision://NAME`` or ``mambavision://NAME@REVISION``; case does not matter.

    Returns:
        The name, the file, and the revision to take.

    Raises:
        WeightsError: no such name; the message has the nearest ones.
    """
    asked, _, revision = source.removeprefix(SCHEME).partition("@")
    for name, file in PUBLISHED.items():
        if name.lower() == asked.lower():
            return name, file, revision or file.revision
    names = {name.lower(): name for name in PUBLISHED}
    near = [names[n] for n in difflib.get_close_matches(asked.lower(), names, cutoff=0.4)]
    raise WeightsError(
        f"there are no published weights {asked!r}: did you mean {' or '.join(near)}?"
        if near
        else f"there are no published weights {asked!r}: choose one of {', '.join(PUBLISHED)}"
    )
