"""A run is the same on any layout: processes, accumulation, micro-batches, ghosts over processes."""

import contextlib
import os
import re
import time

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import typer
from processes import run_together

from gbnzoo import data
from gbnzoo.data import Augment, GlobalBatches
from gbnzoo.launch import LostProcessError, TerminatedError, connect, leaving_process_group, naming_lost_processes
from gbnzoo.metrics import evaluate
from gbnzoo.norm import convert_ghost_batchnorm, span_processes
from gbnzoo.recipe import load_recipe
from gbnzoo.run import TIMED_COLUMNS, Run, RunError
from gbnzoo.spanning import spanning_batch_norm
from gbnzoo.train import main, train
from gbnzoo.trainer import Trainer, build_model, load_sets

DIGITS = "recipes/digits/resnet8_thin_gbn.yaml"
# Five updates of 64 digits in ghosts of 16, on four processes one each; with everything that has a random stream.
SHORT = [
    "precision=fp64",
    "base.epochs=0.25",
    "base.milestones=[]",
    "evaluations=2",
    "data.augment=pad1_crop",
    "large.batch_size=64",
    "gradient_noise={kind: multiplicative, sigma: 0.1}",
]
LAYOUTS = [  # processes, micro-batch, what it is
    (1, 32, "accumulation 2"),
    (1, 16, "accumulation 4"),
    (2, 32, "2 processes"),
    (2, 16, "2 processes, accumulation 2"),
    (4, 16, "4 processes"),
    (2, 8, "each ghost over 2 processes, accumulation 4"),
    (4, 8, "each ghost over 2 of 4 processes, accumulation 2"),
    (4, 4, "each ghost over 4 processes, accumulation 4"),
]


def train_layouts(out, overrides, rung, micro_batch_sizes):
    for size in micro_batch_sizes:
        recipe = load_recipe(DIGITS, overrides, rung=rung)
        train(recipe, out=f"{out}/{size}", micro_batch_size=size, timeout_seconds=60, show_progress=False)


def train_on_all_layouts(out, overrides, rung="gbn", layouts=LAYOUTS, plain=64, on_gpus=False):
    """The run of each (processes, micro-batch), the plain one of (1, 64) first."""
    sizes = {1: [plain]}
    for processes, size, *_ in layouts:
        sizes.setdefault(processes, []).append(size)
    for processes in sizes:
        arguments = (f"{out}/{processes}", overrides, rung, sizes[processes])
        run_together(processes, train_layouts, *arguments, on_gpus=on_gpus)
    return {
        (processes, size): Run(next((out / str(processes) / str(size)).iterdir()))
        for processes in sizes
        for size in sizes[processes]
    }


def relative_distance(run, reference):
    """Largest difference in a tensor, over the tensor's largest value, of all tensors of a checkpoint.

    A value below 1e-3 counts as that: means that are zero but for rounding have no relative accuracy.
    """
    ours, theirs = run.finished()[0].model, reference.finished()[0].model
    assert ours.keys() == theirs.keys()
    return max(((ours[k] - theirs[k]).abs().max() / theirs[k].abs().max().clamp(min=1e-3)).item() for k in theirs)


def assert_same_log(run, reference, rel):
    assert len(run.rows()) == len(reference.rows())
    for row, expected in zip(run.rows(), reference.rows(), strict=True):
        for column in row.keys() - TIMED_COLUMNS:
            if column == "split" or not expected[column]:
                assert row[column] == expected[column]
            else:
                assert float(row[column]) == pytest.approx(float(expected[column]), rel=rel), column
    assert len(run.layer_rows()) == len(reference.layer_rows()) > 0
    for row, expected in zip(run.layer_rows(), reference.layer_rows(), strict=True):
        assert (row["update"], row["layer"]) == (expected["update"], expected["layer"])
        assert float(row["weight_distance"]) == pytest.approx(float(expected["weight_distance"]), rel=rel, abs=1e-15)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return train_on_all_layouts(tmp_path_factory.mktemp("fp64"), SHORT)


