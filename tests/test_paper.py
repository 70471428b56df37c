"""The paper's Table 1, and beside which runs its figures stand."""

import pytest
from test_card import HUB

from gbnzoo.card import group_by_rung, ladder_table, read_results, result_row
from gbnzoo.paper import paper_top1_percent
from gbnzoo.recipe import load_recipe, shipped_recipes

# As the poster prints it, by network: SB, LB, +LR, +GBN, +RA.
TABLE_1 = {
    "mnist/mlp5_gbn": (98.27, 97.05, 97.55, 97.60, 98.53),
    "cifar10/cifar_alexnet_gbn": (87.80, 83.95, 86.15, 86.4, 88.20),
    "cifar10/resnet44_gbn": (92.83, 86.10, 89.30, 90.50, 93.07),
    "cifar10/cifar_vgg16_gbn": (92.30, 84.1, 88.6, 91.50, 93.03),
    "cifar100/cifar_alexnet_gbn": (61.25, 51.50, 57.38, 57.5, 63.20),
    "cifar100/wide_resnet16_4_gbn": (73.70, 68.15, 69.05, 71.20, 73.57),
    "imagenet/alexnet_owt_gbn": (57.10, 41.23, 53.25, 53.93, 59.5),  # the recipe's batch is 8192
}


def row(recipe, overrides=(), num_samples=50_000, **settings):
    recipe = load_recipe(f"recipes/{recipe}.yaml", overrides, **settings)
    environment = {"data": {"num_samples": num_samples, "input_size": [3, 32, 32]}}
    environment |= {"commit": None, "hardware": "a machine", "versions": None}
    log_row = {"update": "1", "samples": "1", "train_seconds": "1", "split": "test"}
    return result_row(recipe, log_row | {"top1_percent": "90", "top5_percent": "99"}, [environment])


@pytest.mark.parametrize(("batch_size", "figure"), [(4096, 41.23), (8192, 41.23), (256, None)])
def test_a_figure_of_an_unnamed_batch_stands_beside_the_papers_batches_alone(batch_size, figure):
    overrides = [f"large.batch_size={batch_size}"]
    shown = row("imagenet/alexnet_owt_gbn", overrides, num_samples=1_281_167, rung="lb")
    assert paper_top1_percent(shown) == figure


@pytest.mark.parametrize("recipe", TABLE_1)
def test_a_shipped_recipe_of_the_papers_stands_beside_its_row(recipe):
    figures = [paper_top1_percent(row(recipe, rung=rung)) for rung in ("sb", "lb", "lr", "gbn", "ra")]
    assert figures == list(TABLE_1[recipe])


def test_no_other_shipped_recipe_has_figures_of_the_papers():
    others = {name.removesuffix(".yaml") for name in shipped_recipes()} - TABLE_1.keys()
    assert len(others) > 10
    assert not [name for name in others if paper_top1_percent(row(name)) is not None]


@pytest.mark.parametrize(
    ("overrides", "figure"),
    [
        (["evaluations=5", "precision=fp32"], 93.07),
        (["data.name=uoft-cs/cifar10"], 93.07),
        (["large.batch_size=2048"], None),  # the table's is 4096
        (["large.ghost_batch_size=64"], None),
        (["base.epochs=170"], None),
        (["tag=cifar10_short"], None),
        (["data.name=cifar100"], None),
    ],
)
def test_a_run_of_another_regime_stands_alone(overrides, figure):
    assert paper_top1_percent(row("cifar10/resnet44_gbn", overrides, rung="ra")) == figure


def test_the_batch_that_the_paper_names_is_told_apart():
    overrides = ["large.batch_size=4096"]
    assert paper_top1_percent(row("imagenet/alexnet_owt_gbn", overrides, rung="gbn")) == 54.92
    assert paper_top1_percent(row("imagenet/alexnet_owt_gbn", overrides, rung="ra")) == 59.5


def test_the_table_of_f1_has_the_papers_column():
    rows = [row for row in read_results(HUB / "results.csv") if row["model"].startswith("mlp5_gbn.mnist_")]
    table = ladder_table(group_by_rung(rows)).splitlines()
    column = [cell.strip() for cell in table[0].split("|")].index("paper")
    f1 = [line.split("|") for line in table if line.split("|")[2].strip() in ("128", "4096")]
    papers = {cells[1].strip(): cells[column].strip() for cells in f1 if cells[column].strip()}
    assert papers == {"sb": "98.27", "lb": "97.05", "lr": "97.55", "gbn": "97.60", "ra": "98.53"}
