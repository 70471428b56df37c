"""Laws of weight distance against updates: planted ones are found, and a wrong one loses."""

import math

import numpy as np
import pytest

from gbnzoo.diffusion import Fit, best_law, best_laws, fit_laws, fit_log_power

UPDATES = np.unique(np.round(np.geomspace(1, 1e5, 60)))
PLANTED = {
    "log": lambda t: 0.7 + 0.9 * np.log(t),
    "sqrt": lambda t: 2.0 + 0.03 * np.sqrt(t),
    "power": lambda t: 1.0 + 0.4 * t**0.25,
    "saturating": lambda t: 10 - 8 * t**-0.4,
}


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_law_is_found_under_noise(planted):
    noise = np.random.default_rng(1).normal(0, 0.05, UPDATES.size)
    fits = fit_laws(UPDATES, PLANTED[planted](UPDATES) + noise)
    best = best_law(fits)
    assert best.law == {"saturating": "power"}.get(planted, planted)
    assert best.r2 > 0.98
    assert max(abs(best(UPDATES) - PLANTED[planted](UPDATES))) < 0.1
    if planted in ("log", "sqrt"):
        rival = fits[{"log": "sqrt", "sqrt": "log"}[planted]]
        assert rival.bic > best.bic + 50


def test_a_difference_below_two_is_a_tie():
    def best(**bics):
        return best_laws({law: Fit(law, 0, 1, None, 1, bic) for law, bic in bics.items()})

    assert best(log=-50, sqrt=-51.9, power=-49.9) == ["log", "sqrt"]
    assert best(log=-50, sqrt=-52, power=-51) == ["sqrt", "power"]
    assert best(log=0, sqrt=5, power=2) == ["log"]


def test_without_noise_the_coefficients_are_the_planted_ones():
    fit = fit_laws(UPDATES, PLANTED["log"](UPDATES))["log"]
    assert (fit.intercept, fit.slope, fit.exponent) == (pytest.approx(0.7), pytest.approx(0.9), None)
    fit = fit_laws(UPDATES, PLANTED["sqrt"](UPDATES))["sqrt"]
    assert (fit.intercept, fit.slope, fit.exponent) == (pytest.approx(2.0), pytest.approx(0.03), 0.5)
    for planted, wanted in (("power", (1.0, 0.4, 0.25)), ("saturating", (10.0, -8.0, -0.4))):
        fit = fit_laws(UPDATES, PLANTED[planted](UPDATES))["power"]
        assert (fit.intercept, fit.slope, fit.exponent) == pytest.approx(wanted, rel=1e-5)
        assert fit.r2 == pytest.approx(1, abs=1e-12)


def test_bic_and_r2_as_worked_by_hand():
    """log2 t = 0..4 against 0, 2, 1, 3, 4: the line is 0.2 + 0.9 x, its squares are .04 + .81 + 1.0 + .0 + .04 = 1.9."""
    fit = fit_laws([1, 2, 4, 8, 16], [0, 2, 1, 3, 4])["log"]
    assert fit.slope * math.log(2) == pytest.approx(0.9)
    assert fit.intercept == pytest.approx(0.2)
    assert fit.r2 == pytest.approx(1 - 1.9 / 10)
    assert fit.bic == pytest.approx(5 * math.log(1.9 / 5) + 3 * math.log(5))


@pytest.mark.parametrize("planted", ["log", "sqrt"])
def test_the_power_law_pays_for_its_exponent(planted):
    """It holds the other two as special cases, so it always fits as well, and by BIC wins only where that is worth log n."""
    rng = np.random.default_rng(0)
    wins = 0
    for _ in range(40):
        fits = fit_laws(UPDATES, PLANTED[planted](UPDATES) + rng.normal(0, 0.05, UPDATES.size))
        assert fits["power"].r2 >= fits["sqrt"].r2
        assert fits["power"].r2 >= fits["log"].r2 - 1e-3
        wins += best_law(fits).law == "power"
    # The likelihood ratio is χ² of 1 degree of freedom: above log(56) = 4.03 in 4.5 % of cases. More than 7 of 40: p < 1e-3.
    assert wins <= 7


