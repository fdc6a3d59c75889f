"""Draw shapes, train a detector and a segmenter on them from scratch, and write one report.

    python tools/demo.py                    # about 10 minutes on 2 CPU cores
    python tools/demo.py --smoke            # the same steps at toy scale: do they run here?

Everything is written below --work-dir (default work_dirs/demo): report.html with numbers, curves
and pictures; report.json; data/, detection/, segmentation/, curves/, pictures/ and logs/.
A GPU is used where there is one. An interrupted run goes on where it was when started again, and a
finished one prints its results again.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import cv2
import mmcv
import torch
from common import ToolError, user_errors

ROOT = Path(__file__).resolve().parents[1]
STATE = "demo.json"
REPORT = "report.html"
RESULTS = "report.json"
PICTURES = 8
SCORE = 0.3
ENLARGE = 3  # odd: shrinking the pictures again gives back the very pixels that were learnt from
DISK_MB = 600
POLL_SECONDS = 0.5
TALK_SECONDS = 15
LOG_TAIL = 25


@dataclass(frozen=True)
class Task:
    """One of the two trainings.

    Attributes:
        name: what it and its folder are called.
        config: its config file.
        layout: the folder of the drawn data that it reads.
    """

    name: str
    config: Path
    layout: str


TASKS = (
    Task("detection", ROOT / "mmdet_configs/cascade_mambavision_demo.py", "coco"),
    Task("segmentation", ROOT / "mmseg_configs/upernet_mambavision_demo.py", "ade"),
)


@dataclass(frozen=True)
class Scale:
    """How much is drawn and trained.

    Attributes:
        name: what the work folder remembers.
        train: training images.
        val: held-out images.
        options: settings of each task's config to override.
    """

    name: str
    train: int
    val: int
    options: dict[str, tuple[str, ...]]


FULL = Scale("full", 1200, 200, {task.name: () for task in TASKS})
SMOKE = Scale(
    "smoke",
    24,
    PICTURES,
    {
        "detection": (
            "train_cfg.max_epochs=2",
            "train_cfg.val_interval=1",
            "param_scheduler.1.end=2",
            "default_hooks.logger.interval=2",
        ),
        "segmentation": (
            "train_cfg.max_iters=6",
            "train_cfg.val_interval=3",
            "param_scheduler.0.end=2",
            "param_scheduler.1.begin=2",
            "param_scheduler.1.end=6",
            "default_hooks.logger.interval=2",
            "default_hooks.checkpoint.interval=3",
        ),
    },
)


@dataclass(frozen=True)
class Step:
    """One program of the demo.

    Attributes:
        name: what it is called in messages, in the state file and as its log.
        command: gives the command line; called when its turn has come.
        result: what exists once it is done.
    """

    name: str
    command: Callable[[], Sequence[str | Path]]
    result: Path


@dataclass
class State:
    """What the work folder remembers between runs.

    Attributes:
        scale: name of the scale that it was started with.
        device: what it ran on last, in words.
        done: finished steps.
        seconds: time spent on each step, over all runs.
        total: time spent in all, over all runs.
    """

    scale: str
    device: str = ""
    done: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    total: float = 0.0


@dataclass(frozen=True)
class Run:
    """What every step needs to know of the run.

    Attributes:
        work: the work folder.
        state: what it remembers.
        environment: variables for the programs.
        lock: descriptor of the lock file. The programs hold it too: should the demo be killed
            without them, they are not started a second time beside themselves.
    """

    work: Path
    state: State
    environment: dict[str, str]
    lock: int


@dataclass
class Job:
    """A step that is running."""

    step: Step
    process: subprocess.Popen[bytes]
    log: Path


class StepFailedError(ToolError):
    """A program of the demo ended with an error."""


def read_state(work: Path, scale: Scale) -> State:
    """What the folder remembers, or the state of a new run.

    Raises:
        ToolError: the folder holds a run at another scale, or an unreadable state.
    """
    path = work / STATE
    if not path.exists():
        return State(scale.name)
    try:
        state = State(**read_json(path))
    except (ValueError, TypeError) as error:
        raise ToolError(f"{path} is not readable ({error}): delete {work}") from error
    if state.scale != scale.name:
        raise ToolError(
            f"{work} holds a demo at {state.scale} scale: delete it or choose another --work-dir"
        )
    return state


def write_state(work: Path, state: State) -> None:
    """Save the state in one step."""
    draft = work / f"{STATE}.part"
    draft.write_text(json.dumps(asdict(state), indent=2) + "\n", encoding="utf-8")
    draft.replace(work / STATE)


def read_json(path: Path) -> Any:
    """Contents of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def last_checkpoint(folder: Path) -> Path:
    """The checkpoint that a training wrote last."""
    return folder / Path((folder / "last_checkpoint").read_text(encoding="utf-8").strip()).name


def tool(name: str, *arguments: str | Path) -> list[str | Path]:
    """Command line of one of the tools beside this one."""
    return [sys.executable, ROOT / "tools" / name, *arguments]


