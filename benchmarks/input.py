"""Images ready for training per second: keyed batched augmentation against torchvision's transforms and a DataLoader.

    OMP_NUM_THREADS=1 python -m benchmarks.input --data-dir data

Each contender crops (4 pixels of padding), flips, scales and normalises CIFAR-10's training images into batches: of bfloat16,
which recipes ask for, and of float32, which torchvision makes.
"""

import os
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import torch
import typer
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from benchmarks.timing import interleave, rate, ratio, setting
from gbnzoo.data import Augment, ImageSet, load_images

BATCH_SIZE = 512


class _AsOthers(Dataset):
    """The images of a set through torchvision's transforms, one by one, as training scripts have it."""

    def __init__(self, images: ImageSet):
        self.images = [Image.fromarray(image) for image in images.images[: 8 * BATCH_SIZE].numpy()]
        self.transform = v2.Compose(
            [
                v2.RandomCrop(32, padding=4),
                v2.RandomHorizontalFlip(),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(images.mean, images.std),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.transform(self.images[index])


def main(
    data_dir: Annotated[Path | None, typer.Option(help="folder with CIFAR-10; else GBNZOO_DATA, else the Hub")] = None,
    rounds: int = 15,
) -> None:
    with tempfile.TemporaryDirectory() as cache:
        os.environ["HF_DATASETS_CACHE"] = cache
        first, cached = (_time_to_load(data_dir) for _ in range(2))
    images = load_images("cifar10", "train", data_dir=data_dir)
    half, single = (Augment(images, "pad4_crop_flip", 0, dtype) for dtype in (torch.bfloat16, torch.float32))
    others = _AsOthers(images)
    indices = torch.randperm(len(images))[:BATCH_SIZE]
    epochs = torch.zeros_like(indices)
    batch = half(indices, epochs)

    def augmented() -> torch.Tensor:
        return single(indices, epochs)

    times = interleave(
        {
            "gbnzoo, bfloat16": lambda: half(indices, epochs),
            "gbnzoo, float32": augmented,
            "torchvision's transforms": lambda: torch.stack([others[i] for i in range(BATCH_SIZE)]),
            "a plain copy of a batch in bfloat16": lambda: torch.empty_like(batch).copy_(batch),
        },
        rounds,
    )
    # Workers are processes of their own: the clock's time, and as many images of ours.
    loader = DataLoader(others, BATCH_SIZE, num_workers=2, persistent_workers=True)
    batches = len(loader)
    with_workers = {
        "gbnzoo, float32": lambda: _drain(augmented() for _ in range(batches)),
        "torchvision's in a DataLoader, 2 workers": lambda: _drain(loader),
    }
    by_the_clock = interleave(with_workers, 5, clock=time.perf_counter)
    print(f"{setting()}\n\n| input | images/s of one core | time over gbnzoo's in float32 |\n|---|---|---|")
    for name in times:
        print(f"| {name} | {rate(times[name], BATCH_SIZE)} | {ratio(times, name, 'gbnzoo, float32')} |")
    for name in by_the_clock:
        cells = rate(by_the_clock[name], batches * BATCH_SIZE), ratio(by_the_clock, name, "gbnzoo, float32")
        print(f"| {name}, by the clock | {' | '.join(cells)} |")
    print(f"\nCIFAR-10 from parquet to tensors: {first}, from the cached copy {cached}")


def _drain(batches: Iterable[torch.Tensor]) -> None:
    for _ in batches:
        pass


def _time_to_load(data_dir: Path | None) -> str:
    cpu, began = time.process_time(), time.perf_counter()
    for split in ("train", "test"):
        load_images("cifar10", split, data_dir=data_dir)
    return f"{time.perf_counter() - began:.3f} s by the clock ({time.process_time() - cpu:.3f} s of CPU time)"


if __name__ == "__main__":
    typer.run(main)
