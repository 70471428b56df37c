"""The Triton kernels on CPU tensors, against torch's BatchNorm on each ghost in float64.

Run by test_gpu_kernels.py in a process of its own, with TRITON_INTERPRET=1: Triton reads it when it is imported.
"""

import warnings

import pytest
import torch
import torch.nn.functional as F
from test_kernels import FUSIONS, laid_out, oracle

from gbnzoo.kernels import cpu, gpu, reference

# From here on the operators of CPU tensors are the GPU's. Two processors, tiles of 16 values.
LIBRARY = torch.library.Library("gbnzoo", "IMPL")
with warnings.catch_warnings(action="ignore"):  # torch 2.11 warns even where overriding is allowed
    LIBRARY.impl("ghost_batch_norm", gpu.forward, "CPU", allow_override=True)
    LIBRARY.impl("ghost_batch_norm_backward", gpu.backward, "CPU", allow_override=True)
LIBRARY.impl("fold_ghosts", gpu.fold, "CPU")
cpu.is_direct = lambda *tensors: False
gpu._processors = lambda device: 2
gpu.STREAMED_TILE = 16

# Triton 3.6 does so; from numpy 2.4 on it is an error.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning")

GHOST = 4
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    gpu.plan.cache_clear()


@pytest.fixture
def launched(monkeypatch):
    """The kernels that were launched, by name."""
    names = set()
    launch = gpu._launch

    def note(kernel, *arguments, **constants):
        names.add(kernel.__name__)
        launch(kernel, *arguments, **constants)

    monkeypatch.setattr(gpu, "_launch", note)
    return names


