"""Keyed randomness, the order of batches, augmentation and loading."""

import itertools
import math
import re
import sys
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
import torchvision.transforms.functional as TF
from conftest import random_pixels
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from gbnzoo import data
from gbnzoo.data import (
    AUGMENTATIONS,
    DATASETS,
    Augment,
    GlobalBatches,
    ImageSet,
    epoch_permutation,
    keyed_bits,
    keyed_normal,
    load_images,
    scored_split,
    with_random_labels,
)


def image_set(pixels: np.ndarray | torch.Tensor, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3)) -> ImageSet:
    images = torch.as_tensor(pixels)
    channels = images.shape[3]
    return ImageSet(images, torch.arange(len(images)) % 10, (), mean[:channels], std[:channels], "random", "train")


def chi_square_is_plausible(counts: torch.Tensor, degrees_of_freedom: int) -> bool:
    """Within five standard deviations of what equally likely cells give: mean k, variance 2k."""
    expected = counts.sum().item() / counts.numel()
    chi_square = ((counts.double() - expected) ** 2 / expected).sum().item()
    return abs(chi_square - degrees_of_freedom) < 5 * math.sqrt(2 * degrees_of_freedom)


# ---- keyed randomness ----------------------------------------------------------------------------------------------


def splitmix64(state: int):
    """The generator as its authors wrote it, in whole numbers."""
    while True:
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        yield z ^ (z >> 31)


def output(state: int, number: int) -> int:
    return next(itertools.islice(splitmix64(state), number, None))


def test_splitmix64_in_this_file_gives_its_published_outputs():
    assert list(itertools.islice(splitmix64(1234567), 3)) == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


@pytest.mark.parametrize(
    ("stream", "number"),
    [
        ("permutation", 0),
        ("augment", 1),
        ("gradient_noise", 2),
        ("holdout", 3),
        ("mix", 4),
        ("random_labels", 5),
        ("isotropic_noise", 6),
    ],
)
def test_bits_are_splitmix64_seeded_with_each_key_in_turn(stream, number):
    epochs, indices = [0, 0, 3, 120], [0, 5, 5, 977]
    expected = [output(output(output(output(0, 7), number), e), i) for e, i in zip(epochs, indices, strict=True)]
    bits = keyed_bits(7, stream, torch.tensor(epochs), torch.tensor(indices))
    assert [b % 2**64 for b in bits.tolist()] == expected


def test_bits_of_neighbouring_seeds_streams_epochs_and_samples_are_unrelated():
    n = 10_000
    base = keyed_bits(0, "augment", 0, torch.arange(n))
    others = [
        keyed_bits(1, "augment", 0, torch.arange(n)),
        keyed_bits(0, "gradient_noise", 0, torch.arange(n)),
        keyed_bits(0, "augment", 1, torch.arange(n)),
        keyed_bits(0, "augment", 0, torch.arange(n) + 1),
    ]
    for other in others:
        flipped = torch.stack([(base ^ other) >> k & 1 for k in range(64)]).double().mean(1)
        assert (flipped - 0.5).abs().max() < 5 * 0.5 / math.sqrt(n)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_random_labels_are_keyed_by_seed_and_sample(share):
    """Against a slow loop: label i goes where its first number is below the share, and its second one says what it becomes."""

    def uniform(stage, i):
        return (output(output(output(output(0, 7), 5), stage), i) >> 11) / 2**53

    true = [i % 10 for i in range(1000)]
    expected = [int(uniform(1, i) * 10) if uniform(0, i) < share else label for i, label in enumerate(true)]
    assert with_random_labels(torch.tensor(true), 10, share, seed=7).tolist() == expected


def test_random_labels_are_uniform_and_tell_nothing_of_the_true_ones():
    n, classes = 50_000, 10
    true = torch.arange(n) % classes
    random = with_random_labels(true, classes, 1.0, seed=0)
    assert chi_square_is_plausible(torch.bincount(true * classes + random, minlength=classes**2), 90)
    assert not torch.equal(random, with_random_labels(true, classes, 1.0, seed=1))
    partly = with_random_labels(true, classes, 0.3, seed=0)
    changed = partly != true
    assert changed.double().mean().item() == pytest.approx(0.3 * 0.9, abs=5 * math.sqrt(0.27 * 0.73 / n))
    assert torch.equal(partly[changed], random[changed])


