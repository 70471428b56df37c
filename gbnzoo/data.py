"""Image sets held whole in memory, the order of their batches, and augmentation; `gbnzoo.image_files` has larger ones.

Everything random is a pure function of (seed, stream, epoch, index): a counter is hashed, no generator is advanced. So the
same images come in the same batches on any machine, however they are spread out, and a resumed run needs no state.

Source: the hash is splitmix64 (Steele, Lea and Flood 2014).
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import PIL.Image
import psutil
import torch
import torch.nn.functional as F
from huggingface_hub import constants, hf_hub_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import center_crop, resize

from gbnzoo import kernels

if TYPE_CHECKING:
    import datasets

Arrays = tuple[Tensor, Tensor, tuple[str, ...]]  # images, labels, class names
SPLITS = ("train", "validation", "test")
DECODING = 2  # raised with every change of what is made of the same files, for cached copies to be made again
SPLIT_FOLDERS = {  # of an imagefolder; named as `datasets` knows them
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# ---- image sets ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DatasetSpec:
    """What a data set must look like, and how it is normalised.

    Where `image_size` (the side in pixels), `num_classes` or a column is None, any will do. Images are in `image_mode`, or
    converted to it; with `resize_to`, they are resized and cropped to that side. `scored_split` is the one with public labels
    that training leaves alone.
    """

    hub_id: str | None
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    image_mode: str = "RGB"
    image_size: int | None = None
    num_classes: int | None = None
    image_column: str | None = None
    label_column: str | None = None
    converts_images: bool = False
    resize_to: int | None = None
    scored_split: str = "test"


# Mean and standard deviation of the training pixels, scaled to 0..1, as the field rounds them.
DATASETS = {
    "mnist": DatasetSpec("ylecun/mnist", (0.1307,), (0.3081,), "L", 28, 10, "image", "label"),
    "cifar10": DatasetSpec(
        "uoft-cs/cifar10", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), "RGB", 32, 10, "img", "label"
    ),
    "cifar100": DatasetSpec(
        "uoft-cs/cifar100", (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), "RGB", 32, 100, "img", "fine_label"
    ),
    "digits": DatasetSpec(None, (0.3066,), (0.3766,), "L", 8, 10),
    "imagenet": DatasetSpec(
        "ILSVRC/imagenet-1k",
        num_classes=1000,
        image_column="image",
        label_column="label",
        converts_images=True,  # some are grey or CMYK
        scored_split="validation",
    ),
}
NUM_TRAIN_IMAGES = {"mnist": 60_000, "cifar10": 50_000, "cifar100": 50_000, "digits": 1297}


@dataclass(frozen=True, eq=False)
class ImageSet:
    """One split of a data set, all of it on one device.

    Args:
        images: uint8 [n, H, W, C].
        labels: int64 [n], 0 <= label < classes.
        class_names: one for each class.
        mean, std: one for each channel, of pixels scaled to 0..1.
        name: as in DATASETS, or the Hub id.
        split: one of SPLITS.
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    name: str
    split: str

    def __len__(self) -> int:
        return len(self.images)

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        height, width, channels = self.images.shape[1:]
        return channels, height, width

    def to(self, device: torch.device | str) -> "ImageSet":
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def batches(
        self, batch_size: int, dtype: torch.dtype = torch.float32, rank: int = 0, world_size: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised images [b, C, H, W] and their labels [b], in order, the last batch as large as it comes out.

        With several processes, each gets its own consecutive share; together they get every image once.
        """
        normalise = Normalise(self.mean, self.std, self.images.shape[2], dtype, self.images.device)
        for batch in consecutive(len(self), batch_size, rank, world_size):
            yield normalise(self.images[batch]), self.labels[batch]

    def micro_batches(
        self, order: "GlobalBatches", positions: Sequence[Tensor], augment: str, dtype: torch.dtype
    ) -> "MicroBatches":
        """What one process trains on.

        Args:
            order: of all processes.
            positions: int64 [b] for each of its micro-batches, places in every global batch.
            augment: a key of AUGMENTATIONS.
            dtype: of the images.
        """
        return MicroBatches(Augment(self, augment, order.seed, dtype), order, positions)


def consecutive(n: int, batch_size: int, rank: int, world_size: int) -> Iterator[slice]:
    """Batches of the process's consecutive share of n images, the last as large as it comes out."""
    start, stop = (n * r // world_size for r in (rank, rank + 1))
    for i in range(start, stop, batch_size):
        yield slice(i, min(i + batch_size, stop))


class Normalise:
    """uint8 [b, H, W, C] to (x / 255 - mean) / std as [b, C, H, W] in channels_last.

    Each step rounds by itself (no fused multiply-add), so an image comes out the same to the bit in any batch. bf16 and fp16
    are rounded from float32.
    """

    def __init__(
        self,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        width: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ):
        self.dtype = dtype
        self.wide = torch.promote_types(dtype, torch.float32)
        self.mean, self.std = (torch.tensor(values, dtype=self.wide, device=device).mul(255) for values in (mean, std))
        # A whole row of pixels: with the channels alone, the innermost loop would be three long.
        self._row = self.mean.repeat(width), self.std.repeat(width)

    def __call__(self, images: Tensor) -> Tensor:
        return self.values(images).permute(0, 3, 1, 2)

    def values(self, images: Tensor) -> Tensor:
        """Still [b, H, W, C]."""
        mean, std = self._row
        x = images.flatten(2).to(self.wide).sub_(mean).div_(std).to(self.dtype)
        return x.view(images.shape)


# ---- loading -------------------------------------------------------------------------------------------------------


def load_images(
    name: str,
    split: str,
    *,
    data_dir: str | Path | None = None,
    holdout: int = 0,
    image_size: int | None = None,
    image_mode: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    num_classes: int | None = None,
) -> ImageSet:
    """One split of a data set, decoded.

    Comes from parquet files under `data_dir` (or the environment variable GBNZOO_DATA) where one is given, else from the Hub;
    scikit-learn's `digits` need neither. What was decoded is kept beside the caches of `datasets`, for as long as the source
    does not change. Sets outside DATASETS are converted to `image_mode`, and normalised with ImageNet's constants (RGB) or
    with mean and standard deviation 0.5 (L).

    Args:
        name: a key of DATASETS, a Hub id such as `zalando-datasets/fashion_mnist`, or `imagefolder`. Of digits'
            1797 images 500 are its test split, stratified by class.
        split: one of SPLITS.
        data_dir: for `imagefolder` the folder itself, else the one that holds the parquet files, or holds `<name>/` with them.
        holdout: so many training images, stratified by class and the same for every seed, are "validation"; "train" is the
            rest. 0 trains on all of them, and "validation" is the source's own split, if it has one.
        image_size: resize the shorter side to this (bicubic) and crop the centre. None leaves images as they are; they must
            then be of one size.
        image_mode: PIL mode, "L" or "RGB"; None is that of DATASETS, or RGB.
        image_column, label_column, num_classes: None is as in DATASETS, or whatever the source has.

    Raises:
        ValueError: if an argument is impossible; if columns, classes, image mode or size are not those wanted; if the images
            would take over a third of the free memory.
        OSError: if the files are missing or broken, or the Hub cannot be reached.
        ModuleNotFoundError: if scikit-learn is missing for digits.
    """
    folder = data_folder(data_dir)
    given = {
        "image_mode": image_mode,
        "image_column": image_column,
        "label_column": label_column,
        "num_classes": num_classes,
        "resize_to": image_size,
    }
    name, spec = find_spec(name, folder, given)
    read = _read_digits if name == "digits" else _read_cached
    images, labels, class_names = read(name, spec, source_split(split, holdout), folder)
    kept = kept_of_source(name, labels, split, holdout)
    return ImageSet(images[kept], labels[kept], class_names, spec.mean, spec.std, name, split)


def data_folder(data_dir: str | Path | None) -> Path | None:
    data_dir = data_dir or os.environ.get("GBNZOO_DATA")
    return Path(data_dir).expanduser() if data_dir else None


def source_split(split: str, holdout: int) -> str:
    """The source's split that holds one of ours.

    Raises:
        ValueError: if it is none of SPLITS.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is none of {', '.join(SPLITS)}")
    return "train" if split == "validation" and holdout else split


def kept_of_source(name: str, labels: Tensor, split: str, holdout: int) -> Tensor | slice:
    """Which images of the source's split are in ours.

    Raises:
        ValueError: if the holdout leaves nothing.
    """
    if not holdout or source_split(split, holdout) != "train":
        return slice(None)
    if not 0 < holdout < len(labels):
        raise ValueError(f"{name}: data.holdout {holdout} of {len(labels)} training images must leave some of both")
    return _stratified(labels, holdout) == (split == "validation")


def scored_split(name: str, data_dir: str | Path | None = None) -> str:
    """The split of a set that a model is scored on: of image folders at hand that have no test images, validation."""
    folder = data_folder(data_dir)
    if name == "imagefolder" and folder and folder.is_dir():
        roots = _image_roots(folder)
        return "validation" if roots.get("validation") and not roots.get("test") else "test"
    return next((spec.scored_split for known, spec in DATASETS.items() if name in (known, spec.hub_id)), "test")


def num_train_images(name: str, holdout: int) -> int | None:
    """How many images of a known set are trained on, without its data; None where only the data can tell."""
    known = {DATASETS[key].hub_id or key: count for key, count in NUM_TRAIN_IMAGES.items()} | NUM_TRAIN_IMAGES
    return count - holdout if (count := known.get(name, 0)) > holdout else None


def find_spec(name: str, folder: Path | None, given: dict[str, Any]) -> tuple[str, DatasetSpec]:
    """The set's name here, and what it must look like; what is given, if not None, goes before what DATASETS says.

    Raises:
        ValueError: if the set is not known, or the image mode.
    """
    given = {key: value for key, value in given.items() if value is not None}
    name = next((known for known, spec in DATASETS.items() if name == spec.hub_id), name)
    if name not in DATASETS and name != "imagefolder" and "/" not in name and not folder:
        raise ValueError(
            f"data.name {name!r} is not known; wanted {', '.join(DATASETS)}, imagefolder, a Hub id such as uoft-cs/cifar10,"
            " or parquet files under --data-dir or GBNZOO_DATA"
        )
    spec = replace(DATASETS.get(name, DatasetSpec(name, converts_images=True)), **given)
    if spec.image_mode not in ("L", "RGB"):
        raise ValueError(f"image_mode {spec.image_mode!r} is neither L nor RGB")
    if spec.converts_images and spec.image_mode == "L":
        spec = replace(spec, mean=(0.5,), std=(0.5,))
    return name, spec


def _read_digits(name: str, spec: DatasetSpec, split: str, folder: Path | None) -> Arrays:
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the digits come with scikit-learn: pip install 'gbnzoo[quickstart]'") from error
    digits = load_digits()
    targets = torch.from_numpy(digits.target.astype(np.int64))
    # Its last images were written by other people than the rest: taken for the test, they would measure that.
    is_test = _stratified(targets, 500)
    splits = {"train": ~is_test, "test": is_test}
    check_split(name, split, splits)
    grey = np.rint(digits.images[splits[split]] * (255 / 16)).astype(np.uint8)  # they range over 0..16
    images = _decode(map(PIL.Image.fromarray, grey), len(grey), spec, f"{name} {split}")
    labels = targets[splits[split]]
    return images, labels, tuple(map(str, digits.target_names))


def _read_cached(name: str, spec: DatasetSpec, split: str, folder: Path | None) -> Arrays:
    """The split from its cached copy, if the source is what it was; else from the source, and a copy made."""
    where, commit = f"{name} {split}", None
    if folder or name == "imagefolder":
        folder = source_folder(name, spec, folder)
        fingerprint, load = fingerprint_of(name, folder), functools.partial(load_folder, name, split, folder)
    else:
        commit, cure = commit_on_hub(spec.hub_id), "its parquet files can be given by --data-dir or GBNZOO_DATA"
        load = functools.cache(functools.partial(load_split, name, split, spec.hub_id, revision=commit, cure=cure))
        # Where the Hub does not say, `datasets` may still have what it once prepared.
        fingerprint = commit or load()._fingerprint
    key = hashlib.sha256(repr((DECODING, fingerprint, split, spec)).encode()).hexdigest()[:16]
    cache = cache_folder()
    cached = cache / f"{name.replace('/', '--')}-{split}-{key}.safetensors"
    with contextlib.nullcontext() if cached.exists() else one_at_a_time(cache):
        with contextlib.suppress(OSError, SafetensorError), safe_open(cached, "pt") as file:
            _check_memory(cached.stat().st_size, where)
            class_names = tuple(json.loads(file.metadata()["class_names"]))
            return file.get_tensor("images"), file.get_tensor("labels"), class_names

        with tempfile.TemporaryDirectory(prefix="gbnzoo-", ignore_cleanup_errors=True) as scratch:
            # The Arrow copy that `datasets` makes of files goes to scratch: only the decoded images are read again.
            table = load(cache_dir=scratch) if folder else load()
            labels, class_names = read_labels(table, spec, where)
            images = _decode(_pil_images(table, spec, where), len(labels), spec, where)
        if commit and not _is_of_commit(table, commit):
            return images, labels, class_names
        with contextlib.suppress(OSError, SafetensorError):  # where nothing can be kept, the next run decodes again
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache) as aside:
                whole = Path(aside) / cached.name
                save_file({"images": images, "labels": labels}, whole, {"class_names": json.dumps(class_names)})
                whole.replace(cached)
    return images, labels, class_names


def commit_on_hub(hub_id: str) -> str | None:
    """The newest commit of a data set, found as `datasets` finds it but without its import, which takes a second.

    Offline, the last one that was seen. None for a set without a card, and for any failure: `load_split` asks again, and says
    what is wrong.
    """
    is_offline = os.environ.get("HF_DATASETS_OFFLINE", "").upper() in constants.ENV_VARS_TRUE_VALUES
    with contextlib.suppress(Exception):
        card = hf_hub_download(hub_id, "README.md", repo_type="dataset", local_files_only=is_offline)
        return Path(card).parent.name  # a file's folder in the cache bears the name of its commit
    return None


def _is_of_commit(table: "datasets.Dataset", commit: str) -> bool:
    """Whether it was prepared from that commit, as the folder that holds it says: where the Hub fails, `datasets` takes what it
    prepared last, whatever it was asked for."""
    return all(commit in Path(file["filename"]).parts for file in table.cache_files)


@contextlib.contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Wait until other processes have left the folder; where it cannot be made or locked, do not wait.

    So the first process of a run decodes, and the others find its copy.
    """
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder, os.O_RDONLY)
            held.callback(os.close, descriptor)  # which unlocks, as a kill does
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


def fingerprint_of(name: str, folder: Path) -> list[tuple[str, int, int]]:
    """What tells whether any file of a set in a folder has changed."""
    if name == "imagefolder":
        found = [
            path for roots in _image_roots(folder.resolve()).values() for root in roots for path in files_under(root)
        ]
    else:
        found = folder.resolve().rglob("*")
    files = sorted(path for path in found if path.is_file())
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]


