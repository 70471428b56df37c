"""Estimators of a loss's surroundings against cases with a known answer, and a network's second derivative."""

import itertools
import math

import numpy as np
import pytest
import timm
import torch
from torch import nn

import gbnzoo  # noqa: F401
from gbnzoo import diagnostics
from gbnzoo.diagnostics import Landscape, fit_potential, loss_differences, noise_scale, sharpness, top_eigenvalues
from gbnzoo.norm import GhostBatchNorm1d, GhostBatchNorm2d


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_symmetric(eigenvalues, seed=0):
    """A float64 matrix with these eigenvalues."""
    n = len(eigenvalues)
    basis, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))
    return torch.from_numpy(basis @ np.diag(eigenvalues) @ basis.T)


def quadratic(matrix, offset=0.0):
    """offset + ½ xᵀHx and its gradient."""
    return lambda x: (offset + 0.5 * (x @ matrix @ x).item(), matrix @ x)


# ---- the random potential


def test_alpha_is_4_around_a_minimum_and_2_on_a_slope():
    distances = np.geomspace(1e-3, 1e-1, 8)
    matrix = random_symmetric(np.linspace(0.1, 3, 40))
    slope = torch.from_numpy(np.random.default_rng(1).normal(size=40))
    for loss, alpha in ((lambda x: quadratic(matrix, 2.0)(x)[0], 4), (lambda x: (slope @ x).item(), 2)):
        point = torch.zeros(40, dtype=torch.float64)
        differences = loss_differences(loss, point, distances, 20, generator())
        found = fit_potential(distances, differences, np.random.default_rng(0))
        for estimate in (found.alpha, found.alpha_of_std):
            assert estimate.value == pytest.approx(alpha, abs=1e-9)
            assert estimate.low == pytest.approx(alpha, abs=1e-9)
            assert estimate.high == pytest.approx(alpha, abs=1e-9)
        assert (found.alpha_near, found.alpha_far) == pytest.approx((alpha, alpha), abs=1e-9)


def test_differences_are_along_unit_vectors():
    """(|w + d·v| − |w|) from the law of cosines: at w = 0 it is d."""
    distances = [0.5, 1.0, 2.0, 4.0]
    found = loss_differences(lambda x: x.norm().item(), torch.zeros(1000), distances, 3, generator())
    assert found == pytest.approx(np.array([distances] * 3), rel=1e-5)


def test_where_no_one_power_holds_the_halves_differ():
    """ΔL = d + 100·d³ is a slope near by and a cube farther out: E(ΔL)² goes from d² to d⁶."""
    d = np.geomspace(1e-4, 1e2, 40)
    found = fit_potential(d, np.outer([1.0, 2.0], d + 100 * d**3), np.random.default_rng(0))
    assert found.alpha_near < 3
    assert found.alpha_far > 5.9


@pytest.mark.parametrize("alpha", [0.6, 1.0, 1.6])
def test_a_planted_alpha_lies_in_its_interval(alpha):
    """Fractional Brownian motion along each direction, E(ΔL)² = d^α exactly, drawn through its covariance's Cholesky
    factor: of 60 intervals of 95 % at least 51 hold α (fewer has probability 0.001), and they average to it."""
    d = np.geomspace(0.01, 1, 10)
    covariance = 0.5 * (d[:, None] ** alpha + d**alpha - np.abs(d[:, None] - d) ** alpha)
    factor = np.linalg.cholesky(covariance)
    rng = np.random.default_rng(3)
    found = [fit_potential(d, rng.normal(size=(60, 10)) @ factor.T, rng, resamples=300).alpha for _ in range(60)]
    assert sum(e.low <= alpha <= e.high for e in found) >= 51
    assert np.mean([e.value for e in found]) == pytest.approx(alpha, abs=4 * np.std([e.value for e in found]) / 60**0.5)
    assert found[0].high - found[0].low < 0.5


