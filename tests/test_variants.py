"""The table of variants and its errors."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from mambavision_backbone.variants import VARIANTS, Arch, resolve_arch


def test_names_and_dicts_resolve() -> None:
    assert resolve_arch("t") is VARIANTS["T"]
    assert resolve_arch(VARIANTS["B"]) is VARIANTS["B"]
    arch = resolve_arch({"dim": 16, "in_dim": 8, "depths": [1] * 4, "num_heads": [2] * 4})
    assert arch == Arch(16, 8, (1, 1, 1, 1), (2, 2, 2, 2))
    assert arch.channels == (16, 32, 64, 128)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 3}, r"unknown field\(s\) \['depth'\] in arch"),
        ({"depths": (1, 1, 0, 1)}, r"depths must be 4 positive integers, got \(1, 1, 0, 1\)"),
        ({"depths": (1, 1, 1)}, "depths must be 4 positive integers"),
        ({"depths": 3}, "depths must be 4 positive integers, got 3"),
        ({"window_size": (8, 8, 0, 7)}, "window_size must be 4 positive integers"),
        ({"num_heads": (2, 2, 7, 4)}, r"num_heads\[2\]=7 does not divide"),
        ({"dim": 0}, "dim must be a positive integer"),
        ({"dim": 15}, "dim must be even"),
        ({"mlp_ratio": 0}, "mlp_ratio must be positive"),
    ],
)
def test_bad_fields_are_named(
    tiny_arch: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_arch({**tiny_arch, **change})


@pytest.mark.parametrize("arch", ["XL", 3, {"dim": 16}])
def test_other_arch_is_refused(arch: Any) -> None:
    with pytest.raises(ValueError, match="arch"):
        resolve_arch(arch)


def test_is_standard_library_only() -> None:
    """The table can be read without importing torch."""
    code = (
        "import importlib.util, sys; from pathlib import Path;"
        "spec = importlib.util.spec_from_file_location('variants', sys.argv[1]);"
        "module = importlib.util.module_from_spec(spec); sys.modules['variants'] = module;"
        "spec.loader.exec_module(module); assert 'torch' not in sys.modules"
    )
    import mambavision_backbone.variants as module

    subprocess.run([sys.executable, "-c", code, module.__file__], check=True)
