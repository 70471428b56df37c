"""Walks on a random potential: landscapes have the planted increments, walkers are Boltzmann's, laws are the known ones."""

import numpy as np
import pytest

from gbnzoo.diffusion import best_law, fit_laws, fit_log_power
from gbnzoo.random_walk import (
    PlaneWaves,
    line_distances,
    line_potential,
    plane_waves,
    polar_mesh,
    self_similar,
    simulate,
    valley_distances,
    walk_line,
    walk_waves,
)


def rng(seed=0):
    return np.random.default_rng(seed)


def transition_matrix(potential, temperature):
    """The heat bath on a box of any dimension, site by site: a proposal over the wall is refused."""
    potential = np.asarray(potential, dtype=float)
    sites = list(np.ndindex(potential.shape))
    chances = np.zeros((len(sites), len(sites)))
    for i, site in enumerate(sites):
        for axis in range(potential.ndim):
            for step in (-1, 1):
                to = tuple(x + step * (a == axis) for a, x in enumerate(site))
                if to in set(sites):
                    accept = 1 / (1 + np.exp((potential[to] - potential[site]) / temperature))
                    chances[i, sites.index(to)] = accept / (2 * potential.ndim)
        chances[i, i] = 1 - chances[i].sum()
    return chances


def distance_after_geometric_time(potential, temperature, t):
    """Σ_k q (1 - q)^k E‖x_k‖ with q = 1/(1 + t), summed step by step from the middle."""
    matrix = transition_matrix(potential, temperature)
    middle = np.array(potential.shape) // 2
    norms = np.array([np.linalg.norm(np.array(site) - middle) for site in np.ndindex(potential.shape)])
    law = np.zeros(norms.size)
    law[norms == 0] = 1
    q, total, left = 1 / (1 + t), 0.0, 1.0
    while left > 1e-13:
        total += q * left * (law @ norms)
        law, left = law @ matrix, left * (1 - q)
    return total


# ---- landscapes


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.5, 1.9])
def test_lines_have_the_increments_they_were_asked_for(alpha):
    lines = np.array([line_potential(alpha, 300, rng(i)) for i in range(2000)])
    assert (lines[:, 300] == 0).all()
    for x, y in ((0, 1), (0, 600), (300, 310), (250, 350)):
        # The square of a normal variable has a relative spread of √2: 2000 of them know their mean to 3.2 %.
        assert np.mean((lines[:, x] - lines[:, y]) ** 2) == pytest.approx((y - x) ** alpha, rel=0.13)


@pytest.mark.parametrize(("alpha", "dimensions"), [(0.5, 2), (1.0, 1), (2.0, 1), (2.0, 3)])
def test_self_similar_landscapes_look_alike_at_all_distances(alpha, dimensions):
    """From the start the planted increments, and between distances d and d·e^x the correlation exp(-32 x²), at each d."""
    direction = rng(1).normal(size=dimensions)
    distances = np.array([0, 1, 1.1, 40, 44, 1e6, 1.1e6])
    points = np.outer(distances, direction / np.linalg.norm(direction))
    heights = np.array([self_similar(alpha, points, rng(i)) for i in range(3000)])
    assert (heights[:, 0] == 0).all()
    scaled = heights[:, 1:] / distances[1:] ** (alpha / 2)
    # The square of a normal variable has a relative spread of √2, and a sum of 64 random waves one 2 % larger.
    assert np.mean(scaled**2, axis=0) == pytest.approx(1, abs=0.11)
    correlations = np.mean(scaled[:, ::2] * scaled[:, 1::2], axis=0)
    assert correlations == pytest.approx(np.exp(-32 * np.log(1.1) ** 2), abs=0.11)
    apart = np.mean(scaled[:, 0] * scaled[:, 2])
    assert apart == pytest.approx(0, abs=0.08)


def test_a_line_at_alpha_2_has_the_increments_from_its_start():
    lines = np.array([line_potential(2.0, 100, rng(i)) for i in range(1000)])
    assert (lines[:, 100] == 0).all()
    assert np.mean(lines**2, axis=0)[[0, 40, 101, 200]] == pytest.approx([100**2, 60**2, 1, 100**2], rel=0.18)


