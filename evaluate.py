"""Measure the accuracy of published weights, of runs, and of anything that timm knows.

    python evaluate.py hub/mlp5_gbn.mnist_gbn4096 --data mnist --data-dir data
    python evaluate.py runs/mlp5_gbn.mnist_gbn4096-seed0 --data-dir data
    python evaluate.py 'resnet18.*' --data imagefolder --data-dir imagenet    # the splits imagenet/train and imagenet/val
    python evaluate.py --check --data-dir data
    python evaluate.py --sha

Weights of gbnzoo are measured as their run measured them (data, split, precision, batches of 256) unless told otherwise, and
what the run's log says then comes out exactly. Weights of timm's are measured as its validate.py does: at their test size, on
classes in its order. Results begin with the columns of timm's results files.
"""

import contextlib
import csv
import functools
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import timm
import torch
import typer
from tqdm import tqdm

import gbnzoo.models  # noqa: F401  (registers the architectures)
from gbnzoo.card import INTERPOLATION, TIMM_COLUMNS, as_csv, in_timm_order, markdown_table, read_results, timm_columns
from gbnzoo.image_files import ImageFiles
from gbnzoo.metrics import Metrics, evaluate
from gbnzoo.run import RunError
from gbnzoo.subject import Settings, Subject, find_device, has_own_images, images_for, load_subject
from gbnzoo.train import EVALUATION_BATCH_SIZE, plain_errors
from gbnzoo.weights import WEIGHTS_FILE, sha256_of

COLUMNS = (*TIMM_COLUMNS, "data", "split", "samples", "loss", "precision", "batch_size", "recorded_top1")
TOLERANCE_PERCENT = 0.01
OTHER_DEVICE_TOLERANCE_PERCENT = 0.05
"""Where a run was scored on a GPU and is measured on a CPU, or the reverse. bf16 rounds otherwise there: of 10,000 images the
three networks trained on an H200 answer 0, 1 and 3 more or fewer rightly."""
AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class ResultsFormat(StrEnum):
    csv = "csv"
    json = "json"


def expand_names(models: Iterable[str]) -> list[str]:
    """Wildcards as the pretrained models that fit them, text files as the names in their lines, all else as it is.

    Raises:
        ValueError: if nothing fits a wildcard, or there is no such text file.
    """
    names = []
    for model in models:
        if any(character in model for character in "*?[") and not Path(model).exists():
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


def measure(subject: Subject, settings: Settings) -> tuple[Metrics, dict[str, str]]:
    """Accuracy of one model: its metrics, and its row of a results file.

    Raises:
        ValueError: if model and images do not fit together.
        FileNotFoundError: if the images are not at hand.
    """
    images = images_for(subject, settings)
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
        gbn and (images.split, precision) == (gbn["split"], gbn["precision"]) and has_own_images(subject, settings)
    )
    row = {
        **timm_columns(
            subject.name,
            input_size=images.input_size,
            top1_percent=metrics.top1_percent,
            top5_percent=metrics.top5_percent,
            param_count=sum(p.numel() for p in model.parameters()),
            crop_pct=settings.crop_pct or subject.preprocessing(settings)["crop_pct"],
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
    except (OSError, ImportError) as error:
        return "not checked", f"its data are not at hand: {error}"
    except (RunError, ValueError) as error:
        return "DIFFERS", f"it cannot be measured: {error}"
    difference = metrics.top1_percent - float(row["top1"])
    scored_on = row["hardware"].split("; ")[-1]  # "2 × AMD EPYC", "NVIDIA H200"
    was_on_cpu, is_on_cpu = " × " in scored_on, find_device(settings.device).type == "cpu"
    tolerance = TOLERANCE_PERCENT if was_on_cpu == is_on_cpu else OTHER_DEVICE_TOLERANCE_PERCENT
    # Half of the row's last decimal is its own rounding.
    if abs(difference) > tolerance + 0.0005:
        return "DIFFERS", f"measured {metrics.top1_percent:.3f}, {difference:+.3f} points"
    return "agrees", f"measured {metrics.top1_percent:.3f}"


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


def report(rows: Sequence[Mapping[str, str]], results_file: Path | None, results_format: ResultsFormat) -> None:
    """Print rows as timm sorts them, and write them to the file if there is one."""
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
    in_chans: Annotated[int | None, typer.Option(min=1, help="channels, of a name in timm")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1)] = EVALUATION_BATCH_SIZE,
    workers: Annotated[
        int | None, typer.Option("--workers", "-j", min=1, help="CPU threads; images lie in memory and need no loader")
    ] = None,
    img_size: Annotated[int | None, typer.Option(min=1, help="bring images to this height and width")] = None,
    use_train_size: Annotated[
        bool, typer.Option(help="images as a timm model was trained with, not as timm tests it")
    ] = False,
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
    settings = Settings(
        data, data_dir, split, batch_size, img_size, crop_pct, device, amp, channels_last, use_train_size
    )
    with plain_errors():
        find_device(device)
        if results_file and not results_file.parent.is_dir():
            raise ValueError(
                f"--results-file {results_file}: there is no folder {results_file.parent}; wanted one that is there"
            )
        if check_results or check_hashes:
            if models or use_train_size or (data, split, img_size, crop_pct, amp) != (None,) * 5:
                raise ValueError(
                    "--check and --sha take every row of results.csv, and measure it as it was recorded; leave out models,"
                    " --data, --split, --img-size, --use-train-size, --crop-pct and --amp"
                )
            raise typer.Exit(0 if check(hub, settings if check_results else None) else 1)
        if not models:
            raise ValueError("nothing to measure: name a model, a hub folder or a run, or give --check")
        options = {
            "pretrained": pretrained,
            "checkpoint": checkpoint,
            "num_classes": num_classes,
            "in_chans": in_chans,
        }
        rows = []
        try:
            for name in expand_names(models):
                rows.append(measure(load_subject(name, **options), settings)[1])
        finally:  # what was measured is told, whatever ends it
            if rows:
                report(rows, results_file, results_format)


if __name__ == "__main__":
    typer.run(main)
