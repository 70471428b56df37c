"""The plot of a walk: distance against updates, of simulated walkers and of a real network's weights alike."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Okabe and Ito's: told apart with any colour vision.
_COLOURS, _INK = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00"), "#333333"


@dataclass(frozen=True)
class WalkCurve:
    """Distances of a walk, with a law through them.

    Args:
        label: for the legend.
        updates: [points], each above 1.
        distances: [points].
        errors: standard errors of the distances, [points], or None.
        fit: a law that gives distances by updates, such as `diffusion.Fit` or `diffusion.LogPower`; drawn as a line.
        fitted: first and last update that the law is drawn between; by default all.
        theory: exponent of log t that theory says; drawn as a dashed line through their later half.
    """

    label: str
    updates: ArrayLike
    distances: ArrayLike
    errors: ArrayLike | None = None
    fit: Callable[[NDArray[np.float64]], NDArray[np.float64]] | None = None
    fitted: tuple[float, float] | None = None
    theory: float | None = None


def distance_plot(curves: Sequence[WalkCurve], path: str | Path, *, title: str = "", unit: str = "‖w_t − w_0‖") -> None:
    """Draw walks twice as a PNG: distance against log t, where a + b · log t is straight, and both logarithms, where a power of
    log t is.

    Args:
        path: of the PNG; its folder is made where it is missing.
        unit: what the distance is, for its axis.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter, MaxNLocator

    figure = Figure(figsize=(9.6, 4.2), dpi=150, layout="constrained")
    plain, logarithmic = figure.subplots(1, 2)
    for i, curve in enumerate(curves):
        colour = _COLOURS[i % len(_COLOURS)]
        t, y = np.asarray(curve.updates, dtype=np.float64), np.asarray(curve.distances, dtype=np.float64)
        first, last = curve.fitted or (t[0], t[-1])
        between = np.exp(np.geomspace(np.log(max(first, t[0])), np.log(last), 200))
        for axes, x in ((plain, np.log10), (logarithmic, np.log)):
            axes.errorbar(
                x(t), y, curve.errors, fmt="o", color=colour, markersize=4, capsize=2, elinewidth=1, label=curve.label
            )
            if curve.fit:
                axes.plot(x(between), curve.fit(between), color=colour, linewidth=1.4)
        if curve.theory is not None:
            late = slice(len(t) // 2, None)
            scale = np.exp(np.mean(np.log(y[late]) - curve.theory * np.log(np.log(t[late]))))
            logarithmic.plot(
                np.log(t), scale * np.log(t) ** curve.theory, color=_INK, linewidth=1, linestyle=(0, (4, 3))
            )
    # By hand, since matplotlib's own logarithmic axis ends near 1e300, and t may come near that.
    plain.xaxis.set_major_locator(MaxNLocator(integer=True))
    plain.xaxis.set_major_formatter("$10^{{{x:g}}}$")
    plain.set_xlabel("updates t", color=_INK)
    plain.set_ylabel(unit, color=_INK)
    logarithmic.set_xscale("log")
    logarithmic.set_yscale("log")
    for axis in (logarithmic.xaxis, logarithmic.yaxis):  # 20, not 2 × 10¹
        axis.set_major_formatter(LogFormatter())
        axis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
    logarithmic.set_xlabel("log t (natural logarithm)", color=_INK)
    laws = ["lines: fits" if any(curve.fit for curve in curves) else ""]
    laws += ["dashed: the slope of theory" if any(curve.theory is not None for curve in curves) else ""]
    logarithmic.set_title(", ".join(filter(None, laws)), loc="left", fontsize=9, color=_INK)
    plain.set_title(title, loc="left", fontsize=10, color=_INK)
    handles, labels = plain.get_legend_handles_labels()
    columns = min(3, len(labels), max(1, 140 // max(map(len, labels))))  # about 140 letters fit beside each other
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=8.5)
    for axes in (plain, logarithmic):
        axes.grid(color="#e2e2e2", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(which="both", length=0, colors=_INK)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
