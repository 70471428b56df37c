"""Runs side by side: the ladder, the walk's law, all batch sizes, ghost sizes, and the files that hold their numbers."""

import csv
import io
import itertools
import math
import statistics

import numpy as np
import PIL.Image
import pytest
from logged_run import BASE, logged_run
from matplotlib.backends.backend_agg import FigureCanvasAgg
from small_run import finished_run
from test_card import HUB

from gbnzoo.card import read_results
from gbnzoo.charts import (
    LIGHT,
    GhostSize,
    _styles,
    collapse_charts,
    curve_charts,
    distance_chart,
    fit_runs,
    ghost_chart,
    ladder_chart,
    layer_charts,
)
from gbnzoo.records import read_record
from gbnzoo.report import (
    find_ladders,
    ghost_sizes,
    ladder_plot,
    ladder_rows,
    read_runs,
    report_rows,
    top1_percent,
    write_report,
)
from gbnzoo.run import RunError


def log_t(t):
    return 3 + 2 * math.log(t)


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# ---- the ladder


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


def test_the_ladder_of_f1_is_a_png_as_wide_as_a_readme_with_the_papers_marks(tmp_path):
    (f1,) = (
        ladder for ladder in find_ladders(read_results(HUB / "results.csv")) if ladder[0].ladder == "mlp5_gbn.mnist"
    )
    path = tmp_path / "new" / "ladder.png"
    ladder_plot(f1, path)
    with PIL.Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width == 1440
        colours = {colour: n for n, colour in image.convert("RGB").getcolors(2**20)}
    assert colours[(0xD5, 0x5E, 0x00)] > 1000


def test_without_the_paper_there_are_no_marks_of_it(tmp_path):
    ladder_plot(ladder_rows([finished_run(tmp_path, rung=rung) for rung in ("sb", "gbn")]), tmp_path / "ladder.png")
    with PIL.Image.open(tmp_path / "ladder.png") as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(2**20)}
    assert (0xD5, 0x5E, 0x00) not in colours


# ---- what a report takes


def test_a_hub_folder_is_a_run_too_and_the_same_run_counts_once(tmp_path):
    folder = HUB / "mlp5_gbn.mnist_gbn4096"
    (record,) = read_runs([folder, folder])
    assert (record.updates, record.is_finished, record.top1_percent, record.split) == (732, True, 98.86, "test")
    assert {
        key: value for key, value in record.result_row().items() if key in ("model", "seed", "top1", "updates")
    } == {
        "model": "mlp5_gbn.mnist_gbn4096",
        "seed": "0",
        "top1": "98.860",
        "updates": "732",
    }


def test_results_stand_in_for_seeds_whose_runs_are_not_at_hand():
    results = read_results(HUB / "results.csv")
    records = read_runs([HUB / "mlp5_gbn.mnist_gbn4096"])
    (ladder,) = find_ladders(report_rows(records, results))
    # Every seed of the CSV once, whether its run is at hand or not.
    wanted = {}
    for row in results:
        if row["model"] in [f"mlp5_gbn.mnist_{name}" for name in ("sb128", *wanted_rungs())]:
            wanted.setdefault(row["rung"], []).append((int(row["seed"]), float(row["top1"])))
    assert {row.rung: row.top1_percent for row in ladder} == {
        rung: tuple(top1 for _, top1 in sorted(seeds)) for rung, seeds in wanted.items()
    }
    assert find_ladders(report_rows(records)) != [ladder]


def wanted_rungs():
    return [f"{rung}4096" for rung in ("lb", "lr", "gbn", "ra")]


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(RunError, match="is not a run"):
        read_runs([tmp_path])
    with pytest.raises(ValueError, match="nothing to report"):
        write_report([], [], tmp_path)


