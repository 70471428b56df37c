"""Tables and plots of finished runs."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from gbnzoo.card import LadderRow, group_by_rung, ladder_table, result_row
from gbnzoo.run import Run

__all__ = ["ladder_plot", "ladder_rows", "ladder_table", "top1_percent"]

# Okabe and Ito's blue and orange: told apart with any colour vision, and in grey.
_DOTS, _PAPER, _INK = "#0072b2", "#d55e00", "#333333"


def top1_percent(run_folder: str | Path) -> float:
    """Top-1 after the last update of a finished run."""
    return float(Run(run_folder).finished()[1]["top1_percent"])


def ladder_rows(run_folders: Iterable[str | Path]) -> list[LadderRow]:
    """Finished runs put together over seeds, in the ladder's order.

    Raises:
        RunError: if a run is not finished.
        ValueError: if there is none, or they are of more than one network, data set or split.
    """
    runs = [Run(folder) for folder in run_folders]
    rows = group_by_rung(result_row(run.recipe, run.finished()[1], run.environments()) for run in runs)
    ladders = sorted({f"{row.ladder}, {row.split} split" for row in rows})
    if len(ladders) != 1:
        raise ValueError(f"these runs make {len(ladders)} ladders ({'; '.join(ladders)}); wanted the runs of one")
    return rows


def ladder_plot(
    rows: Sequence[LadderRow], path: str | Path, *, paper_top1_percent: Mapping[str, float] | None = None
) -> None:
    """Draw top-1 of each rung as a PNG: every seed a dot, mean ± sample standard deviation beside them, `sb` as a level.

    Args:
        rows: one ladder.
        path: of the PNG; its folder is made where it is missing.
        paper_top1_percent: the paper's value by rung, drawn as a dash.
    """
    # Here, so that what only wants the table need not wait a second for it.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.6), dpi=200, layout="constrained")
    axes = figure.subplots()
    seeds = max(len(row.top1_percent) for row in rows)
    if rows[0].rung == "sb":
        axes.axhline(rows[0].mean, color=_INK, linewidth=0.8, linestyle=(0, (4, 4)), zorder=1)
    for x, row in enumerate(rows):
        if seeds > 1:
            dots = [x - 0.3 + 0.28 * i / (seeds - 1) for i in range(len(row.top1_percent))]
            axes.plot(dots, row.top1_percent, "o", color=_DOTS, alpha=0.6, markersize=5, markeredgewidth=0, zorder=2)
        at = x + 0.12 if seeds > 1 else x
        axes.errorbar(at, row.mean, row.std, fmt="o", color=_INK, markersize=6, capsize=3.5, elinewidth=1.2, zorder=3)
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
        offset = {"xytext": (9, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(f"{row.mean:.2f}", (at, row.mean), **offset, color=_INK, fontsize=9, bbox=box, zorder=2.5)
        if paper_top1_percent and row.rung in paper_top1_percent:
            axes.hlines(paper_top1_percent[row.rung], x - 0.3, at + 0.05, color=_PAPER, linewidth=1.8, zorder=1)
    labels = [f"{row.rung}\nbatch {row.batch_size:,}\n{row.updates:,} updates" for row in rows]
    axes.set_xticks(range(len(rows)), labels, fontsize=8.5)
    axes.set_xlim(-0.5, len(rows) - 0.4)
    axes.margins(y=0.1)
    axes.set_ylabel(f"top-1 on the {rows[0].split} split (%)", color=_INK)
    legend = (
        f"blue: {seeds} seeds, black: mean ± std" if seeds > 1 else "one seed",
        "dashed: sb" if rows[0].rung == "sb" else "",
        "orange: the paper" if paper_top1_percent else "",
    )
    axes.set_title(f"{rows[0].ladder}  ({', '.join(filter(None, legend))})", loc="left", fontsize=10, color=_INK)
    axes.grid(axis="y", color="#e2e2e2", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0, colors=_INK)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
