"""What is on the disk of a run, finished or not: its recipe and log, from the run's own folder or the hub folder it became."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gbnzoo.card import result_row
from gbnzoo.recipe import Recipe
from gbnzoo.regime import Regime
from gbnzoo.run import Run, RunError


@dataclass(frozen=True)
class Record:
    """One run as it is read.

    Args:
        folder: of the run, or under hub/.
        recipe: of the run.
        environments: what env.json holds; of a hub folder as much of it as config.json tells.
        log: rows of log.csv in order; a cell that was not measured is None, and so is every cell of a column that was not
            logged yet when the run was made.
        layers: distance from the initial weights by layer, [(update, distance), …] each; empty where there is no layers.csv.
    """

    folder: Path
    recipe: Recipe
    environments: tuple[Mapping[str, Any], ...]
    log: tuple[Mapping[str, float | str | None], ...]
    layers: Mapping[str, tuple[tuple[int, float], ...]]

    @cached_property
    def regime(self) -> Regime:
        return self.recipe.regime(self.environments[-1]["data"]["num_samples"])

    @property
    def name(self) -> str:
        return self.recipe.name

    @property
    def ladder(self) -> str:
        """Its name without rung and batch: of the ladder that it is a rung of."""
        return self.name.removesuffix(f"_{self.recipe.rung}{self.regime.batch_size}")

    @property
    def updates(self) -> int:
        """Made so far."""
        return int(self.log[-1]["update"]) if self.log else 0

    @property
    def is_finished(self) -> bool:
        return self.updates == self.regime.total_updates

    @property
    def split(self) -> str:
        """Which images were scored."""
        return self.environments[-1]["data"]["scored_split"]

    @property
    def top1_percent(self) -> float | None:
        """At the latest evaluation."""
        return next((row["top1_percent"] for row in reversed(self.log) if row.get("top1_percent") is not None), None)

    def points(self, x: str, y: str) -> list[tuple[float, float]]:
        """The log's rows that hold finite numbers in both columns."""
        pairs = ((row.get(x), row.get(y)) for row in self.log)
        return [(a, b) for a, b in pairs if a is not None and b is not None and math.isfinite(a) and math.isfinite(b)]

    def high_rate_phase(self) -> tuple[int, int]:
        """First and last logged update of the longest stretch in which the rate is at least half its highest."""
        peak = max((rate for _, rate in self.points("update", "lr")), default=0.0)
        stretches: list[list[int]] = [[]]
        for row in self.log:
            if (row["lr"] or 0) >= peak / 2:
                stretches[-1].append(int(row["update"]))
            elif stretches[-1]:
                stretches.append([])
        longest = max(stretches, key=lambda updates: updates[-1] - updates[0] if updates else -1)
        return longest[0], longest[-1]

    def result_row(self) -> dict[str, str]:
        """Its row of hub/results.csv, but for what the weights tell.

        Raises:
            RunError: if it is not finished.
        """
        if not self.is_finished:
            raise RunError(
                f"{self.folder} is not finished (update {self.updates} of {self.regime.total_updates});"
                " `gbnzoo train … --resume` goes on with it"
            )
        last = {key: "" if value is None else str(value) for key, value in Run(self.folder).rows()[-1].items()}
        return result_row(self.recipe, last, self.environments)


def read_record(folder: str | Path) -> Record:
    """Read a run's folder, or a hub folder.

    Raises:
        RunError: if it is neither, or was not begun.
    """
    run = Run(folder)
    environments = run.environments() or _environments_of_hub_folder(run.folder)
    if not environments:
        raise RunError(
            f"{run.folder} holds neither env.json nor config.json, so nothing tells its data; `gbnzoo train … --resume`"
            " begins the run anew"
        )
    return Record(
        folder=run.folder,
        recipe=run.recipe,
        environments=tuple(environments),
        log=tuple({key: _number(key, value) for key, value in row.items()} for row in run.rows()),
        layers=_layers(run),
    )


def without_repeats(records: Iterable[Record]) -> list[Record]:
    """The same run of a hub folder and of its own counts once: the first that has most updates."""
    kept: dict[str, Record] = {}
    for record in records:
        key = record.recipe.to_yaml()
        if key not in kept or kept[key].updates < record.updates:
            kept[key] = record
    return list(kept.values())


def _environments_of_hub_folder(folder: Path) -> list[dict[str, Any]]:
    path = folder / "config.json"
    if not path.is_file():
        return []
    config = json.loads(path.read_text(encoding="utf-8"))
    ours, theirs = config["gbn"], config["pretrained_cfg"]
    data = {
        "num_samples": ours["num_samples"],
        "scored_split": ours["split"],
        **{key: theirs[key] for key in ("input_size", "crop_pct", "interpolation")},
    }
    return [{"data": data, "commit": None, "hardware": None, "versions": None}]


def _number(column: str, cell: str | None) -> float | str | None:
    if not cell:
        return None
    return cell if column == "split" else float(cell)


def _layers(run: Run) -> dict[str, tuple[tuple[int, float], ...]]:
    layers: dict[str, list[tuple[int, float]]] = {}
    for row in run.layer_rows():
        layers.setdefault(row["layer"], []).append((int(row["update"]), float(row["weight_distance"])))
    return {layer: tuple(points) for layer, points in layers.items()}