def test_normal_numbers_follow_the_normal_distribution():
    n = 100_000
    z = keyed_normal(0, "gradient_noise", torch.arange(n) % 7, torch.arange(n))
    assert z.dtype == torch.float64
    for x in (-3.0, -2.0, -1.0, -0.3, 0.0, 0.3, 1.0, 2.0, 3.0):
        p = (1 + math.erf(x / math.sqrt(2))) / 2
        assert abs((z <= x).double().mean().item() - p) < 5 * math.sqrt(p * (1 - p) / n)
    assert abs((z[:-1] * z[1:]).mean().item()) < 5 / math.sqrt(n)


# ---- the order of batches ------------------------------------------------------------------------------------------


def order(n: int, seed: int = 0, epoch: int = 0) -> torch.Tensor:
    return epoch_permutation(n, seed, torch.full((n,), epoch), torch.arange(n))


@pytest.mark.parametrize("sizes", [range(1, 301), [1297], [50_000]], ids=["1-300", "1297", "50000"])
def test_each_epoch_is_a_permutation(sizes):
    for n in sizes:
        assert torch.equal(order(n, seed=n).sort().values, torch.arange(n))


def test_permutations_differ_by_epoch_and_by_seed():
    # Two random orders of 50,000 agree at one place on average.
    agreeing = [(order(50_000) == other).sum().item() for other in (order(50_000, epoch=1), order(50_000, seed=1))]
    assert max(agreeing) < 10


@pytest.mark.parametrize("n", [16, 64, 101])
def test_every_sample_is_equally_likely_at_every_position(n):
    epochs = 40 * n
    samples = epoch_permutation(n, 0, torch.arange(epochs).repeat_interleave(n), torch.arange(n).repeat(epochs))
    counts = (torch.arange(n).repeat(epochs) * n + samples).bincount(minlength=n * n)
    # Rows and columns sum to the number of epochs, which leaves (n - 1)² free.
    assert chi_square_is_plausible(counts, (n - 1) ** 2)


@pytest.mark.parametrize("n", [64, 101])
def test_every_pair_of_samples_is_equally_likely_to_be_neighbours(n):
    epochs = 100 * n * (n - 1)
    first, second = (epoch_permutation(n, 0, torch.arange(epochs), torch.full((epochs,), k)) for k in (1, 2))
    assert (first != second).all()
    counts = (first * n + second).bincount(minlength=n * n).view(n, n)
    assert chi_square_is_plausible(counts[~torch.eye(n, dtype=torch.bool)], n * (n - 1) - 1)