@pytest.mark.parametrize(("processes", "micro_batch_size", "what"), LAYOUTS, ids=[name for *_, name in LAYOUTS])
def test_a_layout_changes_neither_weights_nor_statistics_nor_log(runs, processes, micro_batch_size, what):
    run, reference = runs[processes, micro_batch_size], runs[1, 64]
    started = run.environments()[0]
    assert (started["processes"], started["micro_batch_size"]) == (processes, micro_batch_size)
    assert relative_distance(run, reference) < 1e-9
    assert_same_log(run, reference, rel=1e-9)


def test_the_runs_of_this_file_move_the_weights_far(runs):
    weights, initial = runs[1, 64].finished()[0].model, runs[1, 64].initial_weights()
    assert torch.dist(weights["conv1.weight"], initial["conv1.weight"]) > 0.1 * initial["conv1.weight"].norm()


def test_one_ghost_over_all_processes_is_plain_batchnorm_on_one(tmp_path):
    """Rung lb on two and four processes against nn.BatchNorm2d on the whole batch, in a plain loop."""
    overrides = [*SHORT[:4], "large.batch_size=64"]
    runs = train_on_all_layouts(tmp_path, overrides, "lb", [(2, 32), (4, 16)])
    recipe = runs[4, 16].recipe
    train_set, _ = load_sets(recipe, None)
    model = build_model(recipe, train_set, ghost_batch_size=None).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    batches = GlobalBatches(len(train_set), 64, seed=0)
    images, labels = next(train_set.batches(len(train_set), torch.float64))
    for update in range(5):
        indices, _ = batches.at(update)
        optimizer.zero_grad()
        F.cross_entropy(model(images[indices]), labels[indices]).backward()
        optimizer.step()
    for layout in ((2, 32), (4, 16)):
        weights = runs[layout].finished()[0].model
        for name, value in model.state_dict().items():
            torch.testing.assert_close(weights[name], value, rtol=1e-9, atol=1e-11)


def test_recalibrated_statistics_are_the_mean_over_the_ghosts_of_an_epoch_on_any_layout(tmp_path):
    """Against nn.BatchNorm2d that sees one ghost after the other: 4 batches of 4 from 297 digits."""
    overrides = [*SHORT, "data.holdout=1000", "base.epochs=1", "statistics=recalibrated"]
    runs = train_on_all_layouts(tmp_path, overrides, layouts=[(2, 16), (4, 8)])
    assert relative_distance(runs[2, 16], runs[1, 64]) < 1e-9
    assert relative_distance(runs[4, 8], runs[1, 64]) < 1e-9
    assert_same_log(runs[4, 8], runs[1, 64], rel=1e-9)

    checkpoint, recipe = runs[1, 64].finished()[0].model, runs[1, 64].recipe
    train_set, _ = load_sets(recipe, None)
    model = build_model(recipe, train_set, ghost_batch_size=None).double()
    model.load_state_dict(checkpoint)
    norms = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.BatchNorm2d)}
    for norm in norms.values():
        norm.momentum = 1.0  # its running statistics are those of the last batch it saw
    augment = Augment(train_set, recipe.data.augment, recipe.seed, torch.float64)
    batches = GlobalBatches(len(train_set), 64, recipe.seed)
    seen = {f"{name}.{kind}": [] for name in norms for kind in ("running_mean", "running_var")}
    with torch.no_grad():
        for update in range(4):
            for indices, epochs in zip(*(order.split(16) for order in batches.at(update)), strict=True):
                model(augment(indices, epochs))
                for key, values in seen.items():
                    values.append(model.get_buffer(key).clone())
    for key, values in seen.items():
        torch.testing.assert_close(checkpoint[key], torch.stack(values).mean(0), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["mlp5_gbn", "mobilenetv3_small_050_gbn"])
