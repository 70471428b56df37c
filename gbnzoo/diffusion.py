"""How far a walk has come: laws of distance against updates, fitted as rivals, so that the claim of a logarithm can fail.

Hoffer et al. 2017 (arXiv 1705.08741), section 3, find that the distance of the weights from where they started grows like
log t, t in updates: the mark of a random walk on a random potential. A walk without barriers would go like √t. NumPy alone,
for a real network's weights and for a simulated walk alike.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Law = Literal["log", "sqrt", "power"]

MIN_POINTS = 5
# Kass and Raftery 1995: a smaller difference of BIC is "not worth more than a bare mention".
TIE = 2
# t^p goes over into log t as p goes to 0: nearer than this no data tells the two apart, and the coefficients blow up.
EXPONENTS_OF_POWER = (0.005, 2.0)


@dataclass(frozen=True)
class Fit:
    """One law fitted to distances; call it with updates for the distances it says.

    Args:
        law: "log" is intercept + slope · log t (the natural logarithm), "sqrt" intercept + slope · √t, "power"
            intercept + slope · t^exponent.
        intercept: in units of the distance, at log t = 0, √t = 0 or t^exponent = 0.
        slope: distance by unit of log t, √t or t^exponent.
        exponent: fitted where the law is "power", 0.5 where it is "sqrt", None where it is "log".
        r2: share of the distances' variance that the law explains; at most 1.
        bic: Bayesian information criterion, n · log(RSS / n) + k · log n (k counts the noise's variance too: 3, and 4 for
            "power"). Only differences between laws on the same points mean something: a law that is worse by 10 has about
            e^5 times less weight (Kass and Raftery 1995 call that very strong).
    """

    law: Law
    intercept: float
    slope: float
    exponent: float | None
    r2: float
    bic: float

    def __call__(self, updates: ArrayLike) -> NDArray[np.float64]:
        """Distances at these updates (each above 0), in the same shape."""
        t = np.asarray(updates, dtype=np.float64)
        return self.intercept + self.slope * (np.log(t) if self.exponent is None else t**self.exponent)


def fit_laws(updates: ArrayLike, distances: ArrayLike) -> dict[str, Fit]:
    """Fit all three laws by least squares to the same points.

    The power law's exponent is found by a profile search: for each of 398 exponents between -2 and 2 the best line is exact,
    and the best of them is refined between its neighbours. A negative exponent is a distance that saturates.

    Assumed: independent errors of one size at each point, so that points spaced evenly in log t give each decade the same
    weight. A run's own points are not independent (the distance at t remembers that at t/2), so differences of BIC overstate
    how sure a choice is; seeds and a second run are the better evidence.

    Args:
        updates: counts of optimiser steps [n], each at least 1, n ≥ 5 and at least 5 different.
        distances: from the start of the walk [n].

    Returns:
        Fits by law: "log", "sqrt", "power".

    Raises:
        ValueError: naming what is wanted, if the points are too few, not finite, before update 1, or at one same distance.

    Source of the criterion: Schwarz 1978, Estimating the dimension of a model.
    """
    t, y = checked_points(updates, distances)
    log_t = np.log(t)
    fits = {"log": _fit("log", log_t, y), "sqrt": _fit("sqrt", np.sqrt(t), y, exponent=0.5)}

    # The Box–Cox form ((t/c)^p - 1)/p spans the same curves as t^p, and stays well scaled through p = 0.
    centre = log_t.mean()
    z = log_t - centre

    def basis(p: float) -> NDArray[np.float64]:
        return np.expm1(p * z) / p

    low, high = EXPONENTS_OF_POWER
    high = min(high, 600 / np.abs(z).max())  # t may be e^600, and e^709 is the end of float64
    grid = np.linspace(low, high, 199 + 1)
    grid = np.concatenate((-grid[::-1], grid))
    best = int(np.argmin([_rss(basis(p), y) for p in grid]))
    left, right = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    if grid[best] > 0:
        left = max(left, low)
    else:
        right = min(right, -low)
    exponent = _least(lambda p: _rss(basis(p), y), left, right)
    power = _fit("power", basis(exponent), y, exponent=exponent)
    scale = np.exp(-exponent * centre)
    fits["power"] = Fit(
        "power",
        intercept=power.intercept - power.slope / exponent,
        slope=power.slope * scale / exponent,
        exponent=exponent,
        r2=power.r2,
        bic=power.bic,
    )
    return fits


def best_law(fits: Mapping[str, Fit]) -> Fit:
    """The fit of the least BIC."""
    return min(fits.values(), key=lambda fit: fit.bic)


def best_laws(fits: Mapping[str, Fit]) -> list[str]:
    """The law of the least BIC, and those that tie with it: whose BIC is above the least by less than `TIE`."""
    least = best_law(fits).bic
    return [law for law, fit in fits.items() if fit.bic - least < TIE]


@dataclass(frozen=True)
class LogPower:
    """scale · (log t)^exponent, the law of a walk on a random potential; call it with updates for the distances it says.

    Args:
        exponent: 2/α by theory.
        standard_error: of the exponent, over landscapes.
        scale: in units of the distance, at log t = 1.
    """

    exponent: float
    standard_error: float
    scale: float

    def __call__(self, updates: ArrayLike) -> NDArray[np.float64]:
        """Distances at these updates (each above 1), in the same shape."""
        return self.scale * np.log(np.asarray(updates, dtype=np.float64)) ** self.exponent


def fit_log_power(updates: ArrayLike, distances: ArrayLike, *, resamples: int = 1000, seed: int = 0) -> LogPower:
    """Fit scale · (log t)^exponent to the mean over many walks, by least squares in the logarithm of the distance.

    The points of one walk are not independent, so the error is not taken from how they scatter about the law but from the
    bootstrap over walks (Efron 1979): the fit is repeated on as many walks drawn with replacement.

    Args:
        updates: [points], each above 1, at least 5 different.
        distances: of independent walks at these updates, [walks, points], their mean above 0; at least 2 walks.

    Raises:
        ValueError: naming what is wanted.
    """
    each = np.asarray(distances, dtype=np.float64)
    if each.ndim != 2 or len(each) < 2:
        raise ValueError(
            f"distances of shape {each.shape}; wanted [walks, points] of at least 2 walks, to know the error"
        )
    t, mean = checked_points(updates, each.mean(axis=0))
    if t.min() <= 1 or mean.min() <= 0:
        raise ValueError(
            f"a mean distance of {mean.min():g} and a first update of {t.min():g}; wanted a distance above 0 and updates "
            "above 1, since the law is of their logarithms"
        )
    x = np.log(np.log(t))
    rng = np.random.default_rng(seed)
    exponents = [
        _line(x, np.log(each[rng.integers(len(each), size=len(each))].mean(axis=0)))[1] for _ in range(resamples)
    ]
    intercept, exponent = _line(x, np.log(mean))
    return LogPower(float(exponent), float(np.std(exponents, ddof=1)), float(np.exp(intercept)))


def checked_points(updates: ArrayLike, distances: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Updates and distances as float64 [n]; raises ValueError as `fit_laws` says."""
    t, y = np.asarray(updates, dtype=np.float64), np.asarray(distances, dtype=np.float64)
    if t.ndim != 1 or t.shape != y.shape:
        raise ValueError(
            f"updates of shape {t.shape}, distances of shape {y.shape}; wanted one distance for each update"
        )
    if not (np.isfinite(t).all() and np.isfinite(y).all()):
        bad = int(np.flatnonzero(~(np.isfinite(t) & np.isfinite(y)))[0])
        raise ValueError(f"point {bad} is {y[bad]} at update {t[bad]}; wanted finite updates and distances")
    if t.size and t.min() < 1:
        raise ValueError(f"a distance at update {t.min():g}; wanted updates from 1 on, since the laws are of log t")
    if (different := len(np.unique(t))) < MIN_POINTS:
        raise ValueError(
            f"distances at {different} different update(s); wanted at least {MIN_POINTS} to tell laws apart"
        )
    if np.ptp(y) == 0:
        raise ValueError(
            f"all {y.size} distances are {y[0]:g}; wanted distances that change, or there is no law to fit"
        )
    return t, y