def cache_folder() -> Path:
    """Where images and tables are kept: beside the caches of `datasets`, found without its import, which takes a second."""
    datasets_cache = os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets"
    return Path(datasets_cache) / "gbnzoo"


def source_folder(name: str, spec: DatasetSpec, folder: Path | None) -> Path:
    """The folder with the set's own files.

    Raises:
        FileNotFoundError: if there is none.
    """
    if name == "imagefolder":
        if folder and folder.is_dir():
            return folder.absolute()
        raise FileNotFoundError(
            f"imagefolder: {folder or 'no folder'} given, wanted one with train/<class>/ and test/<class>/ full of images, as"
            " --data-dir or GBNZOO_DATA"
        )
    for candidate, pattern in ((folder / name, "**/*.parquet"), (folder, "*.parquet")):
        if any(candidate.glob(pattern)):
            return candidate
    raise FileNotFoundError(
        f"{name}: no parquet files in {folder / name} or {folder}; wanted train-*.parquet and test-*.parquet in the folder"
        f" given as --data-dir or GBNZOO_DATA, or neither of these, to load {spec.hub_id} from the Hub"
    )


def load_folder(name: str, split: str, folder: Path, **options: Any) -> "datasets.Dataset | datasets.IterableDataset":
    """One split of parquet files, loaded with these options of `datasets`, or of an `imagefolder`.

    Raises:
        OSError: if it cannot be loaded.
        ValueError: if there is no such split.
    """
    if name == "imagefolder":
        return _load_image_folder(split, folder)
    folder = folder.resolve()
    if unfit := set("*?[]").intersection(str(folder)):
        raise OSError(
            f"{name}: {folder}: `datasets` takes {' '.join(sorted(unfit))} in a path for a pattern; wanted another name"
        )
    return load_split(name, split, "parquet", data_dir=str(folder), cure="the files may be broken", **options)


