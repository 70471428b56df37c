"""A run in a terminal, as it happens: what its log and its checkpoints' names say, looked at again and again.

Nothing but files is read, so that a run can be watched from any machine that sees its folder.
"""

import contextlib
import itertools
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from gbnzoo.run import Run, RunError

_LEVELS = "▁▂▃▄▅▆▇█"
_BRAILLE = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # bits of the dots, from the top, left and right


@dataclass(frozen=True)
class Progress:
    """A run as its folder shows it at one moment.

    Args:
        name: of the run.
        update: the last that is known to be done, from the log or a newer checkpoint.
        total_updates: None before the run has said how many it will make.
        seconds_left: at the pace of the second half of the log; None where that cannot be told.
        age_seconds: since anything was written; None before that.
        rows: of the log, as `gbnzoo.run.Run.rows` has them.
    """

    name: str
    update: int
    total_updates: int | None
    seconds_left: float | None
    age_seconds: float | None
    rows: list[dict[str, str]]

    @property
    def is_finished(self) -> bool:
        return self.update == self.total_updates

    def column(self, name: str) -> list[tuple[int, float]]:
        """(update, value) of each row that has a value."""
        return [(int(row["update"]), float(row[name])) for row in self.rows if row[name]]


def read_progress(folder: str | Path) -> Progress:
    """How far a run is; of a hub folder, where it ended.

    Raises:
        RunError: if the folder is no run; one that holds runs is answered with their names.
    """
    folder = Path(folder)
    if not (folder / "recipe.yaml").is_file() and (runs := sorted(folder.glob("*/recipe.yaml"))):
        raise RunError(f"{folder} is not a run but holds some; wanted one of {', '.join(str(r.parent) for r in runs)}")
    run = Run(folder)
    rows, starts = run.rows(), run.environments()
    logged = int(rows[-1]["update"]) if rows else 0
    update, total = max(logged, run.saved_update), None
    if starts:
        total = starts[-1]["total_updates"]
    elif (folder / "config.json").is_file():  # published, which only a finished run is
        total = update
    return Progress(
        folder.resolve().name,
        update,
        total,
        (total - update) * pace if total and (pace := _seconds_per_update(rows)) else None,
        time.time() - run.written_at if run.written_at else None,
        rows,
    )


def watch(folder: str | Path, *, seconds: float = 1.0, console: Console | None = None) -> None:
    """Show a run until it is finished or Ctrl-C is pressed; where the output is no terminal, say once how far it is.

    Args:
        folder: a run's.
        seconds: between two looks at it.
        console: where to show it; None is standard output.

    Raises:
        RunError: as of `read_progress`.
    """
    # Told by the output itself: rich takes FORCE_COLOR for a terminal.
    console = console or Console(force_terminal=sys.stdout.isatty(), highlight=False)
    progress = read_progress(folder)
    if not console.is_terminal:
        for name, value in _values(progress, 40):
            console.print(f"{name:18} {value}", soft_wrap=True, markup=False)
        return
    with Live(console=console, auto_refresh=False) as live, contextlib.suppress(KeyboardInterrupt):
        while True:
            live.update(_view(progress, console), refresh=True)
            if progress.is_finished:
                return
            time.sleep(seconds)
            progress = read_progress(folder)


