"""Images read from disk as they are needed, against timm's own transforms; training on them, and scoring."""

import copy
import io
import itertools
import os
import random
import re
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest
import timm.data
import torch
from conftest import random_pixels
from processes import run_together
from scripts import evaluate

from gbnzoo.data import GlobalBatches, keyed_bits, load_images
from gbnzoo.image_files import FileBatches, default_workers, open_images
from gbnzoo.publish import publish
from gbnzoo.recipe import Data, load_recipe, shipped_recipes
from gbnzoo.run import Run
from gbnzoo.train import train
from gbnzoo.trainer import build_optimizer, sample_losses

TRAINED, SCORED, CLASSES = 44, 10, 4
TRANSFORM = {"auto_augment": "rand-m6-mstd0.5-inc1", "eval_image_size": 24}
MIXED = TRANSFORM | {"mixup": 0.4, "cutmix": 1.0}


@pytest.fixture(autouse=True)
def _few_workers(monkeypatch):
    monkeypatch.setenv("GBNZOO_WORKERS", "0")


def photos(n, seed):
    """JPEG files of several sizes; the second is grey, the third CMYK."""
    for i in range(n):
        # Coarse, so that JPEG leaves something of it.
        pixels = random_pixels(5 + i % 3, 4 + i % 4, 3, seed=seed + i)
        image = PIL.Image.fromarray(pixels).resize((40 + 7 * (i % 4), 36 + 9 * (i % 3)))
        image = image.convert({1: "L", 2: "CMYK"}.get(i, "RGB"))
        image.save(file := io.BytesIO(), "JPEG")
        yield file.getvalue()


@pytest.fixture
def data_dir(tmp_path):
    """Parquet files as ImageNet has them on the Hub, its test split without labels; two files of training images."""
    from datasets import ClassLabel, Dataset, Features, Image

    features = Features({"image": Image(), "label": ClassLabel(names=[f"class {k}" for k in range(CLASSES)])})
    folder = tmp_path / "data" / "photos"
    folder.mkdir(parents=True)
    files = {"train-00000-of-00002": 24, "train-00001-of-00002": TRAINED - 24}
    files |= {"validation-00000-of-00001": SCORED, "test-00000-of-00001": 6}
    for k, (name, n) in enumerate(files.items()):
        labels = [-1] * n if name.startswith("test") else [i % CLASSES for i in range(n)]
        rows = {"image": [{"bytes": photo, "path": None} for photo in photos(n, 1000 * k)], "label": labels}
        Dataset.from_dict(rows, features=features).to_parquet(folder / f"{name}.parquet")
    return folder.parent


def settings(transform=TRANSFORM, **changes):
    return Data.model_validate({"name": "photos", "image_size": 16, "transform": transform, **changes})


def opened(data_dir, split="train", transform=TRANSFORM, **changes):
    return open_images(settings(transform, **changes), split, data_dir=data_dir)


def pictures(n, *seeds):
    """The same photographs without a table: what was written, opened and made RGB."""
    files = itertools.chain(*(photos(count, seed) for count, seed in zip(n, seeds, strict=True)))
    return [PIL.Image.open(io.BytesIO(file)).convert("RGB") for file in files]


def batches(files, positions=None, order=None, dtype=torch.float64):
    order = order or GlobalBatches(len(files), 32, seed=3)
    return FileBatches(files, order, positions or [torch.arange(32)], dtype)


# ---- what is read


def test_training_images_are_timms_with_the_generators_set_by_each_key(data_dir):
    made = [batch for update in range(3) for batch in batches(opened(data_dir)).at(update)]
    transform = timm.data.create_transform(
        16, is_training=True, auto_augment="rand-m6-mstd0.5-inc1", interpolation="random"
    )
    images = pictures((24, TRAINED - 24), 0, 1000)
    assert {int(epoch) for batch in made for epoch in batch.epochs} == {0, 1, 2}
    for batch in made:
        for x, label, index, epoch in zip(batch.images, batch.labels, batch.indices, batch.epochs, strict=True):
            bits = int(keyed_bits(3, "augment", epoch, index[None]))
            random.seed(bits)
            np.random.seed(bits % 2**32)
            torch.manual_seed(bits)
            torch.testing.assert_close(x.float(), transform(images[index]), rtol=0, atol=1e-5)
            assert label == (index if index < 24 else index - 24) % CLASSES


