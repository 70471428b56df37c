"""What weights say of themselves: their row of hub/results.csv and their model card. Generated, never typed.

Plain text, no torch. A card is a function of what lies in its hub folder (config.json, recipe.yaml) and of results.csv, so
that it can be made again whenever a row of its ladder changes.
"""

import csv
import functools
import io
import itertools
import json
import re
import shlex
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from gbnzoo.paper import paper_top1_percent
from gbnzoo.recipe import Recipe, load_recipe, shipped_recipes
from gbnzoo.regime import RUNGS
from gbnzoo.weights import ORGANIZATION

TIMM_COLUMNS = (
    "model",
    "img_size",
    "top1",
    "top1_err",
    "top5",
    "top5_err",
    "param_count",  # millions
    "crop_pct",
    "interpolation",
)
RESULT_COLUMNS = (
    *TIMM_COLUMNS,
    "seed",
    "rung",
    "data",
    "split",
    "batch_size",
    "ghost_batch_size",
    "updates",
    "samples",
    "train_seconds",
    "statistics",  # what BatchNorm's buffers hold
    "precision",
    "recipe",  # arguments that make `gbnzoo train` repeat the run
    "commit",
    "hardware",
    "versions",
    "sha256",  # of model.safetensors where it is published
)
_WHOLE_COLUMNS = ("seed", "batch_size", "ghost_batch_size", "updates", "samples")
_NUMBER_COLUMNS = ("top1", "top5", "train_seconds")
CROP_PCT, INTERPOLATION = 1.0, "bicubic"
"""How `gbnzoo.data` brings images to a network's input size, in timm's words."""

PAPER = "1705.08741"
_HUB_ID = re.compile(r"(?:[\w-]+/)?[\w.-]+")  # the Hub's own pattern


@dataclass(frozen=True)
class DatasetFacts:
    """How a data set is named and cited; `hub_id` is None where it comes from elsewhere."""

    title: str
    hub_id: str | None
    citation: str | None = None


_KRIZHEVSKY = """@techreport{krizhevsky2009learning,
  title       = {Learning Multiple Layers of Features from Tiny Images},
  author      = {Krizhevsky, Alex},
  institution = {University of Toronto},
  year        = {2009}
}"""
DATASETS = {
    "mnist": DatasetFacts(
        "MNIST",
        "ylecun/mnist",
        """@article{lecun1998gradient,
  title   = {Gradient-Based Learning Applied to Document Recognition},
  author  = {LeCun, Yann and Bottou, L{\\'e}on and Bengio, Yoshua and Haffner, Patrick},
  journal = {Proceedings of the IEEE},
  volume  = {86},
  number  = {11},
  pages   = {2278--2324},
  year    = {1998}
}""",
    ),
    "cifar10": DatasetFacts("CIFAR-10", "uoft-cs/cifar10", _KRIZHEVSKY),
    "cifar100": DatasetFacts("CIFAR-100", "uoft-cs/cifar100", _KRIZHEVSKY),
    "imagenet": DatasetFacts(
        "ImageNet",
        "ILSVRC/imagenet-1k",
        """@article{russakovsky2015imagenet,
  title   = {{ImageNet} Large Scale Visual Recognition Challenge},
  author  = {Russakovsky, Olga and Deng, Jia and Su, Hao and Krause, Jonathan and Satheesh, Sanjeev and Ma, Sean and
             Huang, Zhiheng and Karpathy, Andrej and Khosla, Aditya and Bernstein, Michael and Berg, Alexander C. and
             Fei-Fei, Li},
  journal = {International Journal of Computer Vision},
  volume  = {115},
  number  = {3},
  pages   = {211--252},
  year    = {2015}
}""",
    ),
    "digits": DatasetFacts(
        "scikit-learn's digits",
        None,
        """@misc{alpaydin1998optical,
  title        = {Optical Recognition of Handwritten Digits},
  author       = {Alpaydin, Ethem and Kaynak, Cenk},
  howpublished = {UCI Machine Learning Repository},
  year         = {1998},
  doi          = {10.24432/C50P49}
}""",
    ),
}
CITATIONS = (
    """@inproceedings{hoffer2017train,
  title     = {Train longer, generalize better: closing the generalization gap in large batch training of neural networks},
  author    = {Hoffer, Elad and Hubara, Itay and Soudry, Daniel},
  booktitle = {Advances in Neural Information Processing Systems},
  volume    = {30},
  year      = {2017}
}""",
    """@misc{rw2019timm,
  author       = {Wightman, Ross},
  title        = {PyTorch Image Models},
  howpublished = {\\url{https://github.com/huggingface/pytorch-image-models}},
  year         = {2019},
  doi          = {10.5281/zenodo.4414861}
}""",
)
RUNG_MEANINGS = {
    "sb": "the small batch, from which every other rung is derived",
    "lb": "a large batch and nothing else changed, which opens the generalization gap",
    "lr": "a large batch with its learning rate adapted",
    "gbn": "a large batch with its learning rate adapted and ghost batch normalization",
    "ra": "a large batch with its learning rate adapted, ghost batch normalization, and as many updates as the small batch",
}