def data_step(work: Path, scale: Scale) -> Step:
    """Drawing the data."""
    sizes = ["--train", str(scale.train), "--val", str(scale.val)]
    out = work / "data"
    return Step(
        "draw",
        lambda: tool("make_shapes.py", out, *sizes, "--size", "128", "--max-shapes", "6"),
        out / "shapes.json",
    )


def task_steps(work: Path, scale: Scale, task: Task) -> list[Step]:
    """Training, evaluation, pictures and curves of one task."""
    folder, data = work / task.name, work / "data" / task.layout
    options = scale.options[task.name]
    common: list[str | Path] = ["--data-root", f"{data}/"]

    def train() -> Sequence[str | Path]:
        overrides = ["--cfg-options", *options] if options else []
        return tool("train.py", task.config, *common, "--work-dir", folder, "--resume", *overrides)

    def evaluate() -> Sequence[str | Path]:
        # what the report needs for its tables of classes
        if task.layout == "coco":
            keep: list[str | Path] = [
                "--cfg-options",
                f"test_evaluator.outfile_prefix={folder}/test/predictions",
            ]
        else:
            keep = ["--out", f"{folder}/test/labels"]
        checkpoint = last_checkpoint(folder)
        out = folder / "test"
        return tool("test.py", task.config, checkpoint, *common, "--work-dir", out, *keep)

    def infer() -> Sequence[str | Path]:
        inputs, out = work / "pictures" / "held-out", work / "pictures" / task.name
        checkpoint = last_checkpoint(folder)
        keep: list[str | Path] = ["--out", out, "--score-thr", str(SCORE)]
        return tool("infer.py", task.config, checkpoint, inputs, *keep)

    return [
        Step(f"train-{task.name}", train, folder / "last_checkpoint"),
        Step(f"test-{task.name}", evaluate, folder / "test"),
        Step(f"infer-{task.name}", infer, work / "pictures" / task.name / "predictions.json"),
        Step(
            f"curves-{task.name}",
            lambda: tool("plot_logs.py", folder, "--out", work / "curves" / task.name),
            work / "curves" / task.name / "loss.png",
        ),
    ]


def report_step(work: Path) -> Step:
    """The report."""
    return Step("report", lambda: tool("demo_report.py", work), work / REPORT)


def enlarge_pictures(work: Path) -> None:
    """Copy some held-out images, enlarged, so that boxes and names drawn on them can be read."""
    out = work / "pictures" / "held-out"
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted((work / "data" / "coco" / "val2017").glob("*.jpg"))[:PICTURES]:
        image = mmcv.imread(path)
        image = cv2.resize(image, None, fx=ENLARGE, fy=ENLARGE, interpolation=cv2.INTER_CUBIC)
        (out / f"{path.stem}.png").write_bytes(cv2.imencode(".png", image)[1].tobytes())


def pending(chain: Sequence[Step], state: State) -> deque[Step]:
    """Steps still to do: the first that is not done and all that build on it."""
    return deque(itertools.dropwhile(lambda s: s.name in state.done and s.result.exists(), chain))


def run_chains(chains: Sequence[Sequence[Step]], run: Run) -> None:
    """Run chains of steps beside each other, the steps of each one after the other.

    Raises:
        StepFailedError: a step failed; the others are stopped.
    """
    state = run.state
    queues = [deque(chain) for chain in chains]
    jobs: dict[int, Job] = {}
    last_time = last_talk = time.monotonic()
    try:
        while jobs or any(queues):
            for i, queue in enumerate(queues):
                if i in jobs and jobs[i].process.poll() is not None:
                    finish(jobs.pop(i), run)
                if i not in jobs and queue:
                    jobs[i] = start(queue.popleft(), run)
            time.sleep(POLL_SECONDS)
            now = time.monotonic()
            state.total += now - last_time
            for job in jobs.values():
                name = job.step.name
                state.seconds[name] = state.seconds.get(name, 0.0) + now - last_time
            last_time = now
            if jobs and now - last_talk >= TALK_SECONDS:
                last_talk = now
                write_state(run.work, state)
                print(status_line(state, jobs.values()), flush=True)
    finally:
        for job in jobs.values():
            stop(job)
        write_state(run.work, state)


def start(step: Step, run: Run) -> Job:
    """Start a step with its output going to its log."""
    log = run.work / "logs" / f"{step.name}.log"
    print(f"{step.name}: started, log {log}", flush=True)
    with log.open("wb") as file:
        process = subprocess.Popen(
            [str(word) for word in step.command()],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **run.environment},
            pass_fds=(run.lock,),
            start_new_session=True,
        )
    return Job(step, process, log)


