"""Stopped in any way at any moment, and gone on with on any number of processes, a run ends as if never stopped."""

import contextlib
import errno
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from processes import Together, run_together
from test_distributed import DIGITS, assert_same_log, relative_distance

from gbnzoo import run as run_module
from gbnzoo.launch import TerminatedError, watching_for_stop
from gbnzoo.recipe import load_recipe
from gbnzoo.run import Run
from gbnzoo.train import train
from gbnzoo.trainer import Trainer

# Thirty updates of 64 digits; with everything that a checkpoint must know of.
RECIPE = [
    "precision=fp64",
    "base.epochs=1.5",
    "base.milestones=[1]",
    "evaluations=3",
    "data.augment=pad1_crop",
    "large.batch_size=64",
]


def train_digits(out, checkpoint_seconds=0.0, timeout_seconds=60.0, overrides=()):
    """Start the run or go on with it, a checkpoint whenever the processes agree on one."""
    recipe = load_recipe(DIGITS, [*RECIPE, *overrides], rung="gbn")
    return train(
        recipe,
        out=out,
        resume=True,
        checkpoint_seconds=checkpoint_seconds,
        timeout_seconds=timeout_seconds,
        show_progress=False,
    )


def train_with_slow_writes(out):
    """As if the disk took 20 ms for each sync, so that a kill may well meet one."""
    sync = os.fsync
    os.fsync = lambda descriptor: (time.sleep(0.02), sync(descriptor))
    return train_digits(out)


def train_with_warnings_as_errors(out):
    warnings.simplefilter("error", UserWarning)
    return train_digits(out)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    [folder] = run_together(1, train_digits, tmp_path_factory.mktemp("whole"), 60)
    return Run(folder)


def assert_same_end(run, whole):
    assert relative_distance(run, whole) < 1e-9
    assert_same_log(run, whole, rel=1e-9)
    assert [path.name for path in run.folder.rglob("*.writing")] == []


def wait_until(is_so, timeout=180):
    deadline = time.monotonic() + timeout
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def has_rows(out, n):
    """Whether a run under `out` has logged so much."""
    return lambda: any(log.read_bytes().count(b"\n") > n for log in out.glob("*/log.csv"))


def is_writing_checkpoint(out):
    return lambda: any(out.glob("*/checkpoints/update*.writing"))


def test_sigterm_to_one_process_saves_and_ends_all(tmp_path, whole):
    with Together(2, train_digits, tmp_path, 60) as together:
        wait_until(has_rows(tmp_path, 3))
        os.kill(together.processes[1].pid, signal.SIGTERM)
        for rank in range(2):
            with pytest.raises(AssertionError, match=r"TerminatedError: .*stopped after update \d+; --resume"):
                together.results([rank])
    run = Run(tmp_path / whole.folder.name)
    assert 4 <= run.latest_checkpoint().update < 30  # the only one; the next would have been due in 60 s
    run_together(4, train_digits, tmp_path)
    assert [start["processes"] for start in run.environments()] == [2, 4]
    assert_same_end(run, whole)


@pytest.mark.parametrize(
    ("sign", "seconds"), [(signal.SIGKILL, 10), (signal.SIGSTOP, 3 + 10)], ids=["a process dies", "a process hangs"]
)
def test_a_lost_process_ends_the_others_in_time_and_the_run_goes_on_without_it(tmp_path, whole, sign, seconds):
    """Of 2 processes; the one left waits 3 seconds for the other, and 10 are for a slow machine."""
    with Together(2, train_digits, tmp_path, 0, 3) as together:
        wait_until(has_rows(tmp_path, 4))
        os.kill(together.processes[1].pid, sign)
        with pytest.raises(
            AssertionError, match=r"LostProcessError: process 0 of 2 has lost another, which died, hangs"
        ):
            together.results([0], timeout=seconds)
    run = Run(tmp_path / whole.folder.name)
    rows = run.rows()
    assert len(rows) >= 4
    run_together(1, train_digits, tmp_path)
    assert run.rows()[: len(rows) - 1] == rows[:-1]  # all that was logged is kept, but what had no checkpoint yet
    assert_same_end(run, whole)


def test_kill_9_anywhere_and_again_changes_nothing(tmp_path, whole):
    moments = random.Random(0)
    for processes, is_hit in (
        (1, has_rows(tmp_path, 2)),
        (2, is_writing_checkpoint(tmp_path)),
        (1, has_rows(tmp_path, 6)),
    ):
        with Together(processes, train_with_slow_writes, tmp_path) as together:
            wait_until(is_hit)
            time.sleep(moments.uniform(0, 0.02))
            assert all(process.is_alive() for process in together.processes)
        # Leaving the context has killed them.
    run_together(2, train_digits, tmp_path)
    run = Run(tmp_path / whole.folder.name)
    assert [start["processes"] for start in run.environments()] == [1, 2, 1, 2]
    assert_same_end(run, whole)


def damage_newest_checkpoint(folder):
    newest = max((folder / "checkpoints").glob("update*"))
    newest.write_bytes(newest.read_bytes()[:-1])
    return newest


