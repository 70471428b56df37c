"""A compiled run is the run, to rounding: accumulated, stopped and gone on with, and over several processes."""

import pytest
import torch
from processes import run_together

from gbnzoo.recipe import load_recipe
from gbnzoo.run import Run
from gbnzoo.train import train

DIGITS = "recipes/digits/resnet8_thin_gbn.yaml"
EXACT = ["precision=fp64", "base.epochs=0.3", "base.milestones=[]", "evaluations=1", "data.augment=pad1_crop"]


def train_digits(out, backend, rung="gbn", micro_batch_size=32, resume=False):
    """Six updates of 64."""
    recipe = load_recipe(DIGITS, [*EXACT, "large.batch_size=64"], rung=rung)
    options = {"micro_batch_size": micro_batch_size, "resume": resume, "show_progress": False, "checkpoint_seconds": 0}
    return Run(train(recipe, out=out, compile_backend=backend, **options))


def assert_same_end(run, eager):
    state, expected = (each.finished()[0].model for each in (run, eager))
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, rtol=1e-9, atol=1e-12)
    assert run.rows()[-1]["top1_percent"] == eager.rows()[-1]["top1_percent"]


def test_a_compiled_run_ends_as_an_eager_one(tmp_path):
    """Two micro-batches an update; gone on with from a checkpoint of the eager run."""
    frames = torch._dynamo.utils.counters["frames"]
    eager = train_digits(tmp_path / "eager", None)
    frames.clear()
    compiled = train_digits(tmp_path / "compiled", "aot_eager")
    assert frames["ok"] > 0
    assert_same_end(compiled, eager)
    last = max((eager.folder / "checkpoints").glob("update*"))
    last.unlink()
    assert_same_end(train_digits(tmp_path / "eager", "aot_eager", resume=True), compiled)
    assert [start["compile_backend"] for start in eager.environments()] == [None, "aot_eager"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rung", "micro_batch_size"), [("gbn", 16), ("lb", 32)], ids=["whole ghosts", "a spanning ghost"]
)
def test_compiled_over_two_processes(tmp_path, rung, micro_batch_size):
    eager = train_digits(tmp_path / "eager", None, rung, 64)
    runs = run_together(2, train_digits, tmp_path / "compiled", "aot_eager", rung, micro_batch_size)
    assert_same_end(runs[0], eager)