def check(shape, dtype=torch.float32, channels_last=False, adds=False, relu=False, affine=True):
    layout = "channels_last" if channels_last else "contiguous"
    x, residual, dy = (laid_out(torch.randn(shape) + 2, layout).to(dtype) for _ in range(3))
    weight, bias = (torch.rand(shape[1]) + 0.5, torch.randn(shape[1])) if affine else (None, None)
    inputs = {"x": x, "weight": weight, "bias": bias, "residual": residual if adds else None}
    leaves = [tensor.requires_grad_() for tensor in inputs.values() if tensor is not None]
    y, mean, variance = cpu.ghost_batch_norm(**inputs, ghost_rows=GHOST, eps=1e-5, relu=relu)
    true_y, true_mean, true_variance = oracle(**inputs, ghost_rows=GHOST, relu=relu)

    assert y.dtype == dtype
    assert y.stride() == x.stride()
    torch.testing.assert_close(mean.double(), true_mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(variance.double(), true_variance, rtol=2e-6, atol=1e-6)
    # The interpreter truncates what a GPU rounds to bfloat16: a whole ulp instead of half of one.
    error = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    torch.testing.assert_close(y.double(), true_y, rtol=error, atol=error)

    dy = dy * ((true_y > 1e-2) | (true_y == 0))  # a gradient where the ReLU's input rounds to zero is anybody's
    ours, true = torch.autograd.grad(y, leaves, dy), torch.autograd.grad(true_y, leaves, dy.double())
    for mine, other in zip(ours, true, strict=True):
        torch.testing.assert_close(mine, other, rtol=error, atol=10 * error)


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_resident(channels_last, dtype, fusion, launched):
    check((9, 3, 2, 3), DTYPES[dtype], channels_last, *FUSIONS[fusion])
    assert launched == {"_forward", "_backward"}


@pytest.mark.parametrize(("fusion", "dtype"), list(zip(FUSIONS, [*DTYPES, "float32"], strict=True)))
@pytest.mark.parametrize("channels_last", [False, True])
def test_split(channels_last, fusion, dtype, launched, monkeypatch):
    monkeypatch.setattr(gpu, "RESIDENT_VALUES", {"forward": 8, "backward": 8})
    check((9, 2, 3, 3), DTYPES[dtype], channels_last, *FUSIONS[fusion])
    assert launched == {"_forward_statistics", "_forward_apply", "_backward_sums", "_backward_apply"}


@pytest.mark.parametrize("shape", [(3, 5), (8, 40), (9, 1, 3), (4, 3, 1, 2, 2)])
def test_other_shapes_without_parameters(shape):
    check(shape, affine=False)


@pytest.mark.parametrize(("ghosts", "channels"), [(1, 3), (5, 70), (40, 3)])
@pytest.mark.parametrize("momentum", [0.1, 1.0])
def test_folding_is_one_ghost_after_the_other(momentum, ghosts, channels):
    mean, variance = torch.randn(ghosts, channels), torch.rand(ghosts, channels)
    running = torch.randn(channels), torch.rand(channels)
    true = [tensor.double() for tensor in running]
    for i in range(ghosts):
        for tensor, statistics in zip(true, (mean, variance), strict=True):
            tensor.lerp_(statistics[i].double(), momentum)
    count, keep = torch.tensor(7), 1 - momentum
    cpu.fold(mean, variance, cpu.Folding(*running, count, cpu.Decay(ghosts, keep**ghosts, keep, momentum)))
    torch.testing.assert_close([tensor.double() for tensor in running], true, rtol=1e-6, atol=1e-6)
    assert count == 7 + ghosts


@pytest.mark.parametrize("resident", [True, False])
def test_first_samples_unlike_all_others_cancel_no_digits(resident, monkeypatch):
    if not resident:
        monkeypatch.setattr(gpu, "RESIDENT_VALUES", {"forward": 8, "backward": 8})
    x = 0.1 * torch.randn(16, 1, 4, 4) + 1000
    x[0] = 0
    y, _, variance = cpu.ghost_batch_norm(x, None, None, 16, 1e-5)
    true_y, _, true_variance = oracle(x, None, None, 16)
    torch.testing.assert_close(variance.double(), true_variance, rtol=1e-6, atol=0)
    torch.testing.assert_close(y.double(), true_y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("mean", "resident"), [(0.5, True), (100.0, True), (1000.0, True), (1000.0, False)])
def test_far_from_zero_the_error_is_below_twice_that_of_batchnorm(mean, resident, monkeypatch):
    if not resident:
        monkeypatch.setattr(gpu, "RESIDENT_VALUES", {"forward": 8, "backward": 8})
        monkeypatch.setattr(gpu, "STREAMED_TILE", 256)
    x = 0.1 * torch.randn(16, 4, 8, 16) + mean
    ours, _, variance = cpu.ghost_batch_norm(x, None, None, 16, 1e-5)
    truth, _, true_variance = oracle(x, None, None, 16)
    theirs = F.batch_norm(x, None, None, training=True)
    assert (ours - truth).abs().max() <= 2 * (theirs - truth).abs().max()
    torch.testing.assert_close(variance.double(), true_variance, rtol=1e-6 if resident else 1e-4, atol=0)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, about what is here meant
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("resident", [True, False])
def test_nan_and_infinity_reach_the_output_of_their_ghost_and_no_other(resident, bad, monkeypatch):
    if not resident:
        monkeypatch.setattr(gpu, "RESIDENT_VALUES", {"forward": 8, "backward": 8})
    x = torch.randn(8, 2, 3, 3)
    x[1, 1, 0, 0] = bad
    y, *_ = cpu.ghost_batch_norm(x, None, None, GHOST, 1e-5, relu=True)
    expected = torch.zeros_like(y, dtype=torch.bool)
    expected[:GHOST, 1] = True
    torch.testing.assert_close(y.isnan(), expected)


def test_second_derivatives():
    x, weight = torch.randn(9, 2, 2, 2, requires_grad=True), torch.rand(2, requires_grad=True)

    def second(y):
        first = torch.autograd.grad(y.square().sum(), (x, weight), create_graph=True)
        return torch.autograd.grad(sum(gradient.square().sum() for gradient in first), (x, weight))

    ours = second(cpu.ghost_batch_norm(x, weight, None, GHOST, 1e-5, relu=True)[0])
    true = second(reference.ghost_batch_norm(x.double(), weight.double(), None, GHOST, 1e-5, relu=True)[0])
    torch.testing.assert_close(ours, true, rtol=1e-4, atol=1e-3)


def test_operators_keep_their_promises_to_torch():
    x = torch.randn(9, 3, 2, 2).to(memory_format=torch.channels_last)
    arguments = (x, x, torch.randn(3), torch.randn(3), GHOST, 1e-5, True)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.gbnzoo.ghost_batch_norm.default, arguments, test_utils=checks)
    y, statistics = torch.ops.gbnzoo.ghost_batch_norm(*arguments)
    arguments = (x, x, y, *arguments[2:4], statistics, GHOST, True)
    torch.library.opcheck(torch.ops.gbnzoo.ghost_batch_norm_backward.default, arguments, test_utils=checks)
    arguments = (*statistics[:2], torch.zeros(3), torch.ones(3), torch.tensor(0), 2, 0.81, 0.9, 0.1)
    torch.library.opcheck(torch.ops.gbnzoo.fold_ghosts.default, arguments, test_utils=checks)


def test_compiles_without_a_graph_break():
    def layer(x):
        y, mean, variance = cpu.ghost_batch_norm(x.sin(), None, None, GHOST, 1e-5, x, True)
        return y.cos(), mean, variance

    x = torch.randn(9, 2, 2, 2, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = [[*function(x), *torch.autograd.grad(function(x)[0].sum(), x)] for function in (layer, compiled)]
    torch.testing.assert_close(*results)
