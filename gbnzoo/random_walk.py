"""Random walks on a random potential: how far from its start a walker comes in t steps, on a landscape L with
E(L(w1) - L(w2))² ~ ‖w1 - w2‖^α.

To come as far as d it must climb barriers of about d^(α/2), which takes exp(d^(α/2)/T) steps: its distance grows like
(T log t)^(2/α). Hoffer et al. 2017 (arXiv 1705.08741), section 3, hold that against the weights of a network, where it is
log t: α = 2. Sinai 1982 proved (log t)² in one dimension at α = 1; Marinari, Parisi, Ruelle and Windey 1983 (Phys. Rev.
Lett. 50, 1223) gave the scaling for other α, Bouchaud and Georges 1990 (Phys. Rep. 195, 127), section 3, for any dimension.

The walker lives on the lattice Z^N. Each step proposes one of the 2N neighbours, all alike, and goes there with the heat
bath's probability 1/(1 + exp(ΔL/T)). Three ways lead to its distance:

- stepping, `walk_line` and `walk_waves`: any dimension, but a logarithm leaves it a few decades only;
- exactly, on a line, `line_distances`: the mean distance after a random number of steps that is geometric with mean t, from
  one elimination for each t. A fixed t would differ by a factor of order 1 in t, which a law in log t does not see (as log t
  grows); in return t may be e^600, no walker is sampled, and only landscapes are left to average over;
- at low temperature, in a plane, `valley_distances`: as T goes to 0 at the same T log t, the walker is at the bottom of the
  valley that it leaves only over barriers above T log t, which flooding finds (Sinai 1982: on a line at any temperature).

NumPy alone. All draws are keyed by seed and landscape: the same arguments give the same numbers.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np
from numpy.typing import ArrayLike, NDArray

# A walker is held where it would pass a barrier within t steps with a probability below e^-HELD.
HELD = 25.0
# Beyond it 1/t is too near the smallest float64.
LAST_LOG_UPDATE = 660.0
LAST_LOG_STEP = 25.0  # hours
# How often a self-similar landscape turns: its correlation length in log‖w‖, and in angle, is 1/TURNS.
TURNS = 8.0
# Arms of lines that are folded together: enough to hide NumPy's overhead, few enough to be of like length.
ARMS_AT_ONCE = 64


@dataclass(frozen=True)
class Walks:
    """Distances from the start, by landscape.

    Args:
        alpha, dimensions, temperature, seed: of the landscapes and the walkers; the temperature in units of L's root mean
            square difference at distance 1.
        stepping: whether each distance is that of one walker after t steps, or else, on a line, the exact mean over all
            walkers on its landscape, stopped after a number of steps that is geometric with mean t, and in a plane that of
            all walkers at a temperature near 0.
        updates: steps t, float64 [points].
        distances: Euclidean, in lattice units, float64 [landscapes, points].
    """

    alpha: float
    dimensions: int
    temperature: float
    seed: int
    stepping: bool
    updates: NDArray[np.float64]
    distances: NDArray[np.float64]


@dataclass(frozen=True)
class PlaneWaves:
    """A Gaussian landscape as a sum of plane waves, L(w) = Re Σ_j c_j exp(i k_j · w).

    Args:
        frequencies: k, radians by lattice unit, float64 [waves, N].
        coefficients: c, complex128 [waves].
    """

    frequencies: NDArray[np.float64]
    coefficients: NDArray[np.complex128]

    def __call__(self, points: ArrayLike) -> NDArray[np.float64]:
        """The landscape at points [..., N]."""
        phases = np.asarray(points, dtype=np.float64) @ self.frequencies.T
        return np.cos(phases) @ self.coefficients.real - np.sin(phases) @ self.coefficients.imag


def simulate(
    alpha: float,
    dimensions: int = 1,
    *,
    landscapes: int = 400,
    seed: int = 0,
    temperature: float | None = None,
    log_updates: tuple[float, float] | None = None,
    points: int = 13,
    radius: float | None = None,
    stepping: bool | None = None,
) -> Walks:
    """Walk on many landscapes, each drawn by (seed, its index).

    Args:
        alpha: 0 < alpha ≤ 2, of landscapes as `line_potential`, in the plane `self_similar`, and by stepping `plane_waves`.
        dimensions: N. One is walked exactly and two at low temperature unless `stepping` is asked for, more by stepping.
        temperature: above 0; by default as in `regime_of`.
        log_updates: natural logarithms of the first and the last t; by default as in `regime_of`.
        points: values of t, even in the logarithm of log t.
        radius: how far the landscape goes, in lattice units. By default on the line four times what holds the walkers of 32
            other landscapes: were the landscapes themselves asked, those that hold best would be preferred. In the plane,
            which costs by its logarithm, far enough for the default updates.

    Returns:
        Walks, in the plane up to the t where one landscape in a hundred lets its walkers come to the edge.

    Raises:
        ValueError: for what no walk can be made of; on the line, too, if it is too short for one of the landscapes.
    """
    _checked_alpha(alpha)
    if dimensions < 1 or landscapes < 1 or points < 2:
        raise ValueError(
            f"{dimensions} dimensions, {landscapes} landscapes, {points} points; wanted at least 1, 1 and 2"
        )
    stepping = dimensions > 2 if stepping is None else stepping
    if not stepping and dimensions > 2:
        raise ValueError(f"a walk without stepping in {dimensions} dimensions; wanted 1 or 2, or stepping")
    usual_temperature, usual_updates = regime_of(alpha, dimensions, stepping=stepping)
    temperature = usual_temperature if temperature is None else temperature
    first, last = usual_updates if log_updates is None else log_updates
    if not (temperature > 0 and 0 < first < last):
        raise ValueError(
            f"temperature {temperature:g}, log updates from {first:g} to {last:g}; wanted a temperature above 0 and "
            "0 < first < last"
        )
    if last > LAST_LOG_UPDATE:
        raise ValueError(
            f"log updates up to {last:g}; wanted at most {LAST_LOG_UPDATE:g}, where float64 still holds 1/t"
        )
    if stepping and last > LAST_LOG_STEP:
        raise ValueError(
            f"log updates up to {last:g} by steps, one after the other; wanted at most {LAST_LOG_STEP:g}, or no --stepping"
        )
    t = np.exp(np.geomspace(first, last, points))

    def rng(i: int, stream: int = 0) -> np.random.Generator:
        return np.random.default_rng([seed, stream, i])

    if stepping:
        t = np.unique(np.round(t))
        counts = t.astype(np.int64).tolist()
        walks = (
            walk_waves(plane_waves(alpha, dimensions, rng(i)), counts, rng(i, 2), temperature=temperature)
            for i in range(landscapes)
        )
        distances = np.array([np.linalg.norm(sites, axis=1) for sites in walks])
    elif dimensions == 1:
        radius = int(
            radius or 4 * _holding_radius(alpha, temperature * (np.log(t[-1]) + HELD), [rng(i, 1) for i in range(32)])
        )
        lines = (line_potential(alpha, radius, rng(i)) for i in range(landscapes))
        distances = line_distances(lines, t, temperature=temperature)
    else:
        radii, angles = polar_mesh(radius or np.exp(7.5 + 2 / alpha * np.log(100)))
        site = np.stack((radii[:, None] * np.cos(angles), radii[:, None] * np.sin(angles)), axis=-1)
        barriers = temperature * np.log(t)
        planes = (self_similar(alpha, site, rng(i)) for i in range(landscapes))
        both = np.array([valley_distances(plane, radii, barriers) for plane in planes])
        inside = np.searchsorted(both[:, 1].mean(axis=0), 0.01, side="right")
        if inside < 2:
            raise ValueError(
                f"walkers come to the edge, {radii[-1]:.4g} away, by t = {t[0]:.3g}; wanted a larger radius"
            )
        t, distances = t[:inside], both[:, 0, :inside]
    return Walks(alpha, dimensions, temperature, seed, stepping, t, distances)


def regime_of(alpha: float, dimensions: int, *, stepping: bool) -> tuple[float, tuple[float, float]]:
    """Temperature and logarithms of the first and last t where the law shows, found by trial.

    Low temperatures, since the walk comes to it where it is held by barriers of many T; and on the line two decades of the
    distance, the last that a minute allows, since it comes to it slowly.
    """
    if stepping:
        return 0.25, (np.log(100), np.log(100_000))
    if dimensions == 2:
        return float(np.interp(alpha, [0.5, 1, 1.5, 2], [0.2, 0.5, 1, 2])), (6.0, 600.0)
    if alpha == 2:
        return 2.0, (60.0, 600.0)
    temperature = float(np.interp(alpha, [0.5, 1, 1.5], [0.25, 0.5, 0.5]))
    last = float(np.interp(alpha, [0.5, 1, 1.5], [100, 200, 600]))
    return temperature, (last / 100 ** (min(alpha, 1.5) / 2), last)


def self_similar(
    alpha: float, points: ArrayLike, rng: np.random.Generator, *, num_waves: int = 64
) -> NDArray[np.float64]:
    """Draw a landscape that looks alike at all distances from its start, L(w) = ‖w‖^(α/2) X(log ‖w‖, w/‖w‖), at points.

    X is Gaussian and stationary, with correlation exp(-32 ‖Δ‖²): a feature at distance d is about d/8 wide. All processes whose
    scale goes with the distance from a point are of this form (Lamperti 1962); E(L(w) - L(0))² = ‖w‖^α exactly, also at
    α = 2, where a landscape with such increments between any two points is a tilted plane, without a barrier.

    Args:
        alpha: 0 < alpha ≤ 2.
        points: [..., N].
        num_waves: that X is the sum of; given them it is exactly Gaussian.

    Returns:
        float64 [...].
    """
    _checked_alpha(alpha)
    points = np.asarray(points, dtype=np.float64)
    distances = np.linalg.norm(points, axis=-1, keepdims=True)
    safe = np.where(distances > 0, distances, 1)
    frequencies = TURNS * rng.normal(size=(points.shape[-1] + 1, num_waves))
    real, imaginary = rng.normal(size=(2, num_waves)) / np.sqrt(num_waves)
    waves = PlaneWaves(frequencies.T, real - 1j * imaginary)
    return distances[..., 0] ** (alpha / 2) * waves(np.concatenate((np.log(safe), points / safe), axis=-1))


def polar_mesh(radius: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Radii 1 … radius, even in their logarithm, and angles of a mesh on which a self-similar landscape is smooth."""
    spacing = 0.35 / TURNS
    return np.exp(np.arange(0, np.log(radius), spacing)), np.linspace(
        0, 2 * np.pi, int(2 * np.pi / spacing), endpoint=False
    )


