"""Rows of results.csv and model cards."""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from small_run import ENVIRONMENT, small_recipe

from gbnzoo.card import (
    RESULT_COLUMNS,
    as_csv,
    check_card,
    group_by_rung,
    in_timm_order,
    ladder_table,
    markdown_table,
    merge_result,
    model_card,
    read_results,
    result_row,
    training_arguments,
)
from gbnzoo.recipe import load_recipe, shipped_recipes

HUB = Path(__file__).parents[1] / "hub"
CONFIG = {
    "architecture": "resnet8_thin_gbn",
    "num_classes": 6,
    "label_names": ENVIRONMENT["data"]["class_names"],
    "pretrained_cfg": {"input_size": [3, 8, 8]},
    "gbn": {"num_samples": 40, "scored_samples": 20, "ghost_batch_size": 4, "sha256": "0123456789abcdef"},
}


def row(top1=87.5, *, top5=95.0, sha256="", environments=(ENVIRONMENT,), **changes):
    log_row = {"update": "5", "samples": "40", "train_seconds": "1.25", "split": "test"}
    log_row |= {"top1_percent": str(top1), "top5_percent": str(top5)}
    return result_row(small_recipe(**changes), log_row, environments, param_count=21_234, sha256=sha256)


def test_a_row_begins_as_timms_results_files_do():
    header, line = as_csv([row()]).splitlines()
    assert header.startswith("model,img_size,top1,top1_err,top5,top5_err,param_count,crop_pct,interpolation,seed,rung,")
    assert line.startswith("resnet8_thin_gbn.shapes_gbn8,8,87.500,12.500,95.000,5.000,0.02,1.000,bicubic,0,gbn,")


def test_a_row_names_what_made_it():
    made = row()
    assert (made["batch_size"], made["ghost_batch_size"], made["updates"], made["samples"]) == ("8", "4", "5", "40")
    assert (made["split"], made["precision"], made["statistics"]) == ("test", "fp32", "running averages")
    assert (made["commit"], made["hardware"]) == ("0123456789ab", "4 × a processor")
    assert made["versions"] == "gbnzoo==0.1.0 torch==2.15.0"


def test_a_run_gone_on_with_elsewhere_names_both_machines():
    moved = [ENVIRONMENT, ENVIRONMENT | {"hardware": "a GPU"}, ENVIRONMENT | {"commit": None}]
    assert row(environments=moved)["hardware"] == "4 × a processor; a GPU"
    assert row(environments=moved)["commit"] == "0123456789ab"


def test_a_shipped_recipe_is_named_by_its_path():
    for name in shipped_recipes():
        recipe = load_recipe(f"recipes/{name}", rung="lr", seed=3)
        assert training_arguments(recipe) == f"recipes/{name} --rung lr --seed 3"


@pytest.mark.parametrize(
    "changes",
    [
        ["base.epochs=3", "base.milestones=[1, 2.5]", "base.lr=1e-5", "tag=other"],
        ["base.schedule=cosine", "base.milestones=[]", "base.warmup_epochs=0.5", "model.args.drop_rate=0.5"],
        ["gradient_noise={kind: multiplicative, sigma: 0.1}", "optimizer.clip_grad_norm=null", "data.name=some/where"],
    ],
)
def test_training_arguments_give_a_changed_recipe_back(changes):
    recipe = load_recipe("recipes/cifar10/resnet44_gbn.yaml", changes, rung="lb", seed=1)
    file, *overrides, rung_flag, rung, seed_flag, seed = shlex.split(training_arguments(recipe))
    assert (rung_flag, seed_flag) == ("--rung", "--seed")
    assert load_recipe(file, overrides, rung=rung, seed=int(seed)) == recipe


def test_rows_come_in_timms_order():
    rows = [
        {"model": "c", "top1": "90.000", "top5": "99.000"},
        {"model": "b", "top1": "90.000", "top5": "99.000"},
        {"model": "d", "top1": "90.000", "top5": "99.500"},
        {"model": "a", "top1": "100.000", "top5": "100.000"},
    ]
    assert [r["model"] for r in in_timm_order(rows)] == ["a", "d", "b", "c"]


