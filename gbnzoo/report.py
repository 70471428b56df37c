"""What runs say side by side: ladders as tables, and a page of charts of any number of runs, finished or not."""

import itertools
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gbnzoo.card import LadderRow, group_by_rung, ladder_of, ladder_table
from gbnzoo.charts import (
    WALK_BEGINS,
    Cell,
    FittedRun,
    GhostSize,
    by_series,
    collapse_charts,
    csv_text,
    curve_charts,
    distance_chart,
    fit_runs,
    ghost_chart,
    ladder_chart,
    layer_charts,
)
from gbnzoo.diffusion import EXPONENTS_OF_POWER, TIE, best_law
from gbnzoo.page import Section, Table, write_page
from gbnzoo.recipe import RecipeError, load_recipe
from gbnzoo.records import Record, read_record, without_repeats
from gbnzoo.regime import RUNGS
from gbnzoo.run import Run

__all__ = [
    "find_ladders",
    "ghost_sizes",
    "is_ladder",
    "ladder_plot",
    "ladder_rows",
    "ladder_table",
    "only_ladder",
    "read_runs",
    "report_rows",
    "top1_percent",
    "write_report",
]

GHOST_SIZE_TAG = re.compile(r"_g\d+$")
"""How the tag of a run ends that differs from the others of its recipe in `large.ghost_batch_size`, as `cifar10_short_g8`."""


def top1_percent(run_folder: str | Path) -> float:
    """Top-1 after the last update of a finished run."""
    return float(Run(run_folder).finished()[1]["top1_percent"])


# ---- ladders


def ladder_rows(run_folders: Iterable[str | Path]) -> list[LadderRow]:
    """Finished runs put together over seeds, in the ladder's order.

    Raises:
        RunError: if a run is not finished.
        ValueError: if there is none, or they are of more than one network, data set or split.
    """
    return only_ladder(find_ladders(read_record(folder).result_row() for folder in run_folders))


def find_ladders(rows: Iterable[Mapping[str, str]]) -> list[list[LadderRow]]:
    """Rows of results put together over seeds, one list for each network, data set and split."""
    grouped = itertools.groupby(group_by_rung(rows), key=lambda row: (row.ladder, row.split))
    return [list(ladder) for _, ladder in grouped]


def is_ladder(rows: Sequence[LadderRow]) -> bool:
    """Whether there are two rungs, of which the large ones share one batch: only then does each add one cure to the last."""
    large = {row.batch_size for row in rows if RUNGS[row.rung].is_large}
    return len({row.rung for row in rows}) > 1 and len(large) == 1


def only_ladder(ladders: Sequence[list[LadderRow]]) -> list[LadderRow]:
    """The one there is.

    Raises:
        ValueError: if there is none or more than one.
    """
    if len(ladders) != 1:
        named = "; ".join(f"{ladder[0].ladder}, {ladder[0].split} split" for ladder in ladders)
        raise ValueError(f"these runs make {len(ladders)} ladders ({named}); wanted the runs of one")
    return ladders[0]


