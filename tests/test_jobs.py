"""Several runs at once: no more than asked for, each line under its name, and none lost by another's failure or a signal."""

import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from processes import Together
from test_cli import DIGITS, gbnzoo
from test_resume import children, has_rows, wait_until

from gbnzoo.cli import train_ladder
from gbnzoo.jobs import FailedJobsError, Job, run_jobs, share
from gbnzoo.launch import JOB_VARIABLE, watching_for_stop
from gbnzoo.recipe import load_recipe
from gbnzoo.run import Run


def script(name, text, *arguments):
    return Job(name, [sys.executable, "-Sc", text, *map(str, arguments)])


def test_no_more_run_at_once_than_asked_for_and_all_do(tmp_path):
    text = (
        "import sys, time; from pathlib import Path; me = Path(sys.argv[1]); me.touch(); time.sleep(0.2);"
        "running = len(list(me.parent.glob('*.run'))); me.rename(me.with_suffix(f'.{running}'))"
    )
    run_jobs([script(f"job{i}", text, tmp_path / f"{i}.run") for i in range(7)], at_once=3)
    assert {path.stem for path in tmp_path.iterdir()} == set("0123456")
    most = max(int(path.suffix[1:]) for path in tmp_path.iterdir())
    assert 1 < most <= 3


def test_each_line_stands_under_its_jobs_name(capfd):
    run_jobs([script("a", "print('a: said by itself'); print('b'); import sys; sys.stderr.write('half')")], 2)
    assert capfd.readouterr().out.splitlines() == ["a: said by itself", "a: b", "a: half"]


def test_one_that_fails_ends_no_other(tmp_path):
    with pytest.raises(
        FailedJobsError, match=r"^2 of 4 failed: bad \(exit code 3\), shot \(killed by SIGKILL\); "
    ) as error:
        run_jobs(
            [
                script("bad", "raise SystemExit(3)"),
                script("shot", "import os; os.kill(os.getpid(), 9)"),
                *(script(n, "import sys; open(sys.argv[1], 'w')", tmp_path / n) for n in ("good", "last")),
            ],
            at_once=1,
        )
    assert error.value.names == ["good", "last"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good", "last"]


@pytest.mark.parametrize(("threads", "at_once", "expected"), [(8, 2, "4"), (8, 3, "2"), (2, 4, "1")])
def test_they_share_the_threads(threads, at_once, expected, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert share(0, at_once)["OMP_NUM_THREADS"] == expected
    assert "CUDA_VISIBLE_DEVICES" not in share(0, at_once)


def test_they_take_the_gpus_in_turn(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [share(slot, 3)["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == ["0", "1", "0"]
    assert share(0, 3)["GBNZOO_GPU_SHARE"] == "2"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert [share(slot, 2)["CUDA_VISIBLE_DEVICES"] for slot in range(2)] == ["5", "7"]
    assert share(0, 2)["GBNZOO_GPU_SHARE"] == "1"


CHILD = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (open(sys.argv[1] + '.saved', 'w'), sys.exit(143)))
open(sys.argv[1] + '.ready', 'w')
time.sleep(60)
"""


def run_three(folder):
    run_jobs([script(name, CHILD, folder / name) for name in "abc"], at_once=2)


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_and_no_other_is_begun(sign, tmp_path):
    with Together(1, run_three, tmp_path) as together:
        wait_until(lambda: len(list(tmp_path.glob("*.ready"))) == 2)
        os.kill(together.processes[0].pid, sign)
        with pytest.raises(
            AssertionError, match=f"TerminatedError: stopped by {sign.name}, 2 of 3 at work; the same comm"
        ):
            together.results()
    assert {path.name for path in tmp_path.iterdir()} == {"a.ready", "a.saved", "b.ready", "b.saved"}


def test_a_job_stops_when_what_began_it_is_gone(monkeypatch):
    monkeypatch.setenv(JOB_VARIABLE, "1")
    with watching_for_stop(signal.SIGTERM) as is_asked_to_stop:
        assert not is_asked_to_stop()
        monkeypatch.setattr(os, "getppid", lambda: 1)
        assert is_asked_to_stop()


SHORT = ["base.epochs=2", "base.milestones=[1]", "evaluations=1", "large.batch_size=128"]


def test_a_ladder_of_two_jobs_is_that_of_one_but_for_the_run_that_fails(tmp_path):
    """The folder of one of its runs holds a run of another recipe."""
    arguments = ["ladder", DIGITS, *SHORT, "--plot", tmp_path / "ladder.png"]

    def table(text):
        return [line.split("|")[1:-2] for line in text.splitlines() if line.startswith("| ")]

    alone = table(gbnzoo(*arguments, "--rungs", "gbn", "--out", tmp_path / "alone"))
    assert len(alone) == 3  # with the head
    out = tmp_path / "at once"
    other = load_recipe(DIGITS, [*SHORT, "base.lr=0.2"], rung="lb", seed=0)
    Run.start(other, out, resume=False)

    said = gbnzoo(*arguments, "--rungs", "lb gbn", "--jobs", 2, "--out", out, exit_code=2)
    assert f"{other.run_name}: error: {out / other.run_name} was started from another recipe (base.lr 0.2 there" in said
    assert f"1 of 2 failed: {other.run_name} (exit code 2)" in said
    assert table(said) == alone
    assert table(gbnzoo(*arguments, "--rungs", "gbn", "--out", out)) == alone


def begin_long_ladder(out):
    train_ladder(DIGITS, ["base.epochs=500"], [0], out, data_dir=None, rungs=["lb"], jobs=2)


@pytest.mark.slow
def test_a_run_saves_when_the_ladder_that_began_it_was_killed(tmp_path):
    with Together(1, begin_long_ladder, tmp_path) as together:
        wait_until(has_rows(tmp_path, 5))
        [run] = children(together.processes[0].pid)
    wait_until(lambda: not Path(f"/proc/{run}").exists())
    assert Run(next(tmp_path.iterdir())).latest_checkpoint().update > 0
