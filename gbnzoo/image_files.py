"""Image sets that are read from disk as they are needed: ImageNet, and whatever else does not fit into memory.

The order of batches is that of `gbnzoo.data`, and image i at epoch e is still augmented by (seed, e, i) alone. Such an order
needs random access, which a stream has not: a set on the Hub, or in parquet files, is therefore streamed once, file by file,
into a table on local disk (as large as the files: some 150 GB for ImageNet), and one that was stopped goes on where it was.
Image folders are read where they lie. In memory are the labels, and the batches that workers have ready.
"""

import contextlib
import functools
import hashlib
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from timm.data import FastCollateMixup, create_transform
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from gbnzoo.data import (
    DATASETS,
    DatasetSpec,
    GlobalBatches,
    MicroBatch,
    Normalise,
    cache_folder,
    consecutive,
    data_folder,
    encoded_images,
    find_spec,
    fingerprint_of,
    in_mode,
    kept_of_source,
    keyed_bits,
    load_folder,
    load_split,
    one_at_a_time,
    open_image,
    read_labels,
    source_folder,
    source_split,
)
from gbnzoo.recipe import Data, Transform

if TYPE_CHECKING:
    import datasets

CHUNK = 64  # images that a worker has in hand: even, for pairs that are mixed, and small beside a micro-batch
PREFETCHED_CHUNKS = 4  # by each worker