def stop(job: Job) -> None:
    """End a program together with its data loaders, which would outlive it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(job.process.pid, signal.SIGKILL)
    job.process.wait()


def finish(job: Job, run: Run) -> None:
    """Note that a step is done.

    Raises:
        StepFailedError: it failed.
    """
    stop(job)  # a program that failed can leave data loaders behind
    name = job.step.name
    if job.process.returncode != 0:
        tail = log_tail(job.log, 20000).splitlines()[-LOG_TAIL:]
        print("\n".join(tail), file=sys.stderr)
        if free_megabytes(run.work) < DISK_MB / 10:
            raise StepFailedError(full_disk(run.work))
        raise StepFailedError(
            f"{name} failed (exit code {job.process.returncode}); the end of {job.log} is above. "
            "Started again, the demo goes on from there"
        )
    state = run.state
    state.done = [*(n for n in state.done if n != name), name]
    write_state(run.work, state)
    print(f"{name}: done in {clock(state.seconds.get(name, 0.0))}", flush=True)


def log_tail(log: Path, size: int) -> str:
    """The end of a log, at most ``size`` bytes."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - size))
        return file.read().decode("utf-8", errors="replace")


def last_progress(text: str) -> str:
    """Where a training or an evaluation is, from the newest progress line of its log."""
    lines = re.findall(r"(?:Epoch|Iter)\((\w+)\) +(\[.*?\])  (.*)", text)
    if not lines:
        return "starting"
    mode, place, rest = lines[-1]
    words = [mode, re.sub(r"\s", "", place)]
    for key in ("loss", "eta"):
        if found := re.search(rf"\b{key}: (\S+)", rest):
            words.append(f"{key} {found[1]}")
    return " ".join(words)


def status_line(state: State, jobs: Iterable[Job]) -> str:
    """One line about everything that is running."""
    parts = [f"{job.step.name}: {last_progress(log_tail(job.log, 20000))}" for job in jobs]
    return f"[{clock(state.total)}] {' | '.join(parts)}"


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    return str(timedelta(seconds=round(seconds)))


def free_megabytes(folder: Path) -> float:
    """Space left where the folder is."""
    return shutil.disk_usage(folder).free / 1e6


def full_disk(folder: Path) -> str:
    """The message about a full disk."""
    return (
        f"the disk of {folder} is full ({free_megabytes(folder):.0f} MB left, the demo takes "
        f"{DISK_MB} MB): make room or choose another --work-dir, and start again"
    )


def environment_of(device: str) -> dict[str, str]:
    """Environment of the programs: the cores shared out, and the GPU hidden if it is no use."""
    cores = len(os.sched_getaffinity(0))
    # Two trainings at a time; such small ones gain little from more threads than these.
    threads = str(max(1, min(4, cores // len(TASKS))))
    environment = {"OMP_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1", "COLUMNS": "100"}
    if device.startswith("CPU"):
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return environment


def find_device() -> str:
    """The GPU if there is one that mmcv's operators can use, else the CPU, in words."""
    if not torch.cuda.is_available():
        return "CPU (no GPU found)"
    from mmcv.ops import get_compiling_cuda_version

    if get_compiling_cuda_version() == "not available":
        return "CPU (mmcv was installed without CUDA operators)"
    return torch.cuda.get_device_name()


@contextlib.contextmanager
def sole_user(work: Path) -> Iterator[int]:
    """Keep a second demo out of the folder; gives the descriptor of the lock file.

    Raises:
        ToolError: another one is running there.
    """
    with (work / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ToolError(f"another demo is running in {work}, or programs of one") from None
        yield lock.fileno()


def run_demo(work: Path, scale: Scale, lock: int) -> None:
    """Do what is still to be done.

    Raises:
        ToolError: the folder cannot be used, or a step failed.
    """
    state = read_state(work, scale)
    chains = [task_steps(work, scale, task) for task in TASKS]
    draw = data_step(work, scale)
    everything = [draw, *itertools.chain(*chains), report_step(work)]
    if not pending(everything, state):
        print(f"{work}: finished before, nothing to do")
        return
    if free_megabytes(work) < DISK_MB and not state.done:
        raise ToolError(full_disk(work))
    state.device = find_device()
    run = Run(work, state, environment_of(state.device), lock)
    print(f"running on: {state.device}; results go to {work}", flush=True)
    (work / "logs").mkdir(exist_ok=True)
    run_chains([pending([draw], state)], run)
    enlarge_pictures(work)
    run_chains([pending(chain, state) for chain in chains], run)
    run_chains([[report_step(work)]], run)


def print_results(work: Path) -> None:
    """Print the main numbers and where the report is."""
    for title, value in read_json(work / RESULTS)["summary"]:
        print(f"  {title:<28} {value}")
    print(f"report: {work / REPORT}")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work-dir", type=Path, default=Path("work_dirs/demo"), help="default: %(default)s"
    )
    parser.add_argument(
        "--smoke", action="store_true", help="toy scale, under 2 minutes: numbers mean nothing"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the demo."""
    args = parse_args(argv)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, signal.default_int_handler)
    work = args.work_dir.resolve()
    with user_errors():
        try:
            work.mkdir(parents=True, exist_ok=True)
            with sole_user(work) as lock:
                run_demo(work, SMOKE if args.smoke else FULL, lock)
                print_results(work)
        except KeyboardInterrupt:
            raise ToolError("interrupted; the same command goes on from here") from None
        except OSError as error:
            if free_megabytes(work.parent) < DISK_MB / 10:
                raise ToolError(full_disk(work.parent)) from error
            raise


if __name__ == "__main__":
    main()
