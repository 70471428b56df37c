"""Training: the same end whatever the layout or the interruptions, and clear words where it cannot go on."""

import gc
import importlib.util
import io
import itertools
import math
import re
import time
import weakref
from pathlib import Path

import pytest
import timm
import torch
from processes import Together, run_together
from timm.optim import list_optimizers
from torch import nn

from gbnzoo.models.cifar_resnet import CifarResNet
from gbnzoo.recipe import RecipeError, load_recipe
from gbnzoo.run import LOG_COLUMNS, TIMED_COLUMNS, Checkpoint, Run, RunError, _pack, _unpack
from gbnzoo.train import train
from gbnzoo.trainer import (
    DivergedError,
    Trainer,
    _Bar,
    _log_spaced,
    build_model,
    build_optimizer,
    check_recipe,
    load_optimizer_state,
    load_sets,
)

DIGITS = "recipes/digits/resnet8_thin_gbn.yaml"
SHORT = ["base.epochs=2", "base.milestones=[1]", "evaluations=2", "large.batch_size=64"]


def trained(tmp_path, *overrides, rung="gbn", seed=0, **options):
    recipe = load_recipe(DIGITS, [*SHORT, *overrides], rung=rung, seed=seed)
    return Run(train(recipe, out=tmp_path, show_progress=False, **options))


def trainer_of(tmp_path, *overrides):
    return Trainer(
        load_recipe(DIGITS, [*SHORT, *overrides], rung="gbn"),
        data_dir=None,
        out=tmp_path,
        processes=None,
        micro_batch_size=32,
        tracker=None,
        checkpoint_seconds=60,
        timeout_seconds=60,
    )


def final_weights(run):
    return run.finished()[0].model


def comparable(rows):
    return [{k: v for k, v in row.items() if k not in TIMED_COLUMNS} for row in rows]


def test_a_run_ends_at_its_last_update_with_its_log_complete(tmp_path):
    run = trained(tmp_path)
    checkpoint, last = run.finished()
    # 1297 training digits: floor(2 · 1297 / 64) = 40 updates; logged eight a decade and at both evaluations.
    assert checkpoint.update == 40
    assert [int(row["update"]) for row in run.rows()] == [1, 2, 3, 4, 6, 7, 10, 13, 18, 20, 24, 32, 40]
    assert [row["update"] for row in run.rows() if row["top1_percent"]] == ["20", "40"]
    measured = ("lr", "train_loss", "grad_norm", "weight_distance", "images_per_second", "peak_memory_mib")
    assert all(row[column] for row in run.rows() for column in measured)
    assert last["split"] == "test"
    assert float(last["top1_percent"]) > 60  # chance is 10
    assert run.environments()[0]["data"]["num_samples"] == 1297


