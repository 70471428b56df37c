"""From a finished run to a folder under hub/, byte for byte what the Hub gets, and its row of hub/results.csv.

A folder appears whole or not at all, holds safetensors only, and has been loaded by timm from where it lay before it does.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save
from torch import Tensor, nn

import gbnzoo.models  # noqa: F401  (registers the architectures)
from gbnzoo.card import (
    CROP_PCT,
    INTERPOLATION,
    PAPER,
    as_csv,
    merge_result,
    model_card,
    read_results,
    result_row,
)
from gbnzoo.collection import collection_markdown, collection_page, collection_rows
from gbnzoo.recipe import Recipe, load_recipe
from gbnzoo.run import Run

_ASIDE, _REPLACED = ".writing-", "replaced"  # where a hub folder is made, and what it replaces lies meanwhile
_TORN = ".writing"  # behind a file's name while it is written


def publish(run_folder: str | Path, hub: str | Path = "hub") -> Path:
    """Make the hub folder of a finished run and its row in results.csv.

    The folder bears the recipe's name, and so takes the place of another seed's. A twin of one of timm's architectures
    names timm's own in config.json, so that its weights load where gbnzoo is not installed.

    Args:
        run_folder: a finished run.
        hub: holds results.csv and the hub folders; made where it is missing.

    Returns:
        The folder: README.md, config.json, log.csv, model.safetensors, recipe.yaml.

    Raises:
        RunError: if the run is not finished.
        ValueError: if its weights are not finite float32, do not fit the architecture, or do not come back through timm.
    """
    if (Path(run_folder) / "config.json").is_file():
        raise ValueError(f"{run_folder} is a hub folder already; --to ORG uploads it")
    run, hub = Run(run_folder), Path(hub)
    recipe, (checkpoint, log_row) = run.recipe, run.finished()
    _check_publishable(checkpoint.model, run.folder)
    weights = save({key: value.contiguous() for key, value in checkpoint.model.items()}, {"format": "pt"})
    sha256 = hashlib.sha256(weights).hexdigest()
    model, config = load_run(run, architecture=timm_architecture(recipe))
    config["gbn"]["sha256"] = sha256
    row = result_row(recipe, log_row, run.environments(), param_count=_param_count(model), sha256=sha256)

    folder = hub / recipe.name
    with _sole_writer(hub), tempfile.TemporaryDirectory(dir=hub, prefix=_ASIDE) as scratch:
        results = merge_result(read_results(hub / "results.csv"), row)
        # Named as it will be: timm takes everything after "local-dir:" for the path.
        aside, replaced = Path(scratch) / recipe.name, Path(scratch) / _REPLACED / recipe.name
        aside.mkdir()
        (aside / "model.safetensors").write_bytes(weights)
        (aside / "config.json").write_text(_as_json(config), encoding="utf-8")
        (aside / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
        (aside / "log.csv").write_bytes((run.folder / "log.csv").read_bytes())
        (aside / "README.md").write_text(model_card(config, recipe, results), encoding="utf-8")
        _check_loads(aside, checkpoint.model)
        replaced.parent.mkdir()
        try:
            if folder.exists():
                os.replace(folder, replaced)
            os.replace(aside, folder)
        except BaseException:
            _put_back(Path(scratch), hub)
            raise
        _replace(hub / "results.csv", as_csv(results))
        _refresh(hub)  # the ladder on other cards may have changed
    return folder


def record_result(run_folder: str | Path, hub: str | Path = "hub") -> Path:
    """Add or replace the row in results.csv of a finished run whose weights are not published; returns that file.

    Raises:
        RunError: if the run is not finished.
        ValueError: if its weights are in the hub folder, and so in the row already.
    """
    run, hub = Run(run_folder), Path(hub)
    recipe, (_, log_row) = run.recipe, run.finished()
    model, _ = load_run(run)
    row = result_row(recipe, log_row, run.environments(), param_count=_param_count(model))
    with _sole_writer(hub):
        results = read_results(hub / "results.csv")
        if any(r["sha256"] for r in results if (r["model"], r["seed"]) == (recipe.name, str(recipe.seed))):
            raise ValueError(
                f"{run.folder}: the weights of {recipe.run_name} are published in {hub / recipe.name}; publish the run"
                " again instead, or remove that folder and its row"
            )
        _replace(hub / "results.csv", as_csv(merge_result(results, row)))
        _refresh(hub)
    return hub / "results.csv"


def load_run(run: Run, architecture: str | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """The network of a finished run after its last update, and the config.json that describes it.

    Args:
        run: a finished run.
        architecture: timm name to build, where it is not the recipe's own.

    Raises:
        RunError: if the run is not finished.
        ValueError: if timm does not know the architecture, or the weights do not fit it.
    """
    recipe, (checkpoint, log_row) = run.recipe, run.finished()
    data = run.environments()[-1]["data"]
    architecture = architecture or recipe.model.name
    if not timm.is_model(architecture):
        raise ValueError(
            f"{run.folder}: model.name {architecture!r} is no architecture that timm or gbnzoo knows; was it renamed since?"
        )
    model = timm.create_model(
        architecture,
        num_classes=len(data["class_names"]),
        in_chans=data["input_size"][0],
        pretrained_cfg_overlay=_preprocessing(data),
        **recipe.model.args,
    )
    load_weights(model, checkpoint.model, f"{run.folder}, update {checkpoint.update}")
    return model, _timm_config(model, architecture, recipe, log_row, data)


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Load a state dict that must have the model's keys and shapes; the model takes over its dtypes.

    Raises:
        ValueError: naming what is missing, unexpected or of another shape.
    """
    wanted = model.state_dict()
    problems = {
        "missing": wanted.keys() - weights.keys(),
        "unexpected": weights.keys() - wanted.keys(),
        "of another shape": {k for k in wanted.keys() & weights.keys() if wanted[k].shape != weights[k].shape},
    }
    if any(problems.values()):
        found = "; ".join(f"{what}: {_listed(keys)}" for what, keys in problems.items() if keys)
        raise ValueError(f"{source}: its weights do not fit {type(model).__name__} ({found})")
    model.load_state_dict(weights, assign=True)