def test_alpha_of_random_landscapes_in_many_dimensions():
    """Sums of waves, octave by octave with amplitude ∝ wavelength^(α/2) (Weierstrass and Mandelbrot): E(ΔL)² ~ d^α for
    distances well within the octaves' range. Seen from one point, L(w) is in every difference but not in the deviation."""
    alpha, n = 1.0, 30
    frequencies = np.repeat(2.0 ** np.arange(-6, 12, 0.5), 6)
    distances, found = np.geomspace(0.01, 1, 8), []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        waves = rng.normal(size=(len(frequencies), n)) * frequencies[:, None]
        phases = rng.uniform(0, 2 * np.pi, len(frequencies))
        amplitudes = frequencies ** (-alpha / 2)

        def loss(x, amplitudes=amplitudes, waves=waves, phases=phases):
            return float(amplitudes @ np.cos(waves @ x.numpy() + phases))

        point = torch.from_numpy(rng.normal(size=n))
        differences = loss_differences(loss, point, distances, 30, generator(seed))
        found.append(fit_potential(distances, differences, rng, resamples=300))
    for name in ("alpha", "alpha_of_std"):
        values = np.array([getattr(each, name).value for each in found])
        assert values.mean() == pytest.approx(alpha, abs=4 * values.std(ddof=1) / 10**0.5)
        assert values.std() < 0.25
    assert sum(each.alpha_of_std.low <= alpha <= each.alpha_of_std.high for each in found) >= 7


@pytest.mark.parametrize(
    ("distances", "differences", "message"),
    [
        ([1, 2, 3], np.ones((5, 3)), "at least 4 distances"),
        ([1, 2, 3, 4], np.ones((1, 4)), "2 directions"),
        ([1, 2, 3, 4], np.zeros((5, 4)), "does not change within distance 1"),
        ([1, 2, 3, 4], [[1, 2, math.inf, math.nan], [2, 3, 4, 5]], "not finite at distance 3"),
    ],
)
def test_what_makes_no_alpha(distances, differences, message):
    with pytest.raises(ValueError, match=message):
        fit_potential(distances, differences, np.random.default_rng(0))


# ---- sharpness


def test_sharpness_of_a_quadratic_with_axes_is_the_closed_form():
    """The maximum moves each weight away from 0 by all that its side of the box allows."""
    h, x, epsilon = np.array([0.5, 3.0, 10.0]), np.array([0.2, -1.5, 0.7]), 1e-2
    found = sharpness(
        quadratic(torch.diag(torch.from_numpy(h)), 1.0), torch.from_numpy(x), generator(), epsilon=epsilon
    )
    moved = np.abs(x) + epsilon * (np.abs(x) + 1)
    loss, highest = 1 + 0.5 * h @ x**2, 1 + 0.5 * h @ moved**2
    assert found.loss == pytest.approx(loss, rel=1e-12)
    assert found.max_loss == pytest.approx(highest, rel=1e-12)
    assert found.percent == pytest.approx(100 * (highest - loss) / (1 + loss), rel=1e-9)


def test_at_an_exact_minimum_the_search_still_finds_the_corner():
    h = np.array([0.5, 3.0, 10.0])
    found = sharpness(quadratic(torch.diag(torch.from_numpy(h))), torch.zeros(3, dtype=torch.float64), generator())
    assert found.percent == pytest.approx(100 * 0.5 * h.sum() * 1e-6, rel=1e-9)


def test_sharpness_with_coupled_weights_is_the_best_corner():
    matrix = random_symmetric([0.1, 0.5, 1, 2, 4, 8, 16, 32])
    x = torch.linspace(-1, 1, 8, dtype=torch.float64)
    loss_of = quadratic(matrix)
    found = sharpness(loss_of, x, generator(), epsilon=0.1)
    corners = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=8)), dtype=torch.float64)
    best = max(loss_of(x + corner * 0.1 * (x.abs() + 1))[0] for corner in corners)
    assert found.max_loss == pytest.approx(best, rel=1e-12)


