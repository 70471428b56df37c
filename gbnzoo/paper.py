"""What the paper measured: Table 1 of Hoffer, Hubara and Soudry 2017 (arXiv 1705.08741), looked up for a row of results.

The figures are recipes/hoffer2017_table1.csv, one line for each network, data set and rung. They are single runs, and which
update they are of is not said: the authors' scripts keep the best epoch on the test set. Assumed there: the six small networks'
large batch is 4096, their small one 128. A line without a batch size is of whatever batch, for the source names none.
"""

import csv
import functools
import shlex
from collections.abc import Mapping

from gbnzoo.recipe import recipes_folder

TABLE = "hoffer2017_table1.csv"
SAME_REGIME = ("data.name", "evaluations", "large.batch_size", "precision")
"""Keys that may be overridden in a run that still stands beside the paper's: none of them is part of its regime, save for the
batch, and that is looked up."""


def paper_top1_percent(row: Mapping[str, str]) -> float | None:
    """The paper's top-1 beside which a run stands, or None.

    Only a run of the paper's own regime stands beside it: its network on its data at its batch, by the shipped recipe that
    bears the data set's plain name. A recipe with a `tag:` of its own (`cifar10_short`), or overridden in more than
    SAME_REGIME, has another regime.

    Args:
        row: of hub/results.csv.
    """
    data = row["data"].split("/")[-1].lower()
    architecture, _, tag = row["model"].partition(".")
    if tag != f"{data}_{row['rung']}{row['batch_size']}" or not overridden_keys(row).issubset(SAME_REGIME):
        return None
    figures = _table()
    if (figure := figures.get((architecture, data, row["rung"], row["batch_size"]))) is not None:
        return figure
    # Where the paper does not say which of a network's large batches a figure is of, it may be any of them, but no other.
    is_known = (architecture, data, "gbn", row["batch_size"]) in figures or row["rung"] == "sb"
    return figures.get((architecture, data, row["rung"], "")) if is_known else None


def overridden_keys(row: Mapping[str, str]) -> set[str]:
    """The keys in which a row's run differs from the shipped recipe nearest to it."""
    _, *words = shlex.split(row["recipe"])
    return {word.partition("=")[0] for word in words[: words.index("--rung")]}


@functools.cache
def _table() -> dict[tuple[str, str, str, str], float]:
    with open(recipes_folder() / TABLE, newline="", encoding="utf-8") as file:
        return {
            (line["architecture"], line["data"], line["rung"], line["batch_size"]): float(line["top1_percent"])
            for line in csv.DictReader(file)
        }