Key = tuple[int, int]  # epoch and sample index


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """One split of a data set, its images in files.

    Args:
        table: one row for each image, as the file it was.
        labels: int64 [n], 0 <= label < classes.
        class_names: one for each class.
        name, split: as of `gbnzoo.data.ImageSet`.
        spec: what the set looks like.
        image_size: side in pixels of images that are trained on.
        transform: how images are augmented, and brought to size.
        workers: processes that decode; 0 for none but this one.
        device: where batches go.
        crop_mode: timm's, of images that are scored.
    """

    table: "datasets.Dataset"
    labels: Tensor
    class_names: tuple[str, ...]
    name: str
    split: str
    spec: DatasetSpec
    image_size: int
    transform: Transform
    workers: int
    device: torch.device
    crop_mode: str = "center"

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def mean(self) -> tuple[float, ...]:
        return self.spec.mean

    @property
    def std(self) -> tuple[float, ...]:
        return self.spec.std

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(channels, height, width) of images that are scored."""
        side = self.transform.eval_image_size or self.image_size
        return len(self.mean), side, side

    def to(self, device: torch.device | str) -> "ImageFiles":
        return replace(self, device=torch.device(device))

    def batches(
        self, batch_size: int, dtype: torch.dtype = torch.float32, rank: int = 0, world_size: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """As of `gbnzoo.data.ImageSet`; not augmented."""
        shares = consecutive(len(self), batch_size, rank, world_size)
        normalise = Normalise(self.mean, self.std, self.input_size[2], dtype, self.device)
        for images, labels in _loader(_Scored(self), ([(0, i) for i in range(s.start, s.stop)] for s in shares), self):
            yield normalise(images.to(self.device, non_blocking=True)), labels.to(self.device, non_blocking=True)

    def micro_batches(
        self, order: GlobalBatches, positions: Sequence[Tensor], augment: str, dtype: torch.dtype
    ) -> "FileBatches":
        """As of `gbnzoo.data.ImageSet`; `augment` has no meaning here, `transform` has."""
        return FileBatches(self, order, positions, dtype)


class FileBatches:
    """One process's part of any update. Taken in turn, updates are made ready ahead by the workers.

    Raises:
        ValueError: if samples that are mixed would be on different processes.
    """

    def __init__(self, files: ImageFiles, order: GlobalBatches, positions: Sequence[Tensor], dtype: torch.dtype):
        self.files, self.order, self.positions = files, order, positions
        self.normalise = Normalise(files.mean, files.std, files.image_size, dtype, files.device)
        self.samples = _Augmented(files, order.seed)
        self._next_update: int | None = None
        if self.samples.mix and any(
            len(p) % 2 or (p[::2] % 2).any() or (p[1::2] - p[::2] != 1).any() for p in positions
        ):
            raise ValueError(
                "data.transform.mixup and cutmix mix neighbours in the global batch: ghosts, and the parts of them that lie on"
                " one process, must be of an even number of samples; wanted another large.ghost_batch_size or micro-batch"
            )

    def at(self, update: int) -> Iterator[MicroBatch]:
        if update != self._next_update:
            self._chunks = None  # its workers end before others begin
            self._chunks = iter(_loader(self.samples, _keys_from(update, self.order, self.positions), self.files))
        self._next_update = None  # until all of this one are taken
        for indices, epochs in self.order.parts(update, self.positions):
            chunks = [next(self._chunks) for _ in indices.split(CHUNK)]
            images, labels = (
                torch.cat([part.to(self.files.device, non_blocking=True) for part in parts])
                for parts in zip(*chunks, strict=True)
            )
            yield MicroBatch(indices, epochs, self.normalise(images), labels)
        self._next_update = update + 1


def _keys_from(update: int, order: GlobalBatches, positions: Sequence[Tensor]) -> Iterator[list[Key]]:
    """The keys of an update's chunks, of the next update's, and so on for ever."""
    while True:
        for indices, epochs in order.parts(update, positions):
            for chunk in zip(epochs.split(CHUNK), indices.split(CHUNK), strict=True):
                yield list(zip(*(part.tolist() for part in chunk), strict=True))
        update += 1


class _Scored(TorchDataset):
    """Of some keys, uint8 images [b, H, W, C] as they are scored, and their labels."""

    def __init__(self, files: ImageFiles):
        self.files = files
        how = files.transform
        self.transform = create_transform(
            files.input_size,
            crop_pct=how.crop_pct,
            crop_mode=files.crop_mode,
            interpolation=how.interpolation,
            use_prefetcher=True,
        )

    def __getitem__(self, keys: list[Key]) -> tuple[Tensor, Tensor]:
        images, labels = self.batch([self.sample(*key) for key in keys], keys)
        return images.permute(0, 2, 3, 1).contiguous(), labels

    def sample(self, epoch: int, index: int) -> tuple[np.ndarray, int]:
        """An image [C, H, W] and its label."""
        files, where = self.files, f"{self.files.name} {self.files.split}"
        (row,) = files.table[index].values()
        image = in_mode(open_image(row, index, where), files.spec, index, where)
        return np.atleast_3d(self.transform(image)), int(files.labels[index])

    def batch(self, samples: list[tuple[np.ndarray, int]], keys: list[Key]) -> tuple[Tensor, Tensor]:
        images, labels = zip(*samples, strict=True)
        return torch.from_numpy(np.stack(images)), torch.tensor(labels)


class _Augmented(_Scored):
    """The same as they are trained on: each augmented by its key, and mixed with its neighbour by the first one's."""

    def __init__(self, files: ImageFiles, seed: int):
        super().__init__(files)
        how = files.transform
        self.seed = seed
        self.transform = create_transform(
            files.image_size,
            is_training=True,
            scale=how.scale,
            ratio=how.ratio,
            hflip=how.hflip,
            vflip=how.vflip,
            color_jitter=how.color_jitter,
            auto_augment=how.auto_augment,
            interpolation=how.train_interpolation,
            mean=files.mean,  # what auto-augmentation fills with
            use_prefetcher=True,
        )
        self.mix = None
        if how.mixup or how.cutmix:
            classes = len(files.class_names)
            # The loss smooths labels.
            self.mix = FastCollateMixup(how.mixup, how.cutmix, mode="pair", label_smoothing=0, num_classes=classes)

    def sample(self, epoch: int, index: int) -> tuple[np.ndarray, int]:
        with _seeded(self.seed, "augment", epoch, index):
            return super().sample(epoch, index)

    def batch(self, samples: list[tuple[np.ndarray, int]], keys: list[Key]) -> tuple[Tensor, Tensor]:
        if not self.mix:
            return super().batch(samples, keys)
        pairs = []
        for i in range(0, len(keys), 2):
            with _seeded(self.seed, "mix", *keys[i]):
                pairs.append(self.mix(samples[i : i + 2]))
        images, labels = zip(*pairs, strict=True)
        return torch.cat(images), torch.cat(labels).float()


@contextlib.contextmanager
def _seeded(seed: int, stream: str, epoch: int, index: int) -> Iterator[None]:
    """While it lasts, what Python, numpy and torch draw is a function of these; then it is as it was.

    timm's transforms draw from all three, torchvision's from torch's.
    """
    bits = int(keyed_bits(seed, stream, epoch, torch.tensor([index])))
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(bits)
    np.random.seed(bits % 2**32)
    torch.default_generator.manual_seed(bits)  # torch.manual_seed would reach for the GPU
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def _loader(samples: _Scored, keys: Iterator[list[Key]], files: ImageFiles) -> DataLoader:
    return DataLoader(
        samples,
        sampler=keys,
        batch_size=None,  # each draw of the sampler is a batch's keys already
        num_workers=files.workers,
        prefetch_factor=PREFETCHED_CHUNKS if files.workers else None,
        pin_memory=files.device.type == "cuda",
        generator=torch.Generator(),  # else it draws from what dropout draws from
    )


