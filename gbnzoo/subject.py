"""What a name on a command line means: a model with its weights, and images as it wants them."""

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.utils.misc import natural_key
from torch import nn
from torchvision.transforms.functional import center_crop

import gbnzoo.models  # noqa: F401  (registers the architectures)
from gbnzoo import data
from gbnzoo.image_files import ImageFiles, is_read_as_needed, open_images
from gbnzoo.pretrained import open_source
from gbnzoo.publish import load_run, load_weights
from gbnzoo.recipe import Data, Transform
from gbnzoo.run import Run
from gbnzoo.trainer import EVALUATION_BATCH_SIZE
from gbnzoo.weights import check_weights

load_images = functools.lru_cache(maxsize=1)(data.load_images)


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
        use_train_size: bring images to the size a timm model was trained at, where it is scored at another.
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
    use_train_size: bool = False


@dataclass(frozen=True)
class Subject:
    """A model with its weights; `gbn` is what its config.json says under that key, and empty for weights of others."""

    name: str
    model: nn.Module
    gbn: Mapping[str, Any]

    def preprocessing(self, settings: Settings) -> dict[str, Any]:
        """What timm's cfg of the model says of its images: those it is scored on, unless `use_train_size`."""
        return timm.data.resolve_model_data_config(self.model, use_test_size=not settings.use_train_size)


def load_subject(
    source: str,
    *,
    pretrained: bool = True,
    checkpoint: Path | None = None,
    num_classes: int | None = None,
    in_chans: int | None = None,
) -> Subject:
    """The model that a name on the command line means.

    Args:
        source: a hub folder, with or without `local-dir:`, a run's folder, `hf-hub:org/name`, or a name in timm.
        pretrained: False leaves a model named in timm with random weights.
        checkpoint: safetensors file with the weights of a model named in timm.
        num_classes, in_chans: of a model named in timm; None is its own number.

    Raises:
        ValueError: if it is none of these, or its weights do not fit or are not to be trusted.
        FileNotFoundError: if its weights are not to be had.
    """
    folder = Path(source.removeprefix("local-dir:"))
    is_hub, is_run = ((folder / file).is_file() for file in ("config.json", "recipe.yaml"))
    is_remote = source.startswith("hf-hub:")
    overrides = {"num_classes": num_classes, "in_chans": in_chans}
    overrides = {key: value for key, value in overrides.items() if value}
    if (is_hub or is_run or is_remote) and (checkpoint or not pretrained or overrides):
        raise ValueError(
            f"{source} has weights of its own; --checkpoint, --no-pretrained, --num-classes and --in-chans go with a name in"
            " timm"
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
    model = _create(source, pretrained=pretrained and not checkpoint, **overrides)
    if checkpoint:
        load_weights(model, load_file(checkpoint), str(checkpoint))
    # Weights published by this project come from a hub folder, whatever name they were asked for by.
    file = None if checkpoint or overrides or not pretrained else model.pretrained_cfg.get("file")
    config = Path(file).with_name("config.json") if file else None
    gbn = json.loads(config.read_text(encoding="utf-8")).get("gbn", {}) if config and config.is_file() else {}
    return Subject(source, model, gbn)


def _create(name: str, **options: Any) -> nn.Module:
    try:
        return timm.create_model(name, **options)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{name} cannot be loaded: {error}") from error


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


def images_for(subject: Subject, settings: Settings) -> data.ImageSet | ImageFiles:
    """The images to measure with, brought to the model's size and normalised with its constants.

    The classes of an image folder are in the order they had in training: in timm's for weights that are not this project's.
    """
    wanted, gbn = subject.preprocessing(settings), subject.gbn
    channels, height, width = wanted["input_size"]
    if not (settings.data or gbn):
        raise ValueError(f"{subject.name}: --data is needed, its weights do not say what they were trained on")
    if settings.img_size:
        if subject.model.pretrained_cfg.get("fixed_input_size") and (height, width) != (settings.img_size,) * 2:
            raise ValueError(
                f"{subject.name} takes images of {height} × {width} only; leave out --img-size {settings.img_size}"
            )
        height = width = settings.img_size
    is_own = has_own_images(subject, settings)
    own = Data.model_validate(gbn["data"]) if gbn else None
    name = settings.data or own.name
    split = settings.split or gbn.get("split") or data.scored_split(name, settings.data_dir)
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
    if name == "imagefolder" and not gbn:
        images = _in_order(images, sorted(images.class_names, key=natural_key))
    if isinstance(images, ImageFiles):
        spec = replace(images.spec, mean=wanted["mean"], std=wanted["std"])
        return replace(images, spec=spec, crop_mode=wanted["crop_mode"])
    cropped = center_crop(images.images.permute(0, 3, 1, 2), [height, width]).permute(0, 2, 3, 1)
    return replace(images, images=cropped, mean=wanted["mean"], std=wanted["std"])


def _in_order(images: data.ImageSet | ImageFiles, class_names: list[str]) -> data.ImageSet | ImageFiles:
    places = torch.tensor([class_names.index(name) for name in images.class_names])
    return replace(images, labels=places[images.labels], class_names=tuple(class_names))


def has_own_images(subject: Subject, settings: Settings) -> bool:
    """Whether the images are those its run was scored on, prepared as there (the split aside)."""
    return bool(
        subject.gbn
        and settings.data in (None, subject.gbn["data"]["name"])
        and settings.img_size is settings.crop_pct is None
    )
