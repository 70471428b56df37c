"""Measure the accuracy of published weights, of runs, and of anything that timm knows.

    python evaluate.py hub/mlp5_gbn.mnist_gbn4096 --data mnist --data-dir data
    python evaluate.py runs/mlp5_gbn.mnist_gbn4096-seed0 --data-dir data
    python evaluate.py 'resnet18.*' --data imagefolder --data-dir imagenet
    python evaluate.py --check --data-dir data
    python evaluate.py --sha

Weights of gbnzoo are measured as their run measured them (data, split, precision, batches of 256) unless told otherwise, and
what the run's log says then comes out exactly. Results begin with the columns of timm's results files.
"""

import contextlib
import csv
import functools
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import typer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torchvision.transforms.functional import center_crop
from tqdm import tqdm

import gbnzoo.models  # noqa: F401  (registers the architectures)
from gbnzoo import data
from gbnzoo.card import INTERPOLATION, TIMM_COLUMNS, as_csv, in_timm_order, markdown_table, read_results, timm_columns
from gbnzoo.image_files import ImageFiles, is_read_as_needed, open_images
from gbnzoo.metrics import Metrics, evaluate
from gbnzoo.pretrained import open_source
from gbnzoo.publish import load_run, load_weights
from gbnzoo.recipe import Data, Transform
from gbnzoo.run import Run
from gbnzoo.train import EVALUATION_BATCH_SIZE, plain_errors
from gbnzoo.weights import WEIGHTS_FILE, check_weights, sha256_of

COLUMNS = (*TIMM_COLUMNS, "data", "split", "samples", "loss", "precision", "batch_size", "recorded_top1")
TOLERANCE_PERCENT = 0.01
AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

load_images = functools.lru_cache(maxsize=1)(data.load_images)


class ResultsFormat(StrEnum):
    csv = "csv"
    json = "json"


@dataclass(frozen=True)
class Settings:
    """How to measure; None leaves it to the weights.

    Args:
        data, data_dir, split: which images, as `gbnzoo.data.load_images` takes them.
        batch_size: images of one forward pass.
        img_size: height and width that images are brought to.
        crop_pct: share of the resized image's side that the centre crop keeps, 0 < crop_pct <= 1.
        device: torch's name of it.
        amp: True for bf16 autocast, False for float32.
        channels_last: memory format of the model.
    """

    data: str | None = None
    data_dir: Path | None = None
    split: str | None = None
    batch_size: int = EVALUATION_BATCH_SIZE
    img_size: int | None = None
    crop_pct: float | None = None
    device: str = "cpu"
    amp: bool | None = None
    channels_last: bool = True


@dataclass(frozen=True)
class Subject:
    """A model with its weights; `gbn` is what its config.json says under that key, and empty for weights of others."""

    name: str
    model: nn.Module
    gbn: Mapping[str, Any]

    @property
    def preprocessing(self) -> dict[str, Any]:
        return timm.data.resolve_model_data_config(self.model)


def expand_names(models: Iterable[str]) -> list[str]:
    """Wildcards as the pretrained models that fit them, text files as the names in their lines, all else as it is.

    Raises:
        ValueError: if nothing fits a wildcard, or there is no such text file.
    """
    names = []
    for model in models:
        if any(character in model for character in "*?["):
            if not (fitting := timm.list_models(model, pretrained=True)):
                raise ValueError(f"{model}: timm has no pretrained model of such a name")
            names += fitting
        elif model.endswith(".txt"):
            if not Path(model).is_file():
                raise ValueError(f"{model}: no such file; wanted a text file with one name a line")
            names += Path(model).read_text(encoding="utf-8").split()
        else:
            names.append(model)
    return names