@pytest.mark.parametrize("world_size", [1, 3])
def test_scored_images_are_timms_each_once(data_dir, world_size):
    files = opened(data_dir, "validation")
    shares = [list(files.batches(4, rank=rank, world_size=world_size)) for rank in range(world_size)]
    x, labels = (torch.cat(parts) for parts in zip(*itertools.chain(*shares), strict=True))
    transform = timm.data.create_transform(24, crop_pct=0.875, interpolation="bicubic")
    expected = torch.stack([transform(image) for image in pictures((SCORED,), 2000)])
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-5)
    assert labels.tolist() == [i % CLASSES for i in range(SCORED)]
    assert files.input_size == (3, 24, 24)
    assert (files.split, len(files), files.class_names[3]) == ("validation", SCORED, "class 3")


def test_folders_of_images_are_read_where_they_lie(tmp_path):
    for split, n in (("train", 5), ("val", 3)):  # as ImageNet's are named
        for k, photo in enumerate(photos(n, 0)):
            folder = tmp_path / "images" / split / ("cat", "dog")[k % 2]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{k}.jpeg").write_bytes(photo)
    files = opened(tmp_path / "images", "validation", name="imagefolder")
    assert files.class_names == ("cat", "dog")
    (images, labels), *_ = files.batches(8)
    transform = timm.data.create_transform(24, crop_pct=0.875, interpolation="bicubic")
    photographs = pictures((3,), 0)
    torch.testing.assert_close(images, torch.stack([transform(photographs[k]) for k in (0, 2, 1)]), rtol=0, atol=1e-5)
    assert labels.tolist() == [0, 0, 1]
    assert not list(tmp_path.rglob("*.arrow"))


def test_holdout_keeps_the_images_that_it_keeps_in_memory(data_dir):
    in_memory = load_images("photos", "validation", data_dir=data_dir, holdout=12, image_size=16)
    held_out, rest = (opened(data_dir, split, holdout=12) for split in ("validation", "train"))
    assert torch.equal(held_out.labels, in_memory.labels)
    assert (len(held_out), len(rest)) == (12, TRAINED - 12)
    files = [{row["image"]["bytes"] for row in images.table} for images in (held_out, rest)]
    assert files[0] | files[1] == {file for k, n in enumerate((24, TRAINED - 24)) for file in photos(n, 1000 * k)}
    assert not files[0] & files[1]


# ---- the order, and who does what


def collected(files, layout, updates):
    """Images and labels by update and place in the global batch."""
    found = {}
    for positions in layout:
        mine = batches(files, positions)
        for update in updates:
            for place, batch in zip(positions, mine.at(update), strict=True):
                found |= {
                    (update, int(p)): (x, label) for p, x, label in zip(place, batch.images, batch.labels, strict=True)
                }
    return found


LAYOUTS = {  # for each process, the places of its micro-batches
    "accumulated": [[torch.arange(8 * k, 8 * k + 8) for k in range(4)]],
    "two processes": [[torch.arange(16)], [torch.arange(16, 32)]],
    "ghosts in turn": [[torch.cat((torch.arange(r, r + 4), torch.arange(r + 8, r + 12)))] for r in (0, 4, 16, 20)],
}


@pytest.mark.parametrize("transform", [TRANSFORM, MIXED], ids=["alone", "mixed"])
@pytest.mark.parametrize(("layout", "workers"), [*((layout, 0) for layout in LAYOUTS), ("accumulated", 2)])
def test_a_sample_is_the_same_whoever_reads_it(data_dir, transform, layout, workers):
    files = opened(data_dir, transform=transform)
    whole = collected(files, [[torch.arange(32)]], range(3))
    parts = collected(replace(files, workers=workers), LAYOUTS[layout], range(3))
    assert parts.keys() == whole.keys()
    assert len(whole) == 3 * 32
    for key, (x, label) in whole.items():
        assert torch.equal(parts[key][0], x)
        assert torch.equal(parts[key][1], label)


def test_order_is_that_of_images_in_memory(data_dir):
    order = GlobalBatches(TRAINED, 32, seed=3)
    for update in (0, 1, 10**12):  # far on, and at once: no order is held
        (batch,) = batches(opened(data_dir), order=order).at(update)
        assert torch.equal(torch.stack((batch.indices, batch.epochs)), torch.stack(order.at(update)))