def test_a_truncated_checkpoint_costs_some_updates_and_changes_nothing(tmp_path, whole):
    with Together(1, train_digits, tmp_path) as together:
        wait_until(has_rows(tmp_path, 6))
    del together
    run = Run(tmp_path / whole.folder.name)
    stopped_at = run.latest_checkpoint().update
    damaged = damage_newest_checkpoint(run.folder)
    with pytest.raises(AssertionError, match=rf"UserWarning: .*{damaged.name} is damaged .*; using update"):
        run_together(1, train_with_warnings_as_errors, tmp_path)
    run_together(2, train_digits, tmp_path)
    assert run.environments()[-1]["first_update"] < stopped_at
    assert_same_end(run, whole)


def test_two_at_once_cannot_train_in_one_folder(tmp_path):
    with Together(1, train_digits, tmp_path) as first:
        wait_until(has_rows(tmp_path, 1))
        with pytest.raises(AssertionError, match=r"RunError: .* is being trained by another process; stop it first"):
            run_together(1, train_digits, tmp_path)
        assert first.processes[0].is_alive()


def train_with_dropout(out, stop_after=None):
    """mobilenetv3 with dropout and drop path; stopped by itself in the middle, if asked to."""
    if stop_after:
        wait = Trainer.agree
        Trainer.agree = lambda self, done, stop: wait(self, done, stop or done >= stop_after)
    model = "model={name: mobilenetv3_small_050_gbn, args: {drop_rate: 0.2, drop_path_rate: 0.2}}"
    recipe = load_recipe(DIGITS, [*RECIPE, model, "base.epochs=0.25", "base.milestones=[]"], rung="gbn")
    return train(recipe, out=out, resume=True, show_progress=False)


def test_dropout_is_the_same_again_on_the_same_layout(tmp_path):
    """And another draw on another layout, which the other tests cannot see: their networks have none."""
    twice, stopped, alone = (tmp_path / name for name in ("twice", "stopped", "alone"))
    first, *_ = run_together(2, train_with_dropout, twice)
    with pytest.raises(AssertionError, match="TerminatedError"):
        run_together(2, train_with_dropout, stopped, 2)
    second, *_ = run_together(2, train_with_dropout, stopped)
    other, *_ = run_together(1, train_with_dropout, alone)
    assert [start["first_update"] for start in Run(second).environments()] == [0, 2]
    assert relative_distance(Run(second), Run(first)) < 1e-9
    assert relative_distance(Run(other), Run(first)) > 1e-3


def train_on_a_disk_that_fills_up(out):
    write = run_module._write

    def fill_up(path, content):
        if path.name.startswith("update"):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, content)

    run_module._write = fill_up
    return train_digits(out)


def test_a_full_disk_is_told_by_all_processes(tmp_path):
    with Together(2, train_on_a_disk_that_fills_up, tmp_path) as together:
        for rank in range(2):
            with pytest.raises(AssertionError, match=r"RunError: cannot write .* No space left on device; last good"):
                together.results([rank])


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 512 KiB, which holds one checkpoint of the digits' network."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(disk)]
    try:
        subprocess.run(mount, check=True, capture_output=True, timeout=30)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs the right to mount a file system: {error}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True, timeout=30)


def test_a_run_on_a_full_disk_goes_on_when_there_is_room(small_disk, whole):
    with pytest.raises(
        AssertionError, match=r"RunError: cannot write .* No space left on device; last good checkpoint: update"
    ):
        run_together(1, train_digits, small_disk)
    run = Run(small_disk / whole.folder.name)
    assert run.latest_checkpoint().update >= 1
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True, timeout=30)
    run_together(1, train_digits, small_disk)
    assert_same_end(run, whole)


# The command itself.


def command(out, processes, *options):
    arguments = [DIGITS, *RECIPE, "--rung", "gbn", "--out", out, "--processes", processes, *options]
    return [sys.executable, "-m", "gbnzoo.train", *map(str, arguments)]


def start(arguments):
    """A command of its own process group, so that all it starts can be ended."""
    # torch adds its own lines to stderr.
    return subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "ACCELERATE_USE_CPU": "true"},
    )


def end(process):
    for pid in [process.pid, *children(process.pid)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=30)


def children(pid):
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


