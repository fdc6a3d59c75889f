"""The environment script against stand-ins for Python, pip and a full disk; the pinned versions.

Nothing is installed here: the script runs with a PATH that holds only what the test puts there.
"""

import configparser
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tools" / "dev" / "make_env.sh"
STACKS = ("onedl", "openmmlab")

# What the script uses of a bare system; deliberately without a compiler.
SYSTEM_TOOLS = [
    "bash",
    "cat",
    "chmod",
    "cut",
    "dirname",
    "grep",
    "mkdir",
    "nproc",
    "realpath",
    "rm",
    "sed",
    "sha256sum",
    "tail",
]

# Stands in for the interpreter, inside and outside of the environment. It notes every pip call in
# $CALLS and fails the one that contains $FAIL_PIP or the probe that contains $FAIL_PROBE.
FAKE_PYTHON = r"""#!/usr/bin/env bash
case "$*" in
    *version_info*) echo "${FAKE_VERSION:-3.11}" ;;
    *version.cuda*) echo 13.0 ;;
    *CUDA_HOME*) echo "${FAKE_TOOLKIT:-}" ;;
    "-m venv"*) mkdir -p "${@: -1}/bin" && cat "$0" >"${@: -1}/bin/python" &&
        chmod +x "${@: -1}/bin/python" ;;
    "-m pip --version") ;;
    "-m pip"*) echo "$*|$PIP_CONSTRAINT|${CUDA_VISIBLE_DEVICES-all}" >>"$CALLS"
        if [ -n "${FAIL_PIP:-}" ] && [[ $* == *"$FAIL_PIP"* ]]; then exit 1; fi ;;
    *) if [ -n "${FAIL_PROBE:-}" ] && [[ $* == *"$FAIL_PROBE"* ]]; then exit 1; fi ;;
esac
"""


class Call(NamedTuple):
    """One `pip install`: its arguments, and the settings it found in its environment."""

    arguments: str
    constraints: str
    visible_gpus: str


class Sandbox:
    """A PATH with stand-ins, an empty folder for the environment, and the record of pip's calls."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.environment = folder / "environment"
        self.calls_file = folder / "calls"
        for tool in SYSTEM_TOOLS:
            (self.bin / tool).symlink_to(str(shutil.which(tool)))
        self.add("python3.11", FAKE_PYTHON)
        self.add("g++", "#!/bin/sh\n")
        self.set_free_disk(gigabytes=50)

    def add(self, name: str, text: str) -> None:
        path = self.bin / name
        path.unlink(missing_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def set_free_disk(self, gigabytes: int) -> None:
        blocks = gigabytes * 1024 * 1024
        self.add("df", f"#!/bin/sh\necho header\necho /dev/disk 99999999 1 {blocks} 99% /\n")

    def run(self, stack: str = "onedl", **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": str(self.bin), "CALLS": str(self.calls_file), **variables}
        return subprocess.run(
            [str(self.bin / "bash"), str(SCRIPT), stack, str(self.environment)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def take_calls(self) -> list[Call]:
        """Returns pip's calls since the last time."""
        if not self.calls_file.exists():
            return []
        lines = self.calls_file.read_text().splitlines()
        self.calls_file.unlink()
        return [Call(*line.removeprefix("-m pip install ").split("|")) for line in lines]


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    return Sandbox(tmp_path)


def refusal(sandbox: Sandbox, **variables: str) -> str:
    """Returns the only line printed, after checking that it stopped before anything was done."""
    result = sandbox.run(**variables)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1, result.stderr
    assert sandbox.take_calls() == []
    assert not sandbox.environment.exists()
    return result.stderr


@pytest.mark.parametrize("version", ["3.9", "3.13", "3.1", "2.7"])
def test_unsupported_python(sandbox: Sandbox, version: str) -> None:
    line = refusal(sandbox, FAKE_VERSION=version)
    assert f"3.10, 3.11 or 3.12 is needed (python3.11 is {version})" in line
    assert "apt-get install python3.12-venv python3.12-dev" in line
    assert "PYTHON=/path" in line


def test_no_python(sandbox: Sandbox) -> None:
    (sandbox.bin / "python3.11").unlink()
    assert "3.10, 3.11 or 3.12 is needed: apt-get install" in refusal(sandbox)


def test_chosen_python_is_not_replaced_by_another(sandbox: Sandbox) -> None:
    assert "is needed" in refusal(sandbox, PYTHON="/nowhere/python3.11")