def test_other_architectures_too(tmp_path, name):
    """BatchNorm1d, and timm's BatchNormAct2d with depthwise convolutions and squeeze-and-excitation."""
    overrides = [*SHORT, f"model={{name: {name}}}", "data.image_size=32", "base.lr=0.01", "base.epochs=0.15"]
    runs = train_on_all_layouts(tmp_path, overrides, layouts=[(2, 8)])
    assert relative_distance(runs[2, 8], runs[1, 64]) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "image_size"),
    [
        *((f"{name}_gbn", 224) for name in ("levit_128s", "efficientvit_m0", "resnet50", "regnety_002")),
        *((f"{name}_gbn", 32) for name in ("resnet20", "preact_resnet20", "resnet9", "cifar_resnet18", "cifar_vgg16")),
        ("cifar_alexnet_gbn, args: {drop_rate: 0.0}", 32),
    ],
)
def test_and_larger_ones(tmp_path, name, image_size):
    """levit and efficientvit_msra fold tokens and windows into the batch, and still share ghosts between processes."""
    model = [f"model={{name: {name}}}", f"data.image_size={image_size}", "base.lr=0.001"]
    batches = [
        "large={batch_size: 8, ghost_batch_size: 4}",
        "base.batch_size=4",
        "base.epochs=0.0127",
        "data.holdout=20",
    ]
    runs = train_on_all_layouts(tmp_path, [*SHORT, *model, *batches], layouts=[(2, 4), (2, 2)], plain=8)
    assert relative_distance(runs[2, 4], runs[1, 8]) < 1e-9
    assert relative_distance(runs[2, 2], runs[1, 8]) < 1e-9


def test_isotropic_noise_is_the_same_on_any_layout(tmp_path):
    noise = "gradient_noise={kind: isotropic, sigma: 0.1}"
    runs = train_on_all_layouts(tmp_path, [*SHORT, noise], layouts=[(2, 16)])
    assert relative_distance(runs[2, 16], runs[1, 64]) < 1e-9


def test_in_float32_layouts_differ_by_the_rounding_of_sums(tmp_path):
    """Measured: 1e-6 after four updates. Later an activation near zero falls on the other side of its ReLU, and then 1e-2."""
    layouts = [(1, 16), (2, 32), (4, 8)]
    runs = train_on_all_layouts(tmp_path, [*SHORT, "precision=fp32", "base.epochs=0.2"], layouts=layouts)
    assert max(relative_distance(runs[layout], runs[1, 64]) for layout in layouts) < 1e-5


def joined(timeout_seconds=60):
    return connect(None, timeout_seconds)


def part_of_a_ghost(ghosts, weight, bias, upstream):
    """One process's rows of its group's ghost [2 groups, 2 members, n, C, ...]: outputs, gradients, statistics."""
    joined()
    pair, _ = dist.new_subgroups(2)
    group, member = divmod(dist.get_rank(), 2)
    x = ghosts[group, member].clone().requires_grad_()
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    y, mean, variance = spanning_batch_norm(x, weight, bias, 1e-5, pair)
    y.backward(upstream[group, member])
    return y.detach(), x.grad, weight.grad, bias.grad, mean, variance