def test_a_run_of_an_earlier_version_lacks_columns_and_is_drawn_as_far_as_it_goes(tmp_path, undrawn):
    folder = logged_run(tmp_path, log_t)
    rows = read_csv(folder / "log.csv")
    kept = [key for key in rows[0] if key not in ("peak_memory_mib", "weight_distance", "weight_distance_first")]
    with open(folder / "log.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, kept, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    page = write_report([read_record(folder)], [], tmp_path / "report").read_text()
    assert 'id="curves"' in page
    assert 'id="distance"' not in page


# ---- charts


def test_the_csv_of_curves_is_the_runs_log(tmp_path, undrawn):
    run = logged_run(tmp_path / "runs", log_t)
    write_report(read_runs([run]), [], tmp_path / "report")
    log = read_csv(run / "log.csv")
    for name, x in (("updates", "update"), ("samples", "samples"), ("time", "train_seconds")):
        drawn = read_csv(tmp_path / "report" / f"curves_by_{name}.csv")
        assert len(drawn) == len(log) == 21
        for row, logged in zip(drawn, log, strict=True):
            for key in (x, "train_loss", "eval_loss", "top1_percent"):
                assert (row[key] == logged[key] == "") or float(row[key]) == float(logged[key])
    distances = read_csv(tmp_path / "report" / "weight_distance.csv")
    assert [float(row["weight_distance"]) for row in distances] == [float(row["weight_distance"]) for row in log]


def test_the_law_of_a_walk_is_found_and_can_lose(tmp_path):
    records = read_runs(
        [
            logged_run(tmp_path, log_t, rung="sb"),
            logged_run(tmp_path, lambda t: 1 + 0.5 * math.sqrt(t), rung="sb", seed=1),
        ]
    )
    logarithm, root = fit_runs(records)
    assert logarithm.fits["log"].slope == pytest.approx(2)
    assert logarithm.fits["log"].r2 == pytest.approx(1)
    assert logarithm.best == ["log"]
    assert root.best == ["sqrt"]
    # The first update logged after 30, up to which weights run straight down.
    assert (logarithm.first, logarithm.last) == (32, 1000)
    rows = [row for row in distance_chart(records, [logarithm, root]).rows if row[1] == 0 and row[4] is not None]
    assert [row[2] for row in rows][:2] == [32, 42]
    assert all(row[3] == pytest.approx(row[4]) for row in rows)


def test_the_laws_that_were_fitted_are_a_file_too(tmp_path, undrawn):
    walks = (lambda t: log_t(t) + 0.05 * math.sin(t), lambda t: 1 + 0.5 * math.sqrt(t) + 0.05 * math.sin(t))
    runs = [logged_run(tmp_path / "runs", walk, rung="sb", seed=seed) for seed, walk in enumerate(walks)]
    page = write_report(read_runs(runs), [], tmp_path / "report").read_text()
    rows = read_csv(tmp_path / "report" / "fits.csv")
    for row, run in zip(rows, runs, strict=True):
        t, d = np.array(
            [
                (float(x["update"]), float(x["weight_distance"]))
                for x in read_csv(run / "log.csv")
                if int(x["update"]) > 30
            ]
        ).T
        slope, intercept = np.polyfit(np.log(t), d, 1)
        assert (float(row["log_slope"]), float(row["log_intercept"])) == pytest.approx((slope, intercept))
        assert float(row["r2_log"]) == pytest.approx(np.corrcoef(np.log(t), d)[0, 1] ** 2)
        assert float(row["r2_sqrt"]) == pytest.approx(np.corrcoef(np.sqrt(t), d)[0, 1] ** 2)
        assert (int(row["first_update"]), int(row["last_update"]), int(row["points"])) == (32, 1000, len(t))
    assert float(rows[1]["power_exponent"]) == pytest.approx(0.5, abs=0.05)
    assert (rows[0]["best"], rows[1]["best"]) == ("log", "sqrt")
    assert "Least BIC: log t in 1, √t in 1, t^p in 0 of 2 runs." in page


def test_the_law_is_fitted_where_the_rate_is_high(tmp_path):
    # Half of 100 epochs of 10 updates: the rate falls at update 500.
    base = BASE | {"milestones": [50], "lr_decay": 0.1}
    (fit,) = fit_runs(read_runs([logged_run(tmp_path, lambda t: log_t(min(t, 450)), rung="sb", base=base)]))
    assert (fit.first, fit.last) == (32, 422)
    assert fit.fits["log"].r2 == pytest.approx(1)


def test_a_run_with_too_few_points_has_no_law_but_is_drawn(tmp_path):
    records = read_runs([logged_run(tmp_path, log_t, until=3)])
    assert fit_runs(records) == []
    assert len(distance_chart(records, []).rows) == 3


def test_batch_sizes_are_compared_before_and_after(tmp_path):
    # Before, a batch twice as large goes half as far; after, all go the same way.
    def before(batch):
        return lambda t: 4 / batch * log_t(t)

    runs = [logged_run(tmp_path, log_t, rung="sb")]
    for batch in (8, 16):
        large = {"batch_size": batch, "ghost_batch_size": 4}
        runs += [
            logged_run(tmp_path, before(batch), rung="lb", large=large),
            logged_run(tmp_path, log_t, rung="gbn", large=large),
        ]
    first, second = collapse_charts(read_runs(runs))
    assert {row[0] for row in first.rows} == {row[0] for row in second.rows} == {4, 8, 16}
    # 16 images an update, 40 images 100 times: 250 updates, of which 237 is the last that all have logged.
    four = "{0} at update 10, {0} at update 32, {0} at update 75, {0} at update 237"
    assert "is so many times the smallest: " + four.format("4.00") in first.text
    assert "is so many times the smallest: " + four.format("1.00") in second.text
    assert f"batch at update 237, the last that all of them have in that phase: 4: {log_t(237):.2f}, " in first.text
    assert collapse_charts(read_runs(runs[:2])) == []
    for chart in (first, second):
        assert "resnet8_thin_gbn.shapes" in chart.title
        assert "resnet8_thin_gbn.shapes" in chart.text
    # No run of batch 4 has all the cures; once there is one, the base regime's stands before alone.
    assert "batch 4: the base regime itself" in second.text
    assert {row[1] for row in second.rows if row[0] == 4} == {"sb"}
    runs.append(logged_run(tmp_path, log_t, rung="gbn", large={"batch_size": 4, "ghost_batch_size": 4}))
    first, second = collapse_charts(read_runs(runs))
    assert {row[1] for row in first.rows if row[0] == 4} == {"sb"}
    assert {row[1] for row in second.rows if row[0] == 4} == {"gbn"}
    assert "the base regime itself" not in second.text


def test_clipping_is_told_where_only_the_cured_runs_have_it(tmp_path):
    clipping = {"optimizer": {"name": "sgd", "clip_grad_norm": 5.0}}
    runs = [logged_run(tmp_path, log_t, rung="sb", **clipping)]
    for batch in (8, 16):
        large = {"batch_size": batch, "ghost_batch_size": 4}
        runs += [logged_run(tmp_path, log_t, rung=rung, large=large, **clipping) for rung in ("lb", "gbn")]
    first, second = collapse_charts(read_runs(runs))
    assert "clipped" not in first.title + first.text
    assert "gradient norm clipped at 5" in second.title
    assert "gradient norm clipped at 5" in second.text


def test_a_ladder_has_one_large_batch(tmp_path, undrawn):
    def has_ladder(runs):
        page = write_report([], report_rows(read_runs(runs)), tmp_path / "report").read_text()
        return 'id="ladder"' in page

    runs = [finished_run(tmp_path, rung="sb"), finished_run(tmp_path, rung="lb")]
    assert has_ladder(runs)
    runs.append(finished_run(tmp_path, rung="gbn", large={"batch_size": 16, "ghost_batch_size": 4}))
    assert not has_ladder(runs)
    assert not has_ladder(runs[:1])


def test_layers_are_drawn_where_they_were_logged(tmp_path):
    with_layers = logged_run(tmp_path, log_t, layers=("stem", "head"))
    (chart,) = layer_charts(read_runs([with_layers, logged_run(tmp_path, log_t, seed=1)]))
    assert {row[0] for row in chart.rows} == {"stem", "head"}
    assert [row[2] for row in chart.rows if row[:2] == ("head", 100)] == [pytest.approx(2 * log_t(100))]
    assert "head has gone farthest" in chart.text


def test_ghost_sizes_are_runs_that_differ_in_nothing_else(tmp_path, undrawn):
    def run(size, seed, value, rung="gbn", batch=16):
        tag = {} if rung == "lr" else {"tag": f"shapes_g{size}"}
        large = {"batch_size": batch, "ghost_batch_size": size}
        return finished_run(tmp_path, rung=rung, seed=seed, top1_percent=value, large=large, **tag)

    runs = [run(2, 0, 80.0), run(2, 1, 84.0), run(4, 0, 90.0), run(4, 1, 91.0), run(4, 2, 92.0)]
    assert ghost_sizes(report_rows(read_runs(runs))) == []  # two sizes are no curve
    # A whole batch without ghosts is rung lr; another batch size is another curve.
    runs += [run(8, 0, 70.0, rung="lr"), run(2, 0, 50.0, batch=8)]
    (curve,) = ghost_sizes(report_rows(read_runs(runs)))
    assert (curve.name, curve.rung, curve.batch_size) == ("resnet8_thin_gbn.shapes", "gbn", 16)
    assert {size.ghost_batch_size: size.top1_percent for size in curve.sizes} == {
        2: (80.0, 84.0),
        4: (90.0, 91.0, 92.0),
        16: (70.0,),
    }
    page = write_report([], report_rows(read_runs(runs)), tmp_path / "report")
    by_size = {}
    for row in read_csv(page.parent / "ghost_sizes.csv"):
        by_size.setdefault(row["ghost_batch_size"], []).append(row)
    assert float(by_size["2"][0]["mean"]) == 82.0
    assert float(by_size["2"][0]["std"]) == pytest.approx(statistics.stdev([80, 84]))
    assert by_size["16"][0]["std"] == ""


def test_a_ghost_size_of_one_seed_has_no_bar_of_error():
    def chart_of(*sizes):
        sizes = [GhostSize(2**k, top1) for k, top1 in enumerate(sizes)]
        chart = ghost_chart("shapes", 8, "test", sizes)
        chart.png()
        (bars,) = chart.draw(LIGHT).axes[0].containers[0].lines[2]
        return chart, [segment for segment in bars.get_segments() if len(segment)]

    chart, bars = chart_of((70.0,), (80.0, 84.0), (90.0,))
    assert [abs(bar[1, 1] - bar[0, 1]) for bar in bars] == [pytest.approx(2 * statistics.stdev([80, 84]))]
    assert "which sizes of one seed do not have" in chart.text
    chart, bars = chart_of((70.0,), (80.0,), (90.0,))
    assert bars == []
    assert "one seed each, so no spread is known" in chart.text
    assert "±" not in chart.text


def test_any_two_of_many_series_look_different():
    looks = [tuple(style.values()) for style in itertools.islice(_styles(LIGHT), 112)]
    assert len(set(looks)) == 112
    # Of the first 28, those of one colour differ in line and in marker, so that dots alone tell them too.
    first = [(style["color"], style["linestyle"], style["marker"]) for style in itertools.islice(_styles(LIGHT), 28)]
    assert len({(colour, line) for colour, line, _ in first}) == len({(colour, dot) for colour, _, dot in first}) == 28


@pytest.mark.parametrize("letters", [1, 12, 17, 20, 40, 80, 92, 140])
def test_a_legend_lies_inside_its_picture_however_long_its_names(tmp_path, letters):
    runs = [logged_run(tmp_path, log_t, rung="sb", seed=k, tag=f"{k}{'x' * letters}") for k in range(5)]
    figure = curve_charts(read_runs(runs))[0].draw(LIGHT)
    FigureCanvasAgg(figure).draw()
    (legend,) = figure.legends
    assert len(legend.get_texts()) == 5
    for corner in legend.get_window_extent().corners():
        assert figure.bbox.contains(*corner)
    assert legend.get_window_extent().y1 < min(axes.get_tightbbox().y0 for axes in figure.axes)


def test_a_ladders_title_lies_inside_its_picture():
    ladders = [ladder for ladder in find_ladders(read_results(HUB / "results.csv")) if len(ladder) > 2]
    for ladder in ladders:
        figure = ladder_chart(ladder).draw(LIGHT)
        FigureCanvasAgg(figure).draw()
        assert figure.bbox.contains(*figure.axes[0]._left_title.get_window_extent().max)


def test_a_picture_of_256_colours_is_the_drawing(tmp_path):
    runs = [
        logged_run(tmp_path, lambda t, k=k: (k + 1) * log_t(t), rung="sb", seed=k, tag=f"shapes_{k}") for k in range(9)
    ]
    records = read_runs(runs)
    chart = distance_chart(records, fit_runs(records))
    whole = io.BytesIO()
    chart.draw(LIGHT).savefig(whole, format="png", facecolor=LIGHT.background)
    content = chart.png(metadata={"Description": "ΔBIC"})
    assert len(content) < 0.5 * len(whole.getvalue())
    with PIL.Image.open(io.BytesIO(content)) as picture, PIL.Image.open(whole) as drawing:
        assert (picture.mode, picture.size) == ("P", drawing.size)
        assert picture.text["Description"] == "ΔBIC"
        ours, theirs = (np.asarray(image.convert("RGB")).astype(int) for image in (picture, drawing))
    assert (ours[theirs.min(axis=2) == 255] == 255).all()
    assert (abs(ours - theirs).max(axis=2) > 8).mean() < 0.03


def test_runs_of_a_series_share_a_line_and_unlike_ones_do_not(tmp_path):
    runs = [
        logged_run(tmp_path / "a", log_t),
        logged_run(tmp_path / "a", log_t, seed=1),
        logged_run(tmp_path / "b", log_t, label_smoothing=0.1),  # of the same name, in another folder
    ]
    rows = curve_charts(read_runs(runs))[0].rows
    assert len({row[0] for row in rows}) == 2
    assert len({row[:2] for row in rows}) == 3


def test_curves_tell_their_numbers_on_every_axis(tmp_path):
    # 1000 updates of 4 images, 0.37 s each: the last top-1 is 90 - 50 / 1000.
    by_updates, by_samples, by_time = (
        chart.text for chart in curve_charts(read_runs([logged_run(tmp_path, log_t, rung="sb")]))
    )
    assert "sb 4: 89.95 after 1,000 updates." in by_updates
    assert "sb 4: 89.95 after 4,000 samples." in by_samples
    assert "sb 4: 89.95 after 6.2 minutes." in by_time
