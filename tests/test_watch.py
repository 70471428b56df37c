"""The view of a run in a terminal: what it says of going, finished, old and broken ones, and that it ends."""

import io
import os
import time
from pathlib import Path

import pytest
from rich.console import Console
from small_run import NUM_SAMPLES, finished_run, small_recipe
from typer.testing import CliRunner

from gbnzoo import watch as watch_module
from gbnzoo.cli import app
from gbnzoo.run import Checkpoint, Run
from gbnzoo.watch import chart, read_progress, sparkline, watch


@pytest.fixture
def run(tmp_path):
    """Started, and to make 10 updates."""
    run = Run.start(small_recipe(rung="sb"), tmp_path, resume=False)
    run.record_environment({"total_updates": 10})
    return run


def log(run, update, train_seconds, **cells):
    row = {
        "update": update,
        "train_seconds": train_seconds,
        "lr": 0.1,
        "train_loss": 1 / update,
        "weight_distance": update,
    }
    run.log(row | cells)


def shown(folder):
    """What the command writes into a pipe, by the name at the start of the line."""
    result = CliRunner().invoke(app, ["watch", str(folder)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return {line[:18].strip(): line[19:].rstrip() for line in result.output.splitlines()}


def on_terminal(folder, width=100, height=40):
    """What `watch` shows on a terminal from its start to its end."""
    terminal = io.StringIO()
    watch(folder, console=Console(file=terminal, force_terminal=True, width=width, height=height))
    return terminal.getvalue()


def test_in_a_pipe_it_says_once_how_far_a_run_is(run):
    log(run, 1, 1.0, split="test", top1_percent=10.0, peak_memory_mib=1234, images_per_second=5678.9, grad_norm=0.5)
    log(run, 4, 10.0)
    said = shown(run.folder)
    assert said["run"] == "resnet8_thin_gbn.shapes_sb4-seed0"
    # 10 s for 4 updates, so 15 s for the other 6.
    assert said["updates"].startswith("4/10 (40 %), 0:00:15 left, written 0:00:0")
    assert said["images/s"] == "5,679"
    assert said["learning rate"] == "0.1"
    assert said["loss"].split() == ["0.25", "█▁"]
    assert said["gradient norm"] == "0.5"
    assert said["peak memory"] == "1,234 MiB"
    assert said["top-1, test"].split() == ["10.00", "%", "▁"]
    assert said["weight distance"] == "4"
    assert said["as of"] == "update 4"


def test_time_left_is_told_by_the_second_half_of_the_log(run):
    for update, seconds in ((1, 100.0), (4, 110.0), (6, 114.0), (8, 118.0)):
        log(run, update, seconds)
    # From update 4 to update 8 it took 2 s each; the first took 100 s.
    assert read_progress(run.folder).seconds_left == pytest.approx(4)


def test_a_checkpoint_newer_than_the_log_counts(run):
    log(run, 2, 4.0)
    path = run.save_checkpoint(Checkpoint(6, 10, {}))
    os.utime(path, (time.time() + 50, time.time() + 50))
    os.utime(run.folder / "log.csv", (0, 0))
    progress = read_progress(run.folder)
    assert (progress.update, progress.total_updates, progress.seconds_left) == (6, 10, pytest.approx(8))
    assert progress.age_seconds == pytest.approx(-50, abs=10)


def test_before_the_first_row_there_is_little_to_say(tmp_path):
    run = Run.start(small_recipe(), tmp_path, resume=False)
    assert shown(run.folder) == {"run": run.folder.name, "updates": "none yet"}
    run.record_environment({"total_updates": 10})
    assert shown(run.folder)["updates"] == "0/10 (0 %)"


def test_a_finished_run_is_shown_once_in_a_terminal_too(tmp_path):
    folder = finished_run(tmp_path)
    total = small_recipe().regime(NUM_SAMPLES).total_updates
    Run(folder).record_environment({"total_updates": total})
    assert f"{total}/{total} (100 %), finished after 0:00:01" in on_terminal(folder)
    assert shown(folder)["updates"] == f"{total}/{total} (100 %), finished after 0:00:01"


def test_a_going_run_is_followed_until_its_last_update(run, monkeypatch):
    log(run, 1, 1.0)
    left = iter([4, 7, 10])
    monkeypatch.setattr(watch_module.time, "sleep", lambda seconds: log(run, next(left), 8.0))
    shown = on_terminal(run.folder)
    for update in (1, 4, 7, 10):
        assert f" {update}/10 (" in shown
    assert list(left) == []
    assert "against log t" in shown


def test_ctrl_c_ends_it_without_an_error(run, monkeypatch):
    def interrupted(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(watch_module.time, "sleep", interrupted)
    assert "0/10 (0 %)" in on_terminal(run.folder)


@pytest.mark.parametrize(("width", "height"), [(60, 14), (100, 24), (300, 80)])
def test_the_view_fits_its_terminal(run, width, height):
    for update in (1, 4, 10):
        log(run, update, 1.0, split="test", top1_percent=10.0, peak_memory_mib=1, images_per_second=1, grad_norm=0.5)
    console = Console(file=io.StringIO(), width=width, height=height)
    lines = console.render_lines(watch_module._view(read_progress(run.folder), console), pad=False)
    assert len(lines) <= height
    assert ("against log t" in "".join(segment.text for line in lines for segment in line)) == (height > 20)


def test_a_hub_folder_with_a_log_of_an_earlier_version_is_shown_as_finished():
    folder = Path(__file__).parents[1] / "hub" / "mlp5_gbn.mnist_ra4096"
    if not folder.exists():
        pytest.skip("needs the checkout's hub folders")
    said = shown(folder)
    assert said["updates"].startswith("23,437/23,437 (100 %), finished after 1:18:")
    assert said["top-1, test"].startswith("99.35 %")
    assert "peak memory" not in said


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda folder: None, "is not a run: it holds no recipe.yaml; `gbnzoo train` makes one"),
        (lambda folder: finished_run(folder), "is not a run but holds some; wanted one of"),
    ],
    ids=["nothing", "a folder of runs"],
)
def test_what_is_no_run_is_named_with_what_is(tmp_path, made, message):
    made(tmp_path)
    result = CliRunner().invoke(app, ["watch", str(tmp_path)])
    assert result.exit_code == 2
    assert result.output.startswith(f"error: {tmp_path} {message}")