def test_sharpness_in_a_subspace_is_the_best_corner_of_its_box(monkeypatch):
    columns = torch.from_numpy(np.random.default_rng(5).normal(size=(30, 6)))
    monkeypatch.setattr(diagnostics, "_random_basis", lambda point, subspace, generator: columns.T)
    matrix, x = random_symmetric(np.linspace(0.1, 3, 30)), torch.linspace(-2, 1, 30, dtype=torch.float64)
    loss_of = quadratic(matrix)
    found = sharpness(loss_of, x, generator(), epsilon=1e-2, subspace=6)
    side = 1e-2 * (np.abs(np.linalg.pinv(columns.numpy()) @ x.numpy()) + 1)
    corners = np.array(list(itertools.product((-1.0, 1.0), repeat=6))) * side
    best = max(loss_of(x + columns @ torch.from_numpy(corner))[0] for corner in corners)
    assert found.max_loss == pytest.approx(best, rel=1e-12)


def test_the_subspace_has_standard_normal_directions_and_its_limit_is_told():
    basis = diagnostics._random_basis(torch.zeros(20_000), 5, generator())
    # Dot products of independent standard normal vectors: n on the diagonal, ±√n off it.
    gram = (basis @ basis.T).numpy()
    assert np.diag(gram) / 20_000 == pytest.approx(np.ones(5), abs=0.05)
    assert np.abs(gram - np.diag(np.diag(gram))).max() < 5 * 20_000**0.5
    with pytest.raises(ValueError, match=r"subspace of 1000000 directions .* would fit"):
        diagnostics._random_basis(torch.zeros(20_000_000), 1_000_000, generator())


def test_a_cubic_beyond_its_maximum_is_not_overshot():
    """f = x − x³ rises up to 1/√3 and falls after: a corner at 1 lies lower than the point at which to stop."""
    found = sharpness(
        lambda x: ((x - x**3).sum().item(), 1 - 3 * x**2), torch.zeros(1, dtype=torch.float64), generator(), epsilon=1.0
    )
    highest = 2 / 3 / 3**0.5
    assert 0.9 * highest < found.max_loss <= highest


# ---- curvature


def test_top_eigenvalues_are_those_of_the_matrix():
    eigenvalues = [*np.linspace(-5, 1, 197), 4.0, 9.0, 20.0]
    matrix = random_symmetric(eigenvalues)
    found = top_eigenvalues(lambda v: matrix @ v, torch.zeros(200, dtype=torch.float64), generator(), count=3)
    assert found.eigenvalues == pytest.approx((20, 9, 4), rel=1e-2)
    assert found.products < 100
    single = matrix.float()
    found = top_eigenvalues(lambda v: single @ v, torch.zeros(200), generator(), count=3)
    assert found.eigenvalues == pytest.approx((20, 9, 4), rel=1e-2)


def test_no_convergence_and_no_finite_product_are_told():
    matrix = random_symmetric(np.linspace(0, 1, 500))
    point = torch.zeros(500, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"of 5 eigenvalues .* may converge"):
        top_eigenvalues(lambda v: matrix @ v, point, generator(), tolerance=1e-9, max_restarts=1)
    with pytest.raises(ValueError, match="not finite"):
        top_eigenvalues(lambda v: v / 0, point, generator())


# ---- a network