def test_a_polar_mesh_resolves_a_self_similar_landscape():
    """A step of the mesh changes X by an eighth of its mean square at most: correlation above 15/16."""
    radii, angles = polar_mesh(1000.0)
    assert (radii[0], angles[0]) == (1, 0)
    assert 950 < radii[-1] < 1000
    for steps in (np.diff(np.log(radii)), np.diff(angles), [2 * np.pi - angles[-1]]):
        assert np.max(steps) < np.sqrt(np.log(16 / 15) / 32)
        assert steps == pytest.approx(steps[0])


@pytest.mark.parametrize(("alpha", "dimensions"), [(0.5, 1), (0.5, 3), (1.0, 2), (1.5, 1), (1.5, 10), (1.9, 2)])
def test_plane_waves_have_the_planted_alpha_in_any_direction(alpha, dimensions):
    distances = np.array([1, 4, 16, 64, 256, 1024])
    direction = rng(1).normal(size=dimensions)
    points = rng(2).normal(size=dimensions) + np.outer(np.append(0, distances), direction / np.linalg.norm(direction))
    squares = np.zeros(distances.size)
    for i in range(400):
        heights = plane_waves(alpha, dimensions, rng([3, i]), num_waves=400)(points)
        squares += (heights[1:] - heights[0]) ** 2 / 400
    assert squares[0] == pytest.approx(1, rel=0.28)
    # Over two and a half decades; 7 % of error at each end are 0.018 of slope. The lattice rounds off what is nearest.
    slope = np.polyfit(np.log(distances[1:]), np.log(squares[1:]), 1)[0]
    assert slope == pytest.approx(alpha, abs=0.08)


def test_plane_waves_are_the_sum_they_say():
    landscape = plane_waves(1.0, 2, rng(), num_waves=3)
    point = np.array([1.5, -2.0])
    total = sum(
        c * np.exp(1j * (k @ point)) for k, c in zip(landscape.frequencies, landscape.coefficients, strict=True)
    )
    assert landscape(point) == pytest.approx(total.real)


# ---- walkers


def test_a_walker_on_a_line_is_boltzmanns():
    potential, temperature = np.array([0.3, -0.7, 1.1, 0.0, -0.2]), 0.6
    sites = walk_line(potential, range(0, 400_000, 20), rng(), temperature=temperature)
    shares = np.bincount(sites + 2, minlength=5) / sites.size
    boltzmann = np.exp(-potential / temperature)
    assert shares == pytest.approx(boltzmann / boltzmann.sum(), abs=0.02)
    # Detailed balance, not just its consequence: as many steps from each site to its neighbour as back.
    every = walk_line(potential, range(100_000), rng(1), temperature=temperature) + 2
    there = np.bincount(5 * every[:-1] + every[1:], minlength=25).reshape(5, 5)
    assert abs(there - there.T).max() <= 1
    chances = there / there.sum(axis=1, keepdims=True)
    assert chances == pytest.approx(transition_matrix(potential, temperature), abs=0.02)


def test_a_walker_on_waves_is_boltzmanns():
    """Waves of period 4 make a landscape of 16 sites on a torus."""
    waves = PlaneWaves(np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 2.0]]) * np.pi / 2, np.array([0.5 + 0.2j, -0.3j, 0.4]))
    temperature = 0.5
    sites = walk_waves(waves, range(0, 150_000, 15), rng(), temperature=temperature) % 4
    shares = np.bincount(4 * sites[:, 0] + sites[:, 1], minlength=16) / len(sites)
    boltzmann = np.exp(-waves(np.stack(np.divmod(np.arange(16), 4), axis=-1)) / temperature)
    assert shares == pytest.approx(boltzmann / boltzmann.sum(), abs=0.02)
    every = walk_waves(waves, range(50_000), rng(1), temperature=temperature) % 4
    every = 4 * every[:, 0] + every[:, 1]
    there = np.bincount(16 * every[:-1] + every[1:], minlength=256).reshape(16, 16)
    # On a torus a walk may go round, so that only the spread of a count is left: n steps there, n ± √(2n) back.
    assert (abs(there - there.T) <= 6 * np.sqrt(there + there.T + 1)).all()


