"""From a run to a hub folder: what timm then loads, and what is refused."""

import hashlib
import json
import os
import re
from multiprocessing import Process
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import timm
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from small_run import CLASS_NAMES, MEAN, STD, finished_run, random_weights, small_recipe
from typer.testing import CliRunner

from gbnzoo.card import read_results
from gbnzoo.cli import app
from gbnzoo.publish import load_run, load_weights, publish, record_result, refresh
from gbnzoo.run import Run, RunError
from gbnzoo.upload import hub_files

NAME = "resnet8_thin_gbn.shapes_gbn8"
INDEX = ("README.md", "index.html", "results.csv")


@pytest.fixture
def hub(tmp_path):
    return tmp_path / "hub"


def rows(hub):
    return {(row["model"], row["seed"]): row for row in read_results(hub / "results.csv")}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_timm_loads_the_weights_of_the_last_update(tmp_path, hub):
    weights = random_weights(small_recipe())
    folder = publish(finished_run(tmp_path, weights=weights), hub)
    assert folder == hub / NAME
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    cfg = model.pretrained_cfg
    assert (cfg["mean"], cfg["std"], cfg["input_size"]) == (list(MEAN), list(STD), [3, 8, 8])
    assert cfg["label_names"] == list(CLASS_NAMES)
    assert timm.data.resolve_model_data_config(model)["crop_pct"] == 1.0


def test_config_json_says_what_timm_and_a_reader_need(tmp_path, hub):
    config = json.loads((publish(finished_run(tmp_path, statistics="recalibrated"), hub) / "config.json").read_text())
    assert (config["architecture"], config["num_classes"], config["num_features"]) == ("resnet8_thin_gbn", 6, 32)
    cfg = config["pretrained_cfg"]
    assert (cfg["interpolation"], cfg["crop_pct"], cfg["crop_mode"]) == ("bicubic", 1.0, "center")
    assert (cfg["license"], cfg["paper_ids"], cfg["tag"]) == ("apache-2.0", "arXiv:1705.08741", "shapes_gbn8")
    assert {"input_size", "mean", "std", "first_conv", "classifier"} <= cfg.keys()
    assert config["label_names"] == list(CLASS_NAMES)
    assert config["gbn"]["statistics"] == "recalibrated"


def test_a_hub_folder_holds_five_files_and_no_pickle(tmp_path, hub):
    run = finished_run(tmp_path)
    files = contents(publish(run, hub))
    assert set(files) == {"README.md", "config.json", "log.csv", "model.safetensors", "recipe.yaml"}
    assert (files["log.csv"], files["recipe.yaml"]) == tuple((run / f).read_bytes() for f in ("log.csv", "recipe.yaml"))
    assert {path.name for path in hub.iterdir()} == {NAME, *INDEX}


def test_the_hash_in_config_and_row_is_that_of_the_weights(tmp_path, hub):
    folder = publish(finished_run(tmp_path), hub)
    sha256 = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert json.loads((folder / "config.json").read_text())["gbn"]["sha256"] == sha256
    assert rows(hub)[NAME, "0"]["sha256"] == sha256


def test_the_number_of_parameters_is_timms(tmp_path, hub):
    publish(finished_run(tmp_path), hub)
    # Convolutions 216, 2·576, 1152 + 2304 + 128, 4608 + 9216 + 512; norms 2·(8 + 8 + 8 + 3·16 + 3·32); classifier 33·6.
    assert rows(hub)[NAME, "0"]["param_count"] == f"{(216 + 1152 + 3584 + 14336 + 336 + 198) / 1e6:.2f}"


def test_publishing_twice_gives_the_same_bytes(tmp_path, hub):
    run = finished_run(tmp_path)
    before = contents(publish(run, hub))
    assert contents(publish(run, hub)) == before
    assert len(rows(hub)) == 1


def test_the_weights_of_a_twin_name_timms_own_network(tmp_path, hub):
    """Which loads them without gbnzoo, as tests/test_hub.py shows."""
    run = finished_run(tmp_path, model={"name": "test_resnet_gbn"})
    folder = publish(run, hub)
    assert json.loads((folder / "config.json").read_text())["architecture"] == "test_resnet"
    twin, _ = load_run(Run(run))
    original = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert type(original).__module__ == "timm.models.resnet"
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(twin.eval()(images), original.eval()(images))


def test_arguments_of_the_recipe_come_back_with_the_weights(tmp_path, hub):
    recipe = small_recipe(model={"name": "mlp5_gbn", "args": {"width": 16, "depth": 2}})
    weights = timm.create_model("mlp5_gbn", num_classes=6, in_chans=3, img_size=8, width=16, depth=2).state_dict()
    folder = publish(finished_run(tmp_path, weights=weights, model=recipe.model.model_dump()), hub)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert [tuple(p.shape) for p in model.parameters() if p.ndim > 1] == [(16, 192), (16, 16), (6, 16)]