@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 4, 5), (1, 3)])
def test_a_shared_ghost_is_normalised_as_one_batch(shape):
    torch.manual_seed(0)
    ghosts = torch.randn(2, 2, *shape, dtype=torch.float64) * 3 + 1000
    upstream = torch.randn_like(ghosts)
    weight, bias = torch.randn(2, 3, dtype=torch.float64)
    parts = run_together(4, part_of_a_ghost, ghosts, weight, bias, upstream)
    for group in range(2):
        x = ghosts[group].flatten(0, 1).requires_grad_()
        scale, shift = weight.clone().requires_grad_(), bias.clone().requires_grad_()
        mean, variance = torch.zeros(2, 3, dtype=torch.float64)
        y = F.batch_norm(x, mean, variance, scale, shift, training=True, momentum=1.0)
        y.backward(upstream[group].flatten(0, 1))
        first, second = parts[2 * group : 2 * group + 2]
        expected = (y.detach(), x.grad, scale.grad, shift.grad, mean, variance)
        together = (torch.cat((first[0], second[0])), torch.cat((first[1], second[1])), first[2] + second[2])
        for ours, theirs in zip((*together, first[3] + second[3], first[4][0], second[5][0]), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def part_of_too_small_a_ghost(x):
    joined()
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    span_processes(convert_ghost_batchnorm(model, 8), dist.group.WORLD)
    model(x)


def test_unequal_parts_of_a_ghost_are_refused():
    with pytest.raises(AssertionError, match="ValueError: 3 rows on each of 2 processes make no ghost of 8 rows"):
        run_together(2, part_of_too_small_a_ghost, torch.ones(3, 4))


def train_shown(out, said):
    """`python -m gbnzoo.train`, all that this process says, in C++ too, led to a file of its own."""
    with open(said / os.environ["RANK"], "w") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
        with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
            app.command()(main)
            app([DIGITS, *SHORT, "--out", str(out), "--micro-batch-size", "16"], standalone_mode=False)


def test_only_the_first_process_says_anything(tmp_path):
    """Off a terminal that is one line for each of the two evaluations, and the run's folder."""
    said = tmp_path / "said"
    said.mkdir()
    run_together(2, train_shown, tmp_path / "runs", said)
    assert (said / "1").read_text() == ""
    name = "resnet8_thin_gbn.digits_ra64-seed0"
    half, whole, folder = (said / "0").read_text().splitlines()
    for line, update in ((half, 10), (whole, 20)):
        assert re.fullmatch(rf"{name}: update {update}/20, loss \d\.\d{{4}}, top-1 \d+\.\d\d %, \d+ images/s", line)
    assert folder == str(tmp_path / "runs" / name)


def share_of_scores(overrides):
    accelerator = joined()
    recipe = load_recipe(DIGITS, overrides)
    train_set, test_set = load_sets(recipe, None)
    model = build_model(recipe, train_set, 16)
    shares = test_set.batches(64, torch.float32, accelerator.process_index, accelerator.num_processes)
    return evaluate(model, shares, reduce=accelerator.reduce)


def test_evaluation_counts_every_sample_once_whatever_the_remainder():
    alone, *three = run_together(1, share_of_scores, []) + run_together(3, share_of_scores, [])
    assert alone.n % 3 > 0
    for scores in three:
        assert (scores.n, scores.top1_percent, scores.top5_percent) == (alone.n, alone.top1_percent, alone.top5_percent)
        assert scores.loss == pytest.approx(alone.loss, rel=1e-6)


def count_decoded(folder):
    joined()
    decode, decoded = data._decode, []
    data._decode = lambda *arguments: decoded.append(time.sleep(0.2)) or decode(*arguments)
    dist.barrier()
    images = data.load_images("cifar10", "train", data_dir=folder).images
    return len(decoded), images.sum().item()


def test_one_process_decodes_the_images_for_all(image_parquet):
    decoded, sums = zip(*run_together(3, count_decoded, image_parquet("cifar10")), strict=True)
    assert sum(decoded) == 1
    assert len(set(sums)) == 1


def sent_in_one_update(out):
    """Of an update of 2 processes × 2 micro-batches: gradient bytes there are, those reduced, and other collectives."""
    trainer = Trainer(
        load_recipe(DIGITS, SHORT, rung="gbn"),
        data_dir=None,
        out=out,
        processes=2,
        micro_batch_size=16,
        tracker=None,
        checkpoint_seconds=60,
        timeout_seconds=60,
    )
    reduced, others, all_reduce = [], [], dist.all_reduce

    def reduce_bucket(_, bucket):
        reduced.append(bucket.buffer().nbytes)
        return all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda future: future.value()[0] / 2)

    with trainer.opened_run(resume=False):
        trainer.model.register_comm_hook(None, reduce_bucket)
        trainer.model.train()
        trainer.add_gradients(0)
        reduced.clear()
        for name in ("all_reduce", "all_gather", "all_gather_into_tensor", "broadcast"):
            setattr(dist, name, lambda *_, name=name, **__: others.append(name))
        trainer.add_gradients(1)
    return sum(p.grad.nbytes for p in trainer.parameters), sum(reduced), others


