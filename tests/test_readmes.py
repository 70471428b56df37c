"""Ladders in READMEs are what results.csv says, and the rows that the paper lacks stand where they belong."""

import re

import PIL.Image
import pytest
from small_run import small_recipe
from test_card import HUB, row

from gbnzoo.card import read_results
from gbnzoo.readmes import PICTURES, pictures, published_ladders, readmes, write_readmes
from gbnzoo.recipe import load_recipe, shipped_recipes

ROOT = HUB.parent
RESULTS = read_results(HUB / "results.csv")
if not RESULTS:
    pytest.skip("no hub/results.csv, as in a source archive", allow_module_level=True)
WRITE = "`gbnzoo report --results hub/results.csv --readmes .` writes it again"


@pytest.mark.parametrize("path", readmes(ROOT, RESULTS), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_committed_readmes_hold_what_results_say(path):
    assert path.read_text() == readmes(ROOT, RESULTS)[path], WRITE


@pytest.mark.parametrize("name", pictures(RESULTS))
def test_committed_pictures_show_what_results_say(name):
    with PIL.Image.open(ROOT / PICTURES / name) as image:
        assert image.text["Description"] == pictures(RESULTS)[name].csv(), WRITE


def test_no_other_pictures_are_kept():
    assert {path.name for path in (ROOT / PICTURES).iterdir()} == pictures(RESULTS).keys()


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / "recipes" / "shapes").mkdir(parents=True)
    (tmp_path / "README.md").write_text(
        "before\n<!-- ladder resnet8_thin_gbn.shapes: -->\n<!-- end of ladder -->\nafter\n"
    )
    return tmp_path


def table(text, ladder):
    block = text.split(f"<!-- ladder {ladder}: ")[1].split("<!-- end of ladder -->")[0]
    lines = [line for line in block.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "---" not in line]


PAGES = [".", "benchmarks", "hub", "recipes", "recipes/cifar10", "recipes/cifar100", "recipes/mnist", "tests"]


@pytest.mark.parametrize("folder", PAGES)
def test_what_a_page_links_to_in_this_checkout_is_there(folder):
    for page in (ROOT / folder).glob("*.md"):
        targets = re.findall(r"\]\(([^)#:\s]+)[)#]", page.read_text(encoding="utf-8"))
        assert [target for target in targets if not (page.parent / target).exists()] == [], page


def test_a_block_is_filled_and_what_is_around_it_stays(checkout):
    results = [row(80.0, rung="lb"), row(90.0, rung="sb"), row(92.0, rung="sb", seed=1)]
    write_readmes(checkout, results)
    text = (checkout / "README.md").read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    header, *rungs = table(text, "resnet8_thin_gbn.shapes")
    assert header == ["rung", "batch", "ghosts", "updates", "samples", "top-1 %, mean ± std (n)", "hours", "hardware"]
    assert rungs == [
        ["sb", "4", "1 × 4", "5", "40", "91.00 ± 1.41 (2)", "0.000", "4 × a processor"],
        ["lb", "8", "1 × 8", "5", "40", "80.00 (1)", "0.000", "4 × a processor"],
    ]
    recipes = checkout / "recipes" / "shapes" / "README.md"
    recipes.write_text(recipes.read_text().replace("## resnet8", "A remark of a person.\n\n## resnet8"))
    write_readmes(checkout, [*results, row(70.0, model={"name": "resnet44_gbn"})])
    text = recipes.read_text()
    assert "A remark of a person." in text
    assert len(table(text, "resnet44_gbn.shapes")) == 2
    before = {path: path.read_bytes() for path in checkout.rglob("*.*") if path.is_file()}
    write_readmes(checkout, [*results, row(70.0, model={"name": "resnet44_gbn"})])
    assert before == {path: path.read_bytes() for path in checkout.rglob("*.*") if path.is_file()}


def test_a_ladder_without_results_is_named(checkout):
    with pytest.raises(
        ValueError, match=r"README.md asks for the ladder resnet8_thin_gbn.shapes; there are results of none"
    ):
        write_readmes(checkout, [])


def test_the_small_batch_on_as_many_samples_is_the_ladders_sixth_row(checkout):
    results = [row(80.0, rung="ra"), row(90.0, rung="sb", tag="shapes_same_samples"), row(85.0, rung="sb")]
    write_readmes(checkout, results)
    rungs = table((checkout / "README.md").read_text(), "resnet8_thin_gbn.shapes")[1:]
    assert [(cells[0], cells[5]) for cells in rungs] == [
        ("sb", "85.00 (1)"),
        ("ra", "80.00 (1)"),
        ("sb, as many samples as ra", "90.00 (1)"),
    ]
    assert list(published_ladders(results)) == ["resnet8_thin_gbn.shapes"]


@pytest.mark.parametrize("has_ladder", [True, False])
def test_ghost_sizes_are_told_with_their_ladder_and_without_one(checkout, has_ladder):
    results = [row(85.0, rung="sb")] if has_ladder else []
    for size in (2, 4, 8):
        large = {"batch_size": 16, "ghost_batch_size": size}
        results += [row(80.0 + size + k, large=large, tag=f"shapes_g{size}", seed=k) for k in (0, 1)]
    write_readmes(checkout, results)
    lines = table((checkout / "README.md").read_text(), "resnet8_thin_gbn.shapes")
    assert [cells for cells in lines if len(cells) == 2] == [
        ["ghost size", "top-1 %, mean ± std (n)"],
        ["2", "82.50 ± 0.71 (2)"],
        ["4", "84.50 ± 0.71 (2)"],
        ["8", "88.50 ± 0.71 (2)"],
    ]
    assert (checkout / PICTURES / "resnet8_thin_gbn.shapes-ghosts.png").is_file()
    text = (checkout / "recipes" / "shapes" / "README.md").read_text()
    assert "(../../docs/ladders/resnet8_thin_gbn.shapes-ghosts.png)" in text
    assert ("| rung |" in text) == has_ladder
    assert list(published_ladders(results)) == ["resnet8_thin_gbn.shapes"]


def test_of_two_splits_the_test_split_is_published():
    rows = [row(80.0) | {"split": "validation"}, row(90.0)]
    (ladder,) = published_ladders(rows).values()
    assert [(each.split, each.mean) for each in ladder] == [("test", 90.0)]
    assert small_recipe().name == rows[0]["model"]


SAME_SAMPLES = [name for name in shipped_recipes() if name.endswith("_same_samples.yaml")]


@pytest.mark.parametrize("name", SAME_SAMPLES)
def test_recipes_of_as_many_samples_see_as_many_as_ra_does(name):
    same = load_recipe(f"recipes/{name}")
    ladder = load_recipe(f"recipes/{name.replace('_same_samples', '')}", rung="ra")
    ours, theirs = same.regime(50_000), ladder.regime(50_000)
    assert 0 <= ours.samples_seen - theirs.samples_seen < ladder.large.batch_size
    # The rate falls after the same share of the run, and nothing else differs.
    shares = [m / ours.total_updates for m in ours.milestones]
    assert shares == pytest.approx([m / theirs.total_updates for m in theirs.milestones], rel=1e-3)
    apart = {"base": {"epochs", "milestones"}, "tag": True, "rung": True}
    assert same.model_dump(exclude=apart) == ladder.model_dump(exclude=apart)
    assert same.tag == f"{ladder.tag or ladder.data.name}_same_samples"