def _fit(law: Law, x: NDArray, y: NDArray, exponent: float | None = None) -> Fit:
    """The line of least squares through (x, y), with its R² and BIC."""
    intercept, slope = _line(x, y)
    n, rss = y.size, _rss(x, y)
    # Points that a law meets to rounding would have an arbitrary, even infinite, criterion.
    floor = n * (4 * np.finfo(np.float64).eps * np.abs(y).max()) ** 2
    num_parameters = 4 if law == "power" else 3
    bic = n * np.log(max(rss, floor) / n) + num_parameters * np.log(n)
    r2 = 1 - rss / np.sum((y - y.mean()) ** 2)
    return Fit(
        law, float(intercept), float(slope), None if exponent is None else float(exponent), float(r2), float(bic)
    )


def _line(x: NDArray, y: NDArray) -> tuple[float, float]:
    scale = np.abs(x).max()  # so that squares do not overflow
    scaled = x / scale
    centred = scaled - scaled.mean()
    slope = centred @ (y - y.mean()) / (centred @ centred)
    return y.mean() - slope * scaled.mean(), slope / scale


def _rss(x: NDArray, y: NDArray) -> float:
    """The sum of squares that the best line through (x, y) leaves."""
    intercept, slope = _line(x, y)
    return float(np.sum((y - intercept - slope * x) ** 2))


def _least(f, left: float, right: float) -> float:
    """Where a function with one minimum between left and right has it, by golden section to 1e-9 of the interval."""
    ratio = (np.sqrt(5) - 1) / 2
    a, b = right - ratio * (right - left), left + ratio * (right - left)
    f_a, f_b = f(a), f(b)
    for _ in range(45):
        if f_a <= f_b:
            right, b, f_b = b, a, f_a
            a = right - ratio * (right - left)
            f_a = f(a)
        else:
            left, a, f_a = a, b, f_b
            b = left + ratio * (right - left)
            f_b = f(b)
    return float((left + right) / 2)
