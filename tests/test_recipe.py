"""Recipes: what is accepted, and that everything wrong is named with its file and key."""

import re

import pytest

from gbnzoo.recipe import RecipeError, find_recipe, load_recipe, shipped_recipes

GOOD = """\
model: {name: resnet44_gbn}
data: {name: cifar10, augment: pad4_crop_flip}
base:
  batch_size: 128
  epochs: 200
  lr: 0.1
  milestones: [81, 122, 164]
  lr_decay: 0.1
optimizer: {name: sgd, momentum: 0.9, weight_decay: 1e-4, clip_grad_norm: 5.0}
large: {batch_size: 4096, ghost_batch_size: 128, lr_scaling: sqrt}
rung: ra
seed: 0
precision: bf16
"""


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(GOOD)
    return path


def test_names_follow_architecture_data_rung_and_batch(recipe_file):
    recipe = load_recipe(recipe_file)
    assert recipe.name == "resnet44_gbn.cifar10_ra4096"
    assert recipe.run_name == "resnet44_gbn.cifar10_ra4096-seed0"
    assert load_recipe(recipe_file, rung="sb", seed=7).run_name == "resnet44_gbn.cifar10_sb128-seed7"
    assert load_recipe(recipe_file, ["tag=cifar10_short"]).name == "resnet44_gbn.cifar10_short_ra4096"
    assert load_recipe(recipe_file, ["data.name=uoft-cs/CIFAR-100"]).name == "resnet44_gbn.cifar_100_ra4096"


def test_numbers_are_read_as_yaml_1_2(recipe_file):
    assert load_recipe(recipe_file).optimizer.weight_decay == 1e-4  # PyYAML reads 1e-4 as a string


def test_overrides_set_single_keys(recipe_file):
    recipe = load_recipe(
        recipe_file, ["base.epochs=10", "base.milestones=[5, 10]", "gradient_noise={kind: multiplicative, sigma: 1}"]
    )
    assert (recipe.base.epochs, recipe.base.milestones, recipe.gradient_noise.sigma) == (10, (5, 10), 1)


def test_what_a_run_records_reads_back_the_same(recipe_file, tmp_path):
    recipe = load_recipe(
        recipe_file,
        [
            "base.lr_decay=[0.1, 0.2, 10]",
            "model.args={drop_rate: 0.1}",
            "optimizer.weight_decay=3e-7",
            "optimizer.args={betas: [0.9, 0.99], eps: 1e-7, amsgrad: true}",
        ],
    )
    assert recipe.optimizer.args["betas"] == (0.9, 0.99)
    (tmp_path / "recorded.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "recorded.yaml") == recipe


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("base.epoch=3", "base.epoch is not a key of a recipe; did you mean epochs?"),
        ("zzz=3", "zzz is not a key of a recipe; known here: model, data, base"),
        ("large.batch_size=4100", "batch_size 4100 is not a multiple of ghost_batch_size 128; 4096 or 4224 would be"),
        ("base.batch_size=0", "base.batch_size: given 0, wanted greater than 0"),
        ("base.lr='0.1'", "base.lr: given '0.1', wanted number"),
        ("base.lr=-0.1", "base.lr: given -0.1, wanted greater than 0"),
        ("base.lr=.nan", "base.lr: given nan, wanted"),
        ("base.milestones=[122, 81, 164]", "must rise"),
        ("base.lr_decay=[0.1, 0.1]", "lr_decay has 2 factors for 3 milestones"),
        ("base.schedule=cosine", "milestones belong to schedule: milestones, not to cosine"),
        ("base.warmup_epochs=300", "warmup_epochs 300.* is longer than epochs 200"),
        ("optimizer.nesterov=1", "optimizer.nesterov: given 1, wanted boolean"),
        ("model=resnet44", "model: given 'resnet44', wanted a section with keys name, args"),
        ("rung=xl", "rung: given 'xl', wanted 'sb', 'lb', 'lr', 'gbn' or 'ra'"),
        ("seed=1.5", "seed: given 1.5, wanted integer"),
        ("precision=half", "precision: given 'half', wanted 'fp32', 'bf16' or 'fp64'"),
        ("gradient_noise={kind: additive, sigma: 1}", "gradient_noise.kind: given 'additive', wanted 'multiplicative'"),
        ("data.random_labels=1.5", "data.random_labels: given 1.5, wanted less than or equal to 1"),
        ("data.holdout=-1", "data.holdout: given -1, wanted greater than or equal to 0"),
        ("data.transform={}", "augment pad4_crop_flip is for images in memory, transform for images on disk"),
        ("data={name: x, transform: {}}", "transform needs image_size"),
        (
            "data={name: x, image_size: 8, transform: {mixop: 1}}",
            "data.transform.mixop is not a key .* did you mean mixup",
        ),
        (
            "data={name: x, image_size: 8, transform: {crop_pct: 87.5}}",
            "crop_pct: given 87.5, wanted less than or equal to 1",
        ),
        ("data={name: x, image_size: 8, transform: {hflip: -1}}", "hflip: given -1, wanted greater than or equal to 0"),
        ("data={name: x, holdout: 9, scored_split: test}", "scored_split test and holdout 9: give one of them"),
        ("bce={threshold: 1}", "bce.threshold: given 1, wanted less than 1"),
        ("base.lr_decay=-1", "lr_decay: given -1, wanted greater than 0"),
        ("base.lr_decay=[0.1, 0, 0.1]", "lr_decay: given 0.1, 0, 0.1, wanted greater than 0"),
        ("base.milestones=10", "base.milestones: given 10, wanted list"),
        ("base.epochs=100", r"milestones \[81.0, 122.0, 164.0\] go beyond epochs 100; .*base.milestones=\[\]"),
        (
            "base.batch_size=8192",
            "x.yaml: large.batch_size 4096 is smaller than base.batch_size 8192; wanted a larger one",
        ),
        ("seed=99999999999999999999", f"seed: given 9{{20}}, wanted less than {2**63}"),
        ("seed=9223372036854775808", "seed: given 9223372036854775808, wanted less than"),
        ("model.name=resnet44_gbn.cifar10_ra4096", "model.name: .* names weights, .* wanted 'resnet44_gbn'"),
        ("model.args={ghost_batch_size: 4}", "model.args: ghost_batch_size .* wanted large.ghost_batch_size"),
        ("model.args={num_classes: 4}", "model.args: num_classes is not given here; wanted data.num_classes"),
        (
            "optimizer.args={betas: [0.9, {a: 1}]}",
            "optimizer.args.betas: given list .*, wanted a number, a text, true, false or",
        ),
        ("optimizer.args={eps: .nan}", "optimizer.args.eps: given nan, wanted finite numbers"),
        ("optimizer.args={lr: 3}", "optimizer.args: lr is not given here; wanted base.lr"),
        ("base.lr.x=1", "base.lr.x=1'?: .*lr is a value and has no keys below it"),
        ("base.lr", "wanted key=value with a dotted key"),
        ("base.lr=[", "override 'base.lr=\\['"),
    ],
)
def test_what_is_wrong_is_named_with_file_and_key(recipe_file, override, message):
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(recipe_file, [override])
    assert str(recipe_file) in str(caught.value) or "override" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + "seed: 1\n", r'x\.yaml:14: found duplicate key "seed"'),
        (GOOD.replace("  lr: 0.1\n", ""), r"x\.yaml: base\.lr is missing; it must be given"),
        ("- a list\n", r"x\.yaml: wanted keys and values"),
        ("", r"x\.yaml: wanted keys and values \(model:, data:, base:, large:\), found None"),
        ("model: {name: [\n", r"x\.yaml:\d+: "),
        ("# é\n" + GOOD, r"x\.yaml: byte 2 is not UTF-8; wanted the file saved as UTF-8"),
    ],
)
def test_a_broken_file_is_named_with_its_line_or_key(recipe_file, text, message):
    recipe_file.write_text(text, encoding="latin-1")
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe_file)