def timm_architecture(recipe: Recipe) -> str:
    """timm's own architecture where the recipe's is a twin of one, else the recipe's."""
    original = recipe.model.name.removesuffix("_gbn")
    return original if timm.is_model(original) else recipe.model.name


def _timm_config(
    model: nn.Module, architecture: str, recipe: Recipe, log_row: Mapping[str, str], data: Mapping[str, Any]
) -> dict[str, Any]:
    """config.json as timm's `save_config_for_hf` writes it, with what concerns us under `gbn`."""
    regime = recipe.regime(data["num_samples"])
    config = {
        "architecture": architecture,
        "num_classes": len(data["class_names"]),
        "num_features": model.num_features,
        "label_names": data["class_names"],
        "model_args": recipe.model.args,
        "pretrained_cfg": {
            "tag": recipe.name.partition(".")[2],
            "custom_load": False,
            **_preprocessing(data),
            "fixed_input_size": model.pretrained_cfg.get("fixed_input_size", False),
            "num_classes": len(data["class_names"]),
            "first_conv": model.pretrained_cfg.get("first_conv"),
            "classifier": model.pretrained_cfg.get("classifier"),
            "license": "apache-2.0",
            "paper_ids": f"arXiv:{PAPER}",
            "paper_name": "Train longer, generalize better",
        },
        "gbn": {
            "name": recipe.name,
            "seed": recipe.seed,
            "rung": recipe.rung,
            "batch_size": regime.batch_size,
            "ghost_batch_size": regime.ghost_batch_size,
            "updates": regime.total_updates,
            "precision": recipe.precision,
            "statistics": recipe.statistics,
            "data": recipe.data.model_dump(mode="json", exclude_none=True),
            "num_samples": data["num_samples"],
            "split": log_row["split"],
            "scored_samples": data["scored_samples"],
            "top1_percent": float(log_row["top1_percent"]),
        },
    }
    return {key: value for key, value in config.items() if value not in ({}, None)}