def test_updates_may_be_taken_from_anywhere_and_left_unfinished(data_dir):
    files = replace(opened(data_dir), workers=1)
    halves = [torch.arange(16), torch.arange(16, 32)]
    mine = batches(files, halves)
    next(mine.at(5))
    for update in (5, 6, 2, 3):
        for batch, half in zip(mine.at(update), halves, strict=True):
            (expected,) = batches(files, [half]).at(update)
            assert torch.equal(batch.images, expected.images)


def test_other_epochs_and_seeds_are_augmented_otherwise(data_dir):
    files = opened(data_dir)
    samples = {}
    for seed in (3, 4):
        mine = batches(files, order=GlobalBatches(TRAINED, TRAINED, seed), positions=[torch.arange(TRAINED)])
        for epoch in (0, 1):
            (batch,) = mine.at(epoch)
            samples[seed, epoch] = batch.images[batch.indices.argsort()]
    for one, other in itertools.combinations(samples.values(), 2):
        assert (one != other).flatten(1).any(1).double().mean() > 0.9


def test_what_others_draw_at_random_is_left_alone(data_dir):
    files = opened(data_dir, transform=MIXED)

    def drawn(between):
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        between()
        return random.random(), np.random.rand(), torch.rand(()).item()

    assert drawn(lambda: list(batches(files).at(0))) == drawn(lambda: None)


# ---- mixing


def test_mixed_neighbours_are_what_their_labels_say(data_dir):
    files = opened(data_dir, transform={"mixup": 1.0})
    (alone,) = batches(opened(data_dir, transform={})).at(0)
    (mixed,) = batches(files).at(0)
    shares = []
    for i, labels in enumerate(mixed.labels):
        neighbour = i ^ 1
        own, others = alone.labels[i], alone.labels[neighbour]
        share = labels[own].item() if own != others else None
        assert labels.sum().item() == pytest.approx(1)
        assert set(labels.nonzero().flatten().tolist()) <= {own.item(), others.item()}
        if share is not None:
            shares.append(share)
            expected = share * alone.images[i] + (1 - share) * alone.images[neighbour]
            assert (mixed.images[i] - expected).abs().max() < 1 / 255 / 0.22  # rounded to a whole pixel value
    assert len({round(share, 4) for share in shares}) > 5


def test_cut_images_hold_a_rectangle_of_their_neighbours(data_dir):
    (alone,) = batches(opened(data_dir, transform={})).at(0)
    (cut,) = batches(opened(data_dir, transform={"cutmix": 1.0})).at(0)
    for i, x in enumerate(cut.images):
        is_own = (x == alone.images[i]).all(0)
        assert (x == alone.images[i ^ 1]).all(0)[~is_own].all()
        own, others = alone.labels[i], alone.labels[i ^ 1]
        if own != others:
            assert cut.labels[i][own].item() == pytest.approx(is_own.double().mean().item(), abs=0.02)


def test_a_pair_over_two_processes_is_refused(data_dir):
    files = opened(data_dir, transform=MIXED)
    for positions in ([torch.arange(3)], [torch.arange(1, 5)], [torch.tensor([0, 2])]):
        with pytest.raises(ValueError, match="must be of an even number of samples; wanted another"):
            batches(files, positions)


# ---- the table on disk


