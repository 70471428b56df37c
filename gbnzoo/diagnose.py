"""`gbnzoo diagnose CHECKPOINT`: what the training loss is like around a checkpoint, as table, JSON, CSV and picture.

Everything is measured in float32, whatever the run's precision, with dropout off, on training images as the recipe augments
them and with its loss (weight decay left out). Sharpness, Hessian and potential take BatchNorm by its running statistics, as in
eval, unless ghosts are asked for; gradient noise always takes it by those of each ghost, as in training.
"""

import csv
import functools
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gbnzoo.card import markdown_table
from gbnzoo.data import GlobalBatches, ImageSet
from gbnzoo.diagnostics import (
    Batch,
    Estimate,
    Landscape,
    NoiseScale,
    Potential,
    Sharpness,
    Spectrum,
    fit_potential,
    loss_differences,
    noise_scale,
    sharpness,
    top_eigenvalues,
)
from gbnzoo.image_files import ImageFiles
from gbnzoo.norm import convert_ghost_batchnorm
from gbnzoo.pretrained import hub_folder, open_source
from gbnzoo.publish import load_weights
from gbnzoo.recipe import Recipe, load_recipe
from gbnzoo.run import Run, RunError
from gbnzoo.subject import Settings, find_device, images_for, load_subject
from gbnzoo.trainer import EVALUATION_BATCH_SIZE, build_model, load_sets, sample_losses
from gbnzoo.weights import WEIGHTS_FILE

PARTS = ("noise_scale", "hessian", "sharpness", "potential")
DEFAULT_GHOST_BATCH_SIZE = 32  # of weights that do not say
NUM_DISTANCES = 10

Statistics = Literal["running", "ghosts"]


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits, labels, reduction="none")


@dataclass(frozen=True)
class Subject:
    """Weights to be diagnosed.

    Args:
        name: for titles and file names.
        model: the network, float32, with these weights; to diagnose it makes its BatchNorm layers ghost layers.
        train_set: what it was trained on.
        augment: how, a key of `gbnzoo.data.AUGMENTATIONS`.
        sample_losses: logits and labels to the loss of each sample.
        ghost_batch_size: of the recipe's large batches.
        batch_size: that it was trained with, where known.
        lr_scaling: the rule of the recipe's large batches, where known.
        update: updates made so far, where known.
        initial: its weights before the first, flat and in the order of its parameters, and where they are from.
        reach: how far from there it, or the run's log, has come.
    """

    name: str
    model: nn.Module
    train_set: ImageSet | ImageFiles
    augment: str = "none"
    sample_losses: Callable[[Tensor, Tensor], Tensor] = _cross_entropy
    ghost_batch_size: int = DEFAULT_GHOST_BATCH_SIZE
    batch_size: int | None = None
    lr_scaling: str = "sqrt"
    update: int | None = None
    initial: tuple[Tensor, str] | None = None
    reach: float | None = None


@dataclass(frozen=True)
class Diagnosis:
    """What was measured; a part that was not asked for is None. `settings` are plain values for JSON."""

    name: str
    update: int | None
    settings: Mapping[str, Any]
    num_weights: int
    weight_norm: float
    weight_distance: float | None
    initial: str | None
    loss: float
    batch_size: int | None
    lr_scaling: str
    noise_scale: NoiseScale | None = None
    hessian: Spectrum | None = None
    relative_hessian: Spectrum | None = None
    sharpness: Sharpness | None = None
    sharpness_subspace: Sharpness | None = None
    potential: Potential | None = None


# ---- what is diagnosed