def small_network(seed=0):
    """Convolution, ghost norms of both dimensions, and activations without kinks, so that differences converge."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        GhostBatchNorm2d(3, ghost_batch_size=8),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(48, 5),
        GhostBatchNorm1d(5, ghost_batch_size=8),
        nn.Tanh(),
        nn.Dropout(0.5),
        nn.Linear(5, 4),
    )
    model(torch.randn(16, 2, 4, 4))  # running statistics that are not those of the start
    batches = [(torch.randn(8, 2, 4, 4), torch.randint(4, (8,))) for _ in range(3)]
    return model, batches


def in_float64(model, batches):
    return model.double(), [(images.double(), labels) for images, labels in batches]


@pytest.mark.parametrize("takes_batch_statistics", [False, True])
def test_hessian_product_is_the_difference_of_float64_gradients(takes_batch_statistics):
    """In float32 the ghost norm is the compiled kernel where there is one; the expected value takes torch's operators,
    differentiates once, and not even that by our code: the gradient is a central difference of losses."""
    single = Landscape(*small_network(), takes_batch_statistics=takes_batch_statistics)
    vector = torch.randn(single.point.shape, generator=generator(1))
    product = single.hessian_product(vector)

    model, batches = in_float64(*small_network())

    def loss(weights):
        twin = {name: value.clone() for name, value in model.state_dict().items()}
        offset = 0
        for name, parameter in model.named_parameters():
            twin[name] = weights[offset : offset + parameter.numel()].view_as(parameter)
            offset += parameter.numel()
        total = 0.0
        for images, labels in batches:
            x = images
            for index, module in enumerate(model):
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    mean, var = twin[f"{index}.running_mean"], twin[f"{index}.running_var"]
                    if takes_batch_statistics:
                        dims = [d for d in range(x.dim()) if d != 1]
                        mean, var = x.mean(dims), x.var(dims, correction=0)
                    shape = (1, -1) + (1,) * (x.dim() - 2)
                    x = (x - mean.view(shape)) / (var.view(shape) + module.eps).sqrt()
                    x = x * twin[f"{index}.weight"].view(shape) + twin[f"{index}.bias"].view(shape)
                elif isinstance(module, nn.Conv2d):
                    x = nn.functional.conv2d(x, twin[f"{index}.weight"], twin[f"{index}.bias"], padding=1)
                elif isinstance(module, nn.Linear):
                    x = x @ twin[f"{index}.weight"].T + twin[f"{index}.bias"]
                elif not isinstance(module, nn.Dropout):
                    x = module(x)
            total += nn.functional.cross_entropy(x, labels, reduction="sum").item()
        return total / 24

    point, vector = single.point.double(), vector.double()
    assert single.loss(single.point) == pytest.approx(loss(point), rel=1e-5)
    h = 1e-4
    with torch.no_grad():
        picked = torch.randperm(len(point), generator=generator(2))[:12]
        for i in picked:
            unit = torch.zeros_like(point)
            unit[i] = 1.0
            corners = [loss(point + h * (a * unit + b * vector)) for a in (1, -1) for b in (1, -1)]
            expected = (corners[0] - corners[1] - corners[2] + corners[3]) / (4 * h * h)
            assert product[i].item() == pytest.approx(expected, abs=2e-4 * product.abs().max().item() + 1e-6)


def test_gradient_and_loss_are_of_all_images_in_any_batches():
    model, batches = in_float64(*small_network())
    one = Landscape(model, [tuple(torch.cat(parts) for parts in zip(*batches, strict=True))])
    three = Landscape(model, batches)
    weights = three.point + 0.1
    assert three.loss(weights) == pytest.approx(one.loss(weights), rel=1e-12)
    loss, gradient = three.loss_and_gradient(weights)
    assert loss == pytest.approx(three.loss(weights), rel=1e-12)
    torch.testing.assert_close(gradient, one.loss_and_gradient(weights)[1], rtol=1e-10, atol=1e-12)


def test_a_landscape_leaves_the_network_as_it_was():
    model, batches = small_network()
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    landscape = Landscape(model, batches, takes_batch_statistics=True)
    twice = [landscape.loss(landscape.point + 1), landscape.loss(landscape.point + 1)]
    landscape.loss_and_gradient(landscape.point - 1)
    landscape.hessian_product(torch.ones_like(landscape.point))
    list(landscape.batch_gradients())
    assert twice[0] == twice[1]  # no dropout
    assert [module.training for module in model.modules()] == modes
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("name", ["resnet8_thin_gbn", "test_vit2", "test_efficientnet_gbn"])
def test_networks_can_be_differentiated_twice(name):
    """The product is symmetric, uᵀ(Hv) = vᵀ(Hu), which no derivative with a missing term would be."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4)
    size = model.pretrained_cfg["input_size"][-1]
    channels = model.pretrained_cfg["input_size"][0]
    landscape = Landscape(
        model,
        [(torch.randn(4, channels, min(size, 160), min(size, 160)), torch.arange(4))],
        takes_batch_statistics=True,
    )
    u, v = (torch.randn(landscape.point.shape, generator=generator(seed)) for seed in (0, 1))
    u_h_v, v_h_u = torch.dot(u, landscape.hessian_product(v)), torch.dot(v, landscape.hessian_product(u))
    assert u_h_v.item() != 0
    assert u_h_v.item() == pytest.approx(v_h_u.item(), rel=1e-2)