def ladder_plot(rows: Sequence[LadderRow], path: str | Path) -> None:
    """Draw a ladder as a PNG as wide as a README; see `gbnzoo.charts.ladder_chart`.

    Args:
        rows: one ladder.
        path: of the PNG; its folder is made where it is missing.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(ladder_chart(rows, width=7.2).png())


# ---- what a report is of


def read_runs(folders: Iterable[str | Path]) -> list[Record]:
    """Runs and hub folders, each run once.

    Raises:
        RunError: if a folder is neither.
    """
    return without_repeats(read_record(folder) for folder in folders)


def report_rows(records: Sequence[Record], results: Iterable[Mapping[str, str]] = ()) -> list[dict[str, str]]:
    """A row of results for each finished run, and for each seed of the same ladders that is not among the runs.

    Args:
        records: the runs at hand; where there are none, all results are taken.
        results: rows of hub/results.csv.
    """

    def seed_of(row: Mapping[str, str]) -> tuple[str, ...]:
        return tuple(row[key] for key in ("model", "split", "ghost_batch_size", "seed"))

    rows = [record.result_row() for record in records if record.is_finished]
    at_hand = {seed_of(row) for row in rows}
    ladders = {(record.ladder, record.split) for record in records}
    others = [dict(row) for row in results if not records or ladder_of(row) in ladders]
    return [*rows, *(row for row in others if seed_of(row) not in at_hand)]


def write_report(records: Sequence[Record], rows: Sequence[Mapping[str, str]], out: str | Path) -> Path:
    """Write a page of charts, and the charts and their data as files beside it.

    A part appears only where the runs have what it needs: curves where there are logs, the law of the distance where it was
    logged, all batch sizes where there are several before and after the cures, a ladder where there are two rungs, the curve
    of ghost sizes where there are three.

    Args:
        records: runs, finished or not.
        rows: of results, from `report_rows`.
        out: folder of the page.

    Returns:
        The page.

    Raises:
        ValueError: if there is nothing to tell.
    """
    if not records and not rows:
        raise ValueError("nothing to report; wanted folders of runs, or --results with rows in it")
    fitted = fit_runs(records)
    sections = [
        _runs(records),
        _ladders(rows),
        _ghosts(rows),
        Section("curves", "Training and evaluation", charts=tuple(curve_charts(records))),
        _law(records, fitted),
        _batch_sizes(records),
        Section("layers", "Layer by layer", charts=tuple(layer_charts(records)), folded=True),
    ]
    kept = [section for section in sections if section.charts or section.tables]
    ladders = {ladder_of(row)[0] for row in rows} | {record.ladder for record in records}
    names = sorted({GHOST_SIZE_TAG.sub("", name) for name in ladders})
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return write_page(out, f"gbnzoo report: {shown}", kept)


# ---- the page's parts

FITS_COLUMNS = (
    *("run", "seed", "first_update", "last_update", "points", "log_intercept", "log_slope"),
    *("r2_log", "r2_sqrt", "r2_power", "power_exponent", "bic_log", "bic_sqrt", "bic_power", "best"),
)
"""Of fits.csv, the laws of `gbnzoo.diffusion` fitted to each run; `best` names all that tie."""


def _runs(records: Sequence[Record]) -> Section:
    def cells(record: Record) -> tuple[str, ...]:
        last = record.log[-1] if record.log else {}
        top1, seconds, memory = record.top1_percent, last.get("train_seconds"), _memory(record)
        regime = record.regime
        return (
            record.name,
            str(record.recipe.seed),
            f"{regime.num_ghosts} × {regime.ghost_batch_size}",
            f"{record.updates:,}" + ("" if record.is_finished else f" of {regime.total_updates:,}"),
            f"{record.updates * regime.batch_size:,}",
            "" if top1 is None else f"{top1:.2f}",
            "" if seconds is None else f"{seconds:,.0f}",
            "" if memory is None else f"{memory:,.0f}",
        )

    columns = ("run", "seed", "ghosts", "updates", "samples", "latest top-1 %", "seconds", "peak memory, MiB")
    rows = [cells(record) for group in by_series(records).values() for record in group]
    if not any(row[-1] for row in rows):  # not logged by runs made before
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    unfinished = sum(not record.is_finished for record in records)
    caption = f"{len(records)} run{'' if len(records) == 1 else 's'}"
    caption += f", {unfinished} of them not finished" if unfinished else ""
    return Section("runs", "Runs", tables=(Table(caption, columns, tuple(rows)),) if rows else ())


def _memory(record: Record) -> float | None:
    """The most of any logged moment, in MiB."""
    values = [row.get("peak_memory_mib") for row in record.log]
    return max((value for value in values if value is not None), default=None)


def _ladders(rows: Sequence[Mapping[str, str]]) -> Section:
    ladders = [ladder for ladder in find_ladders(rows) if is_ladder(ladder)]
    charts = [ladder_chart(ladder, name=f"ladder{_number(k, ladders)}") for k, ladder in enumerate(ladders)]
    return Section(
        "ladder",
        "The ladder",
        "Every rung adds one cure to the one before it: the rate scaled with the batch (lr), ghost batch normalization (gbn),"
        " as many updates as the small batch (ra). The paper's figures, of single runs, stand beside runs of its own regime"
        " alone.",
        tables=tuple(_ladder_table(ladder) for ladder in ladders),
        charts=tuple(charts),
    )


def _ladder_table(ladder: Sequence[LadderRow]) -> Table:
    has_paper = any(row.paper for row in ladder)
    return Table(
        f"{ladder[0].ladder}: top-1 of the last update on the {ladder[0].split} split, mean ± sample standard deviation (n)",
        ("rung", "batch", "ghosts", "updates", "samples", "top-1 %", *(["paper"] if has_paper else []), "seconds"),
        tuple(
            (
                row.rung,
                f"{row.batch_size:,}",
                row.ghosts,
                f"{row.updates:,}",
                f"{row.samples:,}",
                row.spread,
                *([row.paper] if has_paper else []),
                f"{row.train_seconds:,.1f}",
            )
            for row in ladder
        ),
    )


def _ghosts(rows: Sequence[Mapping[str, str]]) -> Section:
    curves = ghost_sizes(rows)
    charts = tuple(
        ghost_chart(f"{c.name}, {c.rung}", c.batch_size, c.split, c.sizes, name=f"ghost_sizes{_number(k, curves)}")
        for k, c in enumerate(curves)
    )
    return Section("ghosts", "Ghost size", charts=charts)


@dataclass(frozen=True)
class GhostSizes:
    """Results that differ in seed and ghost size alone.

    Args:
        name: of their ladder.
        rung: gbn or ra.
        split: which images were scored.
        batch_size: of all of them.
        ladders: names under which they stand in the results.
        sizes: ascending.
    """

    name: str
    rung: str
    split: str
    batch_size: int
    ladders: frozenset[str]
    sizes: tuple[GhostSize, ...]


def ghost_sizes(rows: Iterable[Mapping[str, str]]) -> list[GhostSizes]:
    """Each set of results that differ in ghost size and seed alone, and have three sizes or more.

    A run of rung `lr` differs from one of `gbn` in its ghosts alone: it is the whole batch.
    """
    families: dict[tuple[str, ...], list[Mapping[str, str]]] = {}
    for row in sorted(rows, key=lambda row: (int(row["ghost_batch_size"]), int(row["seed"]), row["rung"])):
        if RUNGS[row["rung"]].adapts_lr:
            families.setdefault(_ghost_family(row), []).append(row)
    curves = []
    for family in families.values():
        sizes: dict[int, dict[str, float]] = {}
        for row in family:
            # The whole batch may have been run as lr and as gbn: one seed counts once.
            sizes.setdefault(int(row["ghost_batch_size"]), {}).setdefault(row["seed"], float(row["top1"]))
        if len(sizes) < 3:
            continue
        ladders = frozenset(ladder_of(row)[0] for row in family)
        curves.append(
            GhostSizes(
                name=min((GHOST_SIZE_TAG.sub("", name) for name in ladders), key=len),
                rung="ra" if RUNGS[family[0]["rung"]].adapts_length else "gbn",
                split=family[0]["split"],
                batch_size=int(family[0]["batch_size"]),
                ladders=ladders,
                sizes=tuple(GhostSize(size, tuple(seeds.values())) for size, seeds in sizes.items()),
            )
        )
    return curves


def _ghost_family(row: Mapping[str, str]) -> tuple[str, ...]:
    """What results have in common that differ in seed and ghost size alone: split, batch, updates, the recipe's rest."""
    path, *words = shlex.split(row["recipe"])
    overrides = words[: words.index("--rung")]
    try:
        # Read again, for the nearest of the shipped recipes, from which the row tells the differences, may be another one.
        apart = {"rung": True, "seed": True, "tag": True, "evaluations": True, "large": {"ghost_batch_size"}}
        rest = repr(load_recipe(path, overrides).model_dump(exclude=apart))
    except RecipeError:  # a recipe that has been moved since
        rest = path
    return row["split"], row["batch_size"], row["updates"], rest