@pytest.mark.parametrize("name", ["resnet8_thin_gbn", "test_resnet_gbn"])
def test_the_usage_on_a_card_runs_as_written(tmp_path, hub, monkeypatch, capsys, name):
    """But for the place: the hub folder is not on the Hub."""
    run = finished_run(tmp_path, model={"name": name})
    folder = publish(run, hub)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GBNZOO_HUB", str(hub))
    PIL.Image.fromarray(np.full((9, 11, 3), 128, np.uint8)).save("image.png")
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    plain, by_name = (block.replace("hf-hub:gbnzoo/", f"local-dir:{hub}/") for block in blocks)
    assert ("gbnzoo is not needed" in (folder / "README.md").read_text()) == (name == "test_resnet_gbn")
    exec(compile(plain, "README.md", "exec"), {})
    assert re.fullmatch(r"class \d \d+\.\d%\n", capsys.readouterr().out)
    scope = {}
    exec(compile(by_name, "README.md", "exec"), scope)
    assert {m.ghost_batch_size for m in scope["model"].modules() if hasattr(m, "ghost_batch_size")} == {4}
    trained = load_run(Run(run))[0].state_dict()
    assert all(torch.equal(value, trained[key]) for key, value in scope["model"].state_dict().items())


def test_a_new_result_shows_on_the_cards_of_its_ladder(tmp_path, hub):
    folder = publish(finished_run(tmp_path, top1_percent=60.0), hub)
    assert "75.00 (1)" not in (folder / "README.md").read_text()
    assert record_result(finished_run(tmp_path, rung="ra", top1_percent=75.0), hub) == hub / "results.csv"
    assert "75.00 (1)" in (folder / "README.md").read_text()
    assert rows(hub)["resnet8_thin_gbn.shapes_ra8", "0"]["sha256"] == ""
    assert ModelCard.load(folder / "README.md").data.eval_results[0].metric_value == 60.0


def test_the_index_has_a_row_for_each_published_weight(tmp_path, hub):
    publish(finished_run(tmp_path, top1_percent=50.0), hub)
    publish(finished_run(tmp_path, rung="ra", top1_percent=62.5), hub)
    record_result(finished_run(tmp_path, rung="sb", top1_percent=99.0), hub)
    table = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (hub / "README.md").read_text().splitlines()
        if line.startswith("| ")
    ]
    megabytes = f"{(hub / NAME / 'model.safetensors').stat().st_size / 1e6:.2f}"
    heading = ["model", "data", "rung", "batch", "ghosts", "top-1 %", "parameters (M)", "size (MB)", "link"]
    ra = NAME.replace("gbn8", "ra8")
    assert table[0] == heading
    assert table[2:] == [
        [f"[{name}]({name}/README.md)", "shapes", rung, "8", "2 × 4", top1, "0.02", megabytes, f"[Hub]({url}{name})"]
        for name, rung, top1, url in (
            (ra, "ra", "62.50", "https://huggingface.co/gbnzoo/"),
            (NAME, "gbn", "50.00", "https://huggingface.co/gbnzoo/"),
        )
    ]
    page = (hub / "index.html").read_text()
    assert page.count("<tr>") == 3
    assert page.index(f">{ra}</a>") < page.index(f">{NAME}</a>")


def test_a_card_keeps_the_recipe_that_lies_beside_it(tmp_path, hub):
    """Recipes get keys in later versions; published ones stay what was published."""
    folder = publish(finished_run(tmp_path), hub)
    older = "".join(
        line for line in (folder / "recipe.yaml").read_text().splitlines(True) if not line.startswith("label_smoothing")
    )
    (folder / "recipe.yaml").write_text(older)
    refresh(hub)
    assert f"```yaml\n{older.strip()}\n```" in (folder / "README.md").read_text()