def test_gradients_are_reduced_once_per_update_and_nothing_else_is_sent(tmp_path):
    for there_are, reduced, others in run_together(2, sent_in_one_update, tmp_path):
        assert reduced == there_are
        assert others == []


def train_on(processes, out, environment):
    os.environ.update(environment)
    train(load_recipe(DIGITS, SHORT), processes=processes, out=out, show_progress=False)


def is_in_group_after(error):
    joined()
    with contextlib.suppress(RunError), leaving_process_group():
        if error:
            raise error("")
    return dist.is_initialized()


@pytest.mark.parametrize(("error", "stays"), [(None, False), (TerminatedError, False), (LostProcessError, True)])
def test_a_process_leaves_its_group_unless_another_is_lost(error, stays):
    """Threads of a group that is not left have aborted a process in place of its exit code."""
    assert run_together(2, is_in_group_after, error) == [stays, stays]


# What `accelerate launch --cpu --num_processes 2` leaves in the environment of the one process it starts.
ACCELERATE_CPU = {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("started", "asked", "environment", "message"),
    [
        (1, 2, {}, "2 processes were asked for, 1 started"),
        (2, 4, {}, "4 processes were asked for, 2 started"),
        (
            1,
            None,
            ACCELERATE_CPU,
            "several processes were asked for, 1 started: accelerate launch --cpu starts a single",
        ),
    ],
)
def test_another_number_of_processes_than_asked_for_is_refused_before_anything_is_written(
    tmp_path, started, asked, environment, message
):
    with pytest.raises(AssertionError, match=f"ValueError: {message}"):
        run_together(started, train_on, asked, tmp_path, environment)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "told",
    [
        {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
        {"ACCELERATE_USE_FSDP": "true"},
        {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2"},
    ],
    ids=" ".join,
)
def test_what_would_change_the_update_behind_the_recipes_back_is_refused(tmp_path, told):
    """Accelerate would divide each micro-batch's loss by its number of accumulation steps, here four."""
    with pytest.raises(AssertionError, match=f"ValueError: {', '.join(told)} in the environment, .* wanted plain data"):
        run_together(1, train_on, 1, tmp_path, told)
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_run_is_not_taken_for_a_lost_process():
    """The folder may be called gloo, by which the errors of that library are known."""
    with pytest.raises(RunError, match=r"^runs/gloo already holds a run$") as told, naming_lost_processes():
        raise RunError("runs/gloo already holds a run")
    assert told.type is RunError


def test_one_process_may_be_asked_for_under_accelerate(tmp_path):
    run_together(1, train_on, 1, tmp_path, ACCELERATE_CPU)


@pytest.mark.gpu
@pytest.mark.parametrize("processes", [1, 2])
def test_with_nccl_too(tmp_path, processes):
    """On one GPU the processes' talk with themselves; on two also a ghost over both."""
    if torch.cuda.device_count() < processes:
        pytest.skip(f"needs {processes} GPUs")
    layouts = [(1, 16)] if processes == 1 else [(2, 32), (2, 16), (2, 8)]
    runs = train_on_all_layouts(tmp_path, [*SHORT, "statistics=recalibrated"], layouts=layouts, on_gpus=True)
    for layout in layouts:
        assert relative_distance(runs[layout], runs[1, 64]) < 1e-9
