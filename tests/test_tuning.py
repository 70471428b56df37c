"""Micro-batches: the fastest is taken, measured once, without a trace in what is trained."""

import json
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest
import torch
from processes import run_together
from test_cli import gbnzoo
from torch import nn

from gbnzoo import GhostBatchNorm2d, tuning
from gbnzoo.recipe import load_recipe
from gbnzoo.run import Run
from gbnzoo.train import train
from gbnzoo.tuning import Setting

DIGITS = "recipes/digits/resnet8_thin_gbn.yaml"
SHORT = ["precision=fp64", "base.epochs=0.3", "base.milestones=[]", "evaluations=1", "large.batch_size=64"]
SETTING = Setting("net", {"width": 2}, (1, 8, 8), 10, 16, (16, 32, 64), "fp32", "4 × a processor", 1)


@pytest.fixture(autouse=True)
def _nothing_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


class Machine:
    """Where a micro-batch of n takes overhead + n · each seconds, more beyond a cache's size, and memory ends at another."""

    def __init__(self, overhead=0.05, each=0.001, cached=128, most=10**9):
        self.overhead, self.each, self.cached, self.most = overhead, each, cached, most
        self.passes, self.seconds = [], 0.0

    def __call__(self, size):
        self.passes.append(size)
        if size > self.most:
            raise torch.OutOfMemoryError
        first = len(self.passes) == 1 and 0.5
        took = first + self.overhead + size * self.each * (1 if size <= self.cached else 2)
        self.seconds += took
        return took


SIZES = (16, 32, 64, 128, 256, 512)


def test_each_size_is_timed_warm_and_the_best_counts():
    seconds = tuning.time_sizes(SIZES, Machine(), 1000)
    # 16 samples: 0.05 + 0.016; from 256 on, two milliseconds each.
    expected = {16: 0.066 / 16, 32: 0.082 / 32, 64: 0.114 / 64, 128: 0.178 / 128, 256: 0.562 / 256, 512: 1.074 / 512}
    assert seconds == pytest.approx(expected)


def test_what_is_too_big_for_the_memory_ends_the_trying():
    machine = Machine(most=100)
    assert list(tuning.time_sizes(SIZES, machine, 1000)) == [16, 32, 64]
    assert machine.passes.count(128) == 1
    assert 256 not in machine.passes
    assert tuning.time_sizes(SIZES, Machine(most=8), 1000) == {}


@pytest.mark.parametrize("max_seconds", [1.0, 3.0, 10.0])
def test_measuring_is_bounded_in_time(max_seconds):
    machine = Machine()
    seconds = tuning.time_sizes(SIZES, machine, max_seconds)
    assert machine.seconds <= 1.1 * max_seconds  # by what the machine takes for a size before it is known
    # Two passes of 32 would be 2 · 32 · 0.066 / 16 = 0.264 s, over a quarter of a second; of 512, by the 0.178 s of 128, 1.4 s.
    assert tuple(seconds) == {1.0: SIZES[:1], 3.0: SIZES[:5], 10.0: SIZES}[max_seconds]


def test_the_fastest_is_taken_unless_it_is_hardly_faster_than_the_rules():
    seconds = {16: 2.0, 32: 1.0, 64: 1.02, 128: 1.5}
    assert tuning.choose(seconds, SIZES, default=128) == 32
    assert tuning.choose(seconds, SIZES, default=64) == 64
    assert tuning.choose(seconds, SIZES, default=512) == 32  # which could not be tried
    assert tuning.choose({}, SIZES, default=512) == 16


@pytest.mark.parametrize(
    ("sizes", "around", "expected"),
    [
        ([128, 256, 512, 1024, 2048, 4096], 512, (128, 256, 512, 1024, 2048, 4096)),
        ([32 * 2**k for k in range(12)], 512, (64, 128, 256, 512, 1024, 2048)),
        ([48, 96, 144, 288], 288, (48, 144, 288)),
        ([16, 32], 32, (16, 32)),
    ],
)
def test_candidates_lie_around_what_the_rule_takes(sizes, around, expected):
    assert tuning.spread(sizes, around) == expected


def test_measured_once_for_each_setting():
    calls = []

    def measure():
        calls.append(None)
        return {16: 2.0, 32: 1.0}

    assert [tuning.fastest_micro_batch(SETTING, 64, measure) for _ in range(2)] == [32, 32]
    assert len(calls) == 1
    for other in ({"threads": 2}, {"device": "another"}, {"versions": {"torch": "3.0"}}, {"architecture_args": {}}):
        tuning.fastest_micro_batch(replace(SETTING, **other), 64, measure)
    assert len(calls) == 5
    SETTING.file.write_text("{torn")
    tuning.fastest_micro_batch(SETTING, 64, measure)
    assert len(calls) == 6
    assert json.loads(SETTING.file.read_text())["setting"]["input_size"] == [1, 8, 8]


def test_where_nothing_can_be_kept_it_is_measured_each_time(tmp_path):
    (tmp_path / "cache").write_text("a file where the folder would be")
    assert [tuning.fastest_micro_batch(SETTING, 64, lambda: {16: 1.0}) for _ in range(2)] == [16, 16]


def test_time_for_measuring_is_a_hundredth_of_the_counted_work():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))
    # Twice the weights in operations forward, three times that in all; 8e11 a second and thread.
    seconds = 0.01 * 3 * 2 * (64 * 100 + 100 * 10) * 10**10 / 8e11
    assert tuning.measuring_seconds(model, SETTING, 10**10) == pytest.approx(seconds)  # 8.88
    assert tuning.measuring_seconds(model, replace(SETTING, threads=4), 10**10) == pytest.approx(seconds / 4)
    assert tuning.measuring_seconds(model, SETTING, 10**11) == 10
    assert tuning.measuring_seconds(model, SETTING, 10**9) == 0