def test_cards_and_index_are_generated_again(tmp_path, hub):
    folder = publish(finished_run(tmp_path), hub)
    files = [folder / "README.md", hub / "README.md", hub / "index.html"]
    before = [file.read_text() for file in files]
    for file in files:
        file.write_text("typed by hand")
    refresh(hub)
    assert [file.read_text() for file in files] == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dry-run"], "wanted a folder for"),
        (["--to", "gbnzoo"], "wanted a folder for"),
        (["nowhere", "--private"], "are of an upload; wanted --to ORG too"),
        (["nowhere", "--revision-tag", "v1"], "are of an upload; wanted --to ORG too"),
        (["nowhere", "--to", "gbnzoo", "--only-result"], "wanted one of the two"),
        (["nowhere", "--to", "gbnzoo"], "nowhere: is no hub folder, it holds nothing"),
        (["nowhere", "--dry-run"], "nowhere: is no hub folder, it holds nothing"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(arguments, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["publish", *arguments])
    assert (result.exit_code, message in result.output) == (2, True), result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "pytorch_model.bin").touch(), "is no hub folder, it holds README.md, config.json"),
        (lambda f: (f / "log.csv").unlink(), "is no hub folder"),
        (lambda f: ((f / "log.csv").unlink(), (f / "log.csv").symlink_to("/etc/passwd")), "log.csv is a link"),
        (lambda f: ((f / "log.csv").unlink(), (f / "log.csv").mkdir()), "log.csv is a link or a folder"),
        (lambda f: f.rename(f.with_name("other")), f"holds {NAME}, whose folder must have that name"),
        (lambda f: (f / "README.md").write_text("---\n---\n"), "would be refused by the Hub"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "no safetensors file"),
        (lambda f: (f / "model.safetensors").write_bytes(b"version https://git-lfs"), "`git lfs pull` fetches"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json is not what `gbnzoo publish RUN` makes"),
        (lambda f: (f / "config.json").write_text('{"gbn": {}}'), "config.json is not what .* KeyError 'name'"),
        (lambda f: (f / "recipe.yaml").write_text("x: 1"), "recipe.yaml"),
    ],
)
def test_a_folder_that_is_not_as_publish_made_it_is_not_uploaded(damage, message, tmp_path, hub):
    folder = publish(finished_run(tmp_path), hub)
    damage(folder)
    (folder,) = (path for path in hub.iterdir() if path.is_dir())
    with pytest.raises(ValueError, match=message):
        hub_files(folder)


def test_a_hub_folder_is_no_run(tmp_path, hub):
    folder = publish(finished_run(tmp_path), hub)
    with pytest.raises(ValueError, match=r"is a hub folder already; --to ORG uploads it"):
        publish(folder, hub)


def test_another_seed_takes_the_folder_over(tmp_path, hub):
    publish(finished_run(tmp_path), hub)
    folder = publish(finished_run(tmp_path, seed=1), hub)
    weights = random_weights(small_recipe(seed=1))
    assert torch.equal(load_file(folder / "model.safetensors")["conv1.weight"], weights["conv1.weight"])
    assert [bool(rows(hub)[NAME, seed]["sha256"]) for seed in ("0", "1")] == [False, True]
    assert {path.name for path in hub.iterdir()} == {NAME, *INDEX}


def publish_seeds(hub, runs, seeds):
    for seed in seeds:
        publish(finished_run(runs, seed=seed, rung="sb"), hub)
        record_result(finished_run(runs, seed=seed), hub)