def load_subject(
    source: str, *, pretrained: bool = True, checkpoint: Path | None = None, num_classes: int | None = None
) -> Subject:
    """The model that a name on the command line means.

    Args:
        source: a hub folder, with or without `local-dir:`, a run's folder, `hf-hub:org/name`, or a name in timm.
        pretrained: False leaves a model named in timm with random weights.
        checkpoint: safetensors file with the weights of a model named in timm.
        num_classes: of a model named in timm; None is its own number.

    Raises:
        ValueError: if it is none of these, or its weights do not fit or are not to be trusted.
        FileNotFoundError: if its weights are not to be had.
    """
    folder = Path(source.removeprefix("local-dir:"))
    is_hub, is_run = ((folder / file).is_file() for file in ("config.json", "recipe.yaml"))
    is_remote = source.startswith("hf-hub:")
    if (is_hub or is_run or is_remote) and (checkpoint or not pretrained or num_classes):
        raise ValueError(
            f"{source} has weights of its own; --checkpoint, --no-pretrained and --num-classes go with a name in timm"
        )
    if is_hub or is_remote:
        # Looked at here, whoever loads them: the weights of a twin name an architecture that timm loads without us.
        opened = open_source(source if is_remote else f"local-dir:{folder}")
        gbn = json.loads((opened / "config.json").read_text(encoding="utf-8")).get("gbn", {})
        return Subject(gbn.get("name", source), _create(f"local-dir:{opened}", pretrained=True), gbn)
    if is_run:
        model, config = load_run(Run(folder))
        return Subject(folder.name, model, config["gbn"])
    if folder.exists() or not timm.is_model(source.partition(".")[0]):
        raise ValueError(
            f"{source}: neither a hub folder (it would hold config.json), nor a run's (recipe.yaml), nor a model of timm's;"
            " hf-hub:org/name is read from the Hub, and timm.list_models() knows the names"
        )
    if checkpoint:
        if not checkpoint.is_file():
            raise ValueError(f"--checkpoint {checkpoint}: no such file; wanted a safetensors file")
        check_weights(checkpoint)
    model = _create(source, pretrained=pretrained and not checkpoint, num_classes=num_classes)
    if checkpoint:
        load_weights(model, load_file(checkpoint), str(checkpoint))
    # Weights published by this project come from a hub folder, whatever name they were asked for by.
    config = Path(model.pretrained_cfg.get("file") or "").parent / "config.json"
    is_published = pretrained and not (checkpoint or num_classes) and config.is_file()
    gbn = json.loads(config.read_text(encoding="utf-8")).get("gbn", {}) if is_published else {}
    return Subject(source, model, gbn)


def _create(name: str, **options: Any) -> nn.Module:
    try:
        return timm.create_model(name, **options)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{name} cannot be loaded: {error}") from error


def measure(subject: Subject, settings: Settings) -> tuple[Metrics, dict[str, str]]:
    """Accuracy of one model: its metrics, and its row of a results file.

    Raises:
        ValueError: if model and images do not fit together.
        FileNotFoundError: if the images are not at hand.
    """
    images = _images_for(subject, settings)
    precision = {None: subject.gbn.get("precision", "fp32"), True: "bf16", False: "fp32"}[settings.amp]
    dtype = torch.float64 if precision == "fp64" else torch.float32
    device = find_device(settings.device)
    model = subject.model.to(
        device, dtype, memory_format=torch.channels_last if settings.channels_last else torch.contiguous_format
    )
    autocast = contextlib.nullcontext
    if precision in AUTOCAST_DTYPES:
        autocast = functools.partial(torch.autocast, device.type, AUTOCAST_DTYPES[precision])
    batches = tqdm(
        images.to(device).batches(settings.batch_size, dtype),
        desc=subject.name,
        total=math.ceil(len(images) / settings.batch_size),
        unit="batch",
        leave=False,
        disable=None,
    )
    metrics = evaluate(model, batches, autocast=autocast)
    gbn = subject.gbn
    is_as_recorded = (
        gbn and (images.split, precision) == (gbn["split"], gbn["precision"]) and _has_own_images(subject, settings)
    )
    row = {
        **timm_columns(
            subject.name,
            input_size=images.input_size,
            top1_percent=metrics.top1_percent,
            top5_percent=metrics.top5_percent,
            param_count=sum(p.numel() for p in model.parameters()),
            crop_pct=settings.crop_pct or subject.preprocessing["crop_pct"],
            interpolation=images.transform.interpolation if isinstance(images, ImageFiles) else INTERPOLATION,
        ),
        "data": images.name,
        "split": images.split,
        "samples": str(metrics.n),
        "loss": f"{metrics.loss:.5f}",
        "precision": precision,
        "batch_size": str(settings.batch_size),
        "recorded_top1": f"{gbn['top1_percent']:.3f}" if is_as_recorded else "",
    }
    return metrics, row