def find_subject(source: str, data_name: str | None = None, data_dir: str | Path | None = None) -> Subject:
    """The weights that a name on the command line means, and their training images.

    Args:
        source: a run's folder (its last checkpoint, finished or not), a file of its checkpoints/, or what evaluate.py takes: a
            hub folder, `hf-hub:org/name`, a name in timm.
        data_name: training images, where not those of the recipe; needed where there is no recipe.
        data_dir: as `gbnzoo.data.load_images` takes it.

    Raises:
        ValueError: if it is none of these, or weights and images do not fit together.
        RunError: if the run has no such checkpoint.
        OSError: if weights or images are not to be had.
    """
    path = Path(source.removeprefix("local-dir:"))
    if path.is_file() or path.suffix == ".safetensors":
        if path.parent.name != "checkpoints" or not (path.parents[1] / "recipe.yaml").is_file():
            raise ValueError(
                f"{source}: a file of weights says neither their network nor their data; wanted one in a run's checkpoints/,"
                " or a run's folder, a hub folder, a name in timm"
            )
        return _of_run(Run(path.parents[1]), path, data_name, data_dir)
    published = hub_folder() / source
    for folder in (path, published):
        if (folder / "config.json").is_file() and (folder / "recipe.yaml").is_file():
            return _of_hub_folder(folder, data_name, data_dir)
    if (path / "recipe.yaml").is_file():
        return _of_run(Run(path), None, data_name, data_dir)

    found = load_subject(source)
    settings = Settings(data_name, Path(data_dir) if data_dir else None, split="train", use_train_size=True)
    train_set = images_for(found, settings)
    gbn = found.gbn
    return Subject(
        found.name,
        found.model.float(),
        train_set,
        augment=gbn["data"].get("augment", "none") if gbn and data_name in (None, gbn["data"]["name"]) else "none",
        ghost_batch_size=gbn.get("ghost_batch_size", DEFAULT_GHOST_BATCH_SIZE),
        batch_size=gbn.get("batch_size"),
        update=gbn.get("updates"),
    )


def _of_run(run: Run, path: Path | None, data_name: str | None, data_dir: str | Path | None) -> Subject:
    checkpoint = run.read_checkpoint(path) if path else run.latest_checkpoint()
    if checkpoint is None:
        raise RunError(f"{run.folder} has no checkpoint yet; `gbnzoo train … --resume` goes on with it")
    initial = run.initial_weights() if run.has_initial else None
    return _of_recipe(
        run.recipe,
        f"{run.folder.resolve().name}-update{checkpoint.update}",
        checkpoint.model,
        data_name,
        data_dir,
        update=checkpoint.update,
        initial=initial and (initial, "checkpoints/initial.safetensors"),
        logged_distances=[row["weight_distance"] for row in run.rows()],
    )


def _of_hub_folder(folder: Path, data_name: str | None, data_dir: str | Path | None) -> Subject:
    opened = open_source(f"local-dir:{folder}")
    recipe = load_recipe(opened / "recipe.yaml")
    gbn = json.loads((opened / "config.json").read_text(encoding="utf-8")).get("gbn", {})
    weights = load_file(opened / WEIGHTS_FILE)
    return _of_recipe(recipe, folder.resolve().name, weights, data_name, data_dir, update=gbn.get("updates"))


def _of_recipe(
    recipe: Recipe,
    name: str,
    weights: Mapping[str, Tensor],
    data_name: str | None,
    data_dir: str | Path | None,
    *,
    update: int | None,
    initial: tuple[Mapping[str, Tensor], str] | None = None,
    logged_distances: Sequence[str] = (),
) -> Subject:
    data = recipe.data
    if data_name and data_name != data.name:
        data = data.model_copy(update={"name": data_name})
    train_set, _ = load_sets(recipe.model_copy(update={"data": data}), data_dir)
    model = build_model(recipe, train_set, recipe.large.ghost_batch_size)
    if initial is None:
        # A function of the seed, on one version of torch at least.
        initial = (
            {key: value.clone() for key, value in model.state_dict().items()},
            f"built again from seed {recipe.seed}",
        )
    load_weights(model, {key: value.clone() for key, value in weights.items()}, name)
    model.float()
    keys = [key for key, parameter in model.named_parameters() if parameter.requires_grad]
    start = torch.cat([initial[0][key].float().flatten() for key in keys])
    regime = recipe.regime(len(train_set))
    return Subject(
        name,
        model,
        train_set,
        augment=data.augment,
        sample_losses=functools.partial(sample_losses, recipe),
        ghost_batch_size=recipe.large.ghost_batch_size,
        batch_size=regime.batch_size,
        lr_scaling=recipe.large.lr_scaling,
        update=update,
        initial=(start, initial[1]),
        reach=max((float(d) for d in logged_distances if d), default=None),
    )