def test_logged_distances_are_those_of_the_weights(tmp_path):
    run = trained(tmp_path)
    checkpoint, last = run.finished()
    initial = run.initial_weights()
    parameters = [name for name in initial if not name.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    flat, flat_0 = (torch.cat([w[name].double().flatten() for name in parameters]) for w in (checkpoint.model, initial))
    assert float(last["weight_distance"]) == pytest.approx(torch.dist(flat, flat_0).item(), rel=1e-6)
    first = torch.dist(checkpoint.model["conv1.weight"], initial["conv1.weight"]).item()
    assert float(last["weight_distance_first"]) == pytest.approx(first, rel=1e-5)


def test_logged_distances_of_layers_are_those_of_their_own_parameters(tmp_path):
    """Against the checkpoint, for each module that has parameters itself; together they make up the whole."""
    run = trained(tmp_path)
    checkpoint, last = run.finished()
    initial = run.initial_weights()
    expected = {}
    for layer, module in timm.create_model("resnet8_thin_gbn", in_chans=1).named_modules():
        if own := [f"{layer}.{name}" for name, _ in module.named_parameters(recurse=False)]:
            flat, flat_0 = (torch.cat([w[n].double().flatten() for n in own]) for w in (checkpoint.model, initial))
            expected[layer] = torch.dist(flat, flat_0).item()
    assert len(expected) > 10
    rows = run.layer_rows()
    assert [row["update"] for row in rows[:: len(expected)]] == [row["update"] for row in run.rows()]
    logged = {row["layer"]: float(row["weight_distance"]) for row in rows if row["update"] == last["update"]}
    assert logged == pytest.approx(expected, rel=1e-6)
    assert list(logged) == list(expected)
    assert sum(d**2 for d in logged.values()) == pytest.approx(float(last["weight_distance"]) ** 2, rel=1e-9)


def test_memory_is_the_peak_of_the_process(tmp_path):
    """Linux's own account of it, in KiB; the peak never falls."""
    run = trained(tmp_path)
    logged = [int(row["peak_memory_mib"]) for row in run.rows()]
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("needs /proc")
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 1024
    assert logged == sorted(logged)
    assert logged[-1] == pytest.approx(peak, rel=0.05)


def test_a_tracker_gets_every_row_of_the_log_and_the_layers_by_name(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = trained(tmp_path, tracker="tensorboard")
    events = EventAccumulator(str(run.folder / "gbnzoo")).Reload()
    layers = {row["layer"] for row in run.layer_rows()}
    columns = set(LOG_COLUMNS) - {"split"}
    assert set(events.Tags()["scalars"]) == columns | {f"weight_distance/{layer}" for layer in layers}
    for column in columns:
        logged = {int(row["update"]): float(row[column]) for row in run.rows() if row[column]}
        assert {event.step: event.value for event in events.Scalars(column)} == pytest.approx(logged, rel=1e-6)
    distances = {event.step: event.value for event in events.Scalars("weight_distance/conv1")}
    logged = {int(r["update"]): float(r["weight_distance"]) for r in run.layer_rows() if r["layer"] == "conv1"}
    assert distances == pytest.approx(logged, rel=1e-6)


def test_a_tracker_that_is_not_installed_is_an_error(tmp_path, monkeypatch):
    """Accelerate would log to nowhere, and say nothing."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="tracker 'trackio' is not installed; pip install trackio"):
        trained(tmp_path, tracker="trackio")
    assert list(tmp_path.iterdir()) == []


def bar_shown(batch_size, **counts):
    """What the bar writes to a terminal when it is made, after 10 of 40 updates in 2 seconds, and at top-1 97 %."""
    terminal = io.StringIO()
    bar = _Bar(batch_size=batch_size, desc="run", total=40, file=terminal, ncols=100, **counts)
    bar.start_t -= 2
    bar.update(10)
    bar.set_postfix({"loss": "0.1", "top-1": "97.00 %"})
    bar.close()
    return terminal.getvalue().rpartition("\r")[2]


def test_the_bar_shows_updates_time_left_images_a_second_and_top1():
    # 10 updates of 64 in 2 s are 320 images/s, and the other 30 take 6 s.
    shown = bar_shown(64)
    assert re.search(r"25%.* 10/40 \[00:02<00:06, 3[12]\d images/s, loss=0.1, top-1=97.00 %\]", shown), shown


@pytest.mark.parametrize("total", [1, 100, 78_125, 10_000_000])
def test_rows_are_as_many_as_the_logarithm_of_the_updates_and_evenly_spaced_in_it(total):
    """That is what makes logging cheap: eight a decade, so that each takes the count up by at most a half, once past 4."""
    updates = sorted(_log_spaced(total))
    assert updates[0] == 1
    assert len(updates) <= 8 * math.log10(total) + 1
    assert all(b <= 1.5 * a for a, b in itertools.pairwise([u for u in updates if u >= 4]))
    assert updates[-1] * 1.5 > total


@pytest.mark.parametrize("micro_batch_size", [16, 32])
def test_accumulation_changes_nothing(tmp_path, micro_batch_size):
    exact = ["precision=fp64", "base.epochs=0.5", "base.milestones=[]", "data.augment=pad1_crop"]
    whole = final_weights(trained(tmp_path / "whole", *exact, micro_batch_size=64))
    parts = final_weights(trained(tmp_path / "parts", *exact, micro_batch_size=micro_batch_size))
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-9, atol=1e-12)


def test_the_small_batch_rung_is_plain_sgd_on_plain_batchnorm(tmp_path):
    """The trainer against a loop in plain torch: nn.BatchNorm2d, torch.optim.SGD, MultiStepLR's rates."""
    run = trained(tmp_path, "precision=fp64", rung="sb")
    recipe = run.recipe
    train_set, _ = load_sets(recipe, None)
    model = build_model(recipe, train_set, ghost_batch_size=None).double()
    from gbnzoo.data import GlobalBatches

    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [81], 0.1)  # floor(1 · 1297 / 16)
    batches = GlobalBatches(len(train_set), 16, seed=0)
    images = (train_set.images.permute(0, 3, 1, 2).double() / 255 - train_set.mean[0]) / train_set.std[0]
    for update in range(162):  # floor(2 · 1297 / 16)
        indices, _ = batches.at(update)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images[indices]), train_set.labels[indices]).backward()
        optimizer.step()
        schedule.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(final_weights(run)[name], value, rtol=1e-6, atol=1e-9)