def _load_image_folder(split: str, folder: Path) -> "datasets.Dataset":
    """The images of `<split>/<class>/`, in the order of their paths.

    A class may have any name, where `datasets` takes `test/train/` for part of both splits. Classes are those of all splits
    together. Where no folder is named like a split, all are classes of "train".
    """
    from datasets import ClassLabel, Dataset, Features, Image

    endings = tuple(ending for ending, kind in PIL.Image.registered_extensions().items() if kind in PIL.Image.OPEN)
    roots = _image_roots(folder)
    found = {}
    for kind, each in roots.items():
        for root in each:
            files = (file for file in files_under(root) if file.name.lower().endswith(endings) and file.parent != root)
            found[kind] = [(str(file), file.relative_to(root).parts[0]) for file in files]
    class_names = sorted({name for samples in found.values() for _, name in samples})
    if len(class_names) < 2:
        raise FileNotFoundError(
            f"imagefolder: {folder} holds images of {' and '.join(class_names) or 'no class'}; {_IMAGE_FOLDERS}, with two"
            " classes at least"
        )
    check_split("imagefolder", split, [kind for kind, samples in found.items() if samples])
    paths, labels = zip(*found[split], strict=True)
    features = Features(image=Image(), label=ClassLabel(names=class_names))
    return Dataset.from_dict({"image": paths, "label": labels}, features)