# ---- hub/results.csv


def timm_columns(
    model: str,
    *,
    input_size: Sequence[int],
    top1_percent: float,
    top5_percent: float,
    param_count: int | None,
    crop_pct: float = CROP_PCT,
    interpolation: str = INTERPOLATION,
) -> dict[str, str]:
    """The columns with which timm's results files begin, written as timm writes them.

    Args:
        input_size: channels, height, width.
        param_count: parameters of the network; None leaves the cell empty.
    """
    return {
        "model": model,
        "img_size": str(input_size[-1]),
        "top1": f"{top1_percent:.3f}",
        "top1_err": f"{100 - top1_percent:.3f}",
        "top5": f"{top5_percent:.3f}",
        "top5_err": f"{100 - top5_percent:.3f}",
        "param_count": "" if param_count is None else f"{param_count / 1e6:.2f}",
        "crop_pct": f"{crop_pct:.3f}",
        "interpolation": interpolation,
    }


def result_row(
    recipe: Recipe,
    log_row: Mapping[str, str],
    environments: Sequence[Mapping[str, Any]],
    *,
    param_count: int | None = None,
    sha256: str = "",
) -> dict[str, str]:
    """One run's row of hub/results.csv.

    Args:
        recipe: of the run.
        log_row: the log's last row.
        environments: what env.json holds, one entry for each start of the run.
        param_count: parameters of the network; None leaves the cell empty.
        sha256: of model.safetensors; empty where the weights are not published.
    """
    data = environments[-1]["data"]
    regime = recipe.regime(data["num_samples"])

    def each(key: str) -> str:
        """What all starts of the run had, each value once."""
        return "; ".join(dict.fromkeys(_as_text(e[key]) for e in environments if e[key]))

    return {
        **timm_columns(
            recipe.name,
            input_size=data["input_size"],
            top1_percent=float(log_row["top1_percent"]),
            top5_percent=float(log_row["top5_percent"]),
            param_count=param_count,
            crop_pct=data.get("crop_pct", CROP_PCT),
            interpolation=data.get("interpolation", INTERPOLATION),
        ),
        "seed": str(recipe.seed),
        "rung": recipe.rung,
        "data": recipe.data.name,
        "split": log_row["split"],
        "batch_size": str(regime.batch_size),
        "ghost_batch_size": str(regime.ghost_batch_size),
        "updates": log_row["update"],
        "samples": log_row["samples"],
        "train_seconds": log_row["train_seconds"],
        "statistics": recipe.statistics,
        "precision": recipe.precision,
        "recipe": training_arguments(recipe),
        "commit": each("commit"),
        "hardware": each("hardware"),
        "versions": each("versions"),
        "sha256": sha256,
    }


def training_arguments(recipe: Recipe) -> str:
    """What to write after `gbnzoo train` for this run: the shipped recipe nearest to it, and each key in which it differs."""
    ours = recipe.model_dump(mode="json", exclude={"rung", "seed"})
    changes = {name: _changes(theirs, ours) for name, theirs in _shipped().items()}
    name = min(changes, key=lambda name: len(changes[name]))
    return shlex.join([f"recipes/{name}", *changes[name], "--rung", recipe.rung, "--seed", str(recipe.seed)])