def is_read_as_needed(name: str) -> bool:
    """Whether a set is too large, or of too many sizes, to be held in memory by whoever has no better plan."""
    return name in ("imagefolder", "imagenet", DATASETS["imagenet"].hub_id)


def default_workers() -> int:
    """GBNZOO_WORKERS, or as many as there are cores for each of this machine's processes."""
    given = os.environ.get("GBNZOO_WORKERS")
    if given is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if not given.isdecimal():
        raise ValueError(f"GBNZOO_WORKERS {given!r}: wanted a number of processes that decode images, 0 for none")
    return int(given)


# ---- opening -------------------------------------------------------------------------------------------------------


def open_images(data: Data, split: str, *, data_dir: str | Path | None = None) -> ImageFiles:
    """One split of a data set, ready to be read.

    Args:
        data: what a recipe says of its data, `image_size` and `transform` included.
        split, data_dir: as of `gbnzoo.data.load_images`.

    Raises:
        ValueError: if an argument is impossible; if columns or classes are not those wanted.
        OSError: if the files are missing or broken, or the Hub cannot be reached.
    """
    if data.name == "digits":
        raise ValueError("data.transform reads images from files; the digits have none, and take data.augment")
    folder = data_folder(data_dir)
    given = {"image_column": data.image_column, "label_column": data.label_column, "num_classes": data.num_classes}
    name, spec = find_spec(data.name, folder, given)
    source = source_split(split, data.holdout)
    table, where = _open_table(name, spec, source, folder), f"{name} {source}"
    labels, class_names = read_labels(table, spec, where)
    images = encoded_images(table, spec, where)
    kept = kept_of_source(name, labels, split, data.holdout)
    if isinstance(kept, Tensor):
        images, labels = images.select(kept.nonzero().flatten().tolist()), labels[kept]
    return ImageFiles(
        images,
        labels,
        class_names,
        name,
        split,
        spec,
        data.image_size,
        data.transform,
        default_workers(),
        torch.device("cpu"),
    )


def _open_table(name: str, spec: DatasetSpec, split: str, folder: Path | None) -> "datasets.Dataset":
    if folder or name == "imagefolder":
        folder = source_folder(name, spec, folder)
        if name == "imagefolder":
            return load_folder(name, split, folder)
        of, load = repr(fingerprint_of(name, folder)), functools.partial(load_folder, name, split, folder)
    else:
        of = spec.hub_id
        cure = (
            f"its terms may have to be accepted at huggingface.co/datasets/{spec.hub_id} and `hf auth login` be run; its"
            " parquet files can be given by --data-dir or GBNZOO_DATA"
        )
        load = functools.partial(load_split, name, split, spec.hub_id, cure=cure)
    key = hashlib.sha256(repr((of, split)).encode()).hexdigest()[:16]
    return _streamed(name, split, load, cache_folder() / f"{name.replace('/', '--')}-{split}-{key}")


def _streamed(name: str, split: str, load: functools.partial, folder: Path) -> "datasets.Dataset":
    """The split as a table on disk; what is not there yet is streamed, by one process of the machine while the others wait.

    From the Hub it is as it was when first streamed; without its folder it is streamed again.

    Raises:
        OSError: naming what was streamed so far.
    """
    from datasets import Dataset, concatenate_datasets

    folder.mkdir(parents=True, exist_ok=True)
    is_complete = folder / "complete"  # and says of how many parts
    with one_at_a_time(folder):
        if not is_complete.exists():
            stream = load(streaming=True)
            parts = _parts(folder, stream.num_shards)
            for k, part in enumerate(parts):
                try:
                    if not part.exists():
                        _write(stream.shard(num_shards=len(parts), index=k), part)
                except (OSError, ValueError, RuntimeError) as error:
                    raise OSError(
                        f"{name} {split}: file {k + 1} of {len(parts)} cannot be brought to {folder}: {error}; those before it"
                        " are there, and the next start goes on with it"
                    ) from error
            (aside := is_complete.with_suffix(".writing")).write_text(str(len(parts)))
            aside.replace(is_complete)
    return concatenate_datasets([Dataset.from_file(str(part)) for part in _parts(folder, int(is_complete.read_text()))])


def _parts(folder: Path, count: int) -> list[Path]:
    return [folder / f"{k:05}-of-{count:05}.arrow" for k in range(count)]


def _write(stream: "datasets.IterableDataset", path: Path) -> None:
    """The rows of a stream as an Arrow file, whole or not at all."""
    import pyarrow as pa

    aside, schema = path.with_suffix(".writing"), stream.features.arrow_schema
    with pa.OSFile(str(aside), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for table in stream.with_format("arrow").iter(batch_size=100):
            writer.write_table(table.cast(schema))
    aside.replace(path)
