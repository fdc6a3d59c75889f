"""The published variants of MambaVision as a table (standard library only)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

STAGES = 4


@dataclass(frozen=True)
class Arch:
    """What distinguishes one MambaVision from another.

    Source: Hatamizadeh & Kautz, "MambaVision", arXiv 2407.08083, table of variants.

    Attributes:
        dim: channels C of the first stage; stage i has ``C * 2**i``.
        in_dim: channels between the two convolutions of the stem.
        depths: blocks of each of the four stages.
        num_heads: attention heads of each stage (the first two stages have no attention).
        window_size: side of the square windows of each stage, in positions of that stage's map
            (the first two stages are convolutional: theirs are not used).
        mlp_ratio: hidden width of the MLPs over C.
        layer_scale: initial value of gamma_1 and gamma_2 in stages 3 and 4, or None for no gamma.
        layer_scale_conv: the same for the convolution blocks; no published variant has one.
    """

    dim: int
    in_dim: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    window_size: tuple[int, ...] = (8, 8, 14, 7)
    mlp_ratio: float = 4.0
    layer_scale: float | None = None
    layer_scale_conv: float | None = None

    def __post_init__(self) -> None:
        """Check the fields; see :func:`resolve_arch` for the errors."""
        for name in ("depths", "num_heads", "window_size"):
            given = getattr(self, name)
            value = tuple(given) if isinstance(given, Iterable) else ()
            if len(value) != STAGES or not all(_is_positive_int(v) for v in value):
                raise ValueError(f"{name} must be {STAGES} positive integers, got {given!r}")
            object.__setattr__(self, name, value)
        for name in ("dim", "in_dim"):
            if not _is_positive_int(getattr(self, name)):
                raise ValueError(f"{name} must be a positive integer, got {getattr(self, name)!r}")
        if self.dim % 2:
            raise ValueError(f"dim must be even (the mixer has two branches), got {self.dim}")
        if not self.mlp_ratio > 0:
            raise ValueError(f"mlp_ratio must be positive, got {self.mlp_ratio}")
        for stage, heads in enumerate(self.num_heads):
            if stage >= 2 and self.channels[stage] % heads:
                raise ValueError(
                    f"num_heads[{stage}]={heads} does not divide the stage's "
                    f"{self.channels[stage]} channels"
                )

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of the four stages."""
        return tuple(self.dim * 2**i for i in range(STAGES))


def _is_positive_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


VARIANTS: dict[str, Arch] = {
    "T": Arch(80, 32, (1, 3, 8, 4), (2, 4, 8, 16)),
    "T2": Arch(80, 32, (1, 3, 11, 4), (2, 4, 8, 16)),
    "S": Arch(96, 64, (3, 3, 7, 5), (2, 4, 8, 16)),
    "B": Arch(128, 64, (3, 3, 10, 5), (2, 4, 8, 16), layer_scale=1e-5),
    "L": Arch(196, 64, (3, 3, 10, 5), (4, 8, 16, 32), layer_scale=1e-5),
    "L2": Arch(196, 64, (3, 3, 12, 5), (4, 8, 16, 32), layer_scale=1e-5),
    "L3": Arch(256, 64, (3, 3, 20, 10), (4, 8, 16, 32), (8, 8, 32, 16), layer_scale=1e-5),
}


def resolve_arch(arch: str | Mapping[str, Any] | Arch) -> Arch:
    """Turn the ``arch`` argument of the backbone into an :class:`Arch`.

    Args:
        arch: a name of :data:`VARIANTS` (case does not matter), a dict of the fields of
            :class:`Arch`, or an :class:`Arch`.

    Raises:
        ValueError: unknown name or field, missing field, or a value out of range; the message
            names it and says what is valid.
    """
    if isinstance(arch, Arch):
        return arch
    if isinstance(arch, str):
        if arch.upper() not in VARIANTS:
            raise ValueError(
                f"unknown arch {arch!r}: choose one of {', '.join(VARIANTS)} or a dict"
            )
        return VARIANTS[arch.upper()]
    if not isinstance(arch, Mapping):
        raise ValueError(f"arch must be a name or a dict, got {type(arch).__name__}")
    names = [f.name for f in fields(Arch)]
    unknown = sorted(set(arch) - set(names))
    if unknown:
        raise ValueError(f"unknown field(s) {unknown} in arch: valid are {names}")
    missing = [n for n in ("dim", "in_dim", "depths", "num_heads") if n not in arch]
    if missing:
        raise ValueError(f"arch lacks {missing}")
    return Arch(**arch)