def read_results(path: str | Path) -> list[dict[str, str]]:
    """The rows of a results file; none where there is no file.

    Raises:
        ValueError: if its columns are not RESULT_COLUMNS, or a row is no run's.
    """
    path = Path(path)
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8-sig") as file:  # spreadsheets begin it with a mark
        reader = csv.DictReader(file)
        columns = tuple(reader.fieldnames or ())
        if columns != RESULT_COLUMNS:
            raise ValueError(f"{path}: its columns are {','.join(columns)}; wanted {','.join(RESULT_COLUMNS)}")
        rows = []
        for row in reader:
            _check_row(row, f"{path}, line {reader.line_num}")
            rows.append(row)
    return rows


def _check_row(row: Mapping[str | None, Any], where: str) -> None:
    if None in row or None in row.values():
        raise ValueError(
            f"{where}: has {'more' if None in row else 'fewer'} than the {len(RESULT_COLUMNS)} cells wanted"
        )
    if row["rung"] not in RUNGS:
        raise ValueError(f"{where}: rung {row['rung']!r}; wanted one of {', '.join(RUNGS)}")
    for kind, wanted, columns in ((int, "a whole number", _WHOLE_COLUMNS), (float, "a number", _NUMBER_COLUMNS)):
        for column in columns:
            try:
                kind(row[column])
            except ValueError:
                raise ValueError(f"{where}: {column} {row[column]!r}; wanted {wanted}") from None


def merge_result(rows: Sequence[Mapping[str, str]], new: Mapping[str, str]) -> list[dict[str, str]]:
    """`rows` with `new` in the place of the row of its name and seed.

    A hub folder holds the weights of one seed: where `new` has their hash, rows of other seeds lose theirs.

    Raises:
        ValueError: if a row of that name was trained by another recipe: means over both would be of neither.
    """
    for row in rows:
        if row["model"] == new["model"] and not _are_of_one_recipe(row["recipe"], new["recipe"]):
            raise ValueError(
                f"{new['model']} is already the name of another recipe's results, seed {row['seed']}: `{row['recipe']}`;"
                f" this run's is `{new['recipe']}`. Train it with a tag of its own (tag=NAME), or take that row out of"
                " results.csv first"
            )
    others = [dict(row) for row in rows if (row["model"], row["seed"]) != (new["model"], new["seed"])]
    if new["sha256"]:
        others = [row | {"sha256": ""} if row["model"] == new["model"] else row for row in others]
    return in_timm_order([*others, dict(new)])


def _are_of_one_recipe(*arguments: str) -> bool:
    """Whether `training_arguments` differ in the seed alone, or mean the same by another shipped recipe."""
    without_seeds = [each.rpartition(" --seed ")[0] for each in arguments]
    if len(set(without_seeds)) == 1:
        return True
    try:
        one, other = (_recipe_of(each) for each in without_seeds)
    except (OSError, ValueError):  # a recipe of an earlier version
        return False
    return one == other


def _recipe_of(arguments: str) -> Recipe:
    file, *overrides, _, rung = shlex.split(arguments)
    return load_recipe(file, overrides, rung=rung, seed=0)


def in_timm_order(rows: Iterable[Mapping[str, str]]) -> list[Mapping[str, str]]:
    """Best top-1 first, then best top-5, then by name (and seed), as timm sorts its results files."""
    return sorted(rows, key=lambda r: (-float(r["top1"]), -float(r["top5"]), r["model"], int(r.get("seed") or 0)))


def as_csv(rows: Iterable[Mapping[str, str]], columns: Sequence[str] = RESULT_COLUMNS) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


# ---- the ladder


