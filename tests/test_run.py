"""The run folder: what is written survives kills, damage and full disks, and reads back the same."""

import errno
import os
import threading

import pytest
import torch

from gbnzoo import run as run_module
from gbnzoo.recipe import load_recipe
from gbnzoo.run import LOG_COLUMNS, Checkpoint, Run, RunError


@pytest.fixture
def recipe():
    return load_recipe("recipes/digits/resnet8_thin_gbn.yaml")


@pytest.fixture
def run(recipe, tmp_path):
    return Run.start(recipe, tmp_path, resume=False)


def checkpoint(update, value=1.0):
    weight = torch.full((2, 3, 4, 4), value).to(memory_format=torch.channels_last)
    return Checkpoint(
        update,
        10,
        {"conv.weight": weight, "bn.num_batches_tracked": torch.tensor(7), "half": torch.ones(2, dtype=torch.bfloat16)},
        {
            0: {"momentum_buffer": weight * 2, "step": 5},
            11: {"momentum_buffer": torch.arange(3.0, dtype=torch.float64)},
        },
        {"loss_sum": 0.1 + 0.2, "row_updates": 3},
    )


def row(update, **cells):
    return dict.fromkeys(LOG_COLUMNS, 0.5) | {"update": update} | cells


def test_a_checkpoint_reads_back_every_tensor_and_number(run):
    written = checkpoint(4)
    run.save_checkpoint(written)
    read = run.latest_checkpoint()
    assert (read.update, read.total_updates, read.progress) == (4, 10, written.progress)
    for key, value in written.model.items():
        assert read.model[key].dtype == value.dtype
        assert torch.equal(read.model[key], value)
    assert read.optimizer[0]["step"] == 5
    assert torch.equal(read.optimizer[0]["momentum_buffer"], written.optimizer[0]["momentum_buffer"])
    assert torch.equal(read.optimizer[11]["momentum_buffer"], torch.arange(3.0, dtype=torch.float64))


def test_the_last_two_checkpoints_are_kept(run):
    for update in (1, 2, 3):
        run.save_checkpoint(checkpoint(update))
    assert sorted(path.name[:15] for path in (run.folder / "checkpoints").iterdir()) == [
        "update000000002",
        "update000000003",
    ]


@pytest.mark.parametrize(("column", "cell"), [("eval_loss", "abc"), ("update", ""), ("update", "1.5"), (None, "1.5")])
def test_a_damaged_line_of_a_log_is_named(run, column, cell):
    run.log({"update": 1, "split": "test"})
    header, line = (run.folder / "log.csv").read_text().splitlines()
    cells = dict(zip(LOG_COLUMNS, line.split(","), strict=True)) | {column: cell}
    (run.folder / "log.csv").write_text(f"{header}\n{','.join(cells.values())}\n")
    with pytest.raises(RunError, match=rf"log.csv, line 2 is damaged: {column or 'too many cells'} "):
        run.rows()


@pytest.mark.parametrize("damage", ["truncate", "flip"])
def test_a_damaged_checkpoint_is_passed_over_loudly(run, damage):
    run.save_checkpoint(checkpoint(1))
    newest = run.save_checkpoint(checkpoint(3))
    content = bytearray(newest.read_bytes())
    if damage == "truncate":
        del content[-100:]
    else:
        content[-5] ^= 1
    newest.write_bytes(content)
    with pytest.warns(UserWarning, match=r"update000000003.* is damaged .*; using update000000001"):
        assert run.latest_checkpoint().update == 1
    # Gone on from there, it takes no place among the last two.
    run.save_checkpoint(checkpoint(2))
    assert not newest.exists()
    assert run.latest_checkpoint().update == 2
    assert len(list((run.folder / "checkpoints").iterdir())) == 2


def test_where_all_checkpoints_are_damaged_the_run_begins_again_loudly(run):
    run.save_checkpoint(checkpoint(1)).write_bytes(b"")
    with pytest.warns(UserWarning, match="is damaged .*; there is no other: the run begins again"):
        assert run.latest_checkpoint() is None