def plane_waves(
    alpha: float, dimensions: int, rng: np.random.Generator, *, longest: float = 2.0**20, num_waves: int = 640
) -> PlaneWaves:
    """Draw a landscape of N dimensions with E(L(w1) - L(w2))² ~ ‖w1 - w2‖^α, 1 at distance 1.

    Wave numbers are spread evenly in their logarithm between √N 2π/longest and √N π (so that their components are as in one
    dimension), directions evenly over the sphere, and the variance of a wave's complex normal coefficient goes like |k|^-α:
    given its waves the landscape is exactly Gaussian. The power law holds from a few lattice units (at distance 1 it is still
    rounded off, by the shortest waves) to well below `longest`, where the longer waves that are missing cost a share of order
    (distance/longest)^(2 - α). At α = 2 there is no such landscape but a tilted plane; cut off at `longest` this one is the
    borderline, distance² · log(longest/distance), where tilts of all scales count alike.

    Args:
        alpha: 0 < alpha ≤ 2.
        longest: wavelength in lattice units, above 2.
        num_waves: by default 34 an octave.
    """
    _checked_alpha(alpha)
    if longest <= 2:
        raise ValueError(f"a longest wave of {longest:g} lattice units; wanted more than the shortest, which is 2")
    numbers = 2 * np.pi / longest * (longest / 2) ** ((np.arange(num_waves) + rng.random(num_waves)) / num_waves)
    numbers *= np.sqrt(dimensions)
    directions = rng.normal(size=(num_waves, dimensions))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    frequencies = directions * numbers[:, None]
    # E(L(w) - L(0))² = Σ_j 2 σ_j² (1 - E cos(k_j · w)), the expectation over directions; σ² is that of each of Re c and Im c.
    sigma = numbers ** (-alpha / 2)
    sigma /= np.sqrt(np.sum(2 * sigma**2 * (1 - _mean_cosine(numbers, dimensions))))
    noise = rng.normal(size=(2, num_waves))
    return PlaneWaves(frequencies, sigma * (noise[0] + 1j * noise[1]))