@pytest.fixture(autouse=True)
def _takes_ctrl_c():
    """As in a terminal; what a script began with & ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("processes", [1, 2])
def test_the_command_starts_the_processes_it_was_asked_for_and_saves_when_it_is_stopped(
    tmp_path, whole, processes, sign
):
    process = start(command(tmp_path, processes))
    try:
        wait_until(lambda: process.poll() is not None or has_rows(tmp_path, 1)())
        if sign == signal.SIGINT:
            os.killpg(process.pid, sign)  # as a terminal does
        else:
            process.terminate()
        _, errors = process.communicate(timeout=120)
    finally:
        end(process)
    assert process.returncode == 128 + sign, errors
    assert "Traceback" not in errors
    run = Run(tmp_path / whole.folder.name)
    assert errors.count(f"error: {run.folder}: stopped after update {run.latest_checkpoint().update}; --resume") == 1
    assert errors.count("Ctrl-C again stops at once") == (processes == 1 and sign == signal.SIGINT)
    assert run.environments()[0]["processes"] == processes
    run_together(1, train_digits, tmp_path)
    assert_same_end(run, whole)


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_after_the_last_update_lets_the_run_end_and_nothing_begin(tmp_path, whole, monkeypatch, sign):
    save = Trainer.save

    def signalled(trainer, done):
        if done == trainer.regime.total_updates:
            os.kill(os.getpid(), sign)
        save(trainer, done)

    monkeypatch.setattr(Trainer, "save", signalled)
    with pytest.raises(TerminatedError, match="stopped after its last update; it is complete") as stopped:
        train_digits(tmp_path)
    assert stopped.value.exit_code == 128 + sign
    monkeypatch.undo()
    assert_same_end(Run(tmp_path / whole.folder.name), whole)


def test_a_signal_is_noted_whoever_has_ended_reading_and_in_no_worker(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(os, "write", lambda _, text, write=os.write: write(writer, text))
    with watching_for_stop(signal.SIGINT) as is_asked_to_stop:
        if (worker := os.fork()) == 0:
            os.kill(os.getpid(), signal.SIGINT)
            os._exit(is_asked_to_stop())
        assert os.waitpid(worker, 0)[1] == 0
        assert not is_asked_to_stop()
        os.kill(os.getpid(), signal.SIGINT)
        assert is_asked_to_stop()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    os.close(writer)


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with watching_for_stop(signal.SIGINT) as is_asked_to_stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert not is_asked_to_stop()
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_end_of_the_launcher_asks_a_process_to_stop(monkeypatch):
    for variable in ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"):
        with monkeypatch.context() as launched:
            launched.setenv(variable, "no")
            with watching_for_stop(signal.SIGTERM) as is_asked_to_stop:
                assert not is_asked_to_stop()
                launched.setattr(os, "getppid", lambda: 0)
                assert is_asked_to_stop()
    with watching_for_stop(signal.SIGTERM) as is_asked_to_stop:
        monkeypatch.setattr(os, "getppid", lambda: 0)
        assert not is_asked_to_stop()  # started by hand, it may outlive its shell


@pytest.mark.slow
def test_a_killed_process_ends_the_command_by_name(tmp_path, whole):
    process = start(command(tmp_path, 2))
    try:
        wait_until(has_rows(tmp_path, 1))
        os.kill(children(process.pid)[1], signal.SIGKILL)
        _, errors = process.communicate(timeout=120)
    finally:
        end(process)
    assert process.returncode == 2
    assert "error: process 1 of 2 was killed by SIGKILL, and the others stopped; --resume goes on" in errors
    run_together(1, train_digits, tmp_path)
    assert_same_end(Run(tmp_path / whole.folder.name), whole)


@pytest.mark.slow
def test_workers_save_and_end_when_their_launcher_is_killed(tmp_path, whole):
    process = start(command(tmp_path, 2))
    try:
        wait_until(has_rows(tmp_path, 1))
        workers = children(process.pid)
        assert len(workers) == 2
        process.kill()
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))
    finally:
        end(process)
    assert Run(tmp_path / whole.folder.name).latest_checkpoint().update < 30
    run_together(1, train_digits, tmp_path)
    assert_same_end(Run(tmp_path / whole.folder.name), whole)


@pytest.mark.slow
def test_24_real_runs_killed_at_random_moments_end_as_one(tmp_path, whole):
    """`gbnzoo train --processes 1, 2 or 4`, all of it killed: at any moment, starting up included, or while it writes."""
    moments, writes, longer = random.Random(1), 0, ["base.epochs=60", "base.milestones=[30]"]  # 1215 updates
    folder = tmp_path / whole.folder.name

    def starts():
        return len(Run(folder).environments()) if (folder / "env.json").exists() else 0

    for _ in range(24):
        before = starts()
        process = start([*command(tmp_path, moments.choice([1, 2, 4]), "--checkpoint-seconds", 0, "--resume"), *longer])
        if moments.random() < 0.25:
            time.sleep(moments.uniform(0, 15))
        else:
            wait_until(lambda before=before: starts() > before)
            time.sleep(moments.uniform(0, 1))
            if moments.random() < 0.7:
                wait_until(is_writing_checkpoint(tmp_path))
        assert process.poll() is None, process.communicate()
        end(process)
        writes += is_writing_checkpoint(tmp_path)()
    last = start([*command(tmp_path, 2, "--resume"), *longer])
    _, errors = last.communicate(timeout=600)
    assert last.returncode == 0, errors
    [uninterrupted] = run_together(1, train_digits, tmp_path / "whole", 60, 60, longer)
    run = Run(folder)
    print(f"{writes} of 24 kills during a write; starts from updates", *(s["first_update"] for s in run.environments()))
    assert writes >= 3
    assert_same_end(run, Run(uninterrupted))
