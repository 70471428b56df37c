"""Charts of runs: each with the data it draws, the words that say the same, and a drawing for light and for dark.

A chart is narrow, so that it can be read on a phone as it stands, and its drawing uses nothing that is not in its data.
"""

import csv
import io
import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gbnzoo.card import LadderRow, spread
from gbnzoo.diffusion import Fit, best_laws, fit_laws
from gbnzoo.records import Record
from gbnzoo.regime import RUNGS

if TYPE_CHECKING:
    import PIL.Image
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Cell = str | int | float | None


@dataclass(frozen=True)
class Theme:
    """Colours of a drawing; `series` are Okabe and Ito's, told apart with any colour vision."""

    name: str
    background: str
    ink: str
    faint: str
    accent: str
    paper: str
    series: tuple[str, ...]
    ramp: tuple[float, float]  # the stretch of the colour map that shows on the background


LIGHT = Theme(
    "light",
    background="#ffffff",
    ink="#333333",
    faint="#e2e2e2",
    accent="#0072b2",
    paper="#d55e00",
    series=("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#333333"),
    ramp=(0.0, 0.88),
)
DARK = Theme(
    "dark",
    background="#1b1f24",
    ink="#d8dbdf",
    faint="#353b43",
    accent="#56b4e9",
    paper="#e69f00",
    series=("#56b4e9", "#e69f00", "#2bc49a", "#e39ac4", "#f0e442", "#7d9bff", "#d8dbdf"),
    ramp=(0.25, 1.0),
)
WIDTH, HEIGHT, DPI = 4.8, 3.3, 200  # inches, dots an inch
LEGEND_ROW, LEGEND_LETTERS = 0.17, 7.5  # inches, points


@dataclass(frozen=True)
class Chart:
    """One chart.

    Args:
        name: stem of its files.
        title: above it.
        text: what it shows, in words and numbers, for those who do not see it.
        columns: of its data.
        rows: of its data; everything that is drawn.
        draw: makes the drawing for a theme.
    """

    name: str
    title: str
    text: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    draw: Callable[[Theme], "Figure"] = field(repr=False)

    def csv(self) -> str:
        """Its data; numbers with all their digits, an empty cell for what was not measured."""
        return csv_text(self.columns, self.rows)

    def png(self, theme: Theme = LIGHT, metadata: Mapping[str, str] | None = None) -> bytes:
        """The drawing as a file's content, in a palette of 256 colours; `metadata` are texts that PNG keeps beside it."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from PIL.PngImagePlugin import PngInfo

        canvas = FigureCanvasAgg(self.draw(theme))
        canvas.draw()
        texts = PngInfo()
        for name, text in (metadata or {}).items():
            texts.add_text(name, text)
        content = io.BytesIO()
        picture = _with_palette(np.asarray(canvas.buffer_rgba())[..., :3])
        picture.save(content, format="png", optimize=True, dpi=(DPI, DPI), pnginfo=texts)
        return content.getvalue()


def csv_text(columns: Sequence[str], rows: Iterable[Sequence[Cell]]) -> str:
    """A table as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue()


# ---- which runs are drawn as one