def test_suitable_python_further_down_the_path_is_found(sandbox: Sandbox) -> None:
    sandbox.add("python3.11", "#!/bin/sh\nexit 127\n")  # as a version manager's empty shim does
    sandbox.add("python3", FAKE_PYTHON)
    assert sandbox.run(FAKE_VERSION="3.10").returncode == 0


@pytest.mark.parametrize(
    ("probe", "missing", "package"),
    [
        ("ensurepip", "Python's venv module", "python3.11-venv"),
        ("Python.h", "Python's headers (Python.h)", "python3.11-dev"),
    ],
    ids=["venv", "headers"],
)
def test_missing_system_package(sandbox: Sandbox, probe: str, missing: str, package: str) -> None:
    line = refusal(sandbox, FAIL_PROBE=probe)
    assert f"missing {missing}" in line
    assert line.endswith(f"apt-get install {package}\n")


def test_missing_compiler(sandbox: Sandbox) -> None:
    (sandbox.bin / "g++").unlink()
    line = refusal(sandbox)
    assert line == "make_env: missing a C++ compiler (g++): apt-get install g++\n"


def test_everything_missing_is_one_line_and_one_command(sandbox: Sandbox) -> None:
    (sandbox.bin / "g++").unlink()
    line = refusal(sandbox, FAIL_PROBE="import")
    assert line.endswith("apt-get install python3.11-venv python3.11-dev g++\n")


def test_full_disk(sandbox: Sandbox) -> None:
    sandbox.set_free_disk(gigabytes=4)
    line = refusal(sandbox)
    assert "GB of free disk space" in line
    assert "has 4 GB: free some" in line


def test_unsupported_python_in_the_environment(sandbox: Sandbox) -> None:
    assert sandbox.run().returncode == 0
    sandbox.take_calls()
    shutil.rmtree(sandbox.environment / ".stamps")
    result = sandbox.run(FAKE_VERSION="3.13")
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert f"rm -r {sandbox.environment}" in result.stderr
    assert sandbox.take_calls() == []


@pytest.mark.parametrize(
    ("stack", "mmcv"), [("onedl", "onedl-mmcv"), ("openmmlab", "mmcv")], ids=STACKS
)
def test_order_of_installation(sandbox: Sandbox, stack: str, mmcv: str) -> None:
    assert sandbox.run(stack).returncode == 0
    calls = sandbox.take_calls()
    assert [call.arguments for call in calls] == [
        "pip",
        "torch torchvision setuptools wheel ninja psutil",
        f"--no-build-isolation --no-cache-dir {mmcv}",
        "--force-reinstall --no-deps opencv-python-headless",
        f"--no-build-isolation --editable .[{stack},dev]",
    ]
    assert {call.constraints for call in calls} == {f"requirements/{stack}.txt"}


def test_constraints_of_the_users_pip_are_replaced(sandbox: Sandbox) -> None:
    sandbox.run(PIP_CONSTRAINT="/etc/elsewhere.txt")
    assert {call.constraints for call in sandbox.take_calls()} == {"requirements/onedl.txt"}


def test_repeated_run_does_nothing(sandbox: Sandbox) -> None:
    assert sandbox.run().returncode == 0
    sandbox.take_calls()
    # Not even the checks of the system run again.
    (sandbox.bin / "g++").unlink()
    again = sandbox.run(FAIL_PIP="install", FAKE_VERSION="3.13")
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert sandbox.take_calls() == []


def test_interrupted_run_goes_on_where_it_was(sandbox: Sandbox) -> None:
    broken_off = sandbox.run(FAIL_PIP="onedl-mmcv")
    assert broken_off.returncode == 1
    assert "goes on from here" in broken_off.stderr
    done = [call.arguments for call in sandbox.take_calls()]
    sandbox.set_free_disk(gigabytes=5)  # the largest part is there already
    assert sandbox.run().returncode == 0
    repeated = [call.arguments for call in sandbox.take_calls()]
    assert done[-1] == repeated[0] == "--no-build-isolation --no-cache-dir onedl-mmcv"
    assert len(done) + len(repeated) == 6


def test_changed_versions_are_installed_over_the_old(sandbox: Sandbox) -> None:
    assert sandbox.run().returncode == 0
    sandbox.take_calls()
    for stamp in (sandbox.environment / ".stamps").iterdir():
        stamp.write_text("key of other versions\n")
    sandbox.set_free_disk(gigabytes=5)  # the difference needs less than everything
    assert sandbox.run().returncode == 0
    assert len(sandbox.take_calls()) == 5