def test_a_timed_pass_leaves_no_trace():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), GhostBatchNorm2d(4, ghost_batch_size=16), nn.Dropout(), nn.Flatten(), nn.Linear(144, 10)
    )
    model(torch.randn(16, 1, 8, 8)).sum().backward()
    model.eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = [p.grad.clone() for p in model.parameters()]
    random_state = torch.get_rng_state()

    time_pass = tuning.training_pass(model, replace(SETTING, precision="bf16"))
    assert all(time_pass(size) > 0 for size in (16, 32))

    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert not any(module.training for module in model.modules())


# ---- in a run


def train_digits(out, fastest, resume=False, **options):
    """On a machine so slow that to measure pays, and on which that micro-batch is the fastest. Returns also how often."""
    measured = []

    def time_sizes(sizes, time_pass, max_seconds):
        measured.append(max_seconds)
        assert time_pass(sizes[0]) > 0
        return {size: 1.0 if size == fastest else 2.0 for size in sizes}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "_FLOPS_PER_CPU_THREAD", 1e5)
        patch.setattr(tuning, "time_sizes", time_sizes)
        recipe = load_recipe(DIGITS, SHORT, rung="gbn")
        folder = train(recipe, out=out, resume=resume, show_progress=False, **options)
    return Run(folder).environments()[-1]["micro_batch_size"], len(measured), folder


def test_a_run_takes_the_fastest_and_the_next_one_too(tmp_path):
    assert train_digits(tmp_path / "a", fastest=32)[:2] == (32, 1)
    assert train_digits(tmp_path / "b", fastest=16)[:2] == (32, 0)
    assert train_digits(tmp_path / "c", fastest=16, micro_batch_size=64)[:2] == (64, 0)


def test_the_choice_changes_no_result(tmp_path):
    ends = []
    for fastest in (64, 16):
        *chosen, folder = train_digits(tmp_path / str(fastest), fastest)
        assert chosen == [fastest, 1]
        ends.append(Run(folder).finished()[0].model)
        for kept in (tmp_path / "cache" / "gbnzoo" / "tuning").iterdir():
            kept.unlink()
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-9, atol=1e-12)


def test_a_run_that_goes_on_keeps_its_micro_batch(tmp_path):
    """So that it ends as if never stopped, to the bit, whatever else was measured in the meantime."""
    _, _, folder = train_digits(tmp_path, fastest=32)
    for checkpoint in (folder / "checkpoints").glob("update*"):
        checkpoint.unlink()
    for kept in (tmp_path / "cache" / "gbnzoo" / "tuning").iterdir():
        kept.unlink()
    assert train_digits(tmp_path, fastest=16, resume=True)[:2] == (32, 0)
    environments = Run(folder).environments()
    moved = json.dumps([environment | {"hardware": "another machine"} for environment in environments])
    (folder / "env.json").write_text(moved)
    for checkpoint in (folder / "checkpoints").glob("update*"):
        checkpoint.unlink()
    assert train_digits(tmp_path, fastest=16, resume=True)[:2] == (16, 1)


def test_the_first_of_several_processes_measures_for_all(tmp_path):
    results = run_together(2, train_digits, tmp_path, 16)
    assert [result[:2] for result in results] == [(16, 1), (16, 0)]


def test_a_short_run_measures_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "time_sizes", None)
    folder = train(load_recipe(DIGITS, SHORT, rung="gbn"), out=tmp_path / "runs", show_progress=False)
    assert Run(folder).environments()[0]["micro_batch_size"] == 64
    assert not (tmp_path / "cache" / "gbnzoo" / "tuning").exists()


def test_plan_tells_what_will_be_measured_and_what_was(tmp_path):
    def planned(*more):
        return gbnzoo("plan", DIGITS, *SHORT, *more)

    assert "measured" not in planned()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "_FLOPS_PER_CPU_THREAD", 1e5)
        said = planned()
        assert said.count("micro-batch 64, or the fastest of 16, 32 and 64, measured when it starts") == 2  # gbn and ra
        assert "measured" not in planned("--micro-batch-size", "16")
        train_digits(tmp_path, fastest=32)
        assert planned().count("2 accumulation × micro-batch 32, measured as the fastest (1 images/s)") == 2


@pytest.mark.parametrize(("accelerator", "device"), [("mps", "cpu"), ("cuda", "cuda"), (None, "cpu")])
def test_runs_are_on_accelerators_that_sum_in_float64(accelerator, device, monkeypatch):
    found = accelerator and torch.device(accelerator)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: found)
    assert tuning.likely_device().type == device


def test_cores_that_the_system_does_not_count_are_not_spoken_of(monkeypatch):
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(cpu_affinity=lambda: [8, 9]))
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval, percpu: [100, 100])
    assert tuning.advice_on_threads(2) == ""


@pytest.mark.parametrize(
    ("threads", "taken", "speaks"), [(4, 0.2, False), (4, 1.0, True), (3, 1.0, False), (1, 4.0, False)]
)
def test_threads_beside_other_work_are_told_what_is_faster(threads, taken, speaks, monkeypatch):
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(cpu_affinity=lambda: [0, 1, 2, 5]))
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval, percpu: [100 * taken, 0, 0, 100, 100, 0])
    advice = tuning.advice_on_threads(threads)
    assert bool(advice) == speaks
    if speaks:
        assert advice.startswith("other work takes 1.0 of 4 cores, and 4 threads wait")
        assert "OMP_NUM_THREADS=1" in advice