@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: content[:-1] + b"\x40"])
def test_damaged_initial_weights_are_named_with_the_cure(run, damage):
    run.save_initial({"w": torch.ones(3)})
    path = run.folder / "checkpoints" / "initial.safetensors"
    assert run.initial_weights()["w"].tolist() == [1, 1, 1]
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(RunError, match=r"initial\.safetensors is damaged .*--resume makes it again from the seed"):
        run.initial_weights()


@pytest.mark.parametrize(
    ("write", "file"),
    [
        (lambda run: run.save_checkpoint(checkpoint(2)), r"update000000002\S+"),
        (lambda run: run.log(row(2)), r"log\.csv"),
        (lambda run: run.log(row(2), {"conv1": 1.0}), r"layers\.csv"),
        (lambda run: run.rewind_log(0), r"log\.csv"),
        (lambda run: run.record_environment({}), r"env\.json"),
    ],
    ids=["checkpoint", "log", "layers", "log rewound", "environment"],
)
def test_a_full_disk_is_named_and_loses_nothing(run, monkeypatch, write, file):
    run.log(row(1))
    run.save_checkpoint(checkpoint(1))

    def no_space(descriptor):
        if not os.readlink(f"/proc/self/fd/{descriptor}").endswith("log.csv"):  # which has had its room
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    appending = lambda path, mode, **more: open("/dev/full" if mode == "ab" else path, mode, **more)  # noqa: E731, SIM115
    if file == r"log\.csv":
        monkeypatch.setattr(run_module, "open", appending, raising=False)
    with pytest.raises(
        RunError,
        match=rf"cannot write \S+{file}: No space left on device; last good checkpoint: update000000001.*--resume",
    ):
        write(run)
    assert run.latest_checkpoint().update == 1
    assert run.rows()[0]["update"] == "1"
    assert [path.name[:15] for path in (run.folder / "checkpoints").iterdir()] == ["update000000001"]