def find_device(name: str) -> torch.device:
    """torch's device of that name; `auto` is a GPU where there is one.

    Raises:
        ValueError: if nothing can be computed on it here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.ones((), device=name).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name}: cannot be used here ({reason}); wanted auto, or cpu") from error
    return torch.device(name)


def check(hub: Path, settings: Settings | None) -> bool:
    """Compare every row of hub/results.csv whose weights are at hand with them, and print the verdicts.

    Args:
        hub: holds results.csv and the hub folders.
        settings: where and how to measure again; None compares hashes alone.

    Returns:
        True if no row differs.
    """
    lines = []
    for row in read_results(hub / "results.csv"):
        verdict, remark = _check_hash(row, hub)
        if settings and verdict == "agrees":
            verdict, remark = _check_accuracy(row, hub, settings)
        lines.append((row["model"], row["seed"], row["top1"], verdict, remark))
    if lines:
        print(markdown_table(("model", "seed", "top-1", "check", ""), lines))
        counts = Counter(line[3] for line in lines)
        print(f"{counts['agrees']} agree, {counts['DIFFERS']} differ, {counts['not checked']} not checked")
    else:
        print(f"{hub / 'results.csv'} has no rows")
    return all(line[3] != "DIFFERS" for line in lines)


def _check_hash(row: Mapping[str, str], hub: Path) -> tuple[str, str]:
    weights = hub / row["model"] / WEIGHTS_FILE
    if not row["sha256"]:
        return "not checked", "its weights are not published"
    if not weights.is_file():
        return "not checked", f"its weights are not at hand: no {weights}"
    if sha256_of(weights) != row["sha256"]:
        return "DIFFERS", f"{weights} is not the file that was measured: its sha256 is another"
    return "agrees", f"sha256 {row['sha256']}"


def _check_accuracy(row: Mapping[str, str], hub: Path, settings: Settings) -> tuple[str, str]:
    try:
        metrics, _ = measure(load_subject(str(hub / row["model"])), settings)
    except (FileNotFoundError, ImportError) as error:
        return "not checked", f"its data are not at hand: {error}"
    difference = metrics.top1_percent - float(row["top1"])
    # Half of the row's last decimal is its own rounding.
    if abs(difference) > TOLERANCE_PERCENT + 0.0005:
        return "DIFFERS", f"measured {metrics.top1_percent:.3f}, {difference:+.3f} points"
    return "agrees", f"measured {metrics.top1_percent:.3f}"


def _images_for(subject: Subject, settings: Settings) -> data.ImageSet | ImageFiles:
    """The images to measure with, brought to the model's size and normalised with its constants."""
    wanted, gbn = subject.preprocessing, subject.gbn
    channels, height, width = wanted["input_size"]
    if not (settings.data or gbn):
        raise ValueError(f"{subject.name}: --data is needed, its weights do not say what they were trained on")
    if settings.img_size:
        if subject.model.pretrained_cfg.get("fixed_input_size") and (height, width) != (settings.img_size,) * 2:
            raise ValueError(
                f"{subject.name} takes images of {height} × {width} only; leave out --img-size {settings.img_size}"
            )
        height = width = settings.img_size
    is_own = _has_own_images(subject, settings)
    own = Data.model_validate(gbn["data"]) if gbn else None
    name = settings.data or own.name
    split = settings.split or gbn.get("split") or data.scored_split(name)
    crop_pct = settings.crop_pct or wanted["crop_pct"]
    if is_own and own.transform:
        images = open_images(own, split, data_dir=settings.data_dir)
    elif is_own:
        images = load_images(name, split, data_dir=settings.data_dir, **own.in_memory)
    elif is_read_as_needed(name) and height == width:
        transform = Transform(crop_pct=crop_pct, interpolation=wanted["interpolation"])
        chosen = Data(name=name, image_size=height, transform=transform)
        images = open_images(chosen, split, data_dir=settings.data_dir)
    else:
        size = math.floor(max(height, width) / crop_pct)
        images = load_images(name, split, data_dir=settings.data_dir, image_size=size)
    if subject.model.num_classes != len(images.class_names):
        raise ValueError(
            f"{subject.name} tells {subject.model.num_classes} classes apart, {images.name} has {len(images.class_names)};"
            " wanted --data with the classes it was trained on"
        )
    found = images.input_size
    if found[0] != channels:
        raise ValueError(
            f"{subject.name} takes images of {channels} channel(s), those of {images.name} have {found[0]}"
        )
    if is_own and found != (channels, height, width):
        raise ValueError(
            f"{subject.name} was trained on images of {height} × {width}, those of {images.name} are {found[1]} × {found[2]};"
            f" --img-size {height} resizes them"
        )
    if isinstance(images, ImageFiles):
        return replace(images, spec=replace(images.spec, mean=wanted["mean"], std=wanted["std"]))
    cropped = center_crop(images.images.permute(0, 3, 1, 2), [height, width]).permute(0, 2, 3, 1)
    return replace(images, images=cropped, mean=wanted["mean"], std=wanted["std"])


