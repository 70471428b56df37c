"""Simulated walks against theory: the exponent of log t that was measured, and 2/α, as table, CSV and plot."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gbnzoo.charts import csv_text, fitted_points
from gbnzoo.diffusion import MIN_POINTS, LogPower, fit_laws, fit_log_power
from gbnzoo.distance_plot import WalkCurve, distance_plot
from gbnzoo.random_walk import Walks
from gbnzoo.records import read_record

CSV_COLUMNS = (
    "alpha",
    "dimensions",
    "temperature",
    "seed",
    "landscapes",
    "stepping",
    "log_update",  # natural logarithm of t
    "mean_distance",  # over landscapes, in lattice units
    "standard_error",
    "fit",  # to all points
    "late_fit",  # to the later half
)


@dataclass(frozen=True)
class WalkLaw:
    """A walk with the powers of log t fitted to it.

    Theory is of late times: where `late` is known, it is what theory is held against.

    Args:
        walks: what was simulated.
        fit: to all points.
        late: to the later half of them (the middle one too), or None where those are too few; where it differs from `fit`, the
            walk had not come to its law at first.
    """

    walks: Walks
    fit: LogPower
    late: LogPower | None

    @property
    def best(self) -> LogPower:
        """`late`, or `fit` where there is none."""
        return self.late or self.fit

    @property
    def theory(self) -> float:
        """2/α, Marinari et al. 1983."""
        return 2 / self.walks.alpha


def measure(walks: Walks) -> WalkLaw:
    """Fit the powers of log t; raises ValueError as `fit_log_power`."""
    t, distances = walks.updates, walks.distances
    half = slice(t.size // 2, None)
    late = fit_log_power(t[half], distances[:, half]) if t[half].size >= MIN_POINTS else None
    return WalkLaw(walks, fit_log_power(t, distances), late)


def table(laws: Sequence[WalkLaw]) -> str:
    """Exponents as a Markdown table; each ± is one standard error over landscapes."""
    head = ("α", "N", "T", "landscapes", "log t", "mean distance", "2/α", "measured", "later half")
    rows = []
    for law in laws:
        walks, mean = law.walks, law.walks.distances.mean(axis=0)
        first, last = np.log(walks.updates[[0, -1]])
        exponents = (f"{fit.exponent:.3f} ± {fit.standard_error:.3f}" if fit else "" for fit in (law.fit, law.late))
        described = (f"{walks.alpha:g}", walks.dimensions, f"{walks.temperature:g}", f"{len(walks.distances):,}")
        rows.append(
            (
                *described,
                f"{first:.3g} to {last:.3g}",
                f"{mean[0]:.3g} to {mean[-1]:.3g}",
                f"{law.theory:.3f}",
                *exponents,
            )
        )
    lines = (head, ("---",) * len(head), *rows)
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def run_curve(folder: str | Path) -> WalkCurve:
    """The weights' distance of a run, with the law a + b · log t over the updates that `gbnzoo report` fits it to.

    Raises:
        RunError: if the folder holds no run.
        ValueError: if its distances are too few or do not change.
    """
    record = read_record(folder)
    points = [point for point in record.points("update", "weight_distance") if point[0] > 1]
    fitted = fitted_points(record) if points else []
    try:
        law = fit_laws([t for t, _ in fitted], [d for _, d in fitted])["log"]
    except ValueError as error:
        raise ValueError(f"{record.folder}: {error}") from error
    label = f"{record.folder.name}: {law.intercept:.3g} + {law.slope:.3g} log t, R² {law.r2:.3f}"
    span = fitted[0][0], fitted[-1][0]
    return WalkCurve(label, [t for t, _ in points], [d for _, d in points], fit=law, fitted=span)


def save(laws: Sequence[WalkLaw], folder: str | Path, real: Sequence[WalkCurve] = ()) -> list[Path]:
    """Write `walk.csv`, one row by walk and t, and `walk.png`, and for real networks `weights.png`; returns their paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    curves, rows = [], []
    for law in laws:
        walks, t = law.walks, law.walks.updates
        mean = walks.distances.mean(axis=0)
        errors = walks.distances.std(axis=0, ddof=1) / np.sqrt(len(walks.distances))
        of_all = (walks.alpha, walks.dimensions, walks.temperature, walks.seed, len(walks.distances), walks.stepping)
        columns = (np.log(t), mean, errors, law.fit(t), law.best(t))
        rows += [(*of_all, *(f"{x:.8g}" for x in row)) for row in zip(*columns, strict=True)]
        span = (t[t.size // 2] if law.late else t[0]), t[-1]
        label = (
            f"α = {walks.alpha:g}, N = {walks.dimensions}: {law.best.exponent:.2f} ± {law.best.standard_error:.2f}, "
            f"theory {law.theory:.2f}"
        )
        curves.append(WalkCurve(label, t, mean, errors, fit=law.best, fitted=span, theory=law.theory))
    (folder / "walk.csv").write_text(csv_text(CSV_COLUMNS, rows), encoding="utf-8")
    distance_plot(
        curves,
        folder / "walk.png",
        title="walks on a random potential: the exponent of log t",
        unit="mean distance (lattice units)",
    )
    paths = [folder / "walk.csv", folder / "walk.png"]
    if real:
        paths.append(folder / "weights.png")
        distance_plot(real, paths[-1], title="the weights of training runs")
    return paths