def sparkline(values: Sequence[float], width: int) -> str:
    """Values as a row of bars, the smallest lowest; where they are more than `width`, so many of them, the last included."""
    if len(values) > width:
        values = [values[(i + 1) * len(values) // width - 1] for i in range(width)]
    if not values:
        return ""
    low, span = min(values), max(values) - min(values)
    return "".join(_LEVELS[round((v - low) / span * (len(_LEVELS) - 1)) if span else 0] for v in values)


def chart(points: Sequence[tuple[float, float]], width: int, height: int) -> list[str]:
    """A line through points of ascending x as lines of braille, 2 × 4 dots a character; y from 0 to its maximum.

    Args:
        points: (x, y), y not negative.
        width, height: in characters.
    """
    columns, rows = 2 * width, 4 * height
    (first, _), (last, _) = points[0], points[-1]
    top = max(y for _, y in points)
    cells = [[0] * width for _ in range(height)]
    for column in range(columns):
        y = _interpolated(points, first + (last - first) * column / (columns - 1))
        row = rows - 1 - round(y / top * (rows - 1)) if top else rows - 1
        cells[row // 4][column // 2] |= _BRAILLE[row % 4][column % 2]
    return ["".join(chr(0x2800 + cell) for cell in line) for line in cells]


def _interpolated(points: Sequence[tuple[float, float]], x: float) -> float:
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return points[-1][1]


def _seconds_per_update(rows: Sequence[dict[str, str]]) -> float | None:
    """Evaluations included, over the rows from half of the updates on."""
    done = [(int(row["update"]), float(row["train_seconds"])) for row in rows if row["train_seconds"]]
    if not done:
        return None
    last, seconds = done[-1]
    before, seconds_before = next(((u, s) for u, s in done if last / 2 <= u < last), (0, 0.0))
    return (seconds - seconds_before) / (last - before)


def _values(progress: Progress, width: int) -> list[tuple[str, str]]:
    """What there is to say, by name; histories are at most `width` characters."""
    values = [("run", progress.name), ("updates", _how_far(progress))]
    if not progress.rows:
        return values
    last = progress.rows[-1]
    for name, column, form in (
        ("images/s", "images_per_second", "{:,.0f}"),
        ("learning rate", "lr", "{:.4g}"),
        ("loss", "train_loss", "{:.4g}"),
        ("gradient norm", "grad_norm", "{:.4g}"),
        ("peak memory", "peak_memory_mib", "{:,.0f} MiB"),
        ("top-1", "top1_percent", "{:.2f} %"),
        ("weight distance", "weight_distance", "{:.4g}"),
    ):
        history = progress.column(column)
        if not history:
            continue
        value = form.format(history[-1][1])
        if column == "train_loss":  # by its logarithm: a loss falls by orders of magnitude
            value = f"{value:10} {sparkline([math.log(max(v, 1e-12)) for _, v in history], width)}"
        if column == "top1_percent":
            value = f"{value:10} {sparkline([v for _, v in history], width)}"
            split = next(row["split"] for row in reversed(progress.rows) if row["split"])
            name = f"top-1, {split}"
        values.append((name, value))
    return [*values, ("as of", f"update {int(last['update']):,}")]


def _how_far(progress: Progress) -> str:
    if progress.total_updates is None:
        return "none yet"
    share = progress.update / progress.total_updates
    said = [f"{progress.update:,}/{progress.total_updates:,} ({math.floor(100 * share)} %)"]
    if progress.is_finished:
        done = progress.column("train_seconds")
        said.append(f"finished after {_duration(done[-1][1])}" if done else "finished")
    else:
        if progress.seconds_left is not None:
            said.append(f"{_duration(progress.seconds_left)} left")
        if progress.age_seconds is not None:
            said.append(f"written {_duration(progress.age_seconds)} ago")
    return ", ".join(said)


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=max(0, round(seconds))))


def _view(progress: Progress, console: Console) -> RenderableType:
    """All of it as high as the terminal allows: values, a bar, and weight distance against the logarithm of updates."""
    width = min(console.width - 20, 100)
    values = Table.grid(padding=(0, 2))
    for name, value in _values(progress, max(8, width - 14)):
        values.add_row(Text(name, style="dim"), Text(value, style="bold" if name == "run" else ""))
    parts: list[RenderableType] = [values]
    if progress.total_updates:
        bar = Table.grid()  # which ends its line; a bar by itself does not
        bar.add_row(ProgressBar(total=progress.total_updates, completed=progress.update, width=width + 10))
        parts.append(bar)
    distances = progress.column("weight_distance")
    height = min(10, console.height - len(parts) - values.row_count - 4)
    if len(distances) > 1 and height > 1:
        points = [(math.log(update), distance) for update, distance in distances]
        highest = f"{max(distance for _, distance in distances):.3g}"
        lines = chart(points, width, height)
        labels = [highest, *[""] * (height - 2), "0"]
        ends = f"{distances[0][0]:,}", f"{distances[-1][0]:,}"
        parts.append(Text("\nweight distance ‖w_t − w_0‖ against log t", style="dim"))
        parts.extend(Text(f"{label:>8} │{line}") for label, line in zip(labels, lines, strict=True))
        parts.append(Text(f"{'':8} └{ends[0]}{ends[1].rjust(width - len(ends[0]), '─')}", style="dim"))
    return Group(*parts)