def by_series(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Runs that differ in their seed alone, by what tells them from the others here; in the ladder's order."""

    def science(record: Record) -> str:
        return record.recipe.model_copy(update={"seed": 0}).to_yaml()

    def place(record: Record) -> tuple:
        regime = record.regime
        rung = list(RUNGS).index(record.recipe.rung)
        return record.ladder, rung, regime.batch_size, regime.ghost_batch_size, science(record), record.recipe.seed

    several_ladders = len({record.ladder for record in records}) > 1
    several_networks = len({record.recipe.model.name for record in records}) > 1
    groups = [list(group) for _, group in itertools.groupby(sorted(records, key=place), key=lambda r: place(r)[:-1])]
    ghosts: dict[str, set[int]] = {}
    for group in groups:
        ghosts.setdefault(group[0].name, set()).add(group[0].regime.ghost_batch_size)
    series: dict[str, list[Record]] = {}
    for group in groups:
        record = group[0]
        label = f"{record.recipe.rung} {record.regime.batch_size}"
        if several_ladders:
            label = record.name if several_networks else record.name.partition(".")[2]
        if len(ghosts[record.name]) > 1:
            label += f", ghosts of {record.regime.ghost_batch_size}"
        # Two recipes of one name: their base regimes differ, and only their folders say so.
        while label in series:
            label += "′"
        series[label] = group
    return series


# ---- training and evaluation


_AXES = {
    "update": ("updates", "updates"),
    "samples": ("samples", "samples seen"),
    "train_seconds": ("time", "time, evaluation included"),
}


def curve_charts(records: Sequence[Record]) -> list[Chart]:
    """Losses and top-1 against updates, samples and time."""
    records = [record for record in records if record.points("update", "train_loss")]
    return [_curves(records, x) for x in _AXES if any(record.points(x, "train_loss") for record in records)]


def _curves(records: Sequence[Record], x: str) -> Chart:
    series = by_series(records)
    short, axis = _AXES[x]
    scale, unit, digits = (*_time_unit(records), 1) if x == "train_seconds" else (1.0, "", 0)
    rows = tuple(
        (label, record.recipe.seed, *(row.get(key) for key in (x, "train_loss", "eval_loss", "top1_percent")))
        for label, group in series.items()
        for record in group
        for row in record.log
        if row.get(x) is not None
    )
    splits = " and ".join(sorted({record.split for record in records}))

    def draw(theme: Theme) -> "Figure":
        figure = _figure(theme, HEIGHT + 1.6, len(series))
        losses, scores = figure.subplots(2, sharex=True)
        for style, (label, group) in zip(_styles(theme), series.items(), strict=False):
            line, _ = _parts(style)
            losses.plot([], [], **style, linewidth=1.0, label=label)
            for record in group:
                for axes, y, look in (
                    (losses, "train_loss", line),
                    (losses, "eval_loss", {**style, "alpha": 0.55}),
                    (scores, "top1_percent", style),
                ):
                    points = record.points(x, y)
                    axes.plot([a / scale for a, _ in points], [b for _, b in points], **look, linewidth=1.0)
        losses.set_xscale("log")
        losses.set_yscale("log")
        losses.set_ylabel(f"loss (dots: {splits} split)")
        scores.set_ylabel(f"top-1, {splits} split (%)")
        scores.set_xlabel(axis + (f" ({unit})" if unit else ""))
        for axes in (losses, scores):
            _plain(axes, theme)
        _legend(figure, losses, theme)
        return figure

    counted = unit or axis.removesuffix(" seen")

    def latest(record: Record) -> float | None:
        points = record.points(x, "top1_percent") or record.points(x, "train_loss")
        return points[-1][0] / scale if points else None

    ends = "; ".join(
        f"{label}: {_mean([r.top1_percent for r in group])} after {_mean(list(map(latest, group)), digits)} {counted}"
        for label, group in series.items()
    )
    return Chart(
        f"curves_by_{short}",
        f"Losses and top-1 against {axis}",
        f"Above, training loss (lines; the mean since the row before) and loss on the {splits} split (dots); below, top-1"
        f" there; against {axis}, on a logarithmic axis; a line for each seed. Latest top-1 in %, mean over seeds: {ends}.",
        ("run", "seed", x, "train_loss", "eval_loss", "top1_percent"),
        rows,
        draw,
    )


def _time_unit(records: Sequence[Record]) -> tuple[float, str]:
    longest = max(seconds for record in records for seconds, _ in record.points("train_seconds", "update"))
    return next(((s, unit) for s, unit in ((3600.0, "hours"), (60.0, "minutes")) if longest > 2 * s), (1.0, "seconds"))


# ---- the walk of the weights


@dataclass(frozen=True)
class FittedRun:
    """Laws of one run's weight distance, fitted over its updates from `first` to `last`."""

    label: str
    seed: int
    first: int
    last: int
    points: int
    fits: Mapping[str, Fit]

    @property
    def best(self) -> list[str]:
        """The law that BIC chooses; more where they tie."""
        return best_laws(self.fits)


WALK_BEGINS = 30
"""Update before which no law is fitted. At first the weights run straight down: momentum of 0.9 keeps a gradient for some 10
updates, and of 14 runs of F1 at batches of 64 to 4096 (docs/weight_distance) all go about like t to update 10, one still faster
than √t, as no walk does, to update 32; from there on each goes like t^0.45 or slower. Assumed for other networks. The same
update for all batch sizes, for the paper's law is of updates."""


def fitted_points(record: Record) -> list[tuple[float, float]]:
    """What the laws are fitted to: the phase in which the rate is high, of which the paper's law is, from `WALK_BEGINS` on."""
    first, last = record.high_rate_phase()
    start = max(first, WALK_BEGINS)
    return [(t, d) for t, d in record.points("update", "weight_distance") if start <= t <= last]


def fit_runs(records: Sequence[Record]) -> list[FittedRun]:
    """The laws fitted to each run whose log allows it."""
    fitted = []
    for label, group in by_series([record for record in records if record.log]).items():
        for record in group:
            points = fitted_points(record)
            try:
                fits = fit_laws([t for t, _ in points], [d for _, d in points])
            except ValueError:  # too few points, or weights that do not move
                continue
            span = int(points[0][0]), int(points[-1][0])
            fitted.append(FittedRun(label, record.recipe.seed, *span, len(points), fits))
    return fitted


def distance_chart(records: Sequence[Record], fitted: Sequence[FittedRun]) -> Chart | None:
    """Weight distance against log t, with the laws log t and t^p over the updates they were fitted to."""
    records = [record for record in records if record.points("update", "weight_distance")]
    if not records:
        return None
    series = by_series(records)
    fit_of = {(fit.label, fit.seed): fit for fit in fitted}

    def laws(label: str, record: Record, t: float) -> list[float | None]:
        fit = fit_of.get((label, record.recipe.seed))
        inside = fit and fit.first <= t <= fit.last
        return [float(fit.fits[law](t)) if inside else None for law in ("log", "power")]

    rows = tuple(
        (label, record.recipe.seed, int(t), distance, *laws(label, record, t))
        for label, group in series.items()
        for record in group
        for t, distance in record.points("update", "weight_distance")
    )

    def draw(theme: Theme) -> "Figure":
        figure = _figure(theme, HEIGHT + 0.6, len(series))
        axes = figure.subplots()
        for style, (label, group) in zip(_styles(theme), series.items(), strict=False):
            line, dots = _parts(style)
            axes.plot([], [], **style, linewidth=1.4, label=label)
            for record in group:
                mine = [row for row in rows if row[:2] == (label, record.recipe.seed)]
                axes.plot([r[2] for r in mine], [r[3] for r in mine], **dots, alpha=0.7)
                on_law = [r for r in mine if r[4] is not None]
                axes.plot([r[2] for r in on_law], [r[4] for r in on_law], **line, linewidth=1.4)
                axes.plot([r[2] for r in on_law], [r[5] for r in on_law], color=style["color"], linewidth=0.6)
        axes.set_xscale("log")
        axes.set_xlabel("updates t")
        axes.set_ylabel("‖w_t − w_0‖")
        _plain(axes, theme)
        _legend(figure, axes, theme)
        return figure

    ends = (
        f"{label}: {_mean([r.points('update', 'weight_distance')[-1][1] for r in group])}"
        for label, group in series.items()
    )
    return Chart(
        "weight_distance",
        "Distance of the weights from where they started",
        "Dots: distance of all weights from the initial ones, against updates on a logarithmic axis, on which the paper's law"
        f" a + b · log t is a straight line. Straight lines: that law, fitted from update {WALK_BEGINS} on to the updates made"
        " at no less than half the highest rate; thin curves: a + b · t^p, fitted to the same. Distance at the last logged"
        f" update, mean over seeds: {'; '.join(ends)}.",
        ("run", "seed", "update", "weight_distance", "log_law", "power_law"),
        rows,
        draw,
    )


def layer_charts(records: Sequence[Record]) -> list[Chart]:
    """Weight distance by layer, of the first seed of each series whose layers were logged."""
    charts = []
    for label, group in by_series([record for record in records if record.log]).items():
        record = next((record for record in group if record.layers), None)
        if record:
            charts.append(_layers(label, record))
    return charts


def _layers(label: str, record: Record) -> Chart:
    layers = record.layers

    def draw(theme: Theme) -> "Figure":
        figure = _figure(theme, HEIGHT, len(layers) if len(layers) <= 12 else 4)
        axes = figure.subplots()
        for k, ((layer, points), colour) in enumerate(zip(layers.items(), _ramp(theme, len(layers)), strict=True)):
            # Of many layers every so many is named: the ramp tells the others.
            named = len(layers) <= 12 or k % math.ceil(len(layers) / 8) == 0
            axes.plot(
                [t for t, _ in points],
                [d for _, d in points],
                color=colour,
                linewidth=1.1,
                label=layer if named else None,
            )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("updates t")
        axes.set_ylabel("‖w_t − w_0‖ of the layer")
        _plain(axes, theme)
        _legend(figure, axes, theme)
        return figure

    farthest = max(layers, key=lambda layer: layers[layer][-1][1])
    nearest = min(layers, key=lambda layer: layers[layer][-1][1])
    return Chart(
        f"layers_{_slug(label)}_seed{record.recipe.seed}",
        f"Distance by layer: {label}, seed {record.recipe.seed}",
        f"Distance of each of {len(layers)} layers from its initial weights, from first (dark) to last (bright), against"
        f" updates, both axes logarithmic. At the last one {farthest} has gone farthest, {layers[farthest][-1][1]:.3g},"
        f" and {nearest} least, {layers[nearest][-1][1]:.3g}.",
        ("layer", "update", "weight_distance"),
        tuple((layer, update, distance) for layer, points in layers.items() for update, distance in points),
        draw,
    )


# ---- all batch sizes on one axis


def collapse_charts(records: Sequence[Record]) -> list[Chart]:
    """Weight distance of all batch sizes, before and after the adapted rate and ghosts: pairs of charts.

    A run is in the first of a pair where its whole batch is one ghost and its rate is the base regime's, in the second where
    its ghosts are those of the recipe, its rate is scaled with the batch and its gradient norm clipped, where the recipe says
    so. The base regime itself, whose gradients are not clipped, stands in the second only where its batch has no such run.
    Only the phase of the high rate is drawn. A pair needs two batch sizes on either side, of the same base regime.
    """
    families: dict[str, list[Record]] = {}
    for record in records:
        if record.points("update", "weight_distance"):
            families.setdefault(_family(record), []).append(record)
    charts: list[Chart] = []
    for family in families.values():
        before = [r for r in family if not r.regime.rung.adapts_lr]
        after = [r for r in family if r.regime.rung.has_ghosts]
        cured = {r.regime.batch_size for r in after}
        after += [r for r in before if r.regime.batch_size == r.recipe.base.batch_size not in cured]
        sides = {"before": before, "after": after}
        if all(len({r.regime.batch_size for r in side}) > 1 for side in sides.values()):
            charts += _collapse(sides, str(len(charts) // 2 + 1) if charts else "")
    return charts


def _family(record: Record) -> str:
    """What runs at several batch sizes have in common."""
    apart = {"large": {"batch_size"}, "rung": True, "seed": True, "tag": True, "evaluations": True}
    return repr(record.recipe.model_dump(exclude=apart))


def _collapse(sides: Mapping[str, Sequence[Record]], number: str) -> list[Chart]:
    drawn = {
        side: sorted(
            (
                (
                    record.regime.batch_size,
                    record.recipe.rung,
                    record.recipe.seed,
                    [p for p in record.points("update", "weight_distance") if p[0] <= record.high_rate_phase()[1]],
                )
                for record in records
            ),
            key=lambda each: each[:3],
        )
        for side, records in sides.items()
    }
    batches = sorted({batch for lines in drawn.values() for batch, *_ in lines})
    # The updates that every run has logged: there the batch sizes can be compared.
    shared = set.intersection(*({t for t, _ in points} for lines in drawn.values() for *_, points in lines))
    ladders = ", ".join(sorted({record.ladder for records in sides.values() for record in records}))
    clips = {r.regime.clip_grad_norm for r in sides["after"] if r.regime.rung.adapts_lr} - {None}
    clipped = f", gradient norm clipped at {' or '.join(f'{clip:g}' for clip in sorted(clips))}" if clips else ""
    uncured = sorted({r.regime.batch_size for r in sides["after"] if not r.regime.rung.adapts_lr})
    itself = "the base regime itself" + (", not clipped" if clips else "")
    top = max(d for lines in drawn.values() for *_, points in lines for _, d in points)

    def chart(side: str) -> Chart:
        lines = drawn[side]
        what = {
            "before": "whole batch normalised, base rate",
            "after": f"rate adapted to the batch{clipped}, ghosts of the base batch",
        }[side]

        def draw(theme: Theme) -> "Figure":
            figure = _figure(theme, HEIGHT, len(batches))
            axes = figure.subplots()
            colours = dict(zip(batches, _ramp(theme, len(batches)), strict=True))
            named = set()
            for batch, _, _, points in lines:
                label = None if batch in named else f"batch {batch:,}"
                named.add(batch)
                line = {"color": colours[batch], "linewidth": 1.3, "marker": ".", "markersize": 3}
                axes.plot([t for t, _ in points], [d for _, d in points], **line, label=label)
            axes.set_xscale("log")
            axes.set_ylim(0, 1.05 * top)
            axes.set_xlabel("updates t")
            axes.set_ylabel("‖w_t − w_0‖")
            _plain(axes, theme)
            _legend(figure, axes, theme)
            return figure

        return Chart(
            f"batch_sizes{number}_{side}",
            f"Batch sizes {side}, {ladders}: {what}",
            f"{ladders}: distance of the weights from the initial ones in the phase of the high rate, a colour for each batch"
            f" size from {batches[0]:,} to {batches[-1]:,}, with {what}"
            + "".join(f" (batch {batch:,}: {itself})" for batch in uncured if side == "after")
            + "; both charts of this pair have the same axis of distance."
            + _spreads(shared, lines),
            ("batch_size", "rung", "seed", "update", "weight_distance"),
            tuple((batch, rung, seed, int(t), d) for batch, rung, seed, points in lines for t, d in points),
            draw,
        )

    return [chart(side) for side in drawn]


def _spreads(shared: Iterable[float], lines: Sequence[tuple]) -> str:
    """How far apart the batch sizes are at four of the updates that all have logged, from about 10 to the last."""
    updates = sorted(shared)
    if not updates:
        return ""
    last = updates[-1]
    told = sorted(
        {min(updates, key=lambda t, at=at: abs(math.log(t / at))) for at in np.geomspace(min(10, last), last, 4)}
    )

    ratios = []
    for t in told:
        by_batch: dict[int, list[float]] = {}
        for batch, _, _, points in lines:
            by_batch.setdefault(batch, []).append(dict(points)[t])
        means = {batch: statistics.fmean(distances) for batch, distances in by_batch.items()}
        ratios.append(f"{max(means.values()) / min(means.values()):.2f} at update {int(t):,}")
    distances = ", ".join(f"{batch:,}: {mean:.2f}" for batch, mean in means.items())  # of the last
    return (
        f" The largest mean distance of a batch size is so many times the smallest: {', '.join(ratios)}. Mean distances by"
        f" batch at update {int(last):,}, the last that all of them have in that phase: {distances}."
    )


# ---- the ladder and the ghosts


def ladder_chart(rows: Sequence[LadderRow], *, width: float = WIDTH, name: str = "ladder") -> Chart:
    """Top-1 error of each rung: bars from zero, a dot for each seed, mean ± sample standard deviation, the paper's marks.

    Bars are of the error, for it begins at zero: bars of an accuracy cut off below would show the cut.

    Args:
        rows: one ladder.
        width: in inches.
        name: stem of its files.
    """
    seeds = max(len(row.top1_percent) for row in rows)
    has_paper = any(row.paper_top1_percent is not None for row in rows)
    has_single = any(len(row.top1_percent) == 1 for row in rows)
    is_crowded = len(rows) > 1.6 * width

    def draw(theme: Theme) -> "Figure":
        figure = _figure(theme, HEIGHT, 0, width=width)
        axes = figure.subplots()
        if rows[0].rung == "sb":
            axes.axhline(100 - rows[0].mean, color=theme.ink, linewidth=0.8, linestyle=(0, (4, 4)), zorder=1)
        for x, row in enumerate(rows):
            axes.bar(x, 100 - row.mean, 0.62, color=theme.accent, alpha=0.75, zorder=2)
            if len(row.top1_percent) > 1:
                spots = np.linspace(x - 0.22, x + 0.22, len(row.top1_percent))
                errors = [100 - top1 for top1 in row.top1_percent]
                axes.plot(spots, errors, "o", color=theme.ink, markersize=3, alpha=0.6, markeredgewidth=0, zorder=4)
                axes.errorbar(x, 100 - row.mean, row.std, color=theme.ink, capsize=3.5, elinewidth=1.2, zorder=3)
            if row.paper_top1_percent is not None:
                line = {"color": theme.paper, "linewidth": 2.2, "zorder": 3}
                axes.hlines(100 - row.paper_top1_percent, x - 0.38, x + 0.38, **line)
            highest = 100 - min(row.top1_percent, default=row.mean)
            top = max(highest, 100 - row.mean + (row.std or 0))
            if (
                row.paper_top1_percent is not None
                and -0.06 < (100 - row.paper_top1_percent - top) / _tallest(rows) < 0.1
            ):
                top = max(top, 100 - row.paper_top1_percent)
            offset = {"xytext": (0, 3), "textcoords": "offset points", "ha": "center", "va": "bottom"}
            box = {"facecolor": theme.background, "edgecolor": "none", "pad": 0.6}
            text = {"color": theme.ink, "fontsize": 8, "rotation": 90 if is_crowded else 0, "zorder": 2.5}
            axes.annotate(f"{row.mean:.2f}", (x, top), **offset, **text, bbox=box)
        if is_crowded:
            axes.set_xticks(range(len(rows)), [f"{row.rung} {row.batch_size}" for row in rows], rotation=90)
        else:
            names = [row.rung if row.ladder == rows[0].ladder else f"{row.rung}, longer" for row in rows]
            ticks = [f"{name}\n{row.batch_size:,}\n{row.updates:,}" for name, row in zip(names, rows, strict=True)]
            axes.set_xticks(range(len(rows)), ticks)
            axes.set_xlabel("rung, batch, updates")
        axes.set_xlim(-0.6, len(rows) - 0.4)
        axes.set_ylim(0, (1.3 if is_crowded else 1.14) * _tallest(rows))
        axes.set_ylabel(f"top-1 error, {rows[0].split} split (%)")
        _plain(axes, theme, x_grid=False)
        marks = (
            f"bars: mean ± std of up to {seeds} seeds" if seeds > 1 else "one seed",
            "no whisker: one seed" if seeds > 1 and has_single else "",
            "dashed: sb" if rows[0].rung == "sb" else "",
            "orange: the paper" if has_paper else "",
        )
        title = f"{rows[0].ladder}\n{', '.join(filter(None, marks))}; numbers: top-1"
        axes.set_title(title, loc="left", fontsize=8, color=theme.ink, wrap=True)
        return figure

    told = (
        f"{row.rung} at batch {row.batch_size:,}: {row.spread}"
        + (f", the paper {row.paper}" if row.paper_top1_percent is not None else "")
        for row in rows
    )
    return Chart(
        name,
        f"The ladder of {rows[0].ladder}",
        f"Bars of top-1 error on the {rows[0].split} split after the last update; lower is better. Top-1 in %, mean ± sample"
        f" standard deviation (number of seeds): {'; '.join(told)}.",
        (
            "rung",
            "batch_size",
            "ghost_batch_size",
            "updates",
            "samples",
            "seed_number",
            "top1_percent",
            "paper_top1_percent",
        ),
        tuple(
            (row.rung, row.batch_size, row.ghost_batch_size, row.updates, row.samples, k, top1, row.paper_top1_percent)
            for row in rows
            for k, top1 in enumerate(row.top1_percent)
        ),
        draw,
    )


def _tallest(rows: Sequence[LadderRow]) -> float:
    """The largest error that a ladder's chart has to hold."""
    papers = [row.paper_top1_percent for row in rows if row.paper_top1_percent is not None]
    lows = [min(row.mean - (row.std or 0), *row.top1_percent) for row in rows]
    return max(100 - min(*lows, *papers, 100), 1e-6)


@dataclass(frozen=True)
class GhostSize:
    """Top-1 of the runs of one ghost size, a value for each seed."""

    ghost_batch_size: int
    top1_percent: tuple[float, ...]

    @property
    def spread(self) -> str:
        """Mean ± sample standard deviation (number of seeds)."""
        return spread(self.top1_percent)


def ghost_chart(
    what: str,
    batch_size: int,
    split: str,
    sizes: Sequence[GhostSize],
    *,
    width: float = WIDTH,
    name: str = "ghost_sizes",
) -> Chart:
    """Top-1 against ghost size, mean ± sample standard deviation over seeds.

    Args:
        what: the runs, in words.
        batch_size: of all of them; a ghost of that size is the whole batch.
        split: which images were scored.
        sizes: in ascending order.
        width: in inches.
        name: stem of its files.
    """
    means = [statistics.fmean(size.top1_percent) for size in sizes]
    stds = [statistics.stdev(size.top1_percent) if len(size.top1_percent) > 1 else None for size in sizes]

    def draw(theme: Theme) -> "Figure":
        figure = _figure(theme, HEIGHT, 0, width=width)
        axes = figure.subplots()
        for size in sizes:
            axes.plot(
                [size.ghost_batch_size] * len(size.top1_percent),
                size.top1_percent,
                "o",
                color=theme.accent,
                markersize=4,
                alpha=0.6,
                markeredgewidth=0,
            )
        x = [size.ghost_batch_size for size in sizes]
        bars = [math.nan if std is None else std for std in stds]  # of one seed there is none
        axes.errorbar(x, means, bars, color=theme.ink, marker="o", markersize=4, capsize=3.5, linewidth=1.2)
        axes.set_xscale("log", base=2)
        axes.set_xticks(x, [f"{g}\n(batch)" if g == batch_size else f"{g}" for g in x], fontsize=8)
        axes.minorticks_off()
        axes.set_xlabel("samples normalised together")
        axes.set_ylabel(f"top-1, {split} split (%)")
        if alone:
            note = "one seed each" if alone == len(sizes) else "no bar: one seed"
            axes.set_title(note, loc="left", fontsize=8, color=theme.ink)
        axes.margins(0.08)
        _plain(axes, theme)
        return figure

    told = (f"{size.ghost_batch_size}: {size.spread}" for size in sizes)
    alone = sum(std is None for std in stds)
    what_is_drawn = "dots are seeds, the line is their mean ± sample standard deviation"
    if alone:
        what_is_drawn += ", which sizes of one seed do not have"
    if alone == len(sizes):
        what_is_drawn = "one seed each, so no spread is known"
    best = sizes[int(np.argmax(means))].ghost_batch_size
    return Chart(
        name,
        f"Top-1 against ghost size: {what}",
        f"Runs that differ in the size of their ghosts alone, at batch {batch_size:,}: {what_is_drawn}. Top-1 on the {split}"
        f" split in % (number of seeds) by ghost size: {'; '.join(told)}. The highest"
        f"{'' if alone == len(sizes) else ' mean'} is that of ghosts of {best}.",
        ("ghost_batch_size", "seed_number", "top1_percent", "mean", "std"),
        tuple(
            (size.ghost_batch_size, k, top1, mean, std)
            for size, mean, std in zip(sizes, means, stds, strict=True)
            for k, top1 in enumerate(size.top1_percent)
        ),
        draw,
    )


# ---- drawing


def _with_palette(pixels: NDArray[np.uint8]) -> "PIL.Image.Image":
    """A drawing, [height, width, 3], in the 256 of its colours that most pixels have; the others become the nearest of them.

    The colours of what is drawn stay exact, edges keep their shades, and a third of the bytes is left. Pillow's own
    quantisation mixes its colours, so that the background is no longer the page's.
    """
    import PIL.Image

    packed = pixels.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], dtype=np.uint32)
    colours, places, counts = np.unique(packed, return_inverse=True, return_counts=True)
    channels = np.stack([colours >> 16, colours >> 8 & 255, colours & 255], axis=1).astype(np.float32)
    palette = channels[np.argsort(-counts, kind="stable")[:256]]
    # Least squared difference; |colour|² is the same for all of the palette.
    nearest = (np.square(palette).sum(axis=1) - 2 * channels @ palette.T).argmin(axis=1).astype(np.uint8)
    picture = PIL.Image.fromarray(nearest[places].reshape(packed.shape))
    picture.putpalette(palette.astype(np.uint8).tobytes())
    return picture


def _figure(theme: Theme, height: float, legend_entries: int, width: float = WIDTH) -> "Figure":
    # Here, so that what only wants the table need not wait a second for it.
    from matplotlib.figure import Figure

    height += LEGEND_ROW * math.ceil(legend_entries / 2)
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor=theme.background)