@dataclass(frozen=True)
class LadderRow:
    """One rung of a ladder, all seeds together.

    Args:
        ladder: network and data, e.g. "mlp5_gbn.mnist"; rungs of one ladder share it.
        split: which images were scored.
        samples: seen in training, each time counted.
        top1_percent: of the last update, one value a seed.
        train_seconds: mean over the seeds.
        hardware: what trained it; several, where seeds or stretches of a run had different ones.
        paper_top1_percent: the paper's, where the runs are of its regime (see `gbnzoo.paper`).
    """

    ladder: str
    split: str
    rung: str
    batch_size: int
    ghost_batch_size: int
    updates: int
    samples: int
    top1_percent: tuple[float, ...]
    train_seconds: float
    hardware: str
    paper_top1_percent: float | None

    @property
    def mean(self) -> float:
        return statistics.fmean(self.top1_percent)

    @property
    def std(self) -> float | None:
        """Sample standard deviation; None for one seed."""
        return statistics.stdev(self.top1_percent) if len(self.top1_percent) > 1 else None

    @property
    def spread(self) -> str:
        """Mean ± sample standard deviation (number of seeds)."""
        return spread(self.top1_percent)

    @property
    def ghosts(self) -> str:
        """How many, of how many samples."""
        return f"{self.batch_size // self.ghost_batch_size} × {self.ghost_batch_size}"

    @property
    def paper(self) -> str:
        """The paper's top-1 in a table's cell."""
        return "" if self.paper_top1_percent is None else f"{self.paper_top1_percent:.2f}"


def spread(values: Sequence[float]) -> str:
    """Mean ± sample standard deviation (number of values), as tables tell it."""
    std = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{std} ({len(values)})"


def ladder_of(row: Mapping[str, str]) -> tuple[str, str]:
    """The ladder that a row of hub/results.csv belongs to: its name less rung and batch, and the split."""
    return row["model"].removesuffix(f"_{row['rung']}{row['batch_size']}"), row["split"]


def group_by_rung(rows: Iterable[Mapping[str, str]]) -> list[LadderRow]:
    """Rows of hub/results.csv put together over seeds, in the ladder's order."""

    def rung(row: Mapping[str, str]) -> tuple:
        numbers = (int(row[key]) for key in ("batch_size", "ghost_batch_size", "updates", "samples"))
        return (*ladder_of(row), list(RUNGS).index(row["rung"]), *numbers)

    ladder = []
    for (name, split, position, *numbers), group in itertools.groupby(sorted(rows, key=rung), key=rung):
        seeds = sorted(group, key=lambda row: int(row["seed"]))
        top1_percent = tuple(float(row["top1"]) for row in seeds)
        seconds = statistics.fmean(float(row["train_seconds"]) for row in seeds)
        hardware = "; ".join(dict.fromkeys(row["hardware"] for row in seeds))
        paper = {paper_top1_percent(row) for row in seeds}
        ladder.append(
            LadderRow(
                ladder=name,
                split=split,
                rung=list(RUNGS)[position],
                **dict(zip(("batch_size", "ghost_batch_size", "updates", "samples"), numbers, strict=True)),
                top1_percent=top1_percent,
                train_seconds=seconds,
                hardware=hardware,
                paper_top1_percent=paper.pop() if len(paper) == 1 else None,
            )
        )
    return ladder