_IMAGE_FOLDERS = "wanted train/<class>/ and test/<class>/ or val/<class>/"


def _image_roots(folder: Path) -> dict[str, list[Path]]:
    """The folder of each split of an `imagefolder`, one or none; of "train" its own where none is named like a split.

    Raises:
        FileNotFoundError: if two folders would be one split, or it is not clear whether they are splits or classes.
    """
    top = {path.name: path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")}
    roots = {split: [top[name] for name in names if name in top] for split, names in SPLIT_FOLDERS.items()}
    if twice := [" and ".join(map(str, each)) for each in roots.values() if len(each) > 1]:
        raise FileNotFoundError(f"imagefolder: {', '.join(twice)} would be one split; {_IMAGE_FOLDERS}")
    if any(roots.values()):
        return roots
    words = {word for names in SPLIT_FOLDERS.values() for word in names}
    if alike := [
        name
        for name in top
        if words & set(re.split(r"[-_. 0-9]+", name.lower())) or name.lower().startswith(("train", "test", "valid"))
    ]:
        raise FileNotFoundError(f"imagefolder: are {', '.join(alike)} in {folder} splits, or classes? {_IMAGE_FOLDERS}")
    return {"train": [folder]}


def files_under(root: Path) -> Iterator[Path]:
    """Files in the order of their paths; links are followed, but for those to a folder above, and nothing hidden is found."""

    def identity(folder: Path) -> tuple[int, int]:
        status = folder.stat()
        return status.st_dev, status.st_ino

    def walk(folder: Path, above: frozenset[tuple[int, int]]) -> Iterator[Path]:
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if entry.name.startswith("."):
                continue
            path = Path(entry.path)
            # What the listing says of all but links costs no look at the file, of which ImageNet has a million.
            if not (path.is_dir() if entry.is_symlink() else entry.is_dir()):
                yield path
            elif (own := identity(path)) not in above:
                yield from walk(path, above | {own})

    yield from walk(root, frozenset(map(identity, (root, *root.resolve().parents))))


def load_split(
    name: str, split: str, path: str, *, cure: str, **options: Any
) -> "datasets.Dataset | datasets.IterableDataset":
    """One split by `datasets.load_dataset`, its many errors made one.

    Raises:
        OSError: if the set cannot be loaded.
        ValueError: if it has no such split.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        tables = load_dataset(path, **options)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        source = options.get("data_dir", f"{path} on the Hub")
        raise OSError(f"{name}: cannot load {source}: {error.__cause__ or error}; {cure}") from error
    check_split(name, split, tables)
    return tables[split]


def check_split(name: str, split: str, found: Iterable[str]) -> None:
    if split not in found:
        cures = {
            "validation": "; data.holdout: N keeps N of the training images for it",
            "test": "; data.scored_split: validation scores that one" if "validation" in found else "",
        }
        raise ValueError(f"{name} has no split {split!r}, only {', '.join(found)}{cures.get(split, '')}")


def read_labels(table: "datasets.Dataset", spec: DatasetSpec, where: str) -> tuple[Tensor, tuple[str, ...]]:
    """Labels int64 [n] and class names, checked."""
    column = find_column(table, "ClassLabel", spec.label_column, f"{where}: data.label_column")
    class_names = tuple(table.features[column].names)
    if spec.num_classes not in (None, len(class_names)):
        raise ValueError(
            f"{where}: column {column} has {len(class_names)} classes, wanted {spec.num_classes}; data.num_classes or"
            " data.label_column may be wrong"
        )
    labels = torch.tensor([-1 if label is None else label for label in table[column][:]])
    if labels.min() < 0 or labels.max() >= len(class_names):
        raise ValueError(
            f"{where}: labels of column {column} run from {labels.min()} to {labels.max()}, wanted 0 to"
            f" {len(class_names) - 1}; a split without public labels cannot be used"
        )
    return labels, class_names


def find_column(table: "datasets.Dataset", kind: str, wanted: str | None, key: str) -> str:
    """The wanted column, of one kind of feature; where none is named, the only one."""
    kinds = {column: type(feature).__name__ for column, feature in table.features.items()}
    fitting = [column for column, found in kinds.items() if found == kind and wanted in (None, column)]
    if len(fitting) != 1:
        found = ", ".join(f"{column} ({kind})" for column, kind in kinds.items())
        raise ValueError(
            f"{key}: wanted {wanted or 'one column'} ({kind}), found {found}; {kind} is a feature that files have which"
            " `datasets` wrote"
        )
    return fitting[0]


def _pil_images(table: "datasets.Dataset", spec: DatasetSpec, where: str) -> Iterator[PIL.Image.Image]:
    encoded = encoded_images(table, spec, where)
    rows = (row for batch in encoded.iter(batch_size=1000) for row in batch[encoded.column_names[0]])
    last_format = None
    for i, row in enumerate(rows):
        image = open_image(row, i, where, last_format)
        last_format = image.format
        yield image


def encoded_images(table: "datasets.Dataset", spec: DatasetSpec, where: str) -> "datasets.Dataset":
    """The column of images by itself, each as the file it was."""
    from datasets import Image

    column = find_column(table, "Image", spec.image_column, f"{where}: data.image_column")
    return table.select_columns([column]).cast_column(column, Image(decode=False))


def open_image(row: Mapping[str, Any], i: int, where: str, likely_format: str | None = None) -> PIL.Image.Image:
    """Image number i of a split from its file's bytes, or its path.

    PIL tries its forty formats in turn; to name the likely one halves the time of a set in WebP.

    Raises:
        ValueError: if the file is broken.
    """
    PIL.Image.init()
    formats = [likely_format, *PIL.Image.ID] if likely_format else PIL.Image.ID
    try:
        with PIL.Image.open(BytesIO(row["bytes"]) if row["bytes"] else row["path"], formats=formats) as image:
            image.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{where}: image {i} cannot be decoded ({error}); the files may be broken") from error
    return image


def _decode(images: Iterable[PIL.Image.Image], n: int, spec: DatasetSpec, where: str) -> Tensor:
    """uint8 [n, H, W, C]; mode and size are checked, unless they are to be changed."""
    decoded = None
    for i, image in enumerate(images):
        image = in_mode(image, spec, i, where)
        if spec.resize_to:
            image = center_crop(resize(image, spec.resize_to, InterpolationMode.BICUBIC), spec.resize_to)
        if decoded is None:
            side = spec.resize_to or spec.image_size
            width, height = (side, side) if side else image.size
            shape = (n, height, width, len(spec.mean))
            _check_memory(math.prod(shape), where)
            decoded = np.empty(shape, np.uint8)
        if image.size != (width, height):
            raise ValueError(
                f"{where}: image {i} is {image.width}x{image.height} pixels, wanted {width}x{height}; data.image_size resizes"
                " all to one size"
            )
        decoded[i] = np.asarray(image).reshape(shape[1:])
    return torch.from_numpy(decoded)


def in_mode(image: PIL.Image.Image, spec: DatasetSpec, i: int, where: str) -> PIL.Image.Image:
    """Image number i of a split, in the mode that is wanted.

    Raises:
        ValueError: if it has another and may not be converted.
    """
    if spec.converts_images:
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
            # Of 16 bits, which PIL would clip at 255.
            image = PIL.Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
        return image.convert(spec.image_mode)
    if image.mode != spec.image_mode:
        raise ValueError(f"{where}: image {i} has mode {image.mode}, wanted {spec.image_mode}; data.name may be wrong")
    return image


def _check_memory(num_bytes: int, where: str) -> None:
    free = psutil.virtual_memory().available
    if num_bytes > free / 3:  # the rest is for augmentation's padded copy
        raise ValueError(
            f"{where}: its images take {num_bytes / 1e9:.1f} GB decoded, over a third of the {free / 1e9:.1f} GB of free"
            " memory; a smaller data.image_size or a larger machine would fit; with data.transform images are read when needed"
        )


def _stratified(labels: Tensor, count: int) -> Tensor:
    """bool [n], true for `count` samples: of each class its share to within one, a choice that no training seed changes."""
    n, class_sizes = len(labels), labels.bincount()
    shuffled = keyed_bits(0, "holdout", 0, torch.arange(n)).argsort()
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    own_class = labels[by_class]
    rank = torch.arange(n) - (class_sizes.cumsum(0) - class_sizes)[own_class]
    # Draw from each class at a pace in proportion to its size.
    due = (rank + 0.5).double() / class_sizes[own_class]
    chosen = torch.zeros(n, dtype=torch.bool)
    chosen[by_class[due.argsort(stable=True)[:count]]] = True
    return chosen


def with_random_labels(labels: Tensor, num_classes: int, share: float, seed: int) -> Tensor:
    """Labels int64 [n], each replaced with probability `share` by one drawn uniformly from all classes, its own included.

    What becomes of label i depends on (seed, i) alone, and those replaced at one share are among those at a larger one.

    Source: Zhang et al. 2017, arXiv 1611.03530, "partially corrupted labels".
    """
    index = torch.arange(len(labels))
    is_replaced, drawn = (keyed_uniform(seed, "random_labels", stage, index) for stage in (0, 1))
    return torch.where(is_replaced < share, (drawn * num_classes).long(), labels.cpu()).to(labels.device)


# ---- keyed randomness ----------------------------------------------------------------------------------------------
# On the CPU in numpy: for one batch it is several times faster than tensor operations, and no GPU waits for it. The order of a
# batch has a kernel besides, which is three times faster still.

# Streams never share bits. Their numbers, like the hash and the rounds, are part of every trained weight: they stay.
_STREAMS = {
    "permutation": 0,
    "augment": 1,
    "gradient_noise": 2,
    "holdout": 3,
    "mix": 4,
    "random_labels": 5,
    "isotropic_noise": 6,
}
_FEISTEL_ROUNDS = 8  # after six, neighbours in orders of under 100 samples are visibly unlike random ones

Words = npt.NDArray[np.uint64]  # wrap around


def _words(values: Tensor | int) -> Words:
    return np.atleast_1d(torch.as_tensor(values).cpu().numpy()).astype(np.uint64)


def _modulo(words: Words, n: int) -> Words:
    """words % n, for which numpy takes three times as long."""
    return words - words // n * n


def _less(words: Words, n: int) -> Words:
    """words % n where words < 2 n: below n, words - n wraps around to far more."""
    return np.minimum(words, words - n)


def _absorb(state: Words, words: Words) -> Words:
    """Hash one more word into each state: output number `word` of splitmix64 seeded with `state`."""
    z = state + (words + 1) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> 30)) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> 27)) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> 31)


@functools.cache
def _stream_key(seed: int, stream: str) -> Words:
    return _absorb(_absorb(_words(0), _words(seed)), _words(_STREAMS[stream]))


def _keyed_words(seed: int, stream: str, epochs: Tensor | int, indices: Tensor) -> Words:
    return _absorb(_absorb(_stream_key(seed, stream), _words(epochs)), _words(indices))


def keyed_bits(seed: int, stream: str, epochs: Tensor | int, indices: Tensor) -> Tensor:
    """64 random bits for each sample at each epoch, int64 [B].

    Args:
        seed: 0 <= seed < 2**63.
        stream: a key of _STREAMS; what they draw is unrelated.
        epochs, indices: int64 [B], not negative.
    """
    return torch.from_numpy(_keyed_words(seed, stream, epochs, indices).view(np.int64)).to(indices.device)


def keyed_uniform(seed: int, stream: str, epochs: Tensor | int, indices: Tensor) -> Tensor:
    """A number in [0, 1) for each sample at each epoch, float64 [B]; arguments as of `keyed_bits`."""
    return torch.from_numpy((_keyed_words(seed, stream, epochs, indices) >> 11) * 2.0**-53).to(indices.device)


def keyed_normal(seed: int, stream: str, epochs: Tensor | int, indices: Tensor) -> Tensor:
    """A standard normal number for each sample at each epoch, float64 [B]; arguments as of `keyed_bits`.

    Source: Box and Muller 1958.
    """
    words = _keyed_words(seed, stream, epochs, indices)
    radius, angle = (((w >> 11) + 1) * 2.0**-53 for w in (words, _absorb(words, _words(0))))  # in (0, 1]
    normal = np.sqrt(-2 * np.log(radius)) * np.cos(2 * np.pi * angle)
    return torch.from_numpy(normal).to(indices.device)


def epoch_permutation(num_samples: int, seed: int, epochs: Tensor, positions: Tensor) -> Tensor:
    """Which samples stand at some positions of the epochs' random orders, int64 [B], in O(B) time and memory.

    A Feistel network permutes the a·b >= num_samples cells of a near-square grid; whoever lands beyond the samples walks on
    until among them, which makes it a permutation of the samples.

    Args:
        num_samples: in one epoch.
        seed: 0 <= seed < 2**63.
        epochs, positions: int64 [B]; 0 <= position < num_samples.

    Source: Black and Rogaway 2002, "Ciphers with arbitrary finite domains", methods 2 and 3.
    """
    a, b = _grid(num_samples)

    def encipher(cells: Words, keys: Words) -> Words:
        left, right = _modulo(cells, a), cells // a
        for turn in range(0, _FEISTEL_ROUNDS, 2):
            left = _less(left + _modulo(_absorb(keys, right + turn * a), a), a)
            right = _less(right + _modulo(_absorb(keys, left + (turn + 1) * a), b), b)
        return right * a + left

    keys = _absorb(_stream_key(seed, "permutation"), _words(epochs))
    cells = encipher(_words(positions), keys)
    while (beyond := cells >= num_samples).any():
        cells[beyond] = encipher(cells[beyond], keys[beyond])
    return torch.from_numpy(cells.view(np.int64))


@functools.cache
def _grid(n: int) -> tuple[int, int]:
    """Of the near-square grids of a·b >= n cells, a >= b, the one with the fewest beyond n: then next to none walk."""
    side = math.isqrt(n - 1) + 1
    return min(((a, -(-n // a)) for a in range(side, side + side // 3 + 1)), key=math.prod)


@dataclass(frozen=True)
class GlobalBatches:
    """The global batch of any update: epoch permutations laid end to end, cut into full batches.

    Args:
        num_samples: in one epoch.
        batch_size: of all processes and accumulation together; may exceed `num_samples`.
        seed: fixes every epoch's permutation.

    Raises:
        ValueError: if there are no samples, or no batch.
    """

    num_samples: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if self.num_samples < 1 or self.batch_size < 1:
            raise ValueError(
                f"batches of {self.batch_size} from {self.num_samples} samples: wanted at least one of each"
            )

    def at(self, update: int, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Sample indices and epochs, both int64 [b], of some places, int64 [b], in one global batch; None are all in turn."""
        places = torch.arange(self.batch_size) if positions is None else positions.long()
        first = update * self.batch_size
        if draw := kernels.pick_order(places):
            key = int(_stream_key(self.seed, "permutation")[0])
            return draw(places, first, self.num_samples, _grid(self.num_samples), key)
        entries = places + first
        epochs = entries // self.num_samples
        return epoch_permutation(self.num_samples, self.seed, epochs, entries % self.num_samples), epochs

    def parts(self, update: int, positions: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """The same of several parts, such as the micro-batches of one process, at the price of one."""
        sizes = [len(part) for part in positions]
        return zip(*(whole.split(sizes) for whole in self.at(update, torch.cat(tuple(positions)))), strict=True)


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """What one process runs forward at once: sample indices and epochs int64 [b] on the CPU, images [b, C, H, W] and labels on
    the device. Labels are int64 [b], or, where samples are mixed, shares of the classes [b, classes]."""

    indices: Tensor
    epochs: Tensor
    images: Tensor
    labels: Tensor


@dataclass(frozen=True, eq=False)
class MicroBatches:
    """One process's part of any update, of images held in memory."""

    augment: "Augment"
    order: GlobalBatches
    positions: Sequence[Tensor]

    def at(self, update: int) -> Iterator[MicroBatch]:
        labels = self.augment.image_set.labels
        for indices, epochs in self.order.parts(update, self.positions):
            on_device = indices.to(labels.device, non_blocking=True)
            yield MicroBatch(indices, epochs, self.augment(indices, epochs), labels.index_select(0, on_device))


# ---- augmentation --------------------------------------------------------------------------------------------------

AUGMENTATIONS = {  # pixels of padding that a random crop is taken from; whether to flip at random
    "none": (0, False),
    "pad1_crop": (1, False),
    "pad2_crop": (2, False),
    "pad2_crop_flip": (2, True),
    "pad4_crop": (4, False),
    "pad4_crop_flip": (4, True),
}


class Augment:
    """Random crops and flips of an image set, normalised: a whole batch in one kernel, or a few tensor operations where there
    is none for the device and dtype.

    Image i at epoch e depends on (seed, e, i) alone. Padding is black before normalisation, as in torchvision's RandomCrop;
    the paper's authors pad with grey 127. A padded copy of the set is kept on its device.

    Args:
        image_set: the training images.
        kind: a key of AUGMENTATIONS.
        seed: 0 <= seed < 2**63.
        dtype: of the images made.

    Raises:
        ValueError: if the kind is not known.
    """

    def __init__(self, image_set: ImageSet, kind: str, seed: int, dtype: torch.dtype = torch.float32):
        if kind not in AUGMENTATIONS:
            raise ValueError(f"data.augment {kind!r} is not known; wanted one of {', '.join(AUGMENTATIONS)}")
        self.image_set, self.seed = image_set, seed
        self.pad, self.flips = AUGMENTATIONS[kind]
        images, self.crop = image_set.images.contiguous(), image_set.images.shape[1:3]
        if self.pad:
            images = F.pad(images, (0, 0, *(self.pad,) * 4))
        if not (self.pad or self.flips):  # a whole image lies in one piece, as a row does
            self.crop = (1, math.prod(self.crop))
            images = images.flatten(1, 2).unsqueeze(1)
        self.images = images
        self.normalise = Normalise(image_set.mean, image_set.std, self.crop[1], dtype, images.device)

    def __call__(self, indices: Tensor, epochs: Tensor) -> Tensor:
        """Images [B, C, H, W] in channels_last, on the image set's device.

        Args:
            indices, epochs: int64 [B], best on the CPU.
        """
        images, normalise, shape = self.images, self.normalise, self.image_set.images.shape[1:]
        corners, flipped = self._places(indices, epochs)
        if gather := kernels.pick_crops(images, normalise.dtype):
            crops = gather(images, corners, flipped, self.crop, normalise.mean, normalise.std, normalise.dtype)
        else:
            crops = normalise.values(self._gather(corners, flipped))
        return crops.view(-1, *shape).permute(0, 3, 1, 2)

    def _places(self, indices: Tensor, epochs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Each crop's first pixel, counted over all images, and whether it is flipped, both int64 [B]; None flips nothing."""
        _, rows, columns, _ = self.images.shape
        corners, flipped = indices.long() * (rows * columns), None
        if self.pad or self.flips:
            words, steps = _keyed_words(self.seed, "augment", epochs, indices), 2 * self.pad + 1
            offset = words >> 1
            down = offset // steps
            corner = _words(corners) + (offset - down * steps) * columns + _modulo(down, steps)
            corners = torch.from_numpy(corner.view(np.int64))
            if self.flips:
                flipped = torch.from_numpy((words & 1).view(np.int64)).to(self.images.device, non_blocking=True)
        return corners.to(self.images.device, non_blocking=True), flipped

    def _gather(self, corners: Tensor, flipped: Tensor | None) -> Tensor:
        """As `kernels.crops.gather`, not normalised."""
        images, (rows, columns), (_, _, width, channels) = self.images, self.crop, self.images.shape
        # Row k of this view is the image row that begins at pixel k, so that a crop copies whole rows.
        every = images.view(-1)
        every = every.as_strided(((len(every) - columns * channels) // channels + 1, columns * channels), (channels, 1))
        down = torch.arange(rows, device=images.device) * width
        crops = every.index_select(0, (corners[:, None] + down).flatten()).view(-1, rows, columns, channels)
        if flipped is None:
            return crops
        # To flip all and pick is faster than to flip some: it copies blocks.
        pick = torch.arange(len(crops), device=images.device) + flipped * len(crops)
        return torch.cat((crops, crops.flip(2))).index_select(0, pick)
