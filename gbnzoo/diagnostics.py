"""What a loss is like around a point: random potential, sharpness, curvature, gradient noise. Estimators on plain functions.

A point is the vector of all weights, [n]. A loss is a function of it, and each estimator is told in its arguments what it
asks of one, so that a case with a known answer can stand in for a network; `Landscape` makes them of a network and images.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import psutil
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parameters_to_vector

Batch = tuple[Tensor, Tensor]  # images [b, C, H, W]; labels int64 [b], or shares of the classes [b, classes]
Loss = Callable[[Tensor], float]
LossAndGradient = Callable[[Tensor], tuple[float, Tensor]]

_Z95 = 1.959964  # of a two-sided interval of 95 %
_HALVINGS = 6


class Landscape:
    """The mean loss of a network over some images as a function of its weights.

    Dropout and drop path are off always. BatchNorm normalises by its running statistics, or, with `takes_batch_statistics`,
    by those of each batch, which is then one ghost; its running statistics are left as they were. Frozen parameters are no
    part of the weights.

    Args:
        model: maps images to logits; its weights are where the landscape is looked at from, and are put back by `close`.
        batches: images and labels, on the model's device, the same each time they are gone through; of each batch one
            forward pass is made.
        sample_losses: logits and labels to the loss of each sample, [b].
        takes_batch_statistics: see above.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        sample_losses: Callable[[Tensor, Tensor], Tensor] = lambda logits, labels: nn.functional.cross_entropy(
            logits, labels, reduction="none"
        ),
        *,
        takes_batch_statistics: bool = False,
    ):
        self.model, self.batches, self.sample_losses = model, batches, sample_losses
        self.takes_batch_statistics = takes_batch_statistics
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.point = parameters_to_vector(self.parameters).detach().clone()

    @property
    def samples(self) -> int:
        return sum(len(images) for images, _ in self.batches)

    def loss(self, weights: Tensor) -> float:
        """Mean loss at weights [n]."""
        with self._at(weights), torch.no_grad():
            return self._mean(self._loss_sum(batch).item() for batch in self.batches)

    def loss_and_gradient(self, weights: Tensor) -> tuple[float, Tensor]:
        """Mean loss and its gradient [n] at weights [n]."""
        gradient, losses = torch.zeros_like(self.point), []
        with self._at(weights):
            for batch in self.batches:
                loss = self._loss_sum(batch)
                losses.append(loss.item())
                gradient += _flat(torch.autograd.grad(loss, self.parameters, materialize_grads=True))
        return self._mean(losses), gradient / self.samples

    def hessian_product(self, vector: Tensor) -> Tensor:
        """The Hessian at `point` times a vector [n], by differentiating twice.

        Of a network of ReLUs it is the Hessian of the smooth piece that the point lies on.

        Raises:
            ValueError: if torch has no second derivative of one of the network's operators.
        """
        product = torch.zeros_like(self.point)
        # The fused attention kernels have no second derivative.
        with self._at(self.point), sdpa_kernel(SDPBackend.MATH):
            for batch in self.batches:
                gradient = _flat(
                    torch.autograd.grad(
                        self._loss_sum(batch), self.parameters, create_graph=True, materialize_grads=True
                    )
                )
                along = torch.dot(gradient, vector)
                try:
                    product += _flat(torch.autograd.grad(along, self.parameters, materialize_grads=True))
                except RuntimeError as error:
                    if "not implemented" not in str(error):
                        raise
                    raise ValueError(
                        f"torch cannot differentiate {type(self.model).__name__} twice: {error}"
                    ) from error
        return product / self.samples

    def batch_gradients(self) -> Iterator[Tensor]:
        """The gradient [n] of each batch's own mean loss at `point`, in turn."""
        for images, labels in self.batches:
            with self._at(self.point):
                loss = self._loss_sum((images, labels)) / len(images)
                gradient = _flat(torch.autograd.grad(loss, self.parameters, materialize_grads=True))
            yield gradient

    def _loss_sum(self, batch: Batch) -> Tensor:
        images, labels = batch
        # Summed wide: what is looked for are small differences.
        return self.sample_losses(self.model(images), labels).sum(dtype=torch.float64)

    def _mean(self, sums: Iterable[float]) -> float:
        return math.fsum(sums) / self.samples

    @contextlib.contextmanager
    def _at(self, weights: Tensor) -> Iterator[None]:
        """Let the model have these weights and the mode that is wanted; afterwards it is as it was."""
        training = {module: module.training for module in self.model.modules()}
        buffers = {}
        self.model.eval()
        if self.takes_batch_statistics:
            norms = [module for module in self.model.modules() if isinstance(module, _BatchNorm)]
            buffers = {buffer: buffer.clone() for norm in norms for buffer in norm.buffers(recurse=False)}
            for norm in norms:
                norm.training = True  # its own flag alone: what it holds, dropout perhaps, stays off
        self._put(weights)
        try:
            yield
        finally:
            self._put(self.point)
            with torch.no_grad():
                for buffer, value in buffers.items():
                    buffer.copy_(value)
            for module, mode in training.items():
                module.training = mode

    @torch.no_grad()
    def _put(self, weights: Tensor) -> None:
        for parameter, part in zip(self.parameters, weights.split([p.numel() for p in self.parameters]), strict=True):
            parameter.copy_(part.view_as(parameter))


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