def _law(records: Sequence[Record], fitted: Sequence[FittedRun]) -> Section:
    chart = distance_chart(records, fitted)
    if not chart:
        return Section("distance", "The walk of the weights")
    alone = {name: sum(fit.best == [law] for fit in fitted) for law, name in _LAWS.items()}
    ties = Counter(" and ".join(_LAWS[law] for law in fit.best) for fit in fitted if len(fit.best) > 1)
    text = (
        "The paper finds that weights walk away from where they started like log t, as on a random potential. Fitted to"
        f" the updates made at no less than half the highest rate, from update {WALK_BEGINS} on, before which weights run"
        f" straight down, and judged by BIC, which charges t^p for its exponent. A difference below {TIE} is a tie, one above"
        " 10 very strong, but a run's points are not independent."
    )
    if fitted:
        text += f" Least BIC: {', '.join(f'{name} in {n}' for name, n in alone.items())} of {len(fitted)} runs"
        text += "".join(f", {laws} tie in {n}" for laws, n in ties.items()) + "."
    return Section(
        "distance",
        "The walk of the weights",
        text,
        tables=(_fits_table(fitted),) if fitted else (),
        charts=(chart,),
    )


_LAWS = {"log": "log t", "sqrt": "√t", "power": "t^p"}


def _fits_table(fitted: Sequence[FittedRun]) -> Table:
    def cells(run: FittedRun) -> tuple[str, ...]:
        log, sqrt, power = (run.fits[law] for law in _LAWS)
        least = best_law(run.fits).bic
        is_at_the_end = abs(power.exponent) > 0.999 * EXPONENTS_OF_POWER[1]
        return (
            run.label,
            str(run.seed),
            f"{run.first:,}–{run.last:,} ({run.points})",
            f"{log.slope:.3f}",
            f"{log.r2:.4f}",
            f"{sqrt.r2:.4f}",
            f"{power.r2:.4f}",
            f"{power.exponent:.3f}".replace("-", "−") + (" *" if is_at_the_end else ""),
            *(f"{run.fits[law].bic - least:.1f}" for law in _LAWS),
            " = ".join(_LAWS[law] for law in run.best),
        )

    def data(run: FittedRun) -> tuple[Cell, ...]:
        fits = [run.fits[law] for law in _LAWS]
        return (
            *(run.label, run.seed, run.first, run.last, run.points, run.fits["log"].intercept, run.fits["log"].slope),
            *(fit.r2 for fit in fits),
            run.fits["power"].exponent,
            *(fit.bic for fit in fits),
            " = ".join(run.best),
        )

    return Table(
        "Laws of the distance: ‖w_t − w_0‖ = a + b · log t against its rivals. ΔBIC is above the best, 0 for the best itself;"
        f" laws less than {TIE} apart tie (=). An exponent p with * is the last that was tried.",
        (
            "run",
            "seed",
            "updates (points)",
            "slope b",
            "R² log t",
            "R² √t",
            "R² t^p",
            "p",
            "ΔBIC log t",
            "ΔBIC √t",
            "ΔBIC t^p",
            "best",
        ),
        tuple(map(cells, fitted)),
        name="fits",
        data=csv_text(FITS_COLUMNS, map(data, fitted)),
    )


def _batch_sizes(records: Sequence[Record]) -> Section:
    return Section(
        "batch_sizes",
        "All batch sizes, before and after",
        "The paper finds that the walks of all batch sizes collapse onto one, drawn against updates, once the rate is scaled"
        " with the square root of the batch, the norm of the gradient clipped, and ghosts keep the base batch's size.",
        charts=tuple(collapse_charts(records)),
    )


def _number(k: int, of: Sequence[object]) -> str:
    """What tells the files of several charts of one kind apart."""
    return "" if len(of) == 1 else str(k + 1)
