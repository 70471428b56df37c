"""`gbnzoo walk`: simulated walks and real runs as table, CSV and plot."""

import csv

import numpy as np
import PIL.Image
import pytest
from small_run import ENVIRONMENT, small_recipe
from typer.testing import CliRunner

from gbnzoo.cli import app
from gbnzoo.distance_plot import WalkCurve, distance_plot
from gbnzoo.random_walk import Walks
from gbnzoo.run import Run
from gbnzoo.walk_law import measure, run_curve, table


def colours(path):
    with PIL.Image.open(path) as image:
        assert image.format == "PNG"
        return {colour for _, colour in image.convert("RGB").getcolors(2**20)}


def walk(*arguments, exit_code=0):
    result = CliRunner().invoke(app, ["walk", *(str(a) for a in arguments)], catch_exceptions=False)
    assert result.exit_code == exit_code, result.output
    return result.output


def run_with_distances(folder, law):
    """At the high rate up to update 100, after update 1; then the rate drops, and the weights stand still."""
    run = Run.start(small_recipe(), folder, resume=False)
    run.record_environment(ENVIRONMENT)
    for update in (1, 10, 20, 40, 50, 60, 70, 100, 200):
        run.log({"update": update, "lr": 0.1 if update <= 100 else 0.01, "weight_distance": law(min(update, 100))})
    return run.folder


def test_walks_are_measured_drawn_and_kept(tmp_path):
    folder = run_with_distances(tmp_path, lambda t: 1 + 2 * np.log(t))
    settings = ("--landscapes", 5, "--log-updates", 4, 20, "--temperature", 0.5, "--out", tmp_path / "new")
    said = walk("--alpha", 1, "--alpha", 0.5, *settings, "--run", folder)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines() if line.startswith("| ")][2:]
    assert [(row[0], row[4], row[6]) for row in rows] == [("1", "4 to 20", "2.000"), ("0.5", "4 to 20", "4.000")]
    with (tmp_path / "new" / "walk.csv").open() as file:
        points = list(csv.DictReader(file))
    assert len(points) == 2 * 13
    assert {row["alpha"] for row in points} == {"1.0", "0.5"}
    assert float(points[12]["log_update"]) == pytest.approx(20)
    # What the table says of the mean distance is in the file, and the fit is the line through both logarithms.
    assert float(f"{float(points[12]['mean_distance']):.3g}") == float(rows[0][5].split(" to ")[1])
    x, y, law = (np.log([float(row[key]) for row in points[:13]]) for key in ("log_update", "mean_distance", "fit"))
    slope, intercept = np.polyfit(x, y, 1)
    assert law == pytest.approx(intercept + slope * x, rel=1e-4)
    assert rows[0][7].startswith(f"{slope:.3f} ± ")
    assert {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)} <= colours(tmp_path / "new" / "walk.png")
    assert said.splitlines()[-3:] == [str(tmp_path / "new" / name) for name in ("walk.csv", "walk.png", "weights.png")]
    assert (0x00, 0x72, 0xB2) in colours(tmp_path / "new" / "weights.png")


def test_a_walk_that_cannot_be_made_is_one_line(tmp_path):
    said = walk("--alpha", 3, "--out", tmp_path / "new", exit_code=2)
    assert "alpha 3; wanted 0 < alpha <= 2" in said
    assert not (tmp_path / "new").exists()


def test_a_runs_weights_are_a_curve_with_the_logarithms_law(tmp_path):
    curve = run_curve(run_with_distances(tmp_path, lambda t: 1 + 2 * np.log(t)))
    # Update 1 has no place in log log t.
    assert list(curve.updates) == [10, 20, 40, 50, 60, 70, 100, 200]
    assert curve.distances[-1] == curve.distances[-2]
    assert (curve.fit.intercept, curve.fit.slope) == (pytest.approx(1), pytest.approx(2))
    # Before update 30 the weights run straight down.
    assert curve.fitted == (40, 100)
    assert curve.label == "resnet8_thin_gbn.shapes_gbn8-seed0: 1 + 2 log t, R² 1.000"
    with pytest.raises(ValueError, match=r"still/resnet8.*all 5 distances are 3"):
        run_curve(run_with_distances(tmp_path / "still", lambda t: 3.0))


def test_the_later_half_is_measured_too():
    """(log t)² at first, log t in the end."""
    log_t = np.geomspace(4, 64, 9)
    distances = np.where(log_t <= 16, log_t**2, 16 * log_t)
    law = measure(Walks(1.0, 1, 0.5, 0, False, np.exp(log_t), np.array([distances, distances])))
    assert law.late.exponent == pytest.approx(1)
    assert 1.2 < law.fit.exponent < 1.8
    assert law.fit.standard_error == pytest.approx(0, abs=1e-9)
    assert "| 1 | 1 | 0.5 | 2 | 4 to 64 | 16 to 1.02e+03 | 2.000 |" in table([law])


@pytest.mark.parametrize("last", [100, 1e286])
def test_a_curve_needs_no_law(tmp_path, last):
    distance_plot([WalkCurve("bare", [2, 10, last], [1.0, 2.0, 3.0])], tmp_path / "new" / "plot.png")
    assert (0x00, 0x72, 0xB2) in colours(tmp_path / "new" / "plot.png")