def ladder_table(ladder: Iterable[LadderRow]) -> str:
    """A Markdown table of a ladder that is also legible as it stands; the paper's figures where there are any."""
    ladder = list(ladder)
    has_paper = any(row.paper_top1_percent is not None for row in ladder)
    return markdown_table(
        (
            "rung",
            "batch",
            "ghosts",
            "updates",
            "top-1 %, mean ± std (n)",
            *(["paper"] if has_paper else []),
            "seconds",
        ),
        (
            (
                row.rung,
                row.batch_size,
                row.ghosts,
                row.updates,
                row.spread,
                *([row.paper] if has_paper else []),
                f"{row.train_seconds:.1f}",
            )
            for row in ladder
        ),
    )


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Columns padded to one width; those with words to the left, those of numbers to the right."""
    lines = [tuple(header), *(tuple(map(str, row)) for row in rows)]
    columns = list(zip(*lines, strict=True))
    widths = [max(2, *map(len, column)) for column in columns]  # the rule of a narrower one would not be Markdown
    sides = ["<" if any(cell[:1].isalpha() for cell in column[1:]) else ">" for column in columns]
    rule = [f"{'-' * (width - 1)}{'-' if side == '<' else ':'}" for width, side in zip(widths, sides, strict=True)]
    return "\n".join(
        f"| {' | '.join(f'{cell:{side}{width}}' for cell, side, width in zip(line, sides, widths, strict=True))} |"
        for line in (lines[0], rule, *lines[1:])
    )


# ---- the model card


def check_card(text: str) -> ModelCard:
    """Read a model card as the Hub does, which verifies `license`, `datasets` and `model-index`; needs no network.

    Raises:
        ValueError: for what the Hub would refuse.

    Source: huggingface/hub-docs, modelcard.md, and the errors of its validation.
    """
    card = ModelCard(text)  # raises for YAML and a model-index that huggingface_hub cannot read
    data = card.data
    results = data.eval_results or []
    wanted = {
        "`license` wanted, one of https://hf.co/docs/hub/repositories-licenses": isinstance(data.license, str),
        "`datasets` wanted as ids on the Hub": all(_HUB_ID.fullmatch(str(name)) for name in data.datasets or []),
        "`model-index` wanted with a result": bool(results),
        "`dataset.type` of each result wanted as an id": all(_HUB_ID.fullmatch(str(r.dataset_type)) for r in results),
        "`value` of each metric wanted as a number": all(isinstance(r.metric_value, int | float) for r in results),
    }
    if problems := [problem for problem, holds in wanted.items() if not holds]:
        raise ValueError(f"the model card would be refused by the Hub: {'; '.join(problems)}")
    return card


def model_card(
    config: Mapping[str, Any],
    recipe: Recipe,
    results: Sequence[Mapping[str, str]],
    recipe_yaml: str | None = None,
) -> str:
    """README.md of a hub folder.

    Args:
        config: content of its config.json.
        recipe: of the run whose weights it holds.
        results: rows of hub/results.csv, that of these weights among them.
        recipe_yaml: content of its recipe.yaml, which keys that recipes have got since do not change; None writes it anew.

    Raises:
        ValueError: if it is not among them.
    """
    row = next((r for r in results if (r["model"], r["seed"]) == (recipe.name, str(recipe.seed))), None)
    if row is None:
        raise ValueError(
            f"results.csv has no row for {recipe.name}, seed {recipe.seed}, whose weights are published; publish its run"
            " again, or remove its hub folder"
        )
    ladder = group_by_rung(r for r in results if ladder_of(r) == ladder_of(row))
    dataset = dataset_facts(recipe)
    sections = (
        _metadata(row, recipe, dataset),
        f"# Model card for {recipe.name}",
        f"A `{recipe.model.name}` image classifier, trained on {dataset.title} with gbnzoo. It is rung `{recipe.rung}` of"
        f" the ladder of [Hoffer et al. 2017](https://arxiv.org/abs/{PAPER}): {RUNG_MEANINGS[recipe.rung]}. In evaluation a"
        " ghost batch norm is a BatchNorm.",
        "## Model Details",
        _details(config, row, dataset),
        "## Training",
        _training(config, row, recipe, recipe_yaml or recipe.to_yaml()),
        "## Results",
        _results(config, row, recipe, dataset, ladder),
        "## Usage",
        _usage(config, recipe),
        "## Limits",
        _limits(config, row, dataset, ladder),
        "## Citation",
        *(f"```bibtex\n{entry}\n```" for entry in (*CITATIONS, dataset.citation) if entry),
    )
    return "\n\n".join(sections) + "\n"


def dataset_facts(recipe: Recipe) -> DatasetFacts:
    name = recipe.data.name
    return DATASETS.get(name.split("/")[-1].lower()) or DatasetFacts(name, name if "/" in name else None)


def _metadata(row: Mapping[str, str], recipe: Recipe, dataset: DatasetFacts) -> str:
    scored = {
        "task_type": "image-classification",
        "task_name": "Image Classification",
        "dataset_type": dataset.hub_id or recipe.data.name,
        "dataset_name": dataset.title,
        "dataset_split": row["split"],
        "metric_type": "accuracy",
    }
    data = ModelCardData(
        model_name=recipe.name,
        library_name="timm",
        license="apache-2.0",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "gbnzoo", "ghost-batch-norm", "large-batch", f"arxiv:{PAPER}"],
        datasets=[dataset.hub_id] if dataset.hub_id else None,
        metrics=["accuracy"],
        eval_results=[
            EvalResult(**scored, metric_name="Top-1 accuracy (%)", metric_value=float(row["top1"])),
            EvalResult(**scored, metric_name="Top-5 accuracy (%)", metric_value=float(row["top5"])),
        ],
    )
    return f"---\n{data.to_yaml()}\n---"


def _details(config: Mapping[str, Any], row: Mapping[str, str], dataset: DatasetFacts) -> str:
    channels, height, width = config["pretrained_cfg"]["input_size"]
    link = f"[{dataset.title}](https://huggingface.co/datasets/{dataset.hub_id})" if dataset.hub_id else dataset.title
    batches = "batches" if row["ghost_batch_size"] == row["batch_size"] else "ghosts"
    statistics_held = {
        "running averages": f"running averages over the {batches} it trained on",
        "recalibrated": f"recalibrated: the mean over the {batches} of its first epoch, taken with the final weights"
        " ([precise BN](https://arxiv.org/abs/2105.07576))",
    }
    facts = {
        "Model Type": "Image classification",
        "Architecture": f"`{config['architecture']}`",
        "Params (M)": row["param_count"],
        "Image size": f"{height} × {width}, {channels} channel{'s' if channels > 1 else ''}",
        "Classes": f"{config['num_classes']}: {_shortened(config['label_names'])}",
        "Dataset": link,
        "BatchNorm statistics": statistics_held[row["statistics"]],
        "Paper": f"[Train longer, generalize better](https://arxiv.org/abs/{PAPER})",
        "License": "Apache-2.0",
    }
    return "\n".join(f"- **{name}:** {fact}" for name, fact in facts.items())


def _training(config: Mapping[str, Any], row: Mapping[str, str], recipe: Recipe, recipe_yaml: str) -> str:
    num_samples = config["gbn"]["num_samples"]
    regime = recipe.regime(num_samples)
    ghosts = f"{regime.num_ghosts} ghosts of {regime.ghost_batch_size}" if regime.num_ghosts > 1 else "no ghosts"
    rate = f"{regime.lr:.4g}"
    if regime.warmup_updates:
        rate += f" after {regime.warmup_updates} updates of warm-up"
    for milestone, factor in zip(regime.milestones, regime.lr_decay, strict=True):
        rate += f", × {factor:g} at update {milestone}"
    if regime.schedule in ("cosine", "linear"):
        rate += f", {regime.schedule} decay to 0"
    optimizer = recipe.optimizer
    reset = ", reset each epoch" if optimizer.reset_momentum_each_epoch else ""
    settings = f"{optimizer.name}, momentum {optimizer.momentum:g}{reset}, weight decay {optimizer.weight_decay:g}"
    if regime.clip_grad_norm:
        settings += f", gradient norm clipped at {regime.clip_grad_norm:g}"
    facts = {
        "rung": f"`{recipe.rung}`: {RUNG_MEANINGS[recipe.rung]}",
        "batch": f"{regime.batch_size}, {ghosts}",
        "updates": f"{regime.total_updates}",
        "samples seen": f"{regime.samples_seen} ({regime.epochs:.4g} epochs of {num_samples})",
        "learning rate": rate,
        "optimizer": settings,
        "precision, seed": f"{recipe.precision}, {recipe.seed}",
        "time": f"{float(row['train_seconds']):.0f} s, evaluation included, on {row['hardware']}",
        "versions": f"{row['versions']}, commit {row['commit'] or 'unknown'}",
    }
    return "\n\n".join(
        (
            "\n".join(("| | |", "|---|---|", *(f"| {name} | {fact} |" for name, fact in facts.items()))),
            f"The same again: `gbnzoo train {row['recipe']}`. Every key of the recipe:",
            f"```yaml\n{recipe_yaml.strip()}\n```",
        )
    )


def _results(
    config: Mapping[str, Any],
    row: Mapping[str, str],
    recipe: Recipe,
    dataset: DatasetFacts,
    ladder: Sequence[LadderRow],
) -> str:
    return "\n\n".join(
        (
            f"**Top-1 {float(row['top1']):.2f} %**, top-5 {float(row['top5']):.2f} %, on the {row['split']} split of"
            f" {dataset.title} ({config['gbn']['scored_samples']} images). It is the accuracy of the last update, not the"
            " best of any.",
            "The ladder of this network and data set, over all seeds in `results.csv`; every rung adds one cure to the one"
            " above it:"
            if len({rung.rung for rung in ladder}) > 1
            else "Over all seeds in `results.csv`:",
            ladder_table(ladder),
            f"Measure it again, in a checkout of gbnzoo: `python evaluate.py hub/{recipe.name} --data {recipe.data.name}`",
        )
    )


def _usage(config: Mapping[str, Any], recipe: Recipe) -> str:
    is_ours = config["architecture"] == recipe.model.name
    mode = "L" if config["pretrained_cfg"]["input_size"][0] == 1 else "RGB"
    ghosts = config["gbn"]["ghost_batch_size"]
    return f"""In plain timm{", which gbnzoo tells the architecture" if is_ours else "; gbnzoo is not needed"}:

```python
{"import gbnzoo" if is_ours else "# no import of gbnzoo"}
import timm
from PIL import Image

model = timm.create_model("hf-hub:{ORGANIZATION}/{recipe.name}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)

image = Image.open("image.png").convert("{mode}")
probabilities = model(transform(image).unsqueeze(0)).softmax(-1)[0]
best = probabilities.argmax().item()
print(model.pretrained_cfg["label_names"][best], f"{{probabilities[best]:.1%}}")
```

With gbnzoo, which `pip install .` in a checkout installs, the name is enough. The weights are then those in the checkout's
hub/, or in the folder GBNZOO_HUB, else those of {ORGANIZATION} on the Hub, and are looked at before they are loaded;
`ghost_batch_size` is for training on:

```python
import gbnzoo
import timm

model = timm.create_model("{recipe.name}", pretrained=True, ghost_batch_size={ghosts})
```

Offline: `timm.create_model("local-dir:FOLDER", pretrained=True)` with a copy of this repo, or `HF_HUB_OFFLINE=1` once the cache
holds it. `@{config["gbn"]["sha256"][:12]}` after the Hub's name means these very weights, whatever is published here later."""


def _limits(
    config: Mapping[str, Any], row: Mapping[str, str], dataset: DatasetFacts, ladder: Sequence[LadderRow]
) -> str:
    seeds = max(len(rung.top1_percent) for rung in ladder)
    limits = [
        f"It knows the {config['num_classes']} classes of {dataset.title} and images like those; anything else gets one of"
        " these classes too, often with high confidence.",
        "Not tested: corrupted, shifted or adversarial images, calibration, fairness.",
        f"The weights are those of seed {row['seed']} alone. "
        + ("The table tells how far seeds differ." if seeds > 1 else "How far seeds differ has not been measured."),
    ]
    best = max(ladder, key=lambda rung: rung.mean)
    if best.rung != row["rung"] and best.mean > float(row["top1"]):
        limits.append(f"On this ladder rung `{best.rung}` does better: {best.mean:.2f} %.")
    return "\n".join(f"- {limit}" for limit in limits)


@functools.cache
def _shipped() -> dict[str, dict[str, Any]]:
    recipes = {name: load_recipe(path) for name, path in shipped_recipes().items()}
    return {name: recipe.model_dump(mode="json", exclude={"rung", "seed"}) for name, recipe in recipes.items()}


def _changes(theirs: Mapping[str, Any], ours: Mapping[str, Any], section: str = "") -> list[str]:
    """Overrides (`key=value`) that turn one recipe into the other."""
    changes = []
    for key in ours:
        before, after = theirs.get(key), ours[key]
        if isinstance(before, Mapping) and isinstance(after, Mapping) and before.keys() <= after.keys():
            changes += _changes(before, after, f"{section}{key}.")
        elif before != after:
            changes.append(f"{section}{key}={json.dumps(after)}")
    return changes


def _shortened(labels: Sequence[str], most: int = 10) -> str:
    shown = ", ".join(labels[:most])
    return f"{shown}, …" if len(labels) > most else shown


def _as_text(value: Any) -> str:
    return " ".join(f"{k}=={v}" for k, v in value.items()) if isinstance(value, Mapping) else str(value)
