"""The command line: what each command prints and leaves, and that mistakes are answered in one line."""

import pytest
from typer.testing import CliRunner

from gbnzoo import cli
from gbnzoo.data import load_images
from gbnzoo.recipe import shipped_recipes

DIGITS = "recipes/digits/resnet8_thin_gbn.yaml"
DIGITS_FILE = shipped_recipes()["digits/resnet8_thin_gbn.yaml"]


def gbnzoo(*arguments, exit_code=0):
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == exit_code, result.output
    return result.output


def test_plan_tells_every_rung_before_it_runs():
    plan = gbnzoo(
        "plan",
        "recipes/cifar10/resnet44_gbn.yaml",
        "--num-samples",
        50_000,
        "--processes",
        8,
        "--micro-batch-size",
        256,
    )
    rungs = dict(block.split(None, 1) for block in plan.split("\n\n", 1)[1].replace("\n     ", " ").splitlines())
    assert list(rungs) == ["sb", "lb", "lr", "gbn", "ra"]
    # 8 processes x 2 accumulation steps x 256 = 4096; 78125 updates of 4096 are 320 million samples, 6400 epochs.
    assert "batch 4,096 = 32 ghost(s) of 128 8 process(es) × 2 accumulation × micro-batch 256" in rungs["ra"]
    assert "78,125 updates, 6,400.0 epochs, 320,000,000 samples seen" in rungs["ra"]
    assert "0.5657 at 0, 0.05657 at 31,640, 0.005657 at 47,656" in rungs["ra"]
    assert "clipped at 5" in rungs["ra"]
    assert "clipped" not in rungs["lb"]
    assert "not as asked: " in rungs["sb"]


def test_the_thread_from_recipe_to_evaluated_weight(tmp_path, monkeypatch):
    """The quickstart on two epochs: ladder, plot, hub folder, and timm's model of it scored as its run was."""
    monkeypatch.setattr(cli, "QUICKSTART_OVERRIDES", ("base.epochs=4", "base.milestones=[3]", "large.batch_size=128"))
    said = gbnzoo("quickstart", "--out", tmp_path)
    table = [line for line in said.splitlines() if line.startswith("| ")]
    assert [line.split()[1] for line in table[2:]] == ["sb", "lb", "lr", "gbn", "ra"]
    assert (tmp_path / "ladder.png").stat().st_size > 10_000
    folder = tmp_path / "hub" / "resnet8_thin_gbn.digits_ra128"
    assert {f.name for f in folder.iterdir()} == {
        "README.md",
        "config.json",
        "log.csv",
        "model.safetensors",
        "recipe.yaml",
    }
    measured, trained = said.splitlines()[-1].split("top-1 ")[1].split("; its run: ")
    assert measured == trained
    assert float(measured.split()[0]) > 80

    runs, page = sorted((tmp_path / "runs").iterdir()), tmp_path / "page"
    again = gbnzoo("report", *runs, folder, "--plot", tmp_path / "again.png", "--out", page)
    assert again.splitlines()[-2:] == [f"plot: {tmp_path / 'again.png'}", f"page: {page / 'index.html'}"]
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "ladder.png").read_bytes()
    assert [line for line in again.splitlines() if line.startswith("| ")] == table
    assert "already" in gbnzoo("train", DIGITS, *cli.QUICKSTART_OVERRIDES, "--out", tmp_path / "runs", exit_code=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "recipes/mnist/nothing.yaml"), "recipes/mnist/nothing.yaml: no such file"),
        (("train", DIGITS, "base.epoch=1"), "base.epoch is not a key of a recipe; did you mean epochs?"),
        (("train", "recipes/mnist/mlp5_gbn.yaml", "--data-dir", "/nowhere"), "--data-dir"),
        (("plan", DIGITS, "large.batch_size=500"), "batch_size 500 is not a multiple of ghost_batch_size 16"),
        (("plan", DIGITS, "base.epochs=0.1", "base.milestones=[]"), f"{DIGITS}: base.epochs: rung lb would make no"),
        (("publish", "nowhere"), "nowhere is not a run"),
        (("report", "nowhere"), "nowhere is not a run"),
        (("report",), "nothing to report; wanted folders of runs, or --results with rows in it"),
        (("report", "--readmes", "."), "wanted --results hub/results.csv, no runs and no --plot"),
    ],
)
def test_mistakes_are_answered_in_words(arguments, message):
    said = gbnzoo(*arguments, exit_code=2)
    assert message in said
    assert said.startswith("error: ")
    assert "Traceback" not in said


@pytest.mark.parametrize("command", ["train", "plan"])
@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "model.name=resnet18",
            "model.name: given 'resnet18', which takes no ghost_batch_size; did you mean resnet18_gbn?",
        ),
        (
            "model.name=vit_tiny_patch16_224",
            "model.name: given 'vit_tiny_patch16_224', which takes no ghost_batch_size; wanted one of timm.list_models(",
        ),
        ("model.name=resnet44gbn", "no architecture that timm or gbnzoo knows; did you mean resnet44_gbn?"),
        ("model.args={foo: 1}", "model.args: given {'foo': 1}, which the entry point of resnet8_thin_gbn refuses: "),
        (
            "model.args={drop_rate: 5}",
            "model.args: given {'drop_rate': 5}, which the entry point of resnet8_thin_gbn ref",
        ),
        ("optimizer.name=sgdd", "optimizer.name: given 'sgdd', which timm does not know; did you mean sgd?"),
        (
            "optimizer.name=lookahead_kron",
            "optimizer.name: given 'lookahead_kron', which keeps lists of tensors for each parameter",
        ),
        ("optimizer.args={foo: 1}", "optimizer.args: given {'foo': 1}, which sgd refuses: "),
        ("data.augment=rotate", "data.augment: given 'rotate', wanted one of none, pad1_crop"),
        ("data.holdout=2000", "data.holdout 2000 of 1297 training images"),
    ],
)
def test_what_no_run_could_use_is_named_with_file_and_key(command, override, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = gbnzoo(command, DIGITS, override, exit_code=2)
    assert said.startswith(f"error: {DIGITS}: ") or said.startswith(f"error: {DIGITS_FILE}: ")
    assert message in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("data", "num_samples"),
    [("mnist", "60,000"), ("cifar10", "50,000"), ("uoft-cs/cifar100", "50,000"), ("digits", "1,297")],
)
def test_plan_of_a_known_set_needs_no_data(data, num_samples, monkeypatch):
    monkeypatch.setattr(cli.train, "load_sets", None)
    monkeypatch.delenv("GBNZOO_DATA", raising=False)
    assert f"on {data}, {num_samples} training images" in gbnzoo("plan", DIGITS, f"data.name={data}")
    assert f"{int(num_samples.replace(',', '')) - 297:,} training" in gbnzoo(
        "plan", DIGITS, f"data.name={data}", "data.holdout=297"
    )


def test_the_digits_are_as_many_as_plan_says():
    assert len(load_images("digits", "train")) == 1297