def test_a_kill_before_the_rename_leaves_the_checkpoint_before(run, monkeypatch):
    run.save_checkpoint(checkpoint(1))

    def killed(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        run.save_checkpoint(checkpoint(2))
    assert run.latest_checkpoint().update == 1


def test_the_log_is_rewound_to_a_checkpoint(run):
    for update in (1, 2, 5, 9):
        run.log(row(update))
    run.rewind_log(5)
    assert [int(r["update"]) for r in run.rows()] == [1, 2, 5]
    run.log(row(6, split="test"))
    assert run.rows()[-1] == {column: str(value) for column, value in row(6, split="test").items()}


def test_what_is_logged_of_layers_is_rewound_with_the_log(run):
    for update in (1, 2, 5):
        run.log(row(update), {"conv1": update / 2, "bn1": 0.25, "": 3.0})
    run.rewind_log(2)
    run.log(row(3), {"conv1": 7.0})
    assert (run.folder / "layers.csv").read_text() == (
        "update,layer,weight_distance\n1,conv1,0.5\n1,bn1,0.25\n1,,3.0\n2,conv1,1.0\n2,bn1,0.25\n2,,3.0\n3,conv1,7.0\n"
    )
    assert [r["update"] for r in run.rows()] == ["1", "2", "3"]
    assert run.layer_rows()[-1] == {"update": "3", "layer": "conv1", "weight_distance": "7.0"}


def test_layers_cut_short_are_no_rows_and_are_gone_after_a_rewind(run):
    run.log(row(1), {"conv1": 1.0})
    run.log(row(2), {"conv1": 2.0, "bn1": 3.0})
    path = run.folder / "layers.csv"
    path.write_bytes(path.read_bytes()[:-2])
    assert [(r["update"], r["layer"]) for r in run.layer_rows()] == [("1", "conv1"), ("2", "conv1")]
    run.rewind_log(1)
    run.log(row(2), {"conv1": 2.0, "bn1": 3.0})
    assert [(r["update"], r["layer"]) for r in run.layer_rows()] == [("1", "conv1"), ("2", "conv1"), ("2", "bn1")]


def test_a_log_of_an_earlier_version_is_read_and_gone_on_with(run):
    """Before layers.csv and the column of memory: the committed logs under hub/ are such."""
    before = [column for column in LOG_COLUMNS if column != "peak_memory_mib"]
    path = run.folder / "log.csv"
    path.write_text(",".join(before) + "\n" + ",".join("7" for _ in before) + "\n")
    assert run.layer_rows() == []
    assert [(r["update"], r["train_seconds"], r["peak_memory_mib"]) for r in run.rows()] == [("7", "7", "")]
    run.rewind_log(7)
    run.log(row(8, peak_memory_mib=512), {"conv1": 1.0})
    assert [(r["update"], r["train_seconds"], r["peak_memory_mib"]) for r in run.rows()] == [
        ("7", "7", ""),
        ("8", "0.5", "512"),
    ]


@pytest.mark.parametrize("cut", [-1, -3, -30], ids=["its line end", "part of its last cell", "some cells"])
def test_a_row_cut_short_is_no_row(run, cut):
    run.log(row(1))
    run.log(row(2))
    path = run.folder / "log.csv"
    path.write_bytes(path.read_bytes()[:cut])
    assert [r["update"] for r in run.rows()] == ["1"]


def test_one_process_at_a_time_writes_to_a_folder(run):
    with run.sole_writer(), pytest.raises(RunError, match="is being trained by another process"), run.sole_writer():
        pass
    with run.sole_writer():
        pass


def test_what_a_kill_left_half_written_is_removed_by_the_next_writer(run):
    left = run.folder / "checkpoints" / "update000000002.0123456789abcdef.safetensors.writing"
    left.write_bytes(b"half")
    with run.sole_writer():
        assert not left.exists()


def test_an_unfinished_run_says_how_far_it_is(run):
    with pytest.raises(RunError, match="no checkpoint yet"):
        run.finished()
    run.log(row(4))
    run.save_checkpoint(checkpoint(4))
    with pytest.raises(RunError, match=r"is not finished \(update 4 of 10\).*--resume"):
        run.finished()
    run.log(row(10))
    run.save_checkpoint(checkpoint(10))
    assert run.finished()[1]["update"] == "10"


def test_a_run_is_never_overwritten(run, recipe, tmp_path):
    with pytest.raises(RunError, match="already holds a run; --resume goes on with it"):
        Run.start(recipe, tmp_path, resume=False)
    assert Run.start(recipe, tmp_path, resume=True).folder == run.folder
    other = load_recipe("recipes/digits/resnet8_thin_gbn.yaml", ["base.epochs=11"])
    with pytest.raises(RunError, match=r"was started from another recipe \(base.epochs 10.0 there, 11.0 now\)"):
        Run.start(other, tmp_path, resume=True)


def test_of_two_that_start_at_once_one_trains(recipe, tmp_path, monkeypatch):
    """The second comes while the first is about to rename its recipe into place; it would take that file's lock along."""
    write, second, errors = run_module._write, [], []

    def start_second():
        try:
            Run.start(recipe, tmp_path, resume=False)
        except RunError as error:
            errors.append(str(error))

    def write_late(path, content):
        if not second:
            second.append(threading.Thread(target=start_second))
            second[0].start()
            second[0].join(timeout=0.5)  # it waits, and is not done
            assert second[0].is_alive()
        write(path, content)

    monkeypatch.setattr(run_module, "_write", write_late)
    Run.start(recipe, tmp_path, resume=False)
    second[0].join(timeout=60)
    assert len(errors) == 1
    assert "already holds a run" in errors[0]


def test_a_full_disk_at_the_start_is_named(recipe, tmp_path, monkeypatch):
    def no_space(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(os, "fsync", no_space)
        with pytest.raises(
            RunError, match=r"cannot begin a run in \S+: No space left on device; another --out, or room"
        ):
            Run.start(recipe, tmp_path, resume=False)
    Run.start(recipe, tmp_path, resume=False)


def test_what_is_not_a_run_is_refused(tmp_path):
    with pytest.raises(RunError, match=r"is not a run: it holds no recipe\.yaml"):
        Run(tmp_path)