def _preprocessing(data: Mapping[str, Any]) -> dict[str, Any]:
    """What the run did to its images, in the words of timm's pretrained cfg."""
    return {
        "input_size": tuple(data["input_size"]),
        "interpolation": data.get("interpolation", INTERPOLATION),
        "crop_pct": data.get("crop_pct", CROP_PCT),
        "crop_mode": "center",
        "mean": tuple(data["mean"]),
        "std": tuple(data["std"]),
    }


def _check_publishable(weights: Mapping[str, Tensor], source: Path) -> None:
    floating = {key: value for key, value in weights.items() if value.is_floating_point()}
    if bad := [key for key, value in floating.items() if not value.isfinite().all()]:
        raise ValueError(f"{source}: not published, NaN or infinity in {_listed(bad)}; train it again at a lower rate")
    if bad := [key for key, value in floating.items() if value.dtype != torch.float32]:
        raise ValueError(
            f"{source}: not published, {_listed(bad)} in {weights[bad[0]].dtype}; timm loads float32, so the run must have"
            " `precision` fp32 or bf16"
        )


def _check_loads(folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Load the folder as a user will.

    Raises:
        ValueError: if that gives other weights.
    """
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).state_dict()
    if changed := [key for key in weights if not torch.equal(loaded[key], weights[key])]:
        raise ValueError(f"{folder.name}: not published, timm loads {_listed(changed)} other than the run left it")


def refresh(hub: str | Path = "hub") -> None:
    """Write every card and the collection's index again, from results.csv and what lies in the hub folders.

    Raises:
        FileNotFoundError: if there is no such hub.
        ValueError: if a hub folder has no row in results.csv, or a file of its is damaged.
    """
    if not Path(hub).is_dir():
        raise FileNotFoundError(f"{hub}: no such folder; wanted the hub/ that `gbnzoo publish RUN` makes, as --hub")
    with _sole_writer(Path(hub)):
        _refresh(Path(hub))


def _refresh(hub: Path) -> None:
    results = read_results(hub / "results.csv")
    for path in hub.glob("*/config.json"):
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}); publish its run again, or remove the folder") from None
        if not isinstance(config, dict) or "gbn" not in config:
            continue  # somebody else's
        recipe = path.with_name("recipe.yaml")
        text = recipe.read_text(encoding="utf-8")
        _replace(path.with_name("README.md"), model_card(config, load_recipe(recipe), results, text))
    rows = collection_rows(results, hub)
    _replace(hub / "README.md", collection_markdown(rows))
    _replace(hub / "index.html", collection_page(rows))


@contextlib.contextmanager
def _sole_writer(hub: Path) -> Iterator[None]:
    """Wait until no other process writes to the hub, made where it is missing, and hold it; a process that dies lets go.

    What a kill left half-written is removed. Where the file system knows no locks, nothing is held.
    """
    hub.mkdir(parents=True, exist_ok=True)
    held = os.open(hub, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(held, fcntl.LOCK_EX)
        for scratch in hub.glob(_ASIDE + "*"):
            _put_back(scratch, hub)
            shutil.rmtree(scratch)
        for torn in [*hub.glob("*" + _TORN), *hub.glob("*/*" + _TORN)]:
            torn.unlink()
        yield
    finally:
        os.close(held)


def _put_back(scratch: Path, hub: Path) -> None:
    """The folder that was about to be replaced, where nothing has taken its place."""
    for replaced in (scratch / _REPLACED).glob("*"):
        if not (hub / replaced.name).exists():
            os.replace(replaced, hub / replaced.name)


def _replace(path: Path, text: str) -> None:
    aside = path.with_name(path.name + _TORN)
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def _param_count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _as_json(config: Mapping[str, Any]) -> str:
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def _listed(keys: set[str] | list[str], most: int = 5) -> str:
    shown = ", ".join(sorted(keys)[:most])
    return f"{shown} and {len(keys) - most} more" if len(keys) > most else shown