def train_sb(out, checkpoint_seconds=60):
    return trained(out, "base.epochs=1", rung="sb", resume=True, checkpoint_seconds=checkpoint_seconds)


def test_a_stopped_run_goes_on_as_if_never_stopped(tmp_path):
    """kill -9 in the middle, resumed; the log and the weights equal an uninterrupted run's to the bit."""
    [whole] = run_together(1, train_sb, tmp_path / "whole")
    folder = tmp_path / "killed" / whole.folder.name
    with Together(1, train_sb, tmp_path / "killed", 0) as together:
        deadline = time.monotonic() + 60
        while not (folder / "log.csv").exists() or len(Run(folder).rows()) <= 8:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert together.processes[0].is_alive()
    # Leaving the context has killed it.
    stopped_at = Run(folder).latest_checkpoint().update
    assert 0 < stopped_at < 81
    [resumed] = run_together(1, train_sb, tmp_path / "killed")
    assert [e["first_update"] for e in resumed.environments()] == [0, stopped_at]
    assert comparable(resumed.rows()) == comparable(whole.rows())
    assert resumed.layer_rows() == whole.layer_rows()
    for name, value in final_weights(whole).items():
        assert torch.equal(final_weights(resumed)[name], value), name


def test_a_finished_run_is_left_as_it_is(tmp_path):
    run = trained(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*") if path.is_file()}
    rows = run.rows()
    trained(tmp_path, resume=True)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert run.rows() == rows
    with pytest.raises(RunError, match="already holds a run"):
        trained(tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run_by_name(tmp_path):
    with pytest.raises(
        DivergedError, match=r"(loss|weight) is not finite after update \d+ at learning rate .*last good: no checkpoint"
    ):
        trained(tmp_path, "base.lr=1e30", rung="lb")


def test_rungs_of_one_seed_start_from_the_same_weights():
    train_set, _ = load_sets(load_recipe(DIGITS), None)
    small, large, other = (
        build_model(load_recipe(DIGITS, rung=rung, seed=seed), train_set, ghost).state_dict()
        for rung, seed, ghost in (("sb", 0, 16), ("ra", 0, 16), ("ra", 1, 16))
    )
    assert all(torch.equal(small[name], large[name]) for name in small)
    assert any(not torch.equal(small[name], other[name]) for name in small)


def test_bf16_trains(tmp_path):
    run = trained(tmp_path, "precision=bf16")
    assert float(run.finished()[1]["top1_percent"]) > 60
    assert all(value.dtype == torch.float32 for name, value in final_weights(run).items() if name.endswith("weight"))


@pytest.mark.parametrize("kind", ["multiplicative", "isotropic"])
def test_gradient_noise_acts_from_rung_lr_on(tmp_path, kind):
    noise = f"gradient_noise={{kind: {kind}, sigma: 0.5}}"
    for rung, acts in (("lb", False), ("lr", True)):
        plain = final_weights(trained(tmp_path / "plain", rung=rung))
        noisy = final_weights(trained(tmp_path / "noisy", noise, rung=rung))
        assert any(not torch.equal(plain[name], noisy[name]) for name in plain) == acts


def test_momentum_is_gathered_anew_each_epoch(tmp_path):
    """Digits have 1,297 training images, of which a batch takes 512: passes begin with updates 3 and 6."""
    trainer = trainer_of(
        tmp_path,
        "optimizer.reset_momentum_each_epoch=true",
        "optimizer.weight_decay=0",
        "optimizer.clip_grad_norm=null",
        "base.epochs=4",
        "large.batch_size=512",
    )
    begins = [update for update in range(8) if trainer.regime.begins_epoch(update)]
    assert begins == [3, 6]
    with trainer.opened_run(resume=False):
        gathered = [torch.zeros_like(parameter) for parameter in trainer.parameters]
        for update in range(8):
            trainer.set_rates(update)
            trainer.add_gradients(update)
            for k, parameter in enumerate(trainer.parameters):
                gathered[k] = parameter.grad + (0 if update in begins else 0.9) * gathered[k]
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
            for parameter, expected in zip(trainer.parameters, gathered, strict=True):
                momentum = trainer.optimizer.state[parameter]["momentum_buffer"]
                torch.testing.assert_close(momentum, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("limit", [1e-3, 2.0, 1e3, None])
def test_gradients_are_clipped_as_torch_clips_them(limit, tmp_path):
    trainer = trainer_of(tmp_path, f"optimizer.clip_grad_norm={'null' if limit is None else limit}")
    with trainer.opened_run(resume=False):
        trainer.add_gradients(0)
        expected = [parameter.detach().clone() for parameter in trainer.parameters]
        for parameter, other in zip(trainer.parameters, expected, strict=True):
            other.grad = parameter.grad.clone()
        norm = nn.utils.clip_grad_norm_(expected, math.inf if limit is None else limit)
        assert 1e-3 < norm < 1e3
        assert trainer.clip_gradients(0) == norm
        for parameter, other in zip(trainer.parameters, expected, strict=True):
            assert torch.equal(parameter.grad, other.grad)
        trainer.parameters[0].grad[0] = math.nan
        trainer.clip_gradients(0)
        assert limit is None or all(parameter.grad.isnan().all() for parameter in trainer.parameters)


def noise_of_one_update(out, seed=0):
    """What isotropic noise of standard deviation 0.1 adds to all weights, over learning rate and deviation.

    The gradient is clipped to next to nothing; noise that were added before would be too.
    """
    one_update = ["precision=fp64", "base.epochs=0.05", "base.milestones=[]", "optimizer.clip_grad_norm=1e-9"]
    plain = trained(out / "plain", *one_update, seed=seed)
    noisy = trained(out / "noisy", *one_update, "gradient_noise={kind: isotropic, sigma: 0.1}", seed=seed)
    [row] = noisy.rows()
    moved = [
        (final_weights(noisy)[name] - final_weights(plain)[name]).flatten()
        for name in plain.initial_weights()
        if "running" not in name and "num_batches" not in name
    ]
    return torch.cat(moved) / (-float(row["lr"]) * 0.1)


def test_isotropic_noise_is_standard_normal_on_every_coordinate(tmp_path):
    noise, other = (noise_of_one_update(tmp_path / str(seed), seed) for seed in (0, 1))
    n = len(noise)
    assert n > 4000
    # Mean, variance and fourth moment of N(0, 1) are 0, 1 and 3; their estimates' deviations sqrt(1, 2 and 96 over n).
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (4, 3, 96)):
        assert noise.pow(power).mean().item() == pytest.approx(expected, abs=5 * (variance / n) ** 0.5)
    assert abs(noise @ other) < 5 * n**0.5
    assert abs(noise[1:] @ noise[:-1]) < 5 * n**0.5


def test_isotropic_noise_is_another_at_each_update_and_the_same_again_after_a_resume(tmp_path):
    arguments = ("gradient_noise={kind: isotropic, sigma: 0.1}", "base.epochs=0.5", "base.milestones=[]")
    run = trained(tmp_path, *arguments, checkpoint_seconds=0)
    newest = max((run.folder / "checkpoints").glob("update*"))
    whole = final_weights(run)
    newest.unlink()
    assert run.latest_checkpoint().update == 9
    resumed = final_weights(trained(tmp_path, *arguments, resume=True))
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


def test_random_labels_are_of_training_images_alone(tmp_path):
    override = ["data.holdout=297", "data.random_labels=1.0"]
    train_set, scored_set = load_sets(load_recipe(DIGITS, override), None)
    true_set, true_scored_set = load_sets(load_recipe(DIGITS, override[:1]), None)
    assert torch.equal(scored_set.labels, true_scored_set.labels)
    assert torch.equal(train_set.images, true_set.images)
    kept = (train_set.labels == true_set.labels).double().mean().item()
    assert kept == pytest.approx(0.1, abs=0.05)  # 1000 labels, of ten classes
    other_seed, _ = load_sets(load_recipe(DIGITS, override, seed=1), None)
    assert not torch.equal(train_set.labels, other_seed.labels)


def test_sgd_is_the_papers_unless_nesterov_is_asked_for():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    settings = load_recipe(DIGITS).optimizer
    assert build_optimizer(settings, model).param_groups[0]["nesterov"] is False
    assert build_optimizer(settings.model_copy(update={"nesterov": True}), model).param_groups[0]["nesterov"] is True
    spared = build_optimizer(settings.model_copy(update={"decay_norm_and_bias": False}), model).param_groups
    decays = {id(p): group["weight_decay"] for group in spared for p in group["params"]}
    assert [decays[id(p)] for p in model.parameters()] == [1e-4, 0, 0, 0]


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "lamb", "adan", "lookahead_sgd", "lookahead_lamb"])
def test_updates_in_one_pass_are_torchs_own_before_and_after_a_checkpoint(name):
    """Against torch's loop over contiguous tensors; the checkpoint's tensors are contiguous, the parameters channels_last."""
    settings = load_recipe(DIGITS).optimizer.model_copy(update={"name": name})
    plain, fast = ([torch.nn.Conv2d(3, 4, 3, dtype=torch.float64), torch.nn.BatchNorm2d(4).double()] for _ in range(2))
    plain, fast = torch.nn.Sequential(*plain), torch.nn.Sequential(*fast)
    fast.load_state_dict(plain.state_dict())
    fast.to(memory_format=torch.channels_last)
    is_torchs = name in ("sgd", "adam", "adamw")
    before = build_optimizer(settings.model_copy(update={"args": {"foreach": False}} if is_torchs else {}), plain)
    after = build_optimizer(settings, fast)
    assert after.defaults.get("fused") is (True if is_torchs else None)
    for update in range(10):
        if update == 4:  # lookahead looks every 6
            state = {i: {k: v.clone() for k, v in s.items()} for i, s in before.state_dict()["state"].items()}
            after = build_optimizer(settings, fast)
            load_optimizer_state(after, state, update)
        for model, optimizer in ((plain, before), (fast, after)):
            torch.manual_seed(update)
            for parameter in model.parameters():
                parameter.grad = torch.empty_like(parameter).copy_(torch.randn(parameter.shape))
            optimizer.param_groups[0]["lr"] = 0.1
            optimizer.step()
    for theirs, ours in zip(plain.parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_a_held_out_split_is_scored_in_place_of_the_test_split(tmp_path):
    run = trained(tmp_path, "data.holdout=297")
    assert run.environments()[0]["data"]["num_samples"] == 1000
    assert run.finished()[1]["split"] == "validation"


@pytest.mark.parametrize(
    ("override", "options", "message"),
    [
        ("model.name=resnet9000_gbn", {}, "model.name: given 'resnet9000_gbn', no architecture"),
        ("data.augment=cutout", {}, "data.augment: given 'cutout', wanted one of none"),
        ("seed=0", {"micro_batch_size": 24}, "micro_batch_size 24 does not cut batch_size 64"),
        ("seed=0", {"tracker": "mlflow"}, "tracker 'mlflow': wanted one of tensorboard, trackio, wandb"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(tmp_path, override, options, message):
    with pytest.raises(ValueError, match=message):
        trained(tmp_path, override, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_trainer_is_freed_with_its_last_reference(tmp_path):
    """What a garbage collector must find may still be there when Python ends, and the threads of a process group abort it."""
    trainer = trainer_of(tmp_path)
    with trainer.opened_run(resume=False):
        trainer.set_rates(0)
        trainer.add_gradients(0)
    freed = weakref.ref(trainer)
    gc.disable()
    try:
        del trainer
        assert freed() is None
    finally:
        gc.enable()


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize(
    ("micro_batch_size", "overrides", "error"),
    [
        pytest.param(64, ["precision=fp64"], 1e-9, id="whole"),
        pytest.param(
            16, ["precision=fp64", "gradient_noise={kind: multiplicative, sigma: 0.5}"], 1e-9, id="accumulated"
        ),
        pytest.param(32, ["precision=fp64", "model.args={drop_rate: 0.3}"], 1e-9, id="dropout"),
        # With the kernels, which know no float64. A few updates, before an activation crosses zero.
        pytest.param(32, ["precision=fp32", "base.epochs=0.2"], 1e-4, id="kernels"),
    ],
)
def test_graphs_change_only_the_time(tmp_path, micro_batch_size, overrides, error):
    runs = [
        trained(tmp_path / str(on), *overrides, micro_batch_size=micro_batch_size, cuda_graphs=on)
        for on in (False, True)
    ]
    assert [run.environments()[0]["cuda_graphs"] for run in runs] == [False, True]
    torch.testing.assert_close(*map(final_weights, runs), rtol=error, atol=error)


@pytest.mark.gpu
@needs_cuda
def test_a_network_that_waits_for_the_host_is_told_what_to_do(tmp_path, monkeypatch):
    forward = CifarResNet.forward

    def waiting(self, x):
        return forward(self, x) * x.sum().isfinite().item()

    monkeypatch.setattr(CifarResNet, "forward", waiting)
    with pytest.raises(RunError, match=r"cannot be captured as a CUDA graph \(.*\); .* --no-cuda-graphs"):
        trained(tmp_path)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_an_update_never_makes_the_host_wait_for_the_gpu(tmp_path):
    noise = "gradient_noise={kind: multiplicative, sigma: 0.5}"
    trainer = trainer_of(tmp_path, noise, "data.augment=pad1_crop", "precision=bf16")
    with trainer.opened_run(resume=False):
        for update in range(3):
            if update == 1:  # the first compiles and allocates
                torch.cuda.set_sync_debug_mode("error")
            trainer.set_rates(update)
            trainer.add_gradients(update)
            trainer.clip_gradients(update)
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
        torch.cuda.set_sync_debug_mode("default")
    assert all(group["fused"] for group in trainer.optimizer.param_groups)


def test_what_check_recipe_lets_pass_makes_updates_and_goes_on_from_a_checkpoint():
    recipe, unfit = load_recipe(DIGITS), set()
    names = [name for name in list_optimizers() if not name.startswith(("bnb", "fused"))]  # which want a GPU
    for name in [*names, *(f"lookahead_{name}" for name in names)]:
        chosen = recipe.optimizer.model_copy(update={"name": name, "weight_decay": 0.1})
        try:
            check_recipe(recipe.model_copy(update={"optimizer": chosen}))
        except RecipeError:
            unfit.add(name.removeprefix("lookahead_"))
            continue
        # A matrix, for which some optimizers keep its factors.
        one, other = (torch.nn.Linear(3, 4) for _ in range(2))
        other.load_state_dict(one.state_dict())
        optimizers = [build_optimizer(chosen, model, 0.01) for model in (one, other)]
        for update in range(3):
            if update == 2:
                checkpoint = Checkpoint(update, 3, {}, optimizers[1].state_dict()["state"], {})
                optimizers[1] = build_optimizer(chosen, other, 0.01)
                load_optimizer_state(optimizers[1], _unpack(_pack(checkpoint)).optimizer, update)
            for model, optimizer in zip((one, other), optimizers, strict=True):
                torch.manual_seed(update)
                for parameter in model.parameters():
                    parameter.grad = torch.randn(parameter.shape)
                optimizer.step()
        torch.testing.assert_close(one.state_dict(), other.state_dict(), msg=lambda text, name=name: f"{name}: {text}")
    assert unfit == {name for name in names if name.startswith(("adahessian", "kron"))}
