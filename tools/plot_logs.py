"""Draw loss, learning rate and metrics of one or several training runs.

    python tools/plot_logs.py work_dirs/cascade_mambavision_t --out plots
    python tools/plot_logs.py work_dirs/pad work_dirs/fit --out plots --smooth 0.9
    python tools/plot_logs.py work_dirs/pad --out plots --keys loss "*bbox_mAP*" --title "1x"

A run is a work folder (of its runs the newest, with those that it was resumed from), the folder of
one run, or a scalars.json. Written: OUT/loss.png (the total and its parts), OUT/lr.png and
OUT/metrics.png (mAP, mIoU and the others of validation); what the logs do not have is left out.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from common import ToolError, user_errors
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

Record = dict[str, Any]

COLUMNS = 4  # at most, of small plots in a figure
NOT_METRICS = ("step", "epoch", "iter", "time", "data_time", "memory")


@dataclass(frozen=True)
class Scalars:
    """What a run logged, by ascending step.

    Attributes:
        train: records of training; their ``step`` counts iterations.
        val: records of validation; their ``step`` counts epochs or iterations, as the run does.
    """

    train: list[Record]
    val: list[Record]

    @property
    def val_unit(self) -> str:
        """What the steps of validation count."""
        return "epoch" if any("epoch" in record for record in self.train) else "iteration"


def read_scalars(path: str | Path) -> Scalars:
    """Read the scalars that mmengine logged.

    Args:
        path: a work folder, the folder of one run, its ``vis_data`` or a ``scalars.json``. Of
            several runs in a work folder the newest counts, continued backwards to where it was
            resumed from.

    Raises:
        ToolError: there is nothing at the path, or something else than scalars.
    """
    path = Path(path)
    if path.is_file():
        return _read_file(path)
    if not path.is_dir():
        raise ToolError(f"log {str(path)!r} does not exist (relative to {Path.cwd()})")
    patterns = ("*/vis_data/scalars.json", "vis_data/scalars.json", "scalars.json")
    files = next((found for p in patterns if (found := sorted(path.glob(p)))), [])
    runs = [scalars for file in files if (scalars := _read_file(file)).train or scalars.val]
    if not runs:
        raise ToolError(
            f"no scalars in {str(path)!r}: looked for {', '.join(patterns)}. Give a work folder in "
            "which training has logged something"
        )
    stitched = runs[0]
    for run in runs[1:]:
        stitched = _continue(stitched, run)
    return stitched


def _read_file(path: Path) -> Scalars:
    lines = path.read_text().splitlines()
    train: list[Record] = []
    val: list[Record] = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            int(record["step"])  # there, and a number
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines) > 1:
                break  # a run that was killed while it wrote
            raise ToolError(
                f"{path}, line {number}: not a record of scalars as mmengine writes them "
                "(vis_data/scalars.json of a run)"
            ) from error
        is_train = "lr" in record or any(_is_loss(key) for key in record)
        if is_train:
            train.append(record)
        else:  # COCO's -1 says that there is nothing to measure
            val.append({key: value for key, value in record.items() if value != -1})
    return Scalars(train, val)


def _continue(old: Scalars, new: Scalars) -> Scalars:
    """Both together if the new run was resumed from the old one, else the new one alone.

    A run that starts anew logs the same first step as the one before it, a resumed one a later one.
    """
    if not new.train:  # stopped before it logged a loss
        return Scalars(old.train, _append(old.val, new.val)) if old.train else new
    if not old.train or new.train[0]["step"] <= old.train[0]["step"]:
        return new
    return Scalars(_append(old.train, new.train), _append(old.val, new.val))


def _append(old: list[Record], new: list[Record]) -> list[Record]:
    first = new[0]["step"] if new else math.inf
    return [record for record in old if record["step"] < first] + new


def _is_loss(key: str) -> bool:
    return key.rsplit("/", 1)[-1].split(".")[-1].startswith("loss")


def plot(
    runs: Mapping[str, Scalars],
    out: str | Path,
    keys: Sequence[str] = (),
    title: str = "",
    smooth: float = 0.0,
) -> list[Path]:
    """Draw the figures.

    Args:
        runs: by the name that the legend gives them.
        out: folder, made if missing.
        keys: names or shell patterns of the scalars to draw; all if empty.
        title: above each figure.
        smooth: of losses, weight of the past in a running mean, in [0, 1).

    Returns:
        The files written.

    Raises:
        ToolError: none of the runs has any of the keys.
    """

    def chosen(key: str) -> bool:
        return not keys or any(fnmatch(key, pattern) for pattern in keys)

    train = [scalars.train for scalars in runs.values()]
    val = [scalars.val for scalars in runs.values()]
    losses = _keys(train, lambda key: _is_loss(key) and chosen(key))
    losses.sort(key=lambda key: key != "loss")  # the total first
    metrics = _keys(val, lambda key: key not in NOT_METRICS and chosen(key))
    rates = _keys(train, lambda key: key == "lr" and chosen(key))
    if not (losses or metrics or rates):
        what = f"that match {', '.join(keys)}" if keys else "of training or validation"
        there = _keys([*train, *val], lambda key: key not in NOT_METRICS)
        raise ToolError(f"nothing to plot: no scalars {what} (there are: {', '.join(there)})")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    units = " / ".join(sorted({scalars.val_unit for scalars in runs.values()}))
    figures = (
        ("loss.png", losses, dict(zip(runs, train, strict=True)), "iteration", smooth),
        ("lr.png", rates, dict(zip(runs, train, strict=True)), "iteration", 0.0),
        ("metrics.png", metrics, dict(zip(runs, val, strict=True)), units, 0.0),
    )
    return [
        _draw(out / name, names, records, title, unit, weight)
        for name, names, records, unit, weight in figures
        if names
    ]


def _keys(records: Iterable[Sequence[Record]], wanted: Callable[[str], bool]) -> list[str]:
    """Names of the numbers in the records, as logged, each once."""
    names = {
        key: None
        for run in records
        for record in run
        for key, value in record.items()
        if isinstance(value, int | float) and wanted(key)
    }
    return list(names)


def _draw(
    path: Path,
    keys: Sequence[str],
    records: Mapping[str, Sequence[Record]],
    title: str,
    unit: str,
    smooth: float,
) -> Path:
    """One small plot a key, one line a run."""
    columns = min(COLUMNS, math.ceil(math.sqrt(len(keys))))
    rows = math.ceil(len(keys) / columns)
    size = (max(7.0, 4 * columns), max(4.5, 2.8 * rows) + 0.5)
    figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axes in grid.flat[len(keys) :]:
        axes.axis("off")
    for axes, key in zip(grid.flat, keys, strict=False):
        for i, run in enumerate(records.values()):
            _draw_line(axes, run, key, f"C{i}", smooth)
        axes.set_title(key, fontsize=10)
        axes.set_xlabel(unit, fontsize=8)
        axes.tick_params(labelsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.ticklabel_format(axis="y", scilimits=(-3, 4))
        axes.grid(alpha=0.3)
    if title:
        figure.suptitle(title)
    lines = [plt.Line2D([], [], color=f"C{i}") for i in range(len(records))]
    figure.legend(lines, list(records), loc="outside lower center", ncols=min(len(records), 4))
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _draw_line(axes: Axes, run: Sequence[Record], key: str, color: str, smooth: float) -> None:
    points = [(record["step"], record[key]) for record in run if key in record]
    if not points:
        return
    steps, values = zip(*points, strict=True)
    marker = "o" if len(points) <= 30 else None
    if smooth:
        axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
        values, marker = running_mean(values, smooth), None
    axes.plot(steps, values, color=color, linewidth=1.4, marker=marker, markersize=3)


def running_mean(values: Sequence[float], weight: float) -> tuple[float, ...]:
    """Exponential running mean without a start-up bias; values that are not finite are passed over.

    Args:
        values: in order.
        weight: of the past, in [0, 1).
    """
    means, total, norm = [], 0.0, 0.0
    for value in values:
        if math.isfinite(value):
            total = weight * total + (1 - weight) * value
            norm = weight * norm + (1 - weight)
        means.append(total / norm if norm else math.nan)
    return tuple(means)


def name_runs(paths: Sequence[str]) -> dict[str, Path]:
    """Paths by the name of their work folder or, where two have the same, by the path as given."""
    named: dict[str, Path] = {}
    folders = [_work_folder(Path(text)) for text in paths]
    for text, folder in zip(paths, folders, strict=True):
        named[text if folders.count(folder) > 1 else folder] = Path(text)
    return named


def _work_folder(path: Path) -> str:
    path = path.resolve()
    if path.is_file() and path.name != "scalars.json":
        return path.stem
    path = path.parent if path.is_file() else path
    if path.name == "vis_data":  # of a run in a work folder
        path = path.parent.parent
    return path.name


def weight(text: str) -> float:
    """An argparse type: a number in [0, 1)."""
    number = float(text)
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1)")
    return number


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="run", help="work folder, run or scalars.json")
    parser.add_argument("--out", required=True, help="folder to write to")
    parser.add_argument(
        "--keys",
        nargs="+",
        default=(),
        metavar="KEY",
        help='scalars to draw, names or patterns such as "loss*" (default: all)',
    )
    parser.add_argument("--title", default="", help="written above each figure")
    parser.add_argument(
        "--smooth",
        type=weight,
        default=0.0,
        metavar="W",
        help="draw losses as a running mean with this weight of the past, e.g. 0.9, over the faint "
        "values (default: 0, the values alone)",
    )
    return parser.parse_args()


def main() -> None:
    """Draw."""
    args = parse_args()
    with user_errors():
        runs = {name: read_scalars(path) for name, path in name_runs(args.runs).items()}
        for path in plot(runs, args.out, args.keys, args.title, args.smooth):
            print(path)


if __name__ == "__main__":
    main()