def test_a_new_row_takes_the_place_of_the_one_with_its_name_and_seed():
    rows = merge_result([row(80.0), row(81.0, seed=1), row(82.0, rung="lb")], row(90.0))
    assert [(r["model"], r["seed"], r["top1"]) for r in rows] == [
        ("resnet8_thin_gbn.shapes_gbn8", "0", "90.000"),
        ("resnet8_thin_gbn.shapes_lb8", "0", "82.000"),
        ("resnet8_thin_gbn.shapes_gbn8", "1", "81.000"),
    ]


def test_only_one_seed_of_a_name_holds_published_weights():
    rows = [row(seed=0, sha256="aa"), row(rung="ra", sha256="bb")]
    merged = merge_result(rows, row(seed=1, sha256="cc"))
    assert {(r["model"][-3:], r["seed"]): r["sha256"] for r in merged} == {
        ("bn8", "0"): "",
        ("bn8", "1"): "cc",
        ("ra8", "0"): "bb",
    }
    unpublished = merge_result(rows, row(seed=1))
    assert {r["sha256"] for r in unpublished} == {"aa", "bb", ""}


def test_results_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "results.csv"
    assert read_results(path) == []
    path.write_text(as_csv([row()]))
    assert read_results(path) == [row()]


def test_results_with_other_columns_are_refused(tmp_path):
    path = tmp_path / "results.csv"
    path.write_text("model,top1\na,90\n")
    with pytest.raises(ValueError, match=r"results.csv: its columns are model,top1; wanted model,img_size"):
        read_results(path)


@pytest.mark.parametrize(
    ("column", "cell", "message"),
    [
        ("seed", "0.0", r"line 2: seed '0\.0'; wanted a whole number"),
        ("top1", "", r"line 2: top1 ''; wanted a number"),
        ("rung", "gbm", r"line 2: rung 'gbm'; wanted one of sb, lb"),
        ("sha256", "aa,bb", r"line 2: has more than the 25 cells wanted"),
    ],
)
def test_a_row_that_was_edited_amiss_is_named(column, cell, message, tmp_path):
    path = tmp_path / "results.csv"
    path.write_text(as_csv([row() | {column: cell}]).replace('"', ""))
    with pytest.raises(ValueError, match=message):
        read_results(path)


def test_what_git_leaves_of_a_conflict_is_named(tmp_path):
    path = tmp_path / "results.csv"
    path.write_text(as_csv([row()]) + "<<<<<<< HEAD\n")
    with pytest.raises(ValueError, match=r"results.csv, line 3: has fewer than the 25 cells wanted"):
        read_results(path)


def test_results_that_a_spreadsheet_wrote_are_read(tmp_path):
    path = tmp_path / "results.csv"
    path.write_text(as_csv([row()]), encoding="utf-8-sig")
    assert read_results(path) == [row()]


@pytest.mark.parametrize("seed", [0, 1])
def test_another_recipes_row_is_not_taken_for_a_seed(seed):
    other = row(seed=seed) | {"recipe": "recipes/digits/resnet8_thin_gbn.yaml base.lr=0.5 --rung gbn --seed 1"}
    with pytest.raises(ValueError, match=r"already the name of another recipe's results, seed 0: .*tag=NAME"):
        merge_result([row()], other)


def test_the_same_recipe_in_other_words_is_another_seed():
    rows = [row() | {"recipe": "recipes/digits/resnet8_thin_gbn.yaml --rung gbn --seed 0"}]
    same = "recipes/digits/resnet8_thin_gbn.yaml seed=5 base.lr=0.05 --rung gbn --seed 1"
    assert len(merge_result(rows, row(seed=1) | {"recipe": same})) == 2


def test_a_ladder_is_the_mean_and_sample_deviation_over_seeds():
    rows = [row(91.0, rung="ra", seed=0), row(80.0), row(82.0, seed=1), row(84.0, seed=2), row(90.0, rung="sb")]
    sb, gbn, ra = group_by_rung(rows)
    assert [r.rung for r in (sb, gbn, ra)] == ["sb", "gbn", "ra"]
    # Of 80, 82, 84: squared deviations 4 + 0 + 4 over n − 1 = 2.
    assert (gbn.top1_percent, gbn.mean, gbn.std) == ((80.0, 82.0, 84.0), 82.0, 2.0)
    assert (sb.std, sb.spread, gbn.spread) == (None, "90.00 (1)", "82.00 ± 2.00 (3)")
    assert (sb.ladder, sb.split, gbn.batch_size, gbn.ghost_batch_size) == ("resnet8_thin_gbn.shapes", "test", 8, 4)