# ---- the diagnosis


def diagnose(
    subject: Subject,
    *,
    only: Sequence[str] = PARTS,
    samples: int | None = None,
    ghosts: int | None = None,
    ghost_batch_size: int | None = None,
    statistics: Statistics = "running",
    eigenvalues: int = 3,
    epsilon: float = 1e-3,
    subspace: int = 100,
    directions: int = 32,
    distance: float | None = None,
    batch_size: int | None = None,
    device: str = "cpu",
    seed: int = 0,
    report: Callable[[str], None] = lambda part: None,
) -> Diagnosis:
    """Measure what is asked for.

    Costs, in passes over an image (a gradient is about 3 forward passes, a Hessian product 7): potential
    10 · directions · samples forward; sharpness about 50 · samples gradients, in the subspace as many and 2 · 50 products
    with a matrix of `subspace` × weights, which is held in memory; hessian about (14 + 4 · eigenvalues) · samples Hessian
    products at least; noise_scale 2 · ghosts · ghost_batch_size gradients.

    Args:
        only: which of PARTS.
        samples: training images that the loss is the mean over, for all but the noise scale; None is 2,048, or all.
        ghosts: for the noise scale, at least 3; None is 64, or as many as there are training images for.
        ghost_batch_size: samples of a ghost; None is the recipe's, or 32.
        statistics: that BatchNorm normalises by, except for the noise scale.
        eigenvalues: how many of the Hessian's largest; besides, the largest of N·H·N, N holding for each weight the norm of
            its tensor.
        epsilon: of the sharpness.
        subspace: random directions of its variant.
        directions: of the potential, at least 2.
        distance: the largest, its distances being spaced evenly in the logarithm from a hundredth of it on. None is how far
            the weights, or the run's others, are from where they started; where that is not known, a tenth of their norm.
        batch_size: for the advice; None is that of the run.
        device: torch's name of it, or "auto".
        seed: fixes images, augmentation, directions and starts; each part is the same with and without the others.
        report: is called with each part's name before it is measured.

    Raises:
        ValueError: if a number is impossible, or the loss around the weights cannot be measured.
    """
    if distance is not None and not (math.isfinite(distance) and distance > 0):
        raise ValueError(f"--distance {distance:g}: wanted a number above 0")
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise ValueError(f"--epsilon {epsilon:g}: wanted a number above 0")
    if unknown := [part for part in only if part not in PARTS]:
        raise ValueError(f"--only {','.join(only)}: {unknown[0]!r} is none of {', '.join(PARTS)}")
    where = find_device(device)
    size = ghost_batch_size or subject.ghost_batch_size
    piece = size if statistics == "ghosts" else EVALUATION_BATCH_SIZE
    if samples is None:
        samples = min(2048, len(subject.train_set))
        samples -= samples % size if statistics == "ghosts" else 0
    if statistics == "ghosts" and samples % size:
        fits = " or ".join(f"{n:,}" for n in (samples - samples % size, samples - samples % size + size) if n)
        raise ValueError(f"--samples {samples} makes no whole ghosts of {size}; wanted {fits}, or --ghost-batch-size")
    if samples > len(subject.train_set):
        raise ValueError(f"--samples {samples} of {len(subject.train_set):,} training images; wanted at most so many")
    if ghosts is None:
        ghosts = min(64, len(subject.train_set) // size)
    if "noise_scale" in only and ghosts * size > len(subject.train_set):
        raise ValueError(
            f"--ghosts {ghosts} of {size} are {ghosts * size:,} samples of {len(subject.train_set):,} training images; wanted"
            f" at most {len(subject.train_set) // size} of {size}, since an image that is drawn twice is no new sample"
        )

    images = subject.train_set.to(where)
    # Every batch is then one ghost, whatever the layers were built with.
    model = convert_ghost_batchnorm(subject.model, size).to(where)
    cut = [torch.arange(start, min(start + piece, samples)) for start in range(0, samples, piece)]
    batches = list(next(_updates(images, subject.augment, samples, cut, seed, 1)))
    landscape = Landscape(model, batches, subject.sample_losses, takes_batch_statistics=statistics == "ghosts")
    point = landscape.point
    moved = None
    if subject.initial:
        moved = torch.linalg.vector_norm(point.double().cpu() - subject.initial[0].double()).item()
    results: dict[str, Any] = {}

    def generator(part: str) -> torch.Generator:
        return torch.Generator().manual_seed(seed * len(PARTS) + PARTS.index(part))

    if "noise_scale" in only:
        report("noise_scale")
        each = _Ghosts(functools.partial(_updates, images, subject.augment, size, [torch.arange(size)], seed, ghosts))
        noisy = Landscape(model, each, subject.sample_losses, takes_batch_statistics=True)
        results["noise_scale"] = noise_scale(noisy.batch_gradients, size)
    if "hessian" in only:
        report("hessian")
        results["hessian"] = top_eigenvalues(landscape.hessian_product, point, generator("hessian"), count=eigenvalues)
        norms = torch.cat([p.detach().norm().expand(p.numel()) for p in landscape.parameters])
        results["relative_hessian"] = top_eigenvalues(
            lambda vector: norms * landscape.hessian_product(norms * vector), point, generator("hessian"), count=1
        )
    if "sharpness" in only:
        report("sharpness")
        search = functools.partial(
            sharpness, landscape.loss_and_gradient, point, generator("sharpness"), epsilon=epsilon
        )
        results["sharpness"] = search()
        results["sharpness_subspace"] = search(subspace=subspace)
    if "potential" in only:
        report("potential")
        norm = torch.linalg.vector_norm(point, dtype=torch.float64).item()
        reach = distance or moved or subject.reach or 0.1 * norm
        distances = np.geomspace(reach / 100, reach, NUM_DISTANCES).tolist()
        differences = loss_differences(landscape.loss, point, distances, directions, generator("potential"))
        results["potential"] = fit_potential(distances, differences, np.random.default_rng(seed))
    return Diagnosis(
        name=subject.name,
        update=subject.update,
        settings={
            "data": subject.train_set.name,
            "augment": subject.augment,
            "num_images": len(subject.train_set),
            "samples": samples,
            "statistics": statistics,
            "ghost_batch_size": size,
            "seed": seed,
            "epsilon": epsilon,
            "subspace": subspace,
            "device": str(where),
            "torch": torch.__version__,
        },
        num_weights=point.numel(),
        weight_norm=torch.linalg.vector_norm(point, dtype=torch.float64).item(),
        weight_distance=moved,
        initial=subject.initial and subject.initial[1],
        loss=landscape.loss(point),
        batch_size=batch_size or subject.batch_size,
        lr_scaling=subject.lr_scaling,
        **results,
    )


@dataclass(frozen=True)
class _Ghosts:
    """The same batches each time they are gone through, made as they are needed."""

    updates: Callable[[], Iterator[Iterator[Batch]]]

    def __iter__(self) -> Iterator[Batch]:
        for update in self.updates():
            yield from update


def _updates(
    images: ImageSet | ImageFiles, augment: str, samples: int, positions: Sequence[Tensor], seed: int, count: int
) -> Iterator[Iterator[Batch]]:
    """Batches of the first `count` times `samples` training images, in the order and with the augmentation of a seed."""
    micro_batches = images.micro_batches(GlobalBatches(len(images), samples, seed), positions, augment, torch.float32)
    for update in range(count):
        yield ((batch.images, batch.labels) for batch in micro_batches.at(update))


# ---- what is said of it


def _advice(diagnosis: Diagnosis) -> str:
    return advice(
        diagnosis.noise_scale.scale,
        diagnosis.batch_size,
        lr_scaling=diagnosis.lr_scaling,
        num_images=diagnosis.settings["num_images"],
    )


def advice(scale: Estimate, batch_size: int | None, *, lr_scaling: str = "sqrt", num_images: int | None = None) -> str:
    """What the noise scale says of a batch, by the model of its source: S = S_min(1 + B_crit/B) updates, and so
    E = E_min(1 + B/B_crit) samples, B_crit being the noise scale.

    A batch of half of it takes 1.5 times as many samples as the smallest, one of as many twice as many: the larger batch that
    is named is the largest power of two times yours within half of it. Where no upper end was found, the lower end stands
    for the scale.

    Args:
        scale: in samples.
        batch_size: yours; None speaks of no batch in particular.
        lr_scaling: the rule by which the rate would grow.
        num_images: no batch larger than this is named.

    Source: McCandlish et al. 2018, arXiv 1812.06162, section 2.3.
    """
    if math.isinf(scale.low):
        return "noise alone was found, no gradient; more --ghosts may tell"
    if scale.low < 1 and math.isinf(scale.high):
        return "so few ghosts tell nothing of the noise scale; more --ghosts may"
    if math.isinf(scale.high):
        limit = scale.low
        beyond = f"where you mostly pay was not found, but not below {_short(limit)} (95 %); more --ghosts may tell"
    else:
        limit = scale.value
        beyond = f"beyond {_short(limit)} (95 %: {_short(scale.low)} to {_short(scale.high)}) you mostly pay"
    if batch_size is None:
        return beyond
    most = min(limit / 2, num_images or math.inf)
    if most >= 2 * batch_size:
        larger = batch_size * 2 ** math.floor(math.log2(most / batch_size))
        updates = (1 + limit / larger) / (1 + limit / batch_size)
        samples = (1 + larger / limit) / (1 + batch_size / limit)
        rate = {"sqrt": math.sqrt(larger / batch_size), "linear": larger / batch_size}.get(lr_scaling)
        at = f" at {lr_scaling}-lr (× {rate:.3g})" if rate else ""
        return (
            f"your batch {batch_size:,} could be {larger:,}{at}, with {updates:.2g} times the updates and {samples:.2g} times"
            f" the samples; {beyond}"
        )
    if batch_size <= limit or math.isinf(scale.high):
        return f"your batch {batch_size:,} is about as large as is known to pay; {beyond}"
    samples = (1 + batch_size / limit) / 2
    return (
        f"your batch {batch_size:,} takes {samples:.2g} times the samples of a batch of {_short(limit)}, and saves less than"
        f" half of its updates; {beyond}"
    )


def _short(number: float) -> str:
    """Two digits of a positive number, as people write them: 9,100."""
    if math.isinf(number):
        return "no end"
    if number < 10:
        return f"{number:.2g}"
    digits = max(0, math.floor(math.log10(number)) - 1)
    return f"{round(number / 10**digits) * 10**digits:,}"


def as_text(diagnosis: Diagnosis) -> str:
    """A table of what was measured, and what follows from the noise scale."""
    settings = diagnosis.settings
    rows: list[tuple[str, str, str, str]] = []

    def add(what: str, value: Estimate | float, remark: str = "") -> None:
        if isinstance(value, Estimate):
            low, high = ("no end" if math.isinf(end) else f"{end:.4g}" for end in (value.low, value.high))
            number = "∞" if math.isinf(value.value) else f"{value.value:.4g}"
            rows.append((what, number, f"{low} to {high}", remark))
        else:
            rows.append((what, f"{value:.4g}", "", remark))

    add("training loss", diagnosis.loss)
    add("‖w‖", diagnosis.weight_norm, f"{diagnosis.num_weights:,} weights")
    if diagnosis.weight_distance is not None:
        add("‖w − w_0‖", diagnosis.weight_distance, f"w_0 {diagnosis.initial}")
    if noise := diagnosis.noise_scale:
        add("‖G‖²", noise.squared_gradient, f"{noise.ghosts} ghosts of {noise.ghost_batch_size}")
        add("tr Σ", noise.trace, "of one sample's gradient")
        add("noise scale", noise.scale, "samples; the critical batch")
    if diagnosis.hessian:
        for i, value in enumerate(diagnosis.hessian.eigenvalues, 1):
            add(f"Hessian λ{i}", value, f"{diagnosis.hessian.products} products" if i == 1 else "")
    if diagnosis.relative_hessian:
        # BatchNorm undoes a scaling of the layer before it, which changes λ and the sharpness's box, but not this.
        add(
            "relative λ1",
            diagnosis.relative_hessian.eigenvalues[0],
            "each tensor in units of its norm: unmoved by a scale that BatchNorm undoes",
        )
    if diagnosis.sharpness:
        add("sharpness, all weights", diagnosis.sharpness.percent, f"%, ε = {settings['epsilon']:g}")
        remark = f"%, ε = {settings['epsilon']:g}, {settings['subspace']} directions"
        add("sharpness, subspace", diagnosis.sharpness_subspace.percent, remark)
    if potential := diagnosis.potential:
        near, far = potential.distances[[0, -1]]
        # What the intervals held on landscapes of known α: LOG.md.
        add(
            "α of the deviation",
            potential.alpha_of_std,
            f"distances {near:.3g} to {far:.3g}, {len(potential.differences)} directions; held a known α at 17 of 20 points",
        )
        add("α", potential.alpha, "of this point; held a known α at 13 of 20")
        add("α, nearer half", potential.alpha_near)
        add("α, farther half", potential.alpha_far)
    at = f", update {diagnosis.update:,}" if diagnosis.update is not None else ""
    by = {"running": "its running statistics", "ghosts": f"ghosts of {settings['ghost_batch_size']}"}
    head = (
        f"{diagnosis.name}{at}: {settings['samples']:,} training images of {settings['data']}, seed {settings['seed']};"
        f" float32, dropout off, BatchNorm by {by[settings['statistics']]}"
    )
    if diagnosis.noise_scale:
        head += f" (gradient noise: by ghosts of {settings['ghost_batch_size']})"
    text = f"{head}\n\n{markdown_table(('', 'value', '95 % interval', ''), rows)}"
    if diagnosis.noise_scale:
        said = _advice(diagnosis)
        text += f"\n\nat this point of training: {said}"
    return text


def write(diagnosis: Diagnosis, out: str | Path) -> list[Path]:
    """Write diagnosis.json, and of the potential its curve as potential.csv and potential.png; `out` is made where missing.

    JSON has no infinity: null stands for it.

    Returns:
        The files.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    content = _plain(diagnosis)
    if diagnosis.noise_scale:
        content["advice"] = _advice(diagnosis)
    files = [out / "diagnosis.json"]
    files[0].write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if potential := diagnosis.potential:
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(("distance", "std", "rms", "mean"))
        table.writerows(zip(potential.distances, potential.std, potential.rms, potential.mean, strict=True))
        files += [out / "potential.csv", out / "potential.png"]
        files[1].write_text(text.getvalue(), encoding="utf-8")
        plot_potential(potential, files[2], diagnosis.name)
    return files


def _plain(value: Any) -> Any:
    """Dataclasses as dicts and arrays as lists, with null for what is not finite."""
    if hasattr(value, "__dataclass_fields__"):
        return {key: _plain(getattr(value, key)) for key in value.__dataclass_fields__}
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value


def plot_potential(potential: Potential, path: str | Path, title: str) -> None:
    """Draw the loss's deviation over directions, and its root mean square difference, against distance, as a PNG."""
    from matplotlib.figure import Figure

    ink = "#333333"
    figure = Figure(figsize=(6.4, 4.0), dpi=200, layout="constrained")
    axes = figure.subplots()
    d = potential.distances
    for values, alpha, color, marker, label in (
        (potential.rms, potential.alpha, "#0072b2", "o", "root of E(L(w + d·v) − L(w))²"),
        (potential.std, potential.alpha_of_std, "#d55e00", "s", "standard deviation over directions v"),
    ):
        slope, intercept = alpha.value / 2, np.log(values).mean() - alpha.value / 2 * np.log(d).mean()
        said = f"{label}: α = {alpha.value:.2f} ({alpha.low:.2f} to {alpha.high:.2f})"
        axes.loglog(d, values, marker, color=color, markersize=4.5, label=said)
        axes.loglog(d, np.exp(intercept) * d**slope, color=color, linewidth=1.0, alpha=0.7)
    axes.set_xlabel("distance d from the weights", color=ink)
    axes.set_ylabel("change of the training loss (nats)", color=ink)
    axes.set_title(
        f"{title}, {len(potential.differences)} directions; lines: d^(α/2)", loc="left", fontsize=10, color=ink
    )
    axes.legend(fontsize=8, frameon=False)
    axes.grid(color="#e2e2e2", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=ink, which="both")
    figure.savefig(path)