def test_a_set_is_streamed_once_and_goes_on_where_it_stopped(data_dir, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    shard, read = datasets.IterableDataset.shard, []

    def fails_at_the_second(self, num_shards, index):
        read.append(index)
        if index == 1 and len(read) == 2:
            raise OSError("the line is cut")
        return shard(self, num_shards, index)

    monkeypatch.setattr(datasets.IterableDataset, "shard", fails_at_the_second)
    with pytest.raises(
        OSError, match=r"photos train: file 2 of 2 cannot be brought to .*: the line is cut; those before"
    ):
        opened(data_dir)
    assert len(opened(data_dir)) == TRAINED
    assert read == [0, 1, 1]  # the first was kept
    monkeypatch.setattr("datasets.load_dataset", None)
    assert len(opened(data_dir)) == TRAINED


def test_the_hub_is_streamed_where_no_folder_is_given(data_dir, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    load, asked = datasets.load_dataset, []

    def from_hub(path, **options):
        asked.append((path, options))
        return load("parquet", data_dir=str(data_dir / "photos"), **options)

    monkeypatch.setattr(datasets, "load_dataset", from_hub)
    for name in ("imagenet", "ILSVRC/imagenet-1k"):
        assert len(opened(None, "validation", name=name, num_classes=CLASSES)) == SCORED
    assert asked == [("ILSVRC/imagenet-1k", {"streaming": True})]


def open_in_one_of_several(data_dir, cache):
    os.environ["HF_DATASETS_CACHE"] = str(cache)
    files = opened(data_dir)
    return len(files), files.labels.sum().item()


def test_processes_that_start_together_wait_for_the_one_that_streams(data_dir, tmp_path):
    answers = run_together(3, open_in_one_of_several, data_dir, tmp_path / "cache")
    assert answers == [(TRAINED, sum(k % CLASSES for n in (24, TRAINED - 24) for k in range(n)))] * 3


# ---- errors


@pytest.mark.parametrize(
    ("split", "changes", "message"),
    [
        ("test", {}, "labels of column label run from -1 to -1, wanted 0 to 3; a split without public labels"),
        ("train", {"name": "imagenet"}, "column label has 4 classes, wanted 1000; data.num_classes"),
        ("train", {"image_column": "img"}, "data.image_column: wanted img (Image), found image (Image), label"),
        ("train", {"label_column": "fine"}, "data.label_column: wanted fine (ClassLabel), found image (Image), label"),
        ("train", {"name": "digits"}, "the digits have none, and take data.augment"),
        ("dev", {}, "split 'dev' is none of train, validation, test"),
    ],
)
def test_data_that_is_not_what_was_wanted_is_named(data_dir, split, changes, message):
    if changes.get("name") == "imagenet":
        data_dir = (data_dir / "photos").rename(data_dir / "imagenet").parent
    with pytest.raises(ValueError, match=re.escape(message)):
        opened(data_dir, split, **changes)


def test_a_missing_split_names_those_there_are(data_dir):
    (data_dir / "photos" / "test-00000-of-00001.parquet").unlink()
    with pytest.raises(
        ValueError, match=r"no split 'test', only train, validation; data.scored_split: validation scores"
    ):
        opened(data_dir, "test")


def test_grey_images_are_refused_where_they_may_not_be_converted(data_dir):
    data_dir = (data_dir / "photos").rename(data_dir / "cifar10").parent
    given = {"name": "cifar10", "image_column": "image", "num_classes": CLASSES}
    with pytest.raises(ValueError, match="cifar10 validation: image 1 has mode L, wanted RGB"):
        list(opened(data_dir, "validation", **given).batches(4))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_named(tmp_path, workers):
    for k, photo in enumerate(photos(3, 0)):
        (folder := tmp_path / "images" / "train" / ("cat", "dog")[k // 2]).mkdir(parents=True, exist_ok=True)
        (folder / f"{k}.jpeg").write_bytes(photo[: 300 if k == 2 else None])
    files = replace(opened(tmp_path / "images", name="imagefolder"), workers=workers)
    with pytest.raises(
        ValueError, match=r"imagefolder train: image 2 cannot be decoded \(.*\); the files may be broken"
    ):
        list(files.batches(2))


def test_workers_are_the_cores_of_a_process_unless_told(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.delenv("GBNZOO_WORKERS")
    assert default_workers() == 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert default_workers() == 5
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "32")
    assert default_workers() == 1
    monkeypatch.setenv("GBNZOO_WORKERS", "all")
    with pytest.raises(ValueError, match="GBNZOO_WORKERS 'all': wanted a number"):
        default_workers()


# ---- training and scoring


RECIPE = """\
model: {name: resnet8_thin_gbn}
data: {name: photos, image_size: 16, scored_split: validation, transform:
  {mixup: 0.4, cutmix: 1.0, eval_image_size: 24, crop_pct: 0.9, interpolation: bilinear}}
base: {batch_size: 8, epochs: 2, lr: 5e-3, schedule: cosine, warmup_epochs: 1}
optimizer: {name: lamb, weight_decay: 0.02, decay_norm_and_bias: false}
large: {batch_size: 16, ghost_batch_size: 8}
bce: {threshold: 0.2}
evaluations: 1
"""


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "photos.yaml"
    path.write_text(RECIPE)
    return path


def trained(recipe_file, data_dir, out, *overrides, **options):
    return Run(train(load_recipe(recipe_file, overrides), data_dir=data_dir, out=out, show_progress=False, **options))


def train_on_two(recipe_file, data_dir, out):
    trained(recipe_file, data_dir, out, "precision=fp64", processes=2, micro_batch_size=4)


def test_training_is_the_same_on_every_layout(recipe_file, data_dir, tmp_path):
    exact = ("precision=fp64", "rung=ra")
    whole = trained(recipe_file, data_dir, tmp_path / "whole", *exact)
    again = [trained(recipe_file, data_dir, tmp_path / "parts", *exact, micro_batch_size=8)]
    run_together(2, train_on_two, recipe_file, data_dir, tmp_path / "two")  # each ghost over both
    again.append(Run(tmp_path / "two" / whole.folder.name))
    for run in again:
        for name, value in whole.finished()[0].model.items():
            torch.testing.assert_close(run.finished()[0].model[name], value, rtol=1e-9, atol=1e-11)
        losses = [float(each.finished()[1]["eval_loss"]) for each in (run, whole)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-9)


@pytest.mark.parametrize("workers", ["0", "1"])
def test_what_was_trained_is_scored_the_same_everywhere(recipe_file, data_dir, tmp_path, workers, monkeypatch):
    monkeypatch.setenv("GBNZOO_WORKERS", workers)
    run = trained(recipe_file, data_dir, tmp_path / "runs", "rung=gbn")
    last = run.finished()[1]
    assert (last["split"], run.environments()[0]["data"]["input_size"]) == ("validation", [3, 24, 24])
    hub_folder = publish(run.folder, tmp_path / "hub")
    for folder in (run.folder, hub_folder):
        metrics, row = evaluate.measure(evaluate.load_subject(str(folder)), evaluate.Settings(data_dir=data_dir))
        assert str(metrics.top1_percent) == last["top1_percent"]
        assert str(metrics.loss) == last["eval_loss"]
        assert (row["recorded_top1"], row["split"]) == (row["top1"], "validation")
    model = timm.create_model(f"local-dir:{hub_folder}", pretrained=True).eval()
    cfg = timm.data.resolve_model_data_config(model)
    assert (cfg["crop_pct"], cfg["interpolation"], tuple(cfg["input_size"])) == (0.9, "bilinear", (3, 24, 24))
    transform = timm.data.create_transform(**cfg)
    images = torch.stack([transform(image) for image in pictures((SCORED,), 2000)])
    hits = model(images).argmax(1) == torch.arange(SCORED) % CLASSES
    assert 100 * hits.double().mean().item() == pytest.approx(float(last["top1_percent"]))


def test_others_weights_are_scored_on_folders_as_timm_does(tmp_path):
    for k, photo in enumerate(photos(8, 0)):
        (folder := tmp_path / "images" / "val" / f"{k % 2}").mkdir(parents=True, exist_ok=True)
        (folder / f"{k}.jpeg").write_bytes(photo)
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=2).eval()
    chosen = evaluate.Settings("imagefolder", tmp_path / "images", "validation", img_size=32, crop_pct=0.8)
    metrics, row = evaluate.measure(evaluate.Subject("test_resnet", model, {}), chosen)
    cfg = timm.data.resolve_model_data_config(model) | {"input_size": (3, 32, 32), "crop_pct": 0.8}
    transform = timm.data.create_transform(**cfg)
    photographs = pictures((8,), 0)
    with torch.no_grad():
        logits = model(torch.stack([transform(image) for image in photographs]))
    loss = torch.nn.functional.cross_entropy(logits, torch.arange(8) % 2).item()
    assert metrics.loss == pytest.approx(loss, rel=1e-4)
    assert (row["img_size"], row["crop_pct"], row["interpolation"]) == ("32", "0.800", cfg["interpolation"])


@pytest.mark.parametrize("use_train_size", [False, True])
def test_others_weights_are_tested_as_timms_validate_does(use_train_size, tmp_path):
    """At their size for tests, cropped in their mode, classes in timm's order, on validation images if there are no others."""
    for k, photo in enumerate(photos(12, 0)):
        (folder := tmp_path / "images" / "val" / f"{k}").mkdir(parents=True)
        (folder / f"{k}.jpeg").write_bytes(photo)
    torch.manual_seed(0)
    cfg = {"test_input_size": (3, 40, 40), "crop_pct": 0.7, "test_crop_pct": 0.9, "crop_mode": "squash"}
    model = timm.create_model("test_resnet", num_classes=12, pretrained_cfg_overlay=cfg | {"input_size": (3, 24, 24)})
    chosen = evaluate.Settings("imagefolder", tmp_path / "images", use_train_size=use_train_size)
    metrics, row = evaluate.measure(evaluate.Subject("test_resnet", model.eval(), {}), chosen)
    cfg = timm.data.resolve_model_data_config(model, use_test_size=not use_train_size)
    assert (cfg["input_size"][-1], cfg["crop_mode"]) == (24 if use_train_size else 40, "squash")
    transform = timm.data.create_transform(**cfg)
    classes = timm.data.create_dataset("", str(tmp_path / "images" / "val")).reader.class_to_idx
    with torch.no_grad():
        logits = model(torch.stack([transform(image) for image in pictures((12,), 0)]))
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor([classes[f"{k}"] for k in range(12)])).item()
    assert metrics.loss == pytest.approx(loss, rel=1e-4)
    assert (row["split"], row["img_size"], row["crop_pct"]) == (
        "validation",
        *(("24", "0.700") if use_train_size else ("40", "0.900")),
    )


@pytest.mark.parametrize("name", [name for name in shipped_recipes() if name.startswith("imagenet/")])
def test_imagenet_recipes_read_augment_and_update(name, data_dir):
    """Whatever a recipe asks of timm's transforms and optimizers, on a small network and small photographs."""
    recipe = load_recipe(f"recipes/{name}")
    changes = {"name": "photos", "image_size": 32}
    files = open_images(recipe.data.model_copy(update=changes), "train", data_dir=data_dir)
    (batch,) = batches(files, dtype=torch.float32).at(0)
    assert batch.images.shape == (32, 3, 32, 32)
    model = timm.create_model("resnet20_gbn", num_classes=CLASSES, ghost_batch_size=8)
    before = copy.deepcopy(model.state_dict())
    optimizer = build_optimizer(recipe.optimizer, model)
    for group in optimizer.param_groups:
        group["lr"] = recipe.base.lr
    sample_losses(recipe, model(batch.images), batch.labels).mean().backward()
    optimizer.step()
    assert type(optimizer).__name__.lower() == recipe.optimizer.name
    assert all(p.isfinite().all() for p in model.parameters())
    assert not torch.equal(model.conv1.weight, before["conv1.weight"])


def test_losses_by_hand(recipe_file):
    """Of logits 0 every class of three has probability 1/2, and log 3 is the cross-entropy."""
    logits = torch.zeros(2, 3, dtype=torch.float64)
    logits[1, 0] = 2
    wrong, right = np.log1p(np.exp(2)), np.log1p(np.exp(-2))
    recipe = load_recipe(recipe_file, ["bce={threshold: 0.2}"])
    losses = sample_losses(recipe, logits, torch.tensor([1, 0]))
    assert losses.tolist() == pytest.approx([np.log(2), (right + 2 * np.log(2)) / 3])
    # Shares above 0.2 count in full, whatever they are.
    shares = torch.tensor([[0.0, 0.3, 0.7], [0.1, 0.9, 0.0]])
    assert sample_losses(recipe, logits, shares).tolist() == pytest.approx([np.log(2), (wrong + 2 * np.log(2)) / 3])
    smooth = load_recipe(recipe_file, ["bce={}", "label_smoothing=0.3"])
    expected = (0.8 * right + 0.2 * wrong + 2 * np.log(2)) / 3  # 1 - 0.3 + 0.3 / 3
    assert sample_losses(smooth, logits, torch.tensor([1, 0]))[1].item() == pytest.approx(expected)
    entropy = load_recipe(recipe_file, ["bce=null"])
    assert sample_losses(entropy, logits, torch.tensor([1, 0]))[0].item() == pytest.approx(np.log(3))
    assert sample_losses(entropy, logits, torch.eye(3)[:2])[0].item() == pytest.approx(np.log(3))