def test_neighbours_in_a_long_order_are_unrelated():
    samples = order(50_000)
    step = (samples[1:] - samples[:-1]) % 50_000
    assert chi_square_is_plausible((step // 500).bincount(minlength=100), 99)
    assert chi_square_is_plausible((samples[:5_000] // 500).bincount(minlength=100), 99)


@pytest.mark.parametrize(("num_samples", "batch_size"), [(50, 8), (50, 50), (7, 20), (1, 3), (1297, 512)])
def test_batches_are_epochs_laid_end_to_end(num_samples, batch_size):
    updates = 12
    epochs = -(-updates * batch_size // num_samples)
    indices = torch.cat([order(num_samples, seed=3, epoch=e) for e in range(epochs)])
    numbers = torch.arange(epochs).repeat_interleave(num_samples)
    batches = GlobalBatches(num_samples, batch_size, seed=3)
    for update in range(updates):
        cut = slice(update * batch_size, (update + 1) * batch_size)
        assert torch.equal(batches.at(update)[0], indices[cut])
        assert torch.equal(batches.at(update)[1], numbers[cut])


def test_parts_of_a_batch_are_those_parts():
    batches, generator = GlobalBatches(50, 32, seed=0), torch.Generator().manual_seed(0)
    positions = torch.randperm(32, generator=generator)[:20].split([5, 15])
    whole = torch.stack(batches.at(5))
    for part, places in zip(batches.parts(5, positions), positions, strict=True):
        assert torch.equal(torch.stack(part), whole[:, places])


def test_positions_may_be_of_any_integers_and_shape():
    batches, positions = GlobalBatches(1000, 64, seed=3), torch.arange(12) * 5
    expected = torch.stack(batches.at(5, positions))
    for dtype in (torch.int32, torch.int16, torch.uint8):
        assert torch.equal(torch.stack(batches.at(5, positions.to(dtype))), expected)
    assert torch.equal(torch.stack(batches.at(5, positions.repeat_interleave(2)[::2])), expected)


def test_order_needs_no_memory_in_proportion_to_the_data():
    # A million million samples: their order could not be held.
    indices, epochs = GlobalBatches(10**12, 1000, seed=0).at(3 * 10**9 + 1)
    assert epochs.unique().tolist() == [3]
    assert indices.unique().numel() == 1000
    assert 0 <= indices.min() < indices.max() < 10**12


@pytest.mark.parametrize(("num_samples", "batch_size"), [(0, 8), (8, 0)])
def test_nothing_to_batch_is_an_error(num_samples, batch_size):
    with pytest.raises(ValueError, match=f"batches of {batch_size} from {num_samples} samples"):
        GlobalBatches(num_samples, batch_size, seed=0)


# ---- augmentation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", AUGMENTATIONS)
@pytest.mark.parametrize("shape", [(32, 32, 3), (8, 8, 1), (12, 20, 3)])
def test_each_image_is_one_of_torchvisions_crops_and_flips(kind, shape):
    pad, flips = AUGMENTATIONS[kind]
    images = image_set(random_pixels(20, *shape))
    height, width, channels = shape
    out = Augment(images, kind, seed=1)(torch.arange(20), torch.arange(20))
    assert out.shape == (20, channels, height, width)
    for pixels, result in zip(images.images, out, strict=True):
        padded = TF.pad(pixels.permute(2, 0, 1), [pad] * 4)  # black, as RandomCrop(padding=...) does
        crops = [TF.crop(padded, top, left, height, width) for top in range(2 * pad + 1) for left in range(2 * pad + 1)]
        crops += [TF.hflip(crop) for crop in crops] if flips else []
        made = torch.stack([TF.normalize(crop / 255, images.mean, images.std) for crop in crops])
        assert ((made - result).abs().amax((1, 2, 3)) < 1e-5).sum() == 1


def test_crops_and_flips_are_equally_likely_and_independent():
    # Pixel (y, x) is (y + 1, x + 1, 0); mean 0 and standard deviation 1/255 leave the pixel values as they are.
    y, x = torch.meshgrid(torch.arange(1, 33), torch.arange(1, 33), indexing="ij")
    one = torch.stack((y, x, torch.zeros_like(x)), -1).to(torch.uint8)
    images = image_set(one.expand(100, -1, -1, -1), mean=(0, 0, 0), std=(1 / 255,) * 3)
    epochs = torch.arange(162)
    out = Augment(images, "pad4_crop_flip", seed=0)(
        torch.arange(100).repeat(162), epochs.repeat_interleave(100)
    ).round()
    top = out[:, 0, 16, 16] - 17 + 4
    flip = out[:, 1, 16, 16] > out[:, 1, 16, 17]
    left = torch.where(flip, out[:, 1, 16, 15], out[:, 1, 16, 16]) - 17 + 4
    cells = (top * 9 + left) * 2 + flip
    assert chi_square_is_plausible(cells.long().bincount(minlength=162), 161)


def test_augmentation_of_a_sample_does_not_depend_on_its_batch():
    images = image_set(random_pixels(50, 32, 32, 3))
    augment = Augment(images, "pad4_crop_flip", seed=2)
    indices, epochs = torch.randperm(50, generator=torch.Generator().manual_seed(0)), torch.arange(50) // 20
    whole = augment(indices, epochs)
    for batch_size in (1, 7, 16):
        parts = zip(indices.split(batch_size), epochs.split(batch_size), strict=True)
        assert torch.equal(torch.cat([augment(i, e) for i, e in parts]), whole)
    assert not torch.equal(augment(indices, epochs + 1), whole)
    assert not torch.equal(Augment(images, "pad4_crop_flip", seed=3)(indices, epochs), whole)


def test_augmented_images_are_channels_last_in_the_dtype_asked_for():
    images = image_set(random_pixels(6, 32, 32, 3))
    wide, single, half = (
        Augment(images, "pad4_crop_flip", 0, dtype)(torch.arange(6), torch.zeros(6, dtype=torch.int64))
        for dtype in (torch.float64, torch.float32, torch.bfloat16)
    )
    assert wide.is_contiguous(memory_format=torch.channels_last)
    assert (wide.dtype, single.dtype, half.dtype) == (torch.float64, torch.float32, torch.bfloat16)
    torch.testing.assert_close(single.double(), wide, rtol=0, atol=1e-6)
    assert torch.equal(half, single.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", AUGMENTATIONS)
def test_images_are_the_same_to_the_bit_without_kernels(kind, dtype, monkeypatch):
    images, indices, epochs = image_set(random_pixels(20, 12, 20, 3)), torch.arange(20), torch.arange(20)
    augment = Augment(images, kind, 0, dtype)
    if data.kernels.cpu.LIBRARY:
        assert bool(data.kernels.pick_crops(augment.images, dtype)) == (dtype in data.kernels.cpu.DTYPES)
    made = augment(indices, epochs)
    monkeypatch.setattr(data.kernels, "_ARE_ON", False)
    assert torch.equal(augment(indices, epochs), made)
    assert made.dtype == dtype


def test_unknown_augmentation_is_named_beside_the_known_ones():
    with pytest.raises(ValueError, match="'pad3_crop' is not known; wanted one of none, pad1_crop"):
        Augment(image_set(random_pixels(2, 8, 8, 3)), "pad3_crop", 0)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_evaluation_batches_hold_every_image_once(world_size):
    images = image_set(random_pixels(11, 8, 6, 3))
    shares = [list(images.batches(4, torch.float64, rank, world_size)) for rank in range(world_size)]
    assert max(len(x) for share in shares for x, _ in share) <= 4
    made, labels = (torch.cat(parts) for parts in zip(*itertools.chain(*shares), strict=True))
    expected = (images.images.double() / 255 - torch.tensor(images.mean)) / torch.tensor(images.std)
    torch.testing.assert_close(made, expected.permute(0, 3, 1, 2), rtol=1e-6, atol=1e-6)
    assert torch.equal(labels, images.labels)
    assert images.input_size == (3, 8, 6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["none", "pad4_crop", "pad4_crop_flip"])
def test_a_gpu_makes_the_same_images(kind, dtype):
    images = image_set(random_pixels(50, 32, 32, 3))
    indices, epochs = torch.arange(50), torch.arange(50) // 20
    on_gpu = Augment(images.to("cuda"), kind, 0, dtype)(indices, epochs)
    assert on_gpu.is_cuda
    assert torch.equal(on_gpu.cpu(), Augment(images, kind, 0, dtype)(indices, epochs))


# ---- loading -------------------------------------------------------------------------------------------------------


def test_parquet_is_found_in_the_folder_in_its_subfolder_and_by_the_environment(image_parquet, monkeypatch):
    root = image_parquet()
    images = load_images("cifar10", "train", data_dir=root)
    assert np.array_equal(images.images, random_pixels(40, 32, 32, 3, seed=len("train")))
    assert images.labels.tolist() == [k % 10 for k in range(40)]
    assert images.class_names == tuple(f"class {k}" for k in range(10))
    assert (images.name, images.split, len(images)) == ("cifar10", "train", 40)
    assert (images.mean, images.std) == ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
    test_pixels = random_pixels(20, 32, 32, 3, seed=len("test"))
    assert np.array_equal(load_images("cifar10", "test", data_dir=root / "cifar10").images, test_pixels)
    monkeypatch.setenv("GBNZOO_DATA", str(root))
    assert np.array_equal(load_images("uoft-cs/cifar10", "test").images, test_pixels)


def test_grey_images_have_one_channel(image_parquet):
    root = image_parquet("mnist", shape=(28, 28), image_column="image")
    images = load_images("mnist", "train", data_dir=root)
    assert np.array_equal(images.images[..., 0], random_pixels(40, 28, 28, seed=len("train")))


@pytest.fixture
def on_hub(image_parquet, tmp_path, monkeypatch):
    """CIFAR-10 on a Hub of its own: its commit, that of what `datasets` prepared if another, and what was asked for."""
    import datasets

    hub, folder = SimpleNamespace(commit="a1", prepared=None, asked=[]), image_parquet() / "cifar10"
    load = datasets.load_dataset

    def load_dataset(hub_id, revision):
        hub.asked.append((hub_id, revision))
        prepared = hub.prepared or revision or hub.commit
        return load("parquet", data_dir=str(folder), cache_dir=str(tmp_path / prepared))

    def hf_hub_download(hub_id, name, repo_type, local_files_only):
        return f"datasets/snapshots/{hub.commit}/{name}"

    monkeypatch.setattr(data, "hf_hub_download", hf_hub_download)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return hub


def test_hub_is_asked_where_no_folder_is_given(on_hub):
    on_hub.commit = "a0"
    assert np.array_equal(load_images("cifar10", "test").images, random_pixels(20, 32, 32, 3, seed=len("test")))
    assert on_hub.asked == [("uoft-cs/cifar10", "a0")]


def test_a_hub_set_is_decoded_once_for_each_commit_and_then_needs_no_datasets_library(on_hub, monkeypatch):
    first = load_images("cifar10", "test")
    on_hub.commit = "b2"
    load_images("cifar10", "test")
    assert on_hub.asked == [("uoft-cs/cifar10", "a1"), ("uoft-cs/cifar10", "b2")]
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert torch.equal(load_images("cifar10", "test").images, first.images)


def test_what_datasets_prepared_of_another_commit_is_not_kept(on_hub):
    """Where the Hub fails, `datasets` takes what it has."""
    on_hub.commit, on_hub.prepared = "d4", "d3"
    for _ in range(2):
        load_images("cifar10", "test")
    assert on_hub.asked == [("uoft-cs/cifar10", "d4")] * 2


@pytest.mark.parametrize("error", [LocalEntryNotFoundError("no answer"), EntryNotFoundError("no card")])
def test_a_hub_set_whose_card_cannot_be_had_is_left_to_datasets(error, on_hub, monkeypatch):
    def failing(*args, **kwargs):
        raise error

    monkeypatch.setattr(data, "hf_hub_download", failing)
    assert len(load_images("cifar10", "test")) == 20
    assert on_hub.asked == [("uoft-cs/cifar10", None)]


def test_other_sets_are_converted_to_rgb_unless_told_otherwise(image_parquet):
    root = image_parquet("fashion", shape=(28, 28), image_column="image")
    rgb = load_images("fashion", "test", data_dir=root)
    assert rgb.input_size == (3, 28, 28)
    assert torch.equal(rgb.images[..., 0], rgb.images[..., 2])
    assert (rgb.mean, rgb.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    grey = load_images("fashion", "test", data_dir=root, image_mode="L")
    assert torch.equal(grey.images[..., 0], rgb.images[..., 0])
    assert (grey.mean, grey.std) == ((0.5,), (0.5,))


# ---- the cached copy


def refuse(*args, **kwargs):
    raise AssertionError("the source was read again")


def test_second_load_comes_from_the_cached_copy(image_parquet, monkeypatch):
    root = image_parquet()
    first = load_images("cifar10", "train", data_dir=root)
    monkeypatch.setattr("datasets.load_dataset", refuse)
    second = load_images("cifar10", "train", data_dir=root)
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.labels, second.labels)
    assert first.class_names == second.class_names


def test_changed_source_is_read_again(image_parquet):
    load_images("cifar10", "train", data_dir=image_parquet(seed=0))
    images = load_images("cifar10", "train", data_dir=image_parquet(seed=9))
    assert np.array_equal(images.images, random_pixels(40, 32, 32, 3, seed=9 + len("train")))


def test_damaged_cached_copy_is_replaced(image_parquet, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    root = image_parquet()
    first = load_images("cifar10", "train", data_dir=root)
    (cached,) = (tmp_path / "cache").rglob("*.safetensors")
    size = cached.stat().st_size
    cached.write_bytes(cached.read_bytes()[: size // 2])
    assert torch.equal(load_images("cifar10", "train", data_dir=root).images, first.images)
    assert cached.stat().st_size == size
    assert list((tmp_path / "cache" / "gbnzoo").iterdir()) == [cached]


def test_cache_that_cannot_be_written_is_no_error(image_parquet, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder can be made below a file")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "file" / "cache"))
    assert len(load_images("cifar10", "train", data_dir=image_parquet())) == 40


# ---- splits


def test_holdout_is_stratified_and_the_rest_is_trained_on(image_parquet):
    root = image_parquet(sizes={"train": 200, "test": 10})
    whole = load_images("cifar10", "train", data_dir=root)
    train, validation = (load_images("cifar10", s, data_dir=root, holdout=50) for s in ("train", "validation"))
    assert validation.labels.bincount().tolist() == [5] * 10
    assert train.labels.bincount().tolist() == [15] * 10
    assert (train.split, validation.split) == ("train", "validation")
    rows = [{tuple(image.flatten().tolist()) for image in images.images} for images in (whole, train, validation)]
    assert rows[1] | rows[2] == rows[0]
    assert not rows[1] & rows[2]
    assert len(load_images("cifar10", "test", data_dir=root, holdout=50)) == 10


def test_holdout_of_uneven_classes_is_proportional_to_within_one_and_exact_in_all(image_parquet):
    # Of 25 training images, classes 0 to 4 have three each and 5 to 9 two: 7 held out is 0.84 and 0.56 of each.
    root = image_parquet(sizes={"train": 25})
    held_out = load_images("cifar10", "validation", data_dir=root, holdout=7)
    assert len(held_out) == 7
    assert set(held_out.labels.bincount(minlength=10).tolist()) == {0, 1}


def test_validation_without_holdout_is_the_sources_own(image_parquet):
    root = image_parquet("own", {"train": 20, "validation": 10})
    assert len(load_images("own", "validation", data_dir=root)) == 10
    with pytest.raises(ValueError, match=r"cifar10 has no split 'validation', only .*; data.holdout: N keeps N"):
        load_images("cifar10", "validation", data_dir=image_parquet())


@pytest.mark.parametrize(
    ("name", "split"),
    [("cifar10", "test"), ("imagenet", "validation"), ("ILSVRC/imagenet-1k", "validation"), ("imagefolder", "test")],
)
def test_imagenet_is_scored_on_its_validation_split(name, split):
    """The labels of its test split are not public."""
    assert scored_split(name) == split


@pytest.mark.parametrize("holdout", [-1, 40, 1000])
def test_impossible_holdout_is_an_error(image_parquet, holdout):
    with pytest.raises(ValueError, match=f"data.holdout {holdout} of 40 training images"):
        load_images("cifar10", "train", data_dir=image_parquet(), holdout=holdout)


def test_digits_are_scikit_learns_500_of_them_for_test():
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    train, test = (load_images("digits", split) for split in ("train", "test"))
    assert (train.input_size, len(train), len(test)) == ((1, 8, 8), 1297, 500)
    made = torch.cat((train.images, test.images)).flatten(1).numpy()
    with_labels = np.column_stack((made, torch.cat((train.labels, test.labels))))
    wanted = np.column_stack((np.rint(pixels * 255 / 16), labels))
    assert sorted(map(tuple, with_labels)) == sorted(map(tuple, wanted))
    # 174 to 183 images of each class: 500/1797 of them are 48.4 to 50.9.
    assert set(test.labels.bincount().tolist()) <= {48, 49, 50, 51}
    scaled = train.images.double() / 255
    assert scaled.mean().item() == pytest.approx(train.mean[0], abs=5e-5)
    assert scaled.std(correction=0).item() == pytest.approx(train.std[0], abs=5e-5)


# ---- folders of images, and sizes


@pytest.fixture
def image_folder(tmp_path):
    """train/{cat,dog}/*.png, 60x30: the middle 30 columns red, blue on both sides; the second one grey."""
    striped = np.zeros((30, 60, 3), np.uint8)
    striped[:, 15:45, 0] = 255
    striped[:, :15, 2] = striped[:, 45:, 2] = 255
    for name, image in {"cat": PIL.Image.fromarray(striped), "dog": PIL.Image.new("L", (30, 40), 100)}.items():
        folder = tmp_path / "images" / "train" / name
        folder.mkdir(parents=True)
        image.save(folder / "0.png")
    return tmp_path / "images"


def test_image_folder_is_resized_by_its_shorter_side_and_cropped_to_the_centre(image_folder):
    images = load_images("imagefolder", "train", data_dir=image_folder, image_size=10)
    assert images.class_names == ("cat", "dog")
    assert images.labels.tolist() == [0, 1]
    assert images.input_size == (3, 10, 10)
    cat, dog = images.images
    assert (cat[:, 2:8] == torch.tensor([255, 0, 0])).all()  # the crop is the red middle; bicubic rings near its edges
    assert (cat[:, :, 0] > 200).all()
    assert (dog == 100).all()


def test_images_of_several_sizes_need_an_image_size(image_folder):
    with pytest.raises(ValueError, match=r"image 1 is 30x40 pixels, wanted 60x30; data.image_size"):
        load_images("imagefolder", "train", data_dir=image_folder)


def grey_images(folder, **counts):
    for name, count in counts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for k in range(count):
            PIL.Image.new("L", (8, 8), 20 * k).save(folder / name / f"{k}.png")


def test_a_class_may_be_called_like_a_split(tmp_path):
    for split in ("train", "test"):
        grey_images(tmp_path / split, bus=2, train=3, covid_test=1)
    for split in ("train", "test"):
        images = load_images("imagefolder", split, data_dir=tmp_path)
        assert images.class_names == ("bus", "covid_test", "train")
        assert images.labels.tolist() == [0, 0, 1, 2, 2, 2]


def test_links_to_folders_and_files_are_followed(tmp_path):
    grey_images(tmp_path / "elsewhere", cat=3, fox=1)
    grey_images(tmp_path / "images" / "train", dog=2)
    (tmp_path / "images" / "train" / "cat").symlink_to(tmp_path / "elsewhere" / "cat")
    (tmp_path / "images" / "train" / "dog" / "2.png").symlink_to(tmp_path / "elsewhere" / "fox" / "0.png")
    (tmp_path / "images" / "val").symlink_to(tmp_path / "elsewhere")
    assert load_images("imagefolder", "train", data_dir=tmp_path / "images").labels.tolist() == [0, 0, 0, 1, 1, 1]
    validation = load_images("imagefolder", "validation", data_dir=tmp_path / "images")
    assert validation.class_names == ("cat", "dog", "fox")
    assert validation.labels.tolist() == [0, 0, 0, 2]
    # What a link leads to is part of what the cached copy is known by.
    PIL.Image.new("L", (8, 8), 255).save(tmp_path / "elsewhere" / "cat" / "2.png")
    assert load_images("imagefolder", "train", data_dir=tmp_path / "images").images[2].min() == 255


def test_an_image_folder_without_splits_is_all_for_training(tmp_path):
    grey_images(tmp_path, cat=2, dog=1)
    grey_images(tmp_path / "cat", kittens=1)  # below a class all are of that class
    (tmp_path / "cat" / "notes.txt").touch()
    (tmp_path / "cat" / "._0.png").touch()
    grey_images(tmp_path, **{".thumbnails": 2})
    assert load_images("imagefolder", "train", data_dir=tmp_path).labels.tolist() == [0, 0, 0, 1]
    with pytest.raises(ValueError, match="imagefolder has no split 'test', only train"):
        load_images("imagefolder", "test", data_dir=tmp_path)


@pytest.mark.parametrize(
    "names",
    [("seg_train", "seg_test"), ("Train", "Val"), ("train_images", "cats"), ("train2017",), ("TestData", "trainA")],
)
def test_folders_that_may_be_splits_are_not_taken_for_classes(tmp_path, names):
    for name in names:
        grey_images(tmp_path / name, cat=1, dog=1)
    with pytest.raises(FileNotFoundError, match=rf"{min(n for n in names if n != 'cats')}.* splits, or classes"):
        load_images("imagefolder", "train", data_dir=tmp_path)


def test_one_split_in_two_folders_is_refused(tmp_path):
    grey_images(tmp_path / "val", cat=1, dog=1)
    (tmp_path / "validation").symlink_to("val")
    with pytest.raises(FileNotFoundError, match=r"validation and .*val would be one split; wanted train/"):
        load_images("imagefolder", "validation", data_dir=tmp_path)


def test_links_in_a_loop_and_hidden_folders_are_left_out(tmp_path):
    grey_images(tmp_path / "train", cat=2, dog=1)
    grey_images(tmp_path / "train" / "cat", **{".ipynb_checkpoints": 1})
    grey_images(tmp_path / "test", cat=3, dog=3)
    for name, to in (("up", ".."), ("again", ".."), ("top", "../.."), ("self", "self")):
        (tmp_path / "train" / "cat" / name).symlink_to(to)
    assert load_images("imagefolder", "train", data_dir=tmp_path).labels.tolist() == [0, 0, 1]


def test_a_copy_of_what_was_decoded_by_other_rules_is_made_again(tmp_path, monkeypatch):
    grey_images(tmp_path, cat=2, dog=1)
    before = load_images("imagefolder", "train", data_dir=tmp_path).images
    monkeypatch.setattr(data, "_decode", lambda *arguments: 255 - before)
    assert torch.equal(load_images("imagefolder", "train", data_dir=tmp_path).images, before)
    monkeypatch.setattr(data, "DECODING", data.DECODING + 1)
    assert torch.equal(load_images("imagefolder", "train", data_dir=tmp_path).images, 255 - before)


def test_an_image_folder_of_one_class_is_refused(tmp_path):
    grey_images(tmp_path / "train", cat=2, dog=0)
    with pytest.raises(FileNotFoundError, match=r"holds images of cat; wanted train/<class>/ .* two classes at least"):
        load_images("imagefolder", "train", data_dir=tmp_path)


def test_sixteen_bits_of_grey_become_eight(tmp_path):
    grey_images(tmp_path / "train", cat=1)
    (tmp_path / "train" / "deep").mkdir()
    deep = np.array([[0, 257, 25_700, 65_535]] * 8, np.uint16).repeat(2, axis=1)
    PIL.Image.fromarray(deep).save(tmp_path / "train" / "deep" / "0.png")
    images = load_images("imagefolder", "train", data_dir=tmp_path).images
    assert images[1, 0, :, 0].tolist() == [0, 0, 1, 1, 100, 100, 255, 255]


def test_a_path_that_datasets_takes_for_a_pattern_is_refused(image_parquet):
    folder = image_parquet().rename(image_parquet().parent / "images [1]")
    with pytest.raises(
        OSError, match=r"images \[1\].*: `datasets` takes \[ \] in a path for a pattern; wanted another name"
    ):
        load_images("cifar10", "train", data_dir=folder)


@pytest.mark.parametrize("data_dir", [None, "nowhere"])
def test_image_folder_must_exist(data_dir):
    with pytest.raises(
        FileNotFoundError, match=r"imagefolder: .* given, wanted one with train/.*--data-dir or GBNZOO_DATA"
    ):
        load_images("imagefolder", "train", data_dir=data_dir)


def test_set_too_large_for_memory_is_refused_with_its_size(image_parquet, monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=200_000))
    with pytest.raises(ValueError, match=r"cifar10 train: its images take 0.0 GB decoded, over a third of the 0.0 GB"):
        load_images("cifar10", "train", data_dir=image_parquet())


# ---- errors


@pytest.mark.parametrize(
    ("written", "arguments", "message"),
    [
        ({"image_column": "image"}, {}, "wanted img (Image), found image (Image), label (ClassLabel)"),
        ({"label_column": "fine"}, {}, "wanted label (ClassLabel), found img (Image), fine (ClassLabel)"),
        ({"num_classes": 7}, {}, "has 7 classes, wanted 10"),
        ({}, {"num_classes": 100}, "has 10 classes, wanted 100"),
        ({"shape": (32, 32)}, {}, "image 0 has mode L, wanted RGB"),
        ({"shape": (28, 32, 3)}, {}, "image 0 is 32x28 pixels, wanted 32x32"),
        ({}, {"image_mode": "CMYK"}, "image_mode 'CMYK' is neither L nor RGB"),
        ({"sizes": {"train": 10}}, {}, "cifar10 has no split 'test', only train"),
    ],
)
def test_data_that_is_not_what_was_wanted_is_named(image_parquet, written, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_images("cifar10", "test", data_dir=image_parquet(**written), **arguments)


def test_columns_and_classes_given_go_before_the_known_ones(image_parquet):
    root = image_parquet(num_classes=7, image_column="picture", label_column="fine")
    given = {"image_column": "picture", "label_column": "fine", "num_classes": 7}
    assert load_images("cifar10", "test", data_dir=root, **given).class_names[-1] == "class 6"


def test_labels_that_are_not_public_are_refused(image_parquet):
    from datasets import load_dataset

    root = image_parquet("hidden")
    table = load_dataset("parquet", data_dir=str(root / "hidden"))["test"]
    hidden = table.remove_columns("label").add_column("label", [-1] * 20, feature=table.features["label"])
    hidden.to_parquet(root / "hidden" / "test-00000-of-00001.parquet")
    with pytest.raises(ValueError, match=r"labels of column label run from -1 to -1, wanted 0 to 9"):
        load_images("hidden", "test", data_dir=root)


def test_missing_files_name_the_places_looked_at_and_the_ways_to_say_where(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no parquet files in .*cifar10 or .*--data-dir or GBNZOO_DATA.*uoft-cs"
    ):
        load_images("cifar10", "train", data_dir=tmp_path)


def test_broken_parquet_is_named(tmp_path):
    (tmp_path / "train-00000-of-00001.parquet").write_bytes(b"not parquet")
    with pytest.raises(OSError, match=rf"cifar10: cannot load {re.escape(str(tmp_path))}: .*; the files may be broken"):
        load_images("cifar10", "train", data_dir=tmp_path)


def test_broken_image_is_named(image_folder):
    whole = image_folder / "train" / "dog" / "0.png"
    whole.write_bytes(whole.read_bytes()[:60])
    with pytest.raises(
        ValueError, match=r"imagefolder train: image 1 cannot be decoded \(.*\); the files may be broken"
    ):
        load_images("imagefolder", "train", data_dir=image_folder, image_size=10)


def test_hub_out_of_reach_names_the_way_without_it(monkeypatch):
    def unreachable(hub_id, revision):
        raise ConnectionError(f"Couldn't reach '{hub_id}' on the Hub")

    monkeypatch.setattr(data, "commit_on_hub", lambda hub_id: None)
    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(
        OSError, match=r"cannot load ylecun/mnist on the Hub: Couldn't reach .*--data-dir or GBNZOO_DATA"
    ):
        load_images("mnist", "train")


def test_unknown_names_are_named_beside_the_known_ones():
    with pytest.raises(
        ValueError, match=r"'cifar11' is not known; wanted mnist, cifar10, cifar100, digits, imagenet, imagefolder"
    ):
        load_images("cifar11", "train")
    with pytest.raises(ValueError, match="split 'dev' is none of train, validation, test"):
        load_images("cifar10", "dev")


def test_digits_without_scikit_learn_name_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=re.escape("pip install 'gbnzoo[quickstart]'")):
        load_images("digits", "train")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mnist", "cifar10", "cifar100"])
def test_mean_and_std_are_those_of_the_real_training_images(name, real_data):
    pixels = load_images(name, "train", data_dir=real_data).images.double() / 255
    assert pixels.mean((0, 1, 2)).tolist() == pytest.approx(DATASETS[name].mean, abs=5e-5)
    assert pixels.std((0, 1, 2)).tolist() == pytest.approx(DATASETS[name].std, abs=5e-5)