def _plain(axes: "Axes", theme: Theme, x_grid: bool = True) -> None:
    axes.set_facecolor(theme.background)
    axes.grid(axis="both" if x_grid else "y", color=theme.faint, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(theme.ink)
    axes.tick_params(which="both", length=0, colors=theme.ink, labelsize=8)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=theme.ink, fontsize=8.5)
    if axes.get_xscale() == "log":  # over decades; they take half of the time of drawing
        axes.xaxis.minorticks_off()


def _legend(figure: "Figure", axes: "Axes", theme: Theme) -> None:
    """Below the axes, in as many columns as there is room for; `_figure` has left that of two."""
    handles, labels = axes.get_legend_handles_labels()
    if not labels:
        return

    longest, rows_left = max(map(len, labels)), math.ceil(len(labels) / 2)
    letters, height = LEGEND_LETTERS, figure.get_figheight()
    for columns in itertools.chain((2 if longest > 16 else 3, 2), itertools.repeat(1)):
        style = {"fontsize": letters, "labelcolor": theme.ink, "frameon": False, "handlelength": 3}
        legend = figure.legend(handles, labels, loc="outside lower center", ncols=columns, **style)
        figure.set_figheight(height + LEGEND_ROW * max(0, math.ceil(len(labels) / columns) - rows_left))
        excess = legend.get_window_extent().width / figure.bbox.width
        if excess <= 1 or letters < 1:
            break
        legend.remove()
        if columns == 1:
            letters *= 0.98 / excess


def _styles(theme: Theme) -> Iterator[dict[str, Any]]:
    """Colour, line and marker for each series, without end; the first 112 differ, the first 28 in colour or in both others."""
    lines, markers = ("-", "--", ":", "-."), ("o", "^", "s", "x")
    for k in itertools.count():
        line, marker = lines[k % 4], markers[(k + k // 4) % 4]
        for colour in theme.series:
            yield {"color": colour, "linestyle": line, "marker": marker, "markersize": 2.8}


def _parts(style: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A style's line without markers, and its markers without a line."""
    return {**style, "marker": "none"}, {**style, "linestyle": "none", "markeredgewidth": 0.8}


def _ramp(theme: Theme, number: int) -> list[tuple[float, ...]]:
    from matplotlib import colormaps

    return [tuple(colour) for colour in colormaps["viridis"](np.linspace(*theme.ramp, number))]


def _mean(values: Sequence[float | None], digits: int = 2) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.fmean(known):,.{digits}f}" if known else "not yet measured"


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() or c in "._" else "_" for c in text)