@pytest.mark.parametrize("dimensions", [1, 3])
def test_without_a_potential_the_distance_goes_like_the_root_of_t(dimensions):
    """Half the proposals are accepted, so E‖x‖² = t/2, and √t beats the logarithm."""
    counts = np.unique(np.geomspace(10, 2000, 12).round().astype(int))
    flat = PlaneWaves(np.ones((1, dimensions)), np.zeros(1, dtype=complex))
    walks = [
        walk_line(np.zeros(4001), counts, rng(i))[:, None] if dimensions == 1 else walk_waves(flat, counts, rng(i))
        for i in range(200)
    ]
    mean_squares = np.mean(np.sum(np.square(walks), axis=2), axis=0)
    # A χ² of N degrees of freedom: relative spread √(2/N) for one walk.
    assert mean_squares == pytest.approx(counts / 2, rel=4 * np.sqrt(2 / dimensions / 200))
    fits = fit_laws(counts, np.sqrt(mean_squares))
    assert fits["power"].exponent == pytest.approx(0.5, abs=0.12)
    assert fits["sqrt"].bic < fits["log"].bic - 10
    assert best_law(fits).law != "log"


# ---- exact distances


@pytest.mark.parametrize("temperature", [0.4, 1.5])
def test_distances_on_a_line_are_the_sum_over_all_steps(temperature):
    sites = np.arange(-12, 13)
    potentials = [rng(i).normal(0, 1, 25) + 0.8 * abs(sites) ** 1.5 * temperature for i in range(3)]
    wanted = [[distance_after_geometric_time(v, temperature, t) for t in (1.0, 7.0, 40.0)] for v in potentials]
    assert line_distances(potentials, [1.0, 7.0, 40.0], temperature=temperature) == pytest.approx(
        np.array(wanted), rel=1e-9
    )


def test_after_very_long_walks_distances_are_boltzmanns():
    """t = e^600: nothing is lost to rounding."""
    sites = np.arange(-60, 61)
    line = rng(1).normal(0, 2, 121).cumsum() * 0 + rng(2).normal(0, 3, 121) + 12.0 * abs(sites)
    weights = np.exp(-(line - line.min()))
    assert line_distances([line], [np.exp(600.0)])[0, 0] == pytest.approx(
        weights @ abs(sites) / weights.sum(), rel=1e-9
    )


def test_walkers_at_low_temperature_are_where_barriers_leave_them():
    """Heights written by hand on 6 rings of 3 sites: what is climbed from each bottom to a lower site, at the best pass."""
    wall = 99.0
    plane = np.array(
        [
            [0.0, wall, wall],
            [1.5, wall, wall],  # climbed: 1.5, to a lower valley
            [-1.0, 4.0, wall],
            [wall, 0.5, wall],  # reached round the side, over 4: 5 from -1
            [wall, -3.0, 0.0],  # a bottom; 0 is no lower
            [wall, wall, 2.0],  # the edge, 5 from -3
        ]
    )
    radii = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    distances, at_edge = valley_distances(plane, radii, [0.0, 1.4, 1.6, 4.9, 5.1, 8.0])
    assert distances.tolist() == [1, 1, 3, 3, 5, 5]
    assert at_edge.tolist() == [False, False, False, False, True, True]


def test_at_low_temperature_the_exact_walk_is_in_its_valley():
    """A line walled off on one side is a plane of one angle: as T goes to 0 both ways give one distance."""
    for seed in range(5):
        arm = line_potential(1.0, 400, rng(seed))[400:]
        line = np.concatenate((np.full(400, 1e6), arm))
        barriers = np.array([1.0, 2.0, 3.5])
        wanted, at_edge = valley_distances(arm[:, None], np.arange(401.0), barriers)
        assert not at_edge.any()
        exact = line_distances([line], np.exp(barriers / 0.01), temperature=0.01)[0]
        assert exact == pytest.approx(wanted, rel=0.05)