def test_what_is_not_alike_makes_rows_of_its_own():
    larger = {"batch_size": 16, "ghost_batch_size": 4}
    rows = [row(), row(tag="shapes_short"), row(large=larger), row() | {"split": "validation", "seed": "1"}]
    assert [(r.ladder, r.split, r.batch_size) for r in group_by_rung(rows)] == [
        ("resnet8_thin_gbn.shapes", "test", 8),
        ("resnet8_thin_gbn.shapes", "test", 16),
        ("resnet8_thin_gbn.shapes", "validation", 8),
        ("resnet8_thin_gbn.shapes_short", "test", 8),
    ]


def test_the_ladders_table():
    assert ladder_table(group_by_rung([row(86.25, rung="lb"), row(87.5), row(90.0, seed=1)])).splitlines() == [
        "| rung | batch | ghosts | updates | top-1 %, mean ± std (n) | seconds |",
        "| ---- | ----: | -----: | ------: | ----------------------: | ------: |",
        "| lb   |     8 |  1 × 8 |       5 |               86.25 (1) |     1.2 |",
        "| gbn  |     8 |  2 × 4 |       5 |        88.75 ± 1.77 (2) |     1.2 |",
    ]


def test_a_table_without_rows_is_its_header():
    assert markdown_table(("a", "bbb"), []) == "|  a | bbb |\n| -: | --: |"


def card(results, **changes):
    return ModelCard(model_card(CONFIG, small_recipe(**changes), results))


def test_the_cards_metadata_is_what_the_hub_reads():
    data = card([row(87.5, sha256="aa")]).data
    assert (data.library_name, data.license, data.pipeline_tag) == ("timm", "apache-2.0", "image-classification")
    assert {"timm", "gbnzoo", "image-classification"} <= set(data.tags)
    assert data.metrics == ["accuracy"]
    assert data.model_name == "resnet8_thin_gbn.shapes_gbn8"
    assert [(r.dataset_type, r.dataset_split, r.metric_type, r.metric_value) for r in data.eval_results] == [
        ("shapes", "test", "accuracy", 87.5),
        ("shapes", "test", "accuracy", 95.0),
    ]


@pytest.mark.parametrize(
    ("name", "hub_id"),
    [("mnist", "ylecun/mnist"), ("uoft-cs/cifar10", "uoft-cs/cifar10"), ("someone/else", "someone/else")],
)
def test_a_card_names_its_data_set_on_the_hub(name, hub_id):
    data = {"name": name}
    assert card([row(data=data)], data=data).data.datasets == [hub_id]
    assert card([row()]).data.datasets is None


@pytest.mark.parametrize(
    ("statistics", "said"),
    [
        ("running averages", "running averages over the ghosts it trained on"),
        ("recalibrated", "recalibrated: the mean over the ghosts of its first epoch, taken with the final weights"),
    ],
)
def test_a_card_says_which_statistics_the_weights_hold(statistics, said):
    made = row(statistics=statistics)
    assert made["statistics"] == statistics
    assert f"- **BatchNorm statistics:** {said}" in card([made], statistics=statistics).text


def test_a_card_says_which_split_was_scored_and_when():
    text = card([row() | {"split": "validation"}]).text
    assert "**Top-1 87.50 %**, top-5 95.00 %, on the validation split of shapes (20 images)" in text
    assert "accuracy of the last update" in text


def test_a_card_shows_the_ladder_of_its_network_and_data_alone():
    results = [row(), row(90.0, rung="ra"), row(11.0, tag="other"), row(12.0, model={"name": "mlp5_gbn"})]
    text = card(results).text
    assert ladder_table(group_by_rung(results[:2])) in text
    assert "11.00" not in text
    assert "12.00" not in text
    assert "rung `ra` does better: 90.00 %" in text
    assert "does better" not in card(results, rung="ra").text