def _has_own_images(subject: Subject, settings: Settings) -> bool:
    """Whether the images are those its run was scored on, prepared as there (the split aside)."""
    return bool(
        subject.gbn
        and settings.data in (None, subject.gbn["data"]["name"])
        and settings.img_size is settings.crop_pct is None
    )


def write_results(path: Path, rows: Sequence[Mapping[str, str]], results_format: ResultsFormat) -> None:
    """Write rows as timm sorts them; to a CSV file that exists they are added.

    Raises:
        ValueError: if that file has other columns.
    """
    if results_format is ResultsFormat.json:
        path.write_text(json.dumps(list(rows), indent=2) + "\n", encoding="utf-8")
        return
    if path.exists():
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise ValueError(
                    f"{path}: cannot be added to, its columns are not {','.join(COLUMNS)}; wanted another file"
                )
            rows = [*reader, *rows]
    path.write_text(as_csv(in_timm_order(rows), COLUMNS), encoding="utf-8")


def main(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL...", help="hub folder, run folder, hf-hub:org/name, timm name, wildcard, .txt of names"
        ),
    ] = None,
    model: Annotated[list[str] | None, typer.Option("--model", "-m", help="one more of these")] = None,
    data: Annotated[str | None, typer.Option(help="mnist, cifar10, …, a Hub id, or imagefolder")] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="folder with the data set; else GBNZOO_DATA, else the Hub")
    ] = None,
    split: Annotated[str | None, typer.Option(help="test or validation; by default what the run was scored on")] = None,
    pretrained: Annotated[bool, typer.Option(help="load the weights of a name in timm")] = True,
    checkpoint: Annotated[Path | None, typer.Option(help="safetensors file with weights for a name in timm")] = None,
    num_classes: Annotated[int | None, typer.Option(min=1, help="of a name in timm, where not its own number")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1)] = EVALUATION_BATCH_SIZE,
    workers: Annotated[
        int | None, typer.Option("--workers", "-j", min=1, help="CPU threads; images lie in memory and need no loader")
    ] = None,
    img_size: Annotated[int | None, typer.Option(min=1, help="bring images to this height and width")] = None,
    crop_pct: Annotated[float | None, typer.Option(min=0.01, max=1, help="what the centre crop keeps")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, …")] = "auto",
    amp: Annotated[
        bool | None, typer.Option("--amp/--no-amp", help="bf16 autocast; by default as the run had it")
    ] = None,
    channels_last: Annotated[bool, typer.Option(help="memory format of the model")] = True,
    results_file: Annotated[Path | None, typer.Option(help="write the results here, or add them to this CSV")] = None,
    results_format: Annotated[ResultsFormat, typer.Option()] = ResultsFormat.csv,
    check_results: Annotated[
        bool, typer.Option("--check", help="measure results.csv again; exit code 1 if it differs")
    ] = False,
    check_hashes: Annotated[
        bool, typer.Option("--sha", help="compare weights with the hashes in results.csv; exit code 1 if one differs")
    ] = False,
    hub: Annotated[Path, typer.Option(help="holds results.csv and the hub folders, for --check and --sha")] = Path(
        "hub"
    ),
) -> None:
    """Measure top-1 and top-5 accuracy."""
    models = [*(models or ()), *(model or ())]
    if workers:
        torch.set_num_threads(workers)
    settings = Settings(data, data_dir, split, batch_size, img_size, crop_pct, device, amp, channels_last)
    with plain_errors():
        find_device(device)
        if results_file and not results_file.parent.is_dir():
            raise ValueError(
                f"--results-file {results_file}: there is no folder {results_file.parent}; wanted one that is there"
            )
        if check_results or check_hashes:
            if models or (data, split, img_size, crop_pct, amp) != (None,) * 5:
                raise ValueError(
                    "--check and --sha take every row of results.csv, and measure it as it was recorded; leave out models,"
                    " --data, --split, --img-size, --crop-pct and --amp"
                )
            raise typer.Exit(0 if check(hub, settings if check_results else None) else 1)
        if not models:
            raise ValueError("nothing to measure: name a model, a hub folder or a run, or give --check")
        options = {"pretrained": pretrained, "checkpoint": checkpoint, "num_classes": num_classes}
        rows = [measure(load_subject(name, **options), settings)[1] for name in expand_names(models)]
        shown = (
            "model",
            "data",
            "split",
            "top1",
            "top5",
            "param_count",
            "img_size",
            "samples",
            "precision",
            "recorded_top1",
        )
        print(markdown_table(shown, ([row[key] for key in shown] for row in in_timm_order(rows))))
        if results_file:
            write_results(results_file, rows, results_format)


if __name__ == "__main__":
    typer.run(main)