def test_a_stepped_walker_comes_as_far_as_the_exact_distance():
    """The same landscape walked both ways: 1,500 walkers stopped at geometric times of mean 60."""
    potential = line_potential(1.0, 3000, rng(4))
    exact = line_distances([potential], [60.0])[0, 0]
    times = rng(5).geometric(1 / 61, 1500) - 1
    stepped = [abs(walk_line(potential, [t], rng([6, i]))[0]) for i, t in enumerate(times)]
    assert np.mean(stepped) == pytest.approx(exact, abs=4 * np.std(stepped) / np.sqrt(1500))


# ---- laws


def test_sinais_law():
    """E|x| of Sinai's walk tends to 5/6 (T log t)²: the mean of Kesten's and Golosov's law of 1986."""
    walks = simulate(1.0, landscapes=120, temperature=0.5, log_updates=(12, 60), radius=2**15)
    fit = fit_log_power(walks.updates, walks.distances)
    assert fit.exponent == pytest.approx(2, abs=3 * fit.standard_error)
    assert fit.standard_error < 0.15
    last = walks.distances[:, -1] / (0.5 * 60) ** 2
    assert last.mean() == pytest.approx(5 / 6, abs=3 * last.std() / np.sqrt(120))
    fits = fit_laws(walks.updates, walks.distances.mean(axis=0))
    assert fits["sqrt"].r2 < 0.7


@pytest.mark.slow
@pytest.mark.parametrize("dimensions", [1, 2])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.5, 2.0])
def test_the_exponent_of_log_t_is_2_over_alpha(alpha, dimensions):
    walks = simulate(alpha, dimensions, landscapes=200)
    fit = fit_log_power(walks.updates[6:], walks.distances[:, 6:])
    assert fit.exponent == pytest.approx(2 / alpha, abs=3 * fit.standard_error)
    assert fit.standard_error < 0.15 / alpha


def test_in_a_plane_at_alpha_2_the_distance_goes_like_log_t():
    walks = simulate(2.0, 2, landscapes=10)
    fit = fit_log_power(walks.updates, walks.distances)
    assert fit.exponent == pytest.approx(1, abs=3 * fit.standard_error)
    assert fit.standard_error < 0.06


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_walks_are_a_function_of_their_seed(dimensions):
    settings = {"landscapes": 2, "log_updates": (2, 5), "points": 3, "radius": 5000.0 if dimensions == 2 else None}
    walks = simulate(1.0, dimensions, **settings)
    assert walks.distances.shape == (2, 3)
    assert (walks.distances == simulate(1.0, dimensions, **settings).distances).all()
    assert (walks.distances[0] != walks.distances[1]).any()
    assert (walks.distances != simulate(1.0, dimensions, **settings, seed=1).distances).any()
    # A landscape is drawn by its index: more of them leave the first as they were.
    assert (walks.distances[0] == simulate(1.0, dimensions, **(settings | {"landscapes": 1})).distances[0]).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 2.5}, "alpha 2.5; wanted 0 < alpha <= 2"),
        ({"alpha": 1, "dimensions": 3, "stepping": False}, "a walk without stepping in 3 dimensions"),
        ({"alpha": 1, "dimensions": 3, "log_updates": (5, 100)}, "log updates up to 100 by steps"),
        ({"alpha": 1, "temperature": 0.0}, "temperature 0, log"),
        ({"alpha": 1, "log_updates": (5, 5)}, "0 < first < last"),
        ({"alpha": 1, "log_updates": (5, 700)}, "log updates up to 700; wanted at most 660"),
        ({"alpha": 1, "radius": 50}, "landscape 0 a walker may pass the end of the line, 50 sites away"),
        ({"alpha": 1, "dimensions": 2, "radius": 3}, r"come to the edge, 2\.\d+ away"),
    ],
)
def test_walks_that_cannot_be_made_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        simulate(**{"landscapes": 2, "points": 3} | arguments)


def test_looks_are_ascending():
    with pytest.raises(ValueError, match="after 5 and then 3 steps"):
        walk_line(np.zeros(11), [5, 3], rng())