# ---- the random potential ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A number with the interval that holds it with 95 % confidence; an end that nothing bounds is infinite."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Potential:
    """How the loss changes with the distance d from a point, over random directions.

    Args:
        distances: d, [k].
        differences: L(w + d·v) − L(w) for each unit vector v, [directions, k].
        alpha: of E(L(w1) − L(w2))² ~ ‖w1 − w2‖^α.
        alpha_of_std: the same of the variance over directions, which is half the mean square difference between points
            √2·d apart. What all directions have in common is taken out: L(w) itself, and a rise away from a minimum.
        alpha_near, alpha_far: `alpha` over the nearer and the farther half of the distances alone. Where they differ
            there is no one power.
    """

    distances: NDArray[np.float64]
    differences: NDArray[np.float64]
    alpha: Estimate
    alpha_of_std: Estimate
    alpha_near: float
    alpha_far: float

    @property
    def rms(self) -> NDArray[np.float64]:
        """Root of the mean square difference at each distance, [k]."""
        return np.sqrt((self.differences**2).mean(0))

    @property
    def mean(self) -> NDArray[np.float64]:
        return self.differences.mean(0)

    @property
    def std(self) -> NDArray[np.float64]:
        """Sample standard deviation of the loss over directions at each distance, [k]."""
        return self.differences.std(0, ddof=1)


def loss_differences(
    loss: Loss, point: Tensor, distances: Sequence[float], directions: int, generator: torch.Generator
) -> NDArray[np.float64]:
    """L(w + d·v) − L(w) for random unit vectors v, uniform on the sphere: [directions, distances].

    Costs directions × distances + 1 losses.
    """
    here = loss(point)
    rows = []
    for _ in range(directions):
        direction = torch.randn(point.shape, generator=generator).to(point)
        direction /= torch.linalg.vector_norm(direction)
        rows.append([loss(point + distance * direction) - here for distance in distances])
    return np.array(rows)


