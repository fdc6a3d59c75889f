"""Who may import whom, and what the package works without."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mambavision_backbone

PACKAGE = Path(mambavision_backbone.__file__).parent
LEAVES = ["variants.py", "version.py", "layers/windows.py"]


def imports(file: Path) -> set[str]:
    """Absolute names of the modules that a file of the package imports, anywhere in it."""
    here = ["mambavision_backbone", *file.relative_to(PACKAGE).parts[:-1]]
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return names


def users_of(module: str) -> set[str]:
    return {
        str(file.relative_to(PACKAGE))
        for file in PACKAGE.rglob("*.py")
        if any(n == module or n.startswith(module + ".") for n in imports(file))
    }


def test_mm_libraries_stay_at_the_edge() -> None:
    assert users_of("mmdet") == users_of("mmseg") == users_of("mmcv") == set()
    assert users_of("mmengine") == {
        "registry.py",
        *(f"engine/{name}.py" for name in ("hooks", "log", "optim", "pickles", "runner")),
    }
    assert users_of("mamba_ssm") == {"ops/selective_scan/mamba_ssm.py"}


def test_backends_know_neither_each_other_nor_the_api() -> None:
    scan = "mambavision_backbone.ops.selective_scan"
    for backend in ("chunked", "reference", "mamba_ssm"):
        own = {n for n in imports(PACKAGE / f"ops/selective_scan/{backend}.py") if scan in n}
        assert own == set(), backend
    for file in (PACKAGE / "ops/selective_scan/triton").glob("*.py"):
        own = {n for n in imports(file) if scan in n}
        assert all(n.startswith(f"{scan}.triton") for n in own), file
    loaded_at_first_use = ("kernels.py", "launch.py", "triton_common.py")
    others = {f for f in users_of("triton") if not f.endswith(loaded_at_first_use)}
    assert others == {"ops/triton_support.py"}  # asks for it in a function
    assert users_of(f"{scan}.schema") == {"ops/selective_scan/api.py"}
    assert users_of(scan) >= {"ops/mix/__init__.py", "backbone.py"}


@pytest.mark.parametrize("leaf", LEAVES)
def test_leaves(leaf: str) -> None:
    own = {
        n.split(".")[1] for n in imports(PACKAGE / leaf) if n.startswith("mambavision_backbone.")
    }
    assert own <= {"variants"}


def test_checkpoints_know_no_network() -> None:
    for file in (PACKAGE / "checkpoint").glob("*.py"):
        own = {n.split(".")[1] for n in imports(file) if n.startswith("mambavision_backbone.")}
        assert own <= {"checkpoint", "variants", "version"}, file


_BLOCK = """
import sys
blocked = sys.argv[1].split(",")

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Block())
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda n, *a: None if n.split(".")[0] in blocked else find_spec(n, *a)

import torch
from mambavision_backbone import MambaVision
arch = dict(dim=16, in_dim=8, depths=(1, 1, 2, 2), num_heads=(2, 2, 4, 4))
model = MambaVision(arch)
model.init_weights()
print("maps", [tuple(o.shape) for o in model(torch.zeros(2, 3, 64, 64))][-1])
"""


@pytest.mark.parametrize(
    "blocked",
    ["mmdet", "mmseg", "mmengine,mmcv,mmdet,mmseg", "triton,mamba_ssm,causal_conv1d"],
)
def test_works_without(blocked: str) -> None:
    out = subprocess.run(
        [sys.executable, "-c", _BLOCK, blocked], capture_output=True, text=True, check=False
    )
    assert out.stdout.endswith("maps (2, 128, 2, 2)\n"), out.stderr


def test_import_loads_no_optional_library() -> None:
    code = (
        "import sys, mambavision_backbone;"
        "print([m for m in ('mamba_ssm', 'mmdet', 'mmseg') if m in sys.modules])"
    )
    out = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert "mamba_ssm" not in out
    assert "mmdet" not in out
    assert "mmseg" not in out