def test_the_exponent_agrees_with_scipys_curve_fit():
    optimize = pytest.importorskip("scipy.optimize", reason="scipy comes with the quickstart's scikit-learn")
    y = PLANTED["power"](UPDATES) + np.random.default_rng(3).normal(0, 0.05, UPDATES.size)
    (intercept, slope, exponent), _ = optimize.curve_fit(lambda t, a, b, p: a + b * t**p, UPDATES, y, p0=(0, 1, 0.3))
    fit = fit_laws(UPDATES, y)["power"]
    assert (fit.intercept, fit.slope, fit.exponent) == pytest.approx((intercept, slope, exponent), rel=1e-3)


@pytest.mark.parametrize(
    ("updates", "distances", "message"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4], "4 different update.*at least 5"),
        ([1, 2, 3, 4, 4], [1, 2, 3, 4, 4], "4 different update.*at least 5"),
        ([], [], "0 different update"),
        ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4], "at update 0; wanted updates from 1 on"),
        ([1, 2, 3, 4, 5], [1, 2, float("nan"), 4, 5], "point 2 is nan at update 3"),
        ([1, 2, 3, 4, float("inf")], [1, 2, 3, 4, 5], "point 4 is 5.0 at update inf"),
        ([1, 2, 3, 4, 5], [2, 2, 2, 2, 2], "all 5 distances are 2"),
        ([1, 2, 3, 4, 5], [1, 2, 3], r"shape \(5,\), distances of shape \(3,\)"),
    ],
)
def test_points_that_no_law_can_be_fitted_to_are_refused(updates, distances, message):
    with pytest.raises(ValueError, match=message):
        fit_laws(updates, distances)


def planted_walks(rng, walks=60):
    """(log t)^1.5 times a factor that wanders along each walk's log log t, as walks on a landscape do."""
    t = np.exp(np.geomspace(5, 100, 12))
    wander = rng.normal(0, 0.2, (walks, 12)).cumsum(axis=1)
    return t, 0.3 * np.log(t) ** 1.5 * np.exp(wander) / np.exp(0.02 * np.arange(1, 13))


def test_the_exponent_of_log_t_is_known_to_its_standard_error():
    fits = [fit_log_power(*planted_walks(np.random.default_rng(seed)), resamples=200) for seed in range(60)]
    off = np.array([(fit.exponent - 1.5) / fit.standard_error for fit in fits])
    # 60 of them: their mean is known to 0.13, their spread to 9 %.
    assert abs(off.mean()) < 0.5
    assert 0.75 < off.std() < 1.3
    t, _ = planted_walks(np.random.default_rng(0))
    assert fits[0](t[0]) == pytest.approx(0.3 * 5**1.5, rel=0.2)


@pytest.mark.parametrize(
    ("updates", "distances", "message"),
    [
        ([2, 3, 4, 5, 6], [1, 2, 3, 4, 5], r"shape \(5,\); wanted \[walks, points\]"),
        ([2, 3, 4, 5, 6], [[1, 2, 3, 4, 5]], r"shape \(1, 5\).*at least 2 walks"),
        ([1, 3, 4, 5, 6], [[1, 2, 3, 4, 5]] * 2, "first update of 1; wanted a distance above 0 and updates above 1"),
        ([2, 3, 4, 5, 6], [[0, 2, 3, 4, 5]] * 2, "a mean distance of 0"),
        ([2, 3, 4, 5], [[1, 2, 3, 4]] * 2, "4 different update"),
    ],
)
def test_walks_without_an_exponent_are_refused(updates, distances, message):
    with pytest.raises(ValueError, match=message):
        fit_log_power(updates, distances)