def test_an_operator_without_second_derivative_is_named():
    model = nn.Sequential(nn.Linear(3, 2), nn.Hardsigmoid())
    landscape = Landscape(model, [(torch.ones(2, 3), torch.tensor([0, 1]))])
    with pytest.raises(ValueError, match=r"cannot differentiate Sequential twice: .*hardsigmoid"):
        landscape.hessian_product(torch.ones_like(landscape.point))


# ---- gradient noise


def planted_gradients(gradient, deviations, ghosts, ghost_batch_size, rng):
    """Mean gradients of ghosts, of samples N(gradient, diag(deviations²))."""
    noise = rng.normal(size=(ghosts, len(gradient))) * deviations / ghost_batch_size**0.5
    rows = torch.from_numpy(gradient + noise)
    return lambda: iter(rows)


def test_noise_scale_of_planted_gradients():
    """tr Σ = 40·4 = 160, |G|² = 2, so the scale is 80 samples: unbiased parts, and intervals that hold them. Of 200 intervals
    of 95 % fewer than 180 hold the value with probability 0.002."""
    rng = np.random.default_rng(0)
    gradient = np.zeros(40)
    gradient[:2] = 1.0
    deviations = np.full(40, 2.0)
    found = [noise_scale(planted_gradients(gradient, deviations, 60, 8, rng), 8) for _ in range(200)]
    for name, truth in (("squared_gradient", 2.0), ("trace", 160.0)):
        values = np.array([getattr(each, name).value for each in found])
        assert values.mean() == pytest.approx(truth, abs=4 * values.std() / 200**0.5)
    assert np.median([each.scale.value for each in found]) == pytest.approx(80, rel=0.05)
    for name, truth in (("squared_gradient", 2.0), ("trace", 160.0), ("scale", 80.0)):
        held = sum(getattr(each, name).low <= truth <= getattr(each, name).high for each in found)
        assert held >= 180, name


def test_noise_alone_has_no_upper_end():
    rng = np.random.default_rng(1)
    found = [noise_scale(planted_gradients(np.zeros(500), np.ones(500), 30, 4, rng), 4) for _ in range(40)]
    assert sum(each.scale.high == math.inf for each in found) >= 36
    assert {each.scale.value == math.inf for each in found} == {True, False}  # |G|² comes out on both sides of 0
    assert np.mean([each.squared_gradient.value for each in found]) == pytest.approx(0, abs=0.2)
    assert all(each.scale.low > 20 for each in found)


def test_noise_scale_of_a_linear_model_is_that_of_its_samples():
    """One sample a ghost: |G|² and tr Σ from the matrix of all samples' gradients, (p − y)xᵀ for softmax regression."""
    torch.manual_seed(0)
    model = nn.Linear(6, 3, bias=False).double()
    images, labels = torch.randn(50, 6, dtype=torch.float64) + 1, torch.randint(3, (50,))
    landscape = Landscape(model, [(images[i : i + 1], labels[i : i + 1]) for i in range(50)])
    found = noise_scale(landscape.batch_gradients, 1)
    error = (model(images).softmax(1) - nn.functional.one_hot(labels, 3)).detach()
    rows = (error[:, :, None] * images[:, None, :]).flatten(1).numpy()
    trace = np.trace(np.cov(rows, rowvar=False))
    mean = rows.mean(0)
    assert found.trace.value == pytest.approx(trace, rel=1e-10)
    assert found.squared_gradient.value == pytest.approx(mean @ mean - trace / 50, rel=1e-10)
    assert found.scale.value == pytest.approx(trace / (mean @ mean - trace / 50), rel=1e-10)


def test_too_few_ghosts_and_no_noise_are_told():
    rows = torch.ones(5, 3)
    with pytest.raises(ValueError, match=r"2 ghost\(s\) of 8 samples: .* at least 3"):
        noise_scale(lambda: iter(rows[:2]), 8)
    with pytest.raises(ValueError, match="no noise"):
        noise_scale(lambda: iter(rows), 8)
