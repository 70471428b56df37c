"""The ladder of finished runs."""

import PIL.Image
import pytest
from small_run import finished_run

from gbnzoo.report import ladder_plot, ladder_rows, top1_percent
from gbnzoo.run import RunError


def test_runs_become_a_ladder(tmp_path):
    runs = [
        finished_run(tmp_path, rung=rung, seed=seed, top1_percent=value)
        for rung, seed, value in (("ra", 0, 99.0), ("sb", 1, 97.0), ("sb", 0, 98.0), ("lb", 0, 86.0))
    ]
    assert [(row.rung, row.updates, row.top1_percent) for row in ladder_rows(runs)] == [
        ("sb", 10, (98.0, 97.0)),
        ("lb", 5, (86.0,)),
        ("ra", 10, (99.0,)),
    ]
    assert top1_percent(runs[0]) == 99.0


def test_a_ladder_is_of_one_network_and_data_set(tmp_path):
    runs = [finished_run(tmp_path), finished_run(tmp_path, tag="other")]
    with pytest.raises(ValueError, match=r"2 ladders \(resnet8_thin_gbn.other, test split; resnet8_thin_gbn.shapes"):
        ladder_rows(runs)
    with pytest.raises(ValueError, match="0 ladders"):
        ladder_rows([])


def test_an_unfinished_run_is_no_part_of_a_ladder(tmp_path):
    with pytest.raises(RunError, match="is not finished"):
        ladder_rows([finished_run(tmp_path, finished=False)])


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_plot_is_a_png_as_wide_as_a_readme(tmp_path, seeds):
    runs = [finished_run(tmp_path, rung=rung, seed=seed) for rung in ("sb", "gbn") for seed in range(seeds)]
    path = tmp_path / "new" / "ladder.png"
    ladder_plot(ladder_rows(runs), path, paper_top1_percent={"sb": 51.0, "lb": 40.0})
    with PIL.Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width == 1440
        # Blue dots only where there are seeds to tell apart; the paper's orange and the black of means always.
        colours = {colour for _, colour in image.convert("RGB").getcolors(2**20)}
    assert (0xD5, 0x5E, 0x00) in colours
    assert (0x33, 0x33, 0x33) in colours
    assert any(b > r + 100 for r, g, b in colours) == (seeds > 1)