@pytest.mark.parametrize(
    ("values", "width", "line"),
    [
        ([], 8, ""),
        ([5.0, 5.0], 8, "▁▁"),
        ([0, 1, 2, 3, 4, 5, 6, 7], 8, "▁▂▃▄▅▆▇█"),
        ([7, 0], 8, "█▁"),
        ([0, 1, 2, 3, 4, 5, 6, 7], 4, "▁▃▆█"),  # 1, 3, 5 and 7: thirds of 7 levels are 2.33 and 4.67
    ],
)
def test_a_sparkline_goes_from_the_smallest_to_the_largest_value(values, width, line):
    assert sparkline(values, width) == line


def dots(lines):
    """(column, row from the bottom) of the dots of lines of braille, bit by bit as Unicode's chapter on it numbers them."""
    offsets = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (0, 3), (1, 3)]
    return {
        (2 * column + right, 4 * len(lines) - 1 - (4 * row + down))
        for row, line in enumerate(lines)
        for column, character in enumerate(line)
        for bit, (right, down) in enumerate(offsets)
        if (ord(character) - 0x2800) >> bit & 1
    }


def test_a_straight_line_is_drawn_straight():
    assert dots(chart([(0.0, 0.0), (7.0, 7.0)], 4, 2)) == {(k, k) for k in range(8)}
    assert dots(chart([(1.0, 3.0), (2.0, 3.0)], 2, 1)) == {(k, 3) for k in range(4)}
    # Down to zero within the first half, then up along every second dot.
    assert dots(chart([(0.0, 3.0), (3.0, 0.0), (6.0, 3.0)], 2, 1)) == {(0, 3), (1, 1), (2, 1), (3, 3)}


def test_what_never_moved_is_a_line_at_the_bottom():
    assert dots(chart([(0.0, 0.0), (1.0, 0.0)], 1, 2)) == {(0, 0), (1, 0)}