def test_a_card_tells_how_the_weights_were_trained():
    recipe = small_recipe(base={"batch_size": 4, "epochs": 1, "lr": 0.1, "milestones": [0.4], "lr_decay": 0.5})
    text = model_card(CONFIG, recipe, [row()])
    for fact in ("8, 2 ghosts of 4", "40 (1 epochs of 40)", "0.1414, × 0.5 at update 2", "4 × a processor"):
        assert fact in text
    assert recipe.to_yaml().strip() in text


def test_a_card_passes_what_the_hub_verifies():
    assert check_card(model_card(CONFIG, small_recipe(), [row()])).data.eval_results[0].metric_value == 87.5


@pytest.mark.parametrize(
    ("right", "wrong", "problem"),
    [
        ("license: apache-2.0", "", "`license` wanted"),
        ("license: apache-2.0", "license: [", "expected"),
        ("type: shapes", "type: some shapes", "`dataset.type`"),
        ("value: 87.5", "value: high", "`value` of each metric"),
        ("value: 87.5", "", "value"),
        ("model-index:", "results:", "`model-index` wanted"),
        ("pipeline_tag:", "datasets: [scikit-learn's digits]\npipeline_tag:", "`datasets` wanted"),
        ("---", "", "`license` wanted"),
    ],
)
def test_a_card_that_the_hub_would_refuse(right, wrong, problem):
    text = model_card(CONFIG, small_recipe(), [row()])
    assert right in text
    with pytest.raises((ValueError, yaml.YAMLError), match=problem):
        check_card(text.replace(right, wrong, 1))


def disagreements(card, row):
    """Numbers on a card that are not those of its row of results.csv, read as a reader of the card would."""
    results = {result.metric_name: result.metric_value for result in card.data.eval_results}
    said = re.search(r"\*\*Top-1 ([\d.]+) %\*\*, top-5 ([\d.]+) %, on the (\w+) split", card.text).groups()
    batch, ghosts = re.search(r"\| batch \| (\d+), (?:\d+ ghosts of (\d+)|no ghosts) \|", card.text).groups()
    found = {
        "top1": (results["Top-1 accuracy (%)"], float(row["top1"])),
        "top5": (results["Top-5 accuracy (%)"], float(row["top5"])),
        "top1 in words": (said[0], f"{float(row['top1']):.2f}"),
        "top5 in words": (said[1], f"{float(row['top5']):.2f}"),
        "split": (said[2], row["split"]),
        "param_count": (re.search(r"Params \(M\):\*\* ([\d.]+)", card.text)[1], row["param_count"]),
        "updates": (re.search(r"\| updates \| (\d+) \|", card.text)[1], row["updates"]),
        "samples": (re.search(r"\| samples seen \| (\d+) ", card.text)[1], row["samples"]),
        "batch_size": (batch, row["batch_size"]),
        "ghost_batch_size": (ghosts or batch, row["ghost_batch_size"]),
    }
    return [key for key, (on_card, in_row) in found.items() if on_card != in_row]


@pytest.mark.parametrize("folder", sorted(path.parent for path in HUB.glob("*/config.json")), ids=lambda f: f.name)
def test_the_cards_in_hub_agree_with_the_csv(folder):
    rows = read_results(HUB / "results.csv")
    (row,) = (row for row in rows if row["model"] == folder.name and row["sha256"])
    card = check_card((folder / "README.md").read_text())
    assert disagreements(card, row) == []
    config = json.loads((folder / "config.json").read_text())
    recipe = folder / "recipe.yaml"
    assert str(card) == model_card(config, load_recipe(recipe), rows, recipe.read_text()), "run `gbnzoo publish`"


@pytest.mark.parametrize(
    ("key", "value"), [("top1", "87.510"), ("top5", "94.990"), ("updates", "6"), ("ghost_batch_size", "8")]
)
def test_a_card_that_disagrees_with_the_csv_is_found(key, value):
    made = row()
    assert disagreements(card([made]), made) == []
    assert key in disagreements(card([made]), made | {key: value})


def test_a_card_without_its_row_is_refused():
    with pytest.raises(ValueError, match=r"no row for resnet8_thin_gbn.shapes_gbn8, seed 0"):
        card([row(seed=1)])


def test_every_column_of_a_row_is_filled():
    assert [key for key, value in row(sha256="aa").items() if not value] == []
    assert tuple(row()) == RESULT_COLUMNS