def fit_potential(
    distances: ArrayLike, differences: ArrayLike, rng: np.random.Generator, resamples: int = 1000
) -> Potential:
    """Fit α as the slope of log E(ΔL)² against log d, by least squares, with percentile intervals over directions.

    The paper shows the standard deviation over directions, and finds α = 2. Around a minimum that is not the root of E(ΔL)²,
    so both slopes are given. Points of one direction are dependent, so whole directions are resampled. The interval of
    `alpha` is of this one point: L(w) is in all differences, and on random landscapes of known α the intervals held it at 13
    of 20 points, those of `alpha_of_std` at 17.

    Args:
        distances: [k], k >= 4, rising, above 0.
        differences: [directions, k], directions >= 2; of fewer than 5 there is no interval.
        rng: draws the resamples.

    Raises:
        ValueError: if there are too few of either, or a difference is not finite or all at one distance are 0.

    Source: Hoffer et al. 2017, arXiv 1705.08741, section 3; the interval: Efron 1979.
    """
    d, differences = np.asarray(distances, np.float64), np.asarray(differences, np.float64)
    directions = len(differences)
    if len(d) < 4 or directions < 2:
        raise ValueError(
            f"{len(d)} distance(s) and {directions} direction(s): α wants at least 4 distances and 2 directions"
        )
    if not np.isfinite(differences).all():
        far = d[~np.isfinite(differences).all(0)].min()
        raise ValueError(
            f"the loss is not finite at distance {far:g} from the point; a smaller largest distance may help"
        )
    wanted_for_an_interval = 5  # of fewer directions resamples are too few and too alike
    if not (differences**2).mean(0).all() or not differences.std(0).all():
        raise ValueError(
            f"the loss does not change within distance {d[0]:g} of the point; a larger smallest distance may help"
        )
    draws = rng.multinomial(directions, np.full(directions, 1 / directions), resamples) / directions
    draws = draws[(draws > 0).sum(1) > 1]  # one direction alone has no variance
    x = np.log(d)

    def slope(moments: NDArray[np.float64], part: slice = slice(None)) -> NDArray[np.float64]:
        """Of log moments [..., k]."""
        centred = x[part] - x[part].mean()
        return np.log(moments[..., part]) @ centred / (centred @ centred)

    def estimate(moments: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> Estimate:
        low, high = -math.inf, math.inf
        if directions >= wanted_for_an_interval:
            low, high = np.quantile(slope(moments(draws)), (0.025, 0.975)).tolist()
        whole = np.full((1, directions), 1 / directions)
        return Estimate(slope(moments(whole)).item(), low, high)

    def mean_squares(shares: NDArray[np.float64]) -> NDArray[np.float64]:
        return shares @ differences**2

    def variances(shares: NDArray[np.float64]) -> NDArray[np.float64]:
        # Around the mean of all directions, so that nothing cancels where they have most in common.
        centred = differences - differences.mean(0)
        return shares @ centred**2 - (shares @ centred) ** 2

    half = len(d) // 2
    squares = (differences**2).mean(0)
    return Potential(
        d,
        differences,
        alpha=estimate(mean_squares),
        alpha_of_std=estimate(variances),
        alpha_near=slope(squares, slice(0, half)).item(),
        alpha_far=slope(squares, slice(len(d) - half, None)).item(),
    )


# ---- sharpness -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sharpness:
    """The largest loss that was found in a box around a point.

    Args:
        percent: φ = (max − loss) / (1 + loss) × 100.
        loss: at the point.
        max_loss: in the box.
        evaluations: of loss and gradient that the search took.
    """

    percent: float
    loss: float
    max_loss: float
    evaluations: int


def sharpness(
    loss_and_gradient: LossAndGradient,
    point: Tensor,
    generator: torch.Generator,
    *,
    epsilon: float = 1e-3,
    subspace: int | None = None,
    iterations: int = 10,
) -> Sharpness:
    """How far the loss can rise in the box −ε(|(A⁺x)_i| + 1) <= y_i <= ε(|(A⁺x)_i| + 1), x + Ay being looked at.

    Without `subspace` A is the identity, and the box has a side for each weight. Else A is n × subspace, its entries standard
    normal: assumed, for the paper says only that its columns are random, and their length scales the box.

    Departs from its source in the search. A linear function's maximum over a box is at a corner that is known, and a convex
    one's at some corner; each iteration goes to the corner that the gradient points to (Frank and Wolfe 1956), or halves the
    way to it until the loss rises. L-BFGS-B, the source's method, builds its model from pairs of steps and gradients of −f
    and refuses each where f curves upwards, as it does around a minimum; its steps then depend on the loss's unit. With ten
    iterations either way and 512 images it found 222 % for F1's sb on MNIST, 291 % where the loss was multiplied by 10⁴,
    and this search 341 %; for lb they agree (7,003, 7,001 and 7,010 %). One search begins at the point and another at a
    random place in the box, since at an exact minimum no gradient points anywhere; the larger maximum counts. Both are local:
    the sharpness is at least this.

    Args:
        loss_and_gradient: of a point.
        point: x, [n].
        generator: draws A and the random start.
        epsilon: above 0.
        subspace: columns of A, at least 1; it is held in memory whole.
        iterations: of each search, at least 1.

    Raises:
        ValueError: if A would take over half of the free memory, or the loss is not finite where it is looked at.

    Source: Keskar et al. 2017, arXiv 1609.04836, metric 2.1 and appendix; ε and ten iterations are theirs.
    """
    basis, coordinates = None, point
    if subspace is not None:
        basis = _random_basis(point, subspace, generator)
        # A⁺x = (AᵀA)⁻¹Aᵀx, in float64: for n far above the number of columns AᵀA is close to n times the identity.
        gram = (basis @ basis.T).double()
        coordinates = torch.linalg.solve(gram, (basis @ point).double()).to(point)
    bound = epsilon * (coordinates.abs() + 1)

    evaluations = 0

    def at(y: Tensor) -> tuple[float, Tensor]:
        nonlocal evaluations
        evaluations += 1
        value, gradient = loss_and_gradient(point + (y if basis is None else y @ basis))
        if not math.isfinite(value):
            raise ValueError(f"the loss is not finite in the box of epsilon {epsilon:g}; a smaller epsilon may help")
        return value, gradient if basis is None else basis @ gradient

    middle = torch.zeros_like(bound)
    anywhere = (2 * torch.rand(bound.shape, generator=generator).to(bound) - 1) * bound
    here, gradient = at(middle)
    highest = here
    for y, value, slope in ((middle, here, gradient), (anywhere, *at(anywhere))):
        for _ in range(iterations):
            way = bound * slope.sign() - y
            for halving in range(_HALVINGS):
                new = y + way / 2**halving
                new_value, new_slope = at(new)
                if new_value > value:
                    break
            else:
                break
            y, value, slope = new, new_value, new_slope
        highest = max(highest, value)
    return Sharpness(100 * (highest - here) / (1 + here), here, highest, evaluations)


def _random_basis(point: Tensor, columns: int, generator: torch.Generator) -> Tensor:
    """Aᵀ, [columns, n]."""
    num_bytes = columns * point.numel() * point.element_size()
    if point.device.type == "cpu" and num_bytes > (free := psutil.virtual_memory().available) / 2:
        raise ValueError(
            f"a subspace of {columns} directions in {point.numel():,} weights takes {num_bytes / 1e9:.1f} GB, over half of the"
            f" {free / 1e9:.1f} GB of free memory; {int(free / 2 / num_bytes * columns)} directions would fit"
        )
    basis = point.new_empty((columns, point.numel()))
    for row in basis:
        row.copy_(torch.randn(point.shape, generator=generator))
    return basis


# ---- curvature -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spectrum:
    """Largest eigenvalues of a Hessian, falling; `products` of it with a vector were needed."""

    eigenvalues: tuple[float, ...]
    products: int


def top_eigenvalues(
    hessian_product: Callable[[Tensor], Tensor],
    point: Tensor,
    generator: torch.Generator,
    *,
    count: int = 5,
    tolerance: float = 1e-2,
    max_restarts: int = 30,
) -> Spectrum:
    """The algebraically largest eigenvalues of a symmetric matrix that is known by its products, by Lanczos' method.

    ARPACK's implicitly restarted one, through SciPy, from a random vector; it forms 2·count + 6 vectors as large as the point.

    Args:
        hessian_product: of a vector [n].
        point: gives n, dtype and device.
        generator: draws the first vector.
        count: 0 < count < n.
        tolerance: of an eigenvalue, relative to itself.
        max_restarts: each costs about count + 6 products.

    Raises:
        ValueError: if there are no so many, so many restarts do not reach the tolerance, or a product is not finite.

    Source: Lehoucq, Sorensen and Yang 1998, ARPACK Users' Guide.
    """
    # Here, so that what wants no eigenvalues need not wait for it.
    from scipy.sparse.linalg import ArpackError, ArpackNoConvergence, LinearOperator, eigsh

    n, products = point.numel(), 0
    if not 0 < count < n:
        raise ValueError(f"{count} eigenvalues of {n} weights; wanted at least 1, and fewer than weights")

    def multiply(vector: NDArray) -> NDArray:
        nonlocal products
        products += 1
        product = hessian_product(torch.from_numpy(vector.ravel().copy()).to(point))
        if not product.isfinite().all():
            raise ValueError(
                "the Hessian's product with a vector is not finite; the weights are where the loss overflows"
            )
        return product.cpu().numpy()

    dtype = point.cpu().numpy().dtype
    start = torch.randn(n, generator=generator, dtype=torch.float64).numpy().astype(dtype)
    try:
        values = eigsh(
            LinearOperator((n, n), matvec=multiply, dtype=dtype),
            k=count,
            which="LA",
            v0=start,
            ncv=min(n, 2 * count + 6),
            tol=tolerance,
            maxiter=max_restarts,
            return_eigenvectors=False,
        )
    except ArpackNoConvergence as error:
        raise ValueError(
            f"{len(error.eigenvalues)} of {count} eigenvalues to {tolerance:g} of themselves after {products} products with"
            " the Hessian; fewer of them, or more samples, may converge"
        ) from error
    except ArpackError as error:
        raise ValueError(f"the Hessian's eigenvalues cannot be found, is it 0? ARPACK says: {error}") from error
    return Spectrum(tuple(float(value) for value in sorted(values, reverse=True)), products)


# ---- gradient noise ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NoiseScale:
    """How noisy a batch's gradient is at a point.

    Args:
        ghosts: gradients it was estimated from.
        ghost_batch_size: samples of each.
        squared_gradient: |G|² of the true gradient; the unbiased estimate may come out below 0.
        trace: tr Σ of the covariance of one sample's gradient.
        scale: tr Σ / |G|², in samples. Infinite where |G|² was not found above 0.
    """

    ghosts: int
    ghost_batch_size: int
    squared_gradient: Estimate
    trace: Estimate
    scale: Estimate


def noise_scale(ghost_gradients: Callable[[], Iterable[Tensor]], ghost_batch_size: int) -> NoiseScale:
    """The gradient noise scale tr Σ / |G|², the batch at which noise and gradient are as large as each other.

    From two batch sizes, one ghost (b) and all k of them (B = k·b), come the unbiased
    |G|² = (B·|G_B|² − b·|G_b|²) / (B − b) and tr Σ = (|G_b|² − |G_B|²) / (1/b − 1/B), |G_b|² being the mean over ghosts.
    Departs from its source in the uncertainty, which there is averaged away over training: each ghost is left out
    once (jackknife), and the interval of the ratio is Fieller's, which has no upper end where |G|² may be 0. Where it is
    nearly 0 the jackknife errs towards too wide.

    Args:
        ghost_gradients: makes the gradients [n] of at least 3 batches of independent samples; called twice, it must make
            the same ones, for all of them are not held at once.
        ghost_batch_size: b, in samples.

    Raises:
        ValueError: if there are fewer than 3 of them, or they are all the same or not finite.

    Source: McCandlish et al. 2018, arXiv 1812.06162, appendix A.1; Fieller 1954.
    """
    total, squares = None, []
    for gradient in ghost_gradients():
        total = gradient.double() if total is None else total + gradient
        squares.append(_dot(gradient, gradient))
    k, b = len(squares), ghost_batch_size
    if k < 3:
        raise ValueError(
            f"{k} ghost(s) of {b} samples: the noise scale wants at least 3; a smaller --ghost-batch-size makes more"
        )
    dots = np.array([_dot(total, gradient) for gradient in ghost_gradients()])
    squares = np.array(squares)
    of_total = _dot(total, total)
    if not np.isfinite([of_total, *squares]).all():
        raise ValueError("a ghost's gradient is not finite; the weights are where the loss overflows")

    def estimates(ghosts: int, sum_of_squares, square_of_sum) -> NDArray[np.float64]:
        """|G|² and tr Σ."""
        small, large = sum_of_squares / ghosts, square_of_sum / ghosts**2
        return np.array([(ghosts * large - small) / (ghosts - 1), (small - large) * b * ghosts / (ghosts - 1)])

    gradient2, trace = estimates(k, squares.sum(), of_total)
    if not trace > 0:
        raise ValueError(f"the gradients of {k} ghosts are all the same: there is no noise to measure")
    without = estimates(k - 1, squares.sum() - squares, of_total - 2 * dots + squares)
    covariance = (k - 1) * np.cov(without, ddof=0)
    radius = _Z95 * np.sqrt(np.diag(covariance))
    return NoiseScale(
        k,
        b,
        squared_gradient=Estimate(gradient2, gradient2 - radius[0], gradient2 + radius[0]),
        trace=Estimate(trace, trace - radius[1], trace + radius[1]),
        scale=Estimate(
            trace / gradient2 if gradient2 > 0 else math.inf, *_ratio_interval(trace, gradient2, covariance)
        ),
    )


def _ratio_interval(trace: float, gradient2: float, covariance: NDArray[np.float64]) -> tuple[float, float]:
    """All ratios r >= 0 for which trace − r·gradient2 is within 1.96 of its standard deviations of 0; both known to be >= 0.

    `covariance` is that of (gradient2, trace). (trace − r·gradient2)² <= z²·(v_t − 2·r·v_tg + r²·v_g) is a quadratic in r.
    """
    (v_g, v_tg), (_, v_t) = covariance * _Z95**2
    a, half_b, c = gradient2**2 - v_g, trace * gradient2 - v_tg, trace**2 - v_t
    root = math.sqrt(max(half_b**2 - a * c, 0.0))
    if c <= 0:  # the trace itself may be 0
        low = 0.0
    elif half_b + root <= 0:
        low = math.inf  # only a negative |G|² would do: nothing but noise
    else:
        low = c / (half_b + root)  # the smaller root, without cancellation
    high = (half_b + root) / a if a > 0 and gradient2 > 0 else math.inf
    return low, high


def _dot(a: Tensor, b: Tensor) -> float:
    return torch.dot(a.double(), b.double()).item()