def line_potential(alpha: float, radius: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Draw a potential on the sites -radius … radius of a line with E(L(x) - L(y))² = |x - y|^α exactly, and L(0) = 0.

    It is fractional Brownian motion of Hurst exponent α/2, a plain random walk at α = 1; its increments are drawn by
    circulant embedding, which is exact (Davies and Harte 1987).

    At α = 2 that would be a straight line, without a barrier: what is drawn there is `self_similar`, with these increments
    from the start only.

    Args:
        alpha: 0 < alpha ≤ 2.

    Returns:
        float64 [2 · radius + 1].
    """
    _checked_alpha(alpha)
    if alpha == 2:
        potential = self_similar(alpha, np.arange(-radius, radius + 1)[:, None], rng)
    else:
        n = 2 * radius
        lags = np.arange(n + 1.0)
        covariance = ((lags + 1) ** alpha - 2 * lags**alpha + np.abs(lags - 1) ** alpha) / 2
        spectrum = np.fft.rfft(np.concatenate((covariance, covariance[-2:0:-1]))).real.clip(0)
        noise = rng.normal(size=(2, n + 1))
        amplitudes = (noise[0] + 1j * noise[1]) * np.sqrt(spectrum * n)
        amplitudes[[0, -1]] = noise[0][[0, -1]] * np.sqrt(spectrum[[0, -1]] * 2 * n)
        potential = np.append(0.0, np.cumsum(np.fft.irfft(amplitudes, 2 * n)[:n]))
    return potential - potential[radius]


def walk_line(
    potential: ArrayLike, updates: Sequence[int], rng: np.random.Generator, *, temperature: float = 1.0
) -> NDArray[np.int64]:
    """Step one walker along a line from its middle; a step over an end is refused.

    Args:
        potential: at the sites -radius … radius, [2 · radius + 1].
        updates: counts of steps after which to look, ascending, from 0 on.

    Returns:
        Its site after each of them, int64 [points].
    """
    potential = np.asarray(potential, dtype=np.float64)
    radius = potential.size // 2
    right, left = _hops(potential, temperature)
    # Lists, since a Python loop reads them several times faster than arrays. A uniform number below `go_left` goes left, one
    # of at least `stay` right.
    go_left, stay = np.append(0.0, left).tolist(), (1 - np.append(right, 0.0)).tolist()
    x, sites = radius, []
    for chunk in _uniforms(updates, rng):
        if chunk is None:
            sites.append(x - radius)
            continue
        for u in chunk.tolist():
            if u < go_left[x]:
                x -= 1
            elif u >= stay[x]:
                x += 1
    return np.array(sites, dtype=np.int64)


def walk_waves(
    landscape: PlaneWaves, updates: Sequence[int], rng: np.random.Generator, *, temperature: float = 1.0
) -> NDArray[np.int64]:
    """Step one walker over a landscape of any dimension, from the origin.

    A step along an axis turns each wave by a fixed angle, so that ΔL is one dot product of what the waves are at the walker's
    site with a vector by direction; no cosine is taken.

    Args:
        updates: counts of steps after which to look, ascending, from 0 on.

    Returns:
        Its site after each of them, int64 [points, N].
    """
    dimensions = landscape.frequencies.shape[1]
    turns = np.exp(1j * np.concatenate((landscape.frequencies.T, -landscape.frequencies.T)))
    # Re(z · (turn - 1)) over the pairs (Re z, Im z) as they lie in memory.
    rises = [np.ascontiguousarray((turn - 1).conj()).view(np.float64) for turn in turns]
    turns = list(turns)
    waves = landscape.coefficients.copy()
    pairs = waves.view(np.float64)
    sites, counts = [], [0] * (2 * dimensions)
    for chunk in _uniforms(updates, rng):
        if chunk is None:
            forth, back = np.array(counts).reshape(2, dimensions)
            sites.append(forth - back)
            continue
        scaled = chunk * (2 * dimensions)
        moves = scaled.astype(np.int64)
        # What is left of the number after the choice of a direction is uniform too: accept where it is below
        # 1/(1 + exp(ΔL/T)), which is where ΔL is below this.
        left = np.clip(scaled - moves, 1e-300, None)
        bounds = temperature * (np.log1p(-left) - np.log(left))
        for move, bound in zip(moves.tolist(), bounds.tolist(), strict=True):
            if rises[move].dot(pairs) < bound:
                waves *= turns[move]
                counts[move] += 1
    return np.array(sites, dtype=np.int64)


def line_distances(
    potentials: Iterable[ArrayLike], updates: ArrayLike, *, temperature: float = 1.0
) -> NDArray[np.float64]:
    """E|x| of walkers on lines, after a number of steps that is geometric with mean t; exact, to rounding, for each line.

    Seen from a site at distance r, let P be the chance to step back to r - 1 before the walk stops, K = 1 - P, and A the
    expected distance where it stops, counted as 0 where it steps back first. With s = 1/t and the hopping rates out and back,

        K_r = (s + out K_{r+1}) / (s + out K_{r+1} + back),   A_r = (s r + out A_{r+1}) / (s + out K_{r+1} + back),

    from the far end inward: nothing is subtracted, so that a chance of e^-600 keeps all its digits. The recursion starts where
    the walker comes with a chance below e^-25: passing a barrier B within t steps has at most t exp(-B/T), by reversibility.

    Args:
        potentials: each at the sites -radius … radius of a line, [2 · radius + 1]; radii may differ.
        updates: mean number of steps t, ascending, [points], 1 to e^660.

    Returns:
        float64 [lines, points].

    Raises:
        ValueError: if a line ends before the barrier that holds its walkers.
    """
    t = _checked_updates(updates)
    barriers = temperature * (np.log(t) + HELD)
    # Each line is two arms, cut where the longest walk is held.
    arms, ends = [], []
    for i, each in enumerate(potentials):
        potential = np.asarray(each, dtype=np.float64)
        radius = potential.size // 2
        for arm in (potential[radius:], potential[radius::-1]):
            end = _held_at(arm, barriers)
            if end[-1] == arm.size:
                raise ValueError(
                    f"on landscape {i} a walker may pass the end of the line, {radius:,} sites away, within "
                    f"e^{np.log(t[-1]):.4g} steps; wanted a larger radius or fewer steps"
                )
            arms.append(arm[: end[-1] + 1].copy())
            ends.append(end)
    kept, gained = np.empty((2, len(arms), t.size))
    order = sorted(range(len(arms)), key=lambda arm: -arms[arm].size)
    for start in range(0, len(order), ARMS_AT_ONCE):
        group = order[start : start + ARMS_AT_ONCE]
        kept[group], gained[group] = _fold_arms(
            [arms[i] for i in group], np.array([ends[i] for i in group]), t, temperature
        )
    to_both_sides = (-1, 2, t.size)
    return gained.reshape(to_both_sides).sum(axis=1) / (1 / t + kept.reshape(to_both_sides).sum(axis=1))


def valley_distances(
    potential: ArrayLike, radii: ArrayLike, barriers: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Distances of walkers in a plane, from its first ring, as the temperature T goes to 0 while T log t is `barriers`.

    Each valley's bottom is left in exp(barrier/T) steps, barrier what must be climbed to any lower site: in the limit surely
    before t, or surely not. The plane is flooded from the start, lowest sites of the shore first, so that the water stands
    at the least height over which each site is reached.

    Args:
        potential: on a polar mesh whose last axis is closed, [rings, angles]; the start is its first site.
        radii: of the rings, [rings].
        barriers: T log t, in units of the potential, [points].

    Returns:
        Radii of the walkers, float64, and whether they have come to the last ring by then (their radius is the one before
        it), bool; each [points].
    """
    potential = np.asarray(potential, dtype=np.float64)
    rings, angles = potential.shape
    heights = potential.ravel().tolist()
    seen = bytearray(potential.size)
    seen[0] = True
    shore = [(heights[0], 0)]
    bottom, level = 0, heights[0]
    bottoms, climbed = [], []  # what must be climbed to go on from each bottom
    while True:
        height, site = heappop(shore)
        level = max(level, height)
        ring, angle = divmod(site, angles)
        at_edge = ring == rings - 1
        if height < heights[bottom] or at_edge:
            bottoms.append(bottom)
            climbed.append(level - heights[bottom])
            bottom = site
            level = height
        if at_edge:
            break
        first = ring * angles
        for next_site in (
            site + angles,
            max(site - angles, angle),
            first + (angle + 1) % angles,
            first + (angle - 1) % angles,
        ):
            if not seen[next_site]:
                seen[next_site] = True
                heappush(shore, (heights[next_site], next_site))
    visited = np.searchsorted(np.maximum.accumulate(climbed), np.asarray(barriers), side="right")
    of_bottoms = np.asarray(radii, dtype=np.float64)[np.array(bottoms) // angles]
    return of_bottoms[np.minimum(visited, len(bottoms) - 1)], visited == len(bottoms)


def _fold_arms(
    arms: Sequence[NDArray], ends: NDArray[np.int64], t: NDArray, temperature: float
) -> tuple[NDArray, NDArray]:
    """K and A of `line_distances`, as seen from the start and times the rate of leaving it, each [arms, points].

    Args:
        arms: potentials from the start outward, longest first.
        ends: the last site where the walk of each t can be, [arms, points].
    """
    longest = arms[0].size
    out, back = np.zeros((2, longest, len(arms)))
    for i, arm in enumerate(arms):
        out[: arm.size - 1, i], back[: arm.size - 1, i] = _hops(arm, temperature)
    s = (1 / t)[:, None]
    kept, gained = np.zeros((2, t.size, len(arms)))
    # Arms that reach as far as r are the first ones, walks that do the last ones.
    reach_of_arms, reach_of_walks = -ends[:, -1], ends.max(axis=0)
    num_arms = np.searchsorted(reach_of_arms, -np.arange(longest), side="right")
    first_walk = np.searchsorted(reach_of_walks, np.arange(longest))
    for r in range(longest - 1, 0, -1):
        n, j = num_arms[r], first_walk[r]
        k, a = kept[j:, :n], gained[j:, :n]
        k *= out[r, :n]
        a *= out[r, :n]
        k += s[j:]
        a += s[j:] * r
        total = k + back[r - 1, :n]
        k /= total
        a /= total
    return (out[0] * kept).T, (out[0] * gained).T


def _held_at(arm: NDArray, barriers: NDArray) -> NDArray[np.int64]:
    """The first site of an arm whose way there climbs each barrier, ascending; the arm's size where none does. [barriers]"""
    climbed = np.maximum.accumulate(arm - np.minimum.accumulate(arm))
    return np.searchsorted(climbed, barriers)


def _holding_radius(alpha: float, barrier: float, rngs: Sequence[np.random.Generator]) -> int:
    """The least power of two at which walkers are held on both sides, on all of these landscapes."""
    radius = 4096
    states = [rng.bit_generator.state for rng in rngs]
    while True:
        for rng, state in zip(rngs, states, strict=True):
            rng.bit_generator.state = state
            line = line_potential(alpha, radius, rng)
            if any(_held_at(arm, np.array([barrier]))[0] == arm.size for arm in (line[radius:], line[radius::-1])):
                break
        else:
            return radius
        radius *= 2
        if radius > 2**20:
            raise ValueError(
                f"barriers of {barrier:.3g} lie more than {radius // 2:,} sites away at alpha {alpha:g}; wanted fewer steps "
                "or a lower temperature"
            )


def _hops(potential: NDArray, temperature: float) -> tuple[NDArray, NDArray]:
    """Chances of a step from site i of a line to i + 1 and from i + 1 to i, [sites - 1]."""
    rise = np.diff(potential) / temperature
    # exp of what is negative only, so that nothing overflows.
    small = np.exp(-np.abs(rise))
    likely, unlikely = 1 / (1 + small), small / (1 + small)
    return np.where(rise > 0, unlikely, likely) / 2, np.where(rise > 0, likely, unlikely) / 2


def _uniforms(updates: Sequence[int], rng: np.random.Generator) -> Iterator[NDArray[np.float64] | None]:
    """A number in [0, 1) for each step, in arrays of at most 2^16, and None each time that a count is reached."""
    done = 0
    for count in updates:
        if count < done:
            raise ValueError(f"looks after {done} and then {count} steps; wanted ascending counts from 0 on")
        while done < count:
            chunk = rng.random(min(count - done, 2**16))
            done += chunk.size
            yield chunk
        yield None


def _mean_cosine(wave_numbers: NDArray, dimensions: int) -> NDArray:
    """E cos(k · w) over the directions of k, at ‖w‖ = 1."""
    if dimensions == 1:
        return np.cos(wave_numbers)
    angles = (np.arange(100) + 0.5) * np.pi / 100  # to 1e-4, also where sin is not smooth at the poles
    weights = np.sin(angles) ** (dimensions - 2)
    return np.cos(wave_numbers[:, None] * np.cos(angles)) @ (weights / weights.sum())


def _checked_alpha(alpha: float) -> None:
    if not 0 < alpha <= 2:
        raise ValueError(f"alpha {alpha:g}; wanted 0 < alpha <= 2, or no landscape has these increments")


def _checked_updates(updates: ArrayLike) -> NDArray[np.float64]:
    t = np.asarray(updates, dtype=np.float64)
    if t.ndim != 1 or not t.size or not (t[0] >= 1 and np.log(t[-1]) <= LAST_LOG_UPDATE and (np.diff(t) > 0).all()):
        raise ValueError(f"updates {t}; wanted ascending counts of steps between 1 and e^{LAST_LOG_UPDATE:g}")
    return t