def test_mmcv_that_does_not_import_is_built_again(sandbox: Sandbox) -> None:
    assert sandbox.run(FAIL_PROBE="import mmcv.ops").returncode == 1
    built = [call.arguments for call in sandbox.take_calls() if "mmcv" in call.arguments]
    assert built == [
        "--no-build-isolation --no-cache-dir onedl-mmcv",
        "--no-build-isolation --no-cache-dir --force-reinstall --no-deps onedl-mmcv",
    ]


def test_environment_made_by_hand_is_completed(sandbox: Sandbox) -> None:
    hand_made = sandbox.environment / "bin" / "python"
    hand_made.parent.mkdir(parents=True)
    hand_made.write_text(FAKE_PYTHON + "# made by hand\n")
    hand_made.chmod(0o755)
    assert sandbox.run().returncode == 0
    assert len(sandbox.take_calls()) == 5
    assert hand_made.read_text().endswith("# made by hand\n")


def test_environment_without_its_interpreter_is_made_anew(sandbox: Sandbox) -> None:
    assert sandbox.run().returncode == 0
    sandbox.take_calls()
    (sandbox.environment / "bin" / "python").unlink()
    assert sandbox.run().returncode == 0
    assert len(sandbox.take_calls()) == 5


def run_with_gpu(
    sandbox: Sandbox, toolkit: Path, release: str | None
) -> subprocess.CompletedProcess[str]:
    """Makes an environment beside a GPU, with nvcc of the given release for PyTorch's CUDA 13.0."""
    sandbox.add("nvidia-smi", "#!/bin/sh\necho 'GPU 0: NVIDIA'\n")
    if release:
        (toolkit / "bin").mkdir(parents=True)
        nvcc = toolkit / "bin" / "nvcc"
        nvcc.write_text(
            f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.88'\n"
        )
        nvcc.chmod(0o755)
    result = sandbox.run(FAKE_TOOLKIT=str(toolkit))
    assert result.returncode == 0
    return result


@pytest.mark.parametrize("release", [None, "12.8"], ids=["no-nvcc", "other-nvcc"])
def test_gpu_without_its_compiler(sandbox: Sandbox, tmp_path: Path, release: str | None) -> None:
    result = run_with_gpu(sandbox, tmp_path / "cuda", release)
    notes = [line for line in result.stdout.splitlines() if "GPU" in line]
    assert len(notes) == 1
    assert "install the CUDA 13.0 toolkit" in notes[0]
    torch, mmcv = sandbox.take_calls()[1:3]
    assert (torch.visible_gpus, mmcv.visible_gpus) == ("all", "")


def test_gpu_with_its_compiler(sandbox: Sandbox, tmp_path: Path) -> None:
    result = run_with_gpu(sandbox, tmp_path / "cuda", "13.1")
    assert "GPU" not in result.stdout
    assert {call.visible_gpus for call in sandbox.take_calls()} == {"all"}


def direct_requirements(*extras: str) -> list[str]:
    """Returns the requirements that setup.cfg states, plain ones and those of the extras."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    text = config["options"]["install_requires"]
    text += "".join(config["options.extras_require"][extra] for extra in extras)
    return [line for line in text.splitlines() if line.strip()]


def name_of(requirement: str) -> str:
    name = re.match(r"[\w.-]+", requirement)
    assert name, requirement
    return re.sub(r"[-_.]+", "-", name[0]).lower()


def test_plain_requirements_hold_no_mm_package() -> None:
    names = {name_of(requirement) for requirement in direct_requirements()}
    assert names == {"torch", "timm", "numpy", "safetensors", "huggingface-hub", "filelock"}


@pytest.mark.parametrize("stack", STACKS)
def test_constraints_are_exact_and_cover_what_is_asked_for(stack: str) -> None:
    lines = (ROOT / "requirements" / f"{stack}.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    exact = re.compile(r'[a-z0-9-]+==[0-9][\w.]*(; python_version (<|>=) "3\.11")?')
    assert [line for line in pins if not exact.fullmatch(line)] == []
    installed_first = {"pip", "torch", "torchvision", "setuptools", "wheel", "ninja", "psutil"}
    asked_for = {name_of(requirement) for requirement in direct_requirements(stack, "dev")}
    assert (installed_first | asked_for) - {name_of(line) for line in pins} == set()


def test_constraints_agree_with_the_extra() -> None:
    pins = (ROOT / "requirements" / "onedl.txt").read_text().splitlines()
    exact = [line for line in direct_requirements("onedl") if "==" in line]
    assert len(exact) == 4
    assert set(exact) <= set(pins)


def test_licence_is_apache() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_script_is_executable() -> None:
    assert os.access(SCRIPT, os.X_OK)
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