def test_of_several_publishers_at_once_none_loses_a_row(tmp_path, hub):
    processes = [Process(target=publish_seeds, args=(hub, tmp_path / str(k), range(k, 9, 3))) for k in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert {seed for _, seed in rows(hub)} == set("012345678")
    assert len(rows(hub)) == 18
    assert {path.name for path in hub.iterdir()} == {"resnet8_thin_gbn.shapes_sb4", *INDEX}


@pytest.mark.parametrize("failing", [1, 2])
def test_who_is_interrupted_leaves_the_folder_that_was_there(tmp_path, hub, monkeypatch, failing):
    before = contents(publish(finished_run(tmp_path), hub))
    moves = []

    def interrupted(source, target):
        if Path(source).is_dir():
            moves.append(target)
            if len(moves) == failing:
                raise KeyboardInterrupt
        os.rename(source, target)

    monkeypatch.setattr("gbnzoo.publish.os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        publish(finished_run(tmp_path, seed=1), hub)
    assert contents(hub / NAME) == before
    assert {path.name for path in hub.iterdir()} == {NAME, *INDEX}


def test_what_a_kill_left_is_put_back_and_cleared_away(tmp_path, hub):
    folder = publish(finished_run(tmp_path), hub)
    before = contents(folder)
    scratch = hub / ".writing-killed"
    (scratch / "replaced").mkdir(parents=True)
    folder.rename(scratch / "replaced" / NAME)
    (scratch / NAME).mkdir()
    (hub / "results.csv.writing").touch()
    refresh(hub)
    assert contents(folder) == before
    assert {path.name for path in hub.iterdir()} == {NAME, *INDEX}


def test_other_peoples_folders_in_the_hub_are_passed_by(tmp_path, hub):
    run = finished_run(tmp_path)
    (hub / "theirs").mkdir(parents=True)
    for config in ("{}", "[1]", '{"architecture": "resnet18"}'):
        (hub / "theirs" / "config.json").write_text(config)
        publish(run, hub)
    (hub / "theirs" / "config.json").write_text('{"gbn": ')
    with pytest.raises(ValueError, match=r"theirs/config.json is damaged \(Expecting value"):
        refresh(hub)


def test_a_hub_that_is_not_there_is_not_made(hub):
    with pytest.raises(FileNotFoundError, match=r"hub: no such folder"):
        refresh(hub)
    assert not hub.exists()


def test_channels_last_weights_are_published(tmp_path, hub):
    weights = random_weights(small_recipe())
    run = finished_run(
        tmp_path,
        weights={k: v.to(memory_format=torch.channels_last) if v.ndim == 4 else v for k, v in weights.items()},
    )
    assert all(torch.equal(v, weights[k]) for k, v in load_file(publish(run, hub) / "model.safetensors").items())


def test_an_unfinished_run_is_refused(tmp_path, hub):
    run = finished_run(tmp_path, finished=False)
    for act in (publish, record_result):
        with pytest.raises(RunError, match=r"is not finished \(update 4 of 5\); .* --resume"):
            act(run, hub)
    assert not hub.exists()


def test_a_folder_that_is_no_run_is_refused(tmp_path, hub):
    with pytest.raises(RunError, match=r"is not a run: it holds no recipe.yaml"):
        publish(tmp_path, hub)


def test_weights_that_are_not_numbers_are_refused(tmp_path, hub):
    weights = random_weights(small_recipe())
    weights["stages.1.0.bn1.running_var"][3] = torch.nan
    with pytest.raises(ValueError, match=r"not published, NaN or infinity in stages.1.0.bn1.running_var"):
        publish(finished_run(tmp_path, weights=weights), hub)
    assert not hub.exists()


def test_float64_weights_are_refused(tmp_path, hub):
    weights = {k: v.double() if v.is_floating_point() else v for k, v in random_weights(small_recipe()).items()}
    with pytest.raises(ValueError, match=r"bn1.* in torch.float64; timm loads float32"):
        publish(finished_run(tmp_path, weights=weights), hub)


def test_weights_that_do_not_fit_are_named(tmp_path, hub):
    weights = random_weights(small_recipe())
    weights["extra"] = weights.pop("conv1.weight")
    weights["head.fc.bias"] = torch.zeros(7)
    with pytest.raises(ValueError, match=r"missing: conv1.weight; unexpected: extra; of another shape: head.fc.bias\)"):
        publish(finished_run(tmp_path, weights=weights), hub)
    assert not hub.exists()


def test_an_architecture_nobody_knows_is_refused(tmp_path, hub):
    run = finished_run(tmp_path, weights={}, model={"name": "resnet21_gbn"})
    with pytest.raises(ValueError, match=r"model.name 'resnet21_gbn' is no architecture"):
        publish(run, hub)


def test_a_row_of_published_weights_is_not_overwritten(tmp_path, hub):
    run = finished_run(tmp_path)
    publish(run, hub)
    before = (hub / "results.csv").read_bytes()
    with pytest.raises(ValueError, match="are published in"):
        record_result(run, hub)
    assert (hub / "results.csv").read_bytes() == before


def test_when_publishing_fails_what_was_there_stays(tmp_path, hub, monkeypatch):
    before = contents(publish(finished_run(tmp_path), hub))
    other = finished_run(tmp_path, seed=1)
    # timm, made to leave the weights as they were initialised.
    build = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **options: build(name, **options | {"pretrained": False}))
    with pytest.raises(
        ValueError, match=r"not published, timm loads bn1.bias, .* and \d+ more other than the run left it"
    ):
        publish(other, hub)
    assert contents(hub / NAME) == before
    assert {path.name for path in hub.iterdir()} == {NAME, *INDEX}
    assert [seed for _, seed in rows(hub)] == ["0"]


def test_a_damaged_last_checkpoint_is_not_published(tmp_path, hub):
    folder = finished_run(tmp_path)
    (checkpoint,) = (folder / "checkpoints").glob("update*")
    content = checkpoint.read_bytes()
    checkpoint.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.warns(UserWarning, match="is damaged"), pytest.raises(RunError, match="no checkpoint yet"):
        publish(folder, hub)


def test_a_run_is_loaded_with_the_preprocessing_it_was_trained_with(tmp_path):
    model, config = load_run(Run(finished_run(tmp_path)))
    assert (
        timm.data.resolve_model_data_config(model)["mean"]
        == MEAN
        != timm.create_model("resnet8_thin_gbn").default_cfg["mean"]
    )
    assert config["gbn"]["data"]["name"] == "shapes"


def test_loading_fits_exactly_or_not_at_all():
    model = torch.nn.Linear(2, 3)
    load_weights(model, {"weight": torch.ones(3, 2), "bias": torch.zeros(3)}, "here")
    assert torch.equal(model.weight, torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"here: its weights do not fit Linear \(missing: bias\)"):
        load_weights(model, {"weight": torch.ones(3, 2)}, "here")