def test_what_only_the_data_show_to_be_wrong_is_named_with_file_and_key(recipe_file):
    recipe = load_recipe(recipe_file, ["base.epochs=0.5", "base.milestones=[]"], rung="lb")
    with pytest.raises(RecipeError, match=r"x\.yaml: base\.epochs: rung lb would make no update"):
        recipe.regime(1297)


def test_all_that_is_wrong_is_said_at_once(recipe_file):
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe_file, ["seed=-1", "base.lrr=1"])
    assert len(str(caught.value).splitlines()) == 2


def test_a_missing_file_names_recipes_that_are_there():
    with pytest.raises(RecipeError, match=r"recipes/mnst/mlp5_gbn.yaml: no such file.* recipes/mnist/mlp5_gbn.yaml"):
        find_recipe("recipes/mnst/mlp5_gbn.yaml")


def test_a_recipe_of_images_on_disk_reads_back_the_same(tmp_path):
    recipe = load_recipe("recipes/imagenet/resnet50_gbn_lamb_a3.yaml")
    (tmp_path / "recorded.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "recorded.yaml") == recipe


@pytest.mark.parametrize(
    ("name", "overrides", "peak", "last"),
    [
        # sqrt(8192 / 128) = 8 times 0.01, at the end a hundredth of it.
        ("alexnet_owt_gbn", [], 0.08, 0.0008),
        ("resnet50_gbn_lars", [], 10.0, 0.0),
        ("resnet50_gbn_lars", ["large.batch_size=16384", "base.lr=0.390625"], 25.0, 0.0),
        ("resnet50_gbn_lars", ["large.batch_size=32768", "base.lr=0.25", "base.warmup_epochs=14"], 32.0, 0.0),
        ("resnet50_gbn_lamb_a2", [], 0.01, 0.0),  # sqrt(8192 / 2048) = 2 times 5e-3
        ("resnet50_gbn_lamb_a3", ["large.batch_size=32768"], 0.032, 0.0),
    ],
)
def test_imagenet_recipes_have_the_rates_they_claim(name, overrides, peak, last):
    regime = load_recipe(f"recipes/imagenet/{name}.yaml", overrides, rung="gbn").regime(1_281_167)
    rates = [regime.lr_at(update) for update in range(regime.total_updates)]
    assert max(rates) == pytest.approx(peak)
    assert rates[-1] == pytest.approx(last, abs=1e-5)


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_loads_on_every_rung(name):
    for rung in ("sb", "lb", "lr", "gbn", "ra"):
        recipe = load_recipe(f"recipes/{name}", rung=rung)
        regime = recipe.regime(1_281_167 if name.startswith("imagenet") else 50_000)
        assert regime.total_updates > 0
        assert name.split("/")[1].startswith(recipe.model.name)


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_opens_with_source_command_and_promise(name):
    source, command, promise, *_ = shipped_recipes()[name].read_text().splitlines()
    assert re.match(r"# .+ (arXiv|et al\.)", source)
    assert re.match(r"# (gbnzoo|accelerate launch) ", command)
    assert re.match(r"# .*(top-1|Top-1|gap)", promise)
