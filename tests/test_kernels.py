"""The CPU kernels, one for each instruction set: the norm against BatchNorm on each ghost in float64; crops; the order."""

import contextlib
import copy
import ctypes
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import random_pixels
from torch.utils._python_dispatch import TorchDispatchMode

from gbnzoo import kernels
from gbnzoo.data import Augment, GlobalBatches, ImageSet
from gbnzoo.kernels import cpu, crops, reference
from gbnzoo.norm import GhostBatchNorm2d, GhostBatchNormAct2d, shard_running_statistics

GHOST = 8
SHAPES = [  # whole and ragged batches, fewer samples than a ghost; vectors that fit and that do not
    (16, 3, 5, 7),
    (20, 16, 8, 8),
    (17, 64, 4, 4),
    (3, 24, 7, 7),
    (33, 17),
    (24, 130),
    (27, 130),
    (11, 72, 3, 3),
    (14, 1, 3, 3),
    (12, 40, 13),
    (9, 2, 40, 41),
    (8, 5, 2, 3, 4),
    (32, 10, 1, 1),
]
LAYOUTS = ["contiguous", "channels_last"]
DTYPES = [torch.float32, torch.bfloat16]
FUSIONS = {"plain": (False, False), "relu": (False, True), "add": (True, False), "add_relu": (True, True)}


@pytest.fixture(autouse=True)
def _settings(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(kernels, "_ARE_ON", True)


@pytest.fixture(params=cpu.INSTRUCTION_SETS)
def instruction_set(request, monkeypatch):
    library = cpu.load(request.param)
    if library is None:
        pytest.skip(f"the {request.param} kernel is not built (python setup.py build_ext --inplace) or cannot run here")
    monkeypatch.setattr(cpu, "LIBRARY", library)


@contextlib.contextmanager
def streaming():
    """Outputs of any size are written past the cache, as otherwise only large ones are."""
    limit = ctypes.c_int64.in_dll(cpu.LIBRARY, "ghost_norm_streamed_bytes")
    usual, limit.value = limit.value, 0
    try:
        yield
    finally:
        limit.value = usual


@pytest.fixture
def kernel():
    return (
        cpu.ghost_batch_norm if cpu.LIBRARY else pytest.skip("no kernel is built: python setup.py build_ext --inplace")
    )


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def laid_out(x, layout):
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if layout == "channels_last" else x


def oracle(x, weight, bias, ghost_rows, residual=None, relu=False, eps=1e-5):
    """In float64, BatchNorm shown the ghosts one after the other, the last one with the remainder."""
    x, weight, bias = (None if tensor is None else tensor.double() for tensor in (x, weight, bias))
    whole = max(1, len(x) // ghost_rows) - 1
    pieces, means, variances = [], [], []
    for ghost in x.split([ghost_rows] * whole + [len(x) - whole * ghost_rows]):
        mean, variance = (torch.zeros(x.shape[1], dtype=torch.float64) for _ in range(2))
        pieces.append(F.batch_norm(ghost, mean, variance, weight, bias, training=True, momentum=1.0, eps=eps))
        means.append(mean)
        variances.append(variance)
    y = torch.cat(pieces)
    if residual is not None:
        y = y + residual.double()
    return y.relu() if relu else y, torch.stack(means), torch.stack(variances)


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.usefixtures("instruction_set", "threads")
def test_outputs_statistics_and_gradients_are_those_of_batchnorm_on_each_ghost(dtype, layout, fusion):
    adds, relu = FUSIONS[fusion]
    for shape in SHAPES:
        x, residual, dy = (laid_out(torch.randn(shape) + 2, layout).to(dtype) for _ in range(3))
        inputs = [x, torch.rand(shape[1]) + 0.5, torch.randn(shape[1])] + ([residual] if adds else [])
        inputs = [tensor.requires_grad_() for tensor in inputs]
        y, mean, variance = cpu.ghost_batch_norm(*inputs[:3], GHOST, 1e-5, *inputs[3:], relu=relu)
        true_y, true_mean, true_variance = oracle(*inputs[:3], GHOST, *inputs[3:], relu=relu)

        assert y.dtype == dtype
        assert y.stride() == x.stride()
        torch.testing.assert_close(mean.double(), true_mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(variance.double(), true_variance, rtol=2e-6, atol=1e-6)
        close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 4e-3, "atol": 4e-3}  # half an ulp
        torch.testing.assert_close(y.double(), true_y, **close)

        # A gradient where the ReLU's input rounds to zero is anybody's.
        dy = dy * ((true_y > 1e-3) | (true_y == 0))
        ours, true = torch.autograd.grad(y, inputs, dy), torch.autograd.grad(true_y, inputs, dy.double())
        close["atol"] *= 10
        for mine, other in zip(ours, true, strict=True):
            torch.testing.assert_close(mine, other, **close)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("instruction_set")
def test_without_affine_parameters(layout):
    x = laid_out(torch.randn(10, 6, 3, 5), layout).requires_grad_()
    dy = torch.randn_like(x)
    y, true_y = cpu.ghost_batch_norm(x, None, None, GHOST, 1e-5)[0], oracle(x, None, None, GHOST)[0]
    torch.testing.assert_close(y.double(), true_y, rtol=1e-5, atol=1e-5)
    (dx,), (true_dx,) = torch.autograd.grad(y, x, dy), torch.autograd.grad(true_y, x, dy.double())
    torch.testing.assert_close(dx, true_dx, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mean", [0.5, 100.0, 1000.0])
@pytest.mark.usefixtures("instruction_set")
def test_far_from_zero_the_error_is_below_twice_that_of_batchnorm(mean, layout):
    x = 0.1 * torch.randn(32, 8, 16, 16) + mean
    ours, _, variance = cpu.ghost_batch_norm(laid_out(x, layout), None, None, 32, 1e-5)
    theirs = F.batch_norm(x, None, None, training=True)
    truth, _, true_variance = oracle(x, None, None, 32)
    assert (ours - truth).abs().max() <= 2 * (theirs - truth).abs().max()
    torch.testing.assert_close(variance.double(), true_variance, rtol=1e-6, atol=0)


@pytest.mark.parametrize("rows", [2, 16, 33, 128, 129])
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.usefixtures("instruction_set")
def test_ghosts_of_few_rows_and_many_channels(dtype, rows):
    x = (torch.randn(2 * rows + 1, 150) + 2).to(dtype)
    inputs = [tensor.requires_grad_() for tensor in (x, torch.rand(150) + 0.5, torch.randn(150))]
    y, mean, variance = cpu.ghost_batch_norm(*inputs, rows, 1e-2, relu=True)
    true_y, true_mean, true_variance = oracle(*inputs, rows, relu=True, eps=1e-2)
    torch.testing.assert_close(mean.double(), true_mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(variance.double(), true_variance, rtol=4e-6, atol=1e-6)
    close = {"rtol": 2e-5, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 4e-3, "atol": 4e-3}
    torch.testing.assert_close(y.double(), true_y, **close)

    dy = torch.randn_like(x) * ((true_y > 1e-3) | (true_y == 0))
    close["atol"] *= 10
    ours, true = torch.autograd.grad(y, inputs, dy), torch.autograd.grad(true_y, inputs, dy.double())
    for mine, other in zip(ours, true, strict=True):
        torch.testing.assert_close(mine, other, **close)


@pytest.mark.parametrize("unlike", [0, 1, 4])
@pytest.mark.usefixtures("instruction_set")
def test_few_rows_far_from_zero_with_some_unlike_the_others(unlike):
    """Four rows are what the mean is first guessed from."""
    x = 0.1 * torch.randn(64, 100) + 1000
    x[:: 64 // 4, 40:70][:unlike] = 0
    ours, _, variance = cpu.ghost_batch_norm(x, None, None, 64, 1e-5)
    theirs = F.batch_norm(x, None, None, training=True)
    truth, _, true_variance = oracle(x, None, None, 64)
    assert (ours - truth).abs().max() <= 2 * (theirs - truth).abs().max()
    torch.testing.assert_close(variance.double(), true_variance, rtol=1e-5, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("instruction_set")
def test_first_samples_unlike_all_others_cancel_no_digits(layout):
    x = 0.1 * torch.randn(64, 8, 16, 16) + 1000
    x[0] = 0
    x[0, :, 0, 0] = 1000
    *_, variance = cpu.ghost_batch_norm(laid_out(x, layout), None, None, 64, 1e-5)
    torch.testing.assert_close(variance.double(), oracle(x, None, None, 64)[2], rtol=1e-5, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.usefixtures("instruction_set")
def test_nan_and_infinity_reach_the_output_of_their_ghost_and_no_other(relu, layout):
    for bad in (float("nan"), float("inf")):
        x = torch.randn(16, 6, 3, 3)
        x[1, 2, 0, 0] = bad
        y, *_ = cpu.ghost_batch_norm(laid_out(x, layout), None, None, GHOST, 1e-5, relu=relu)
        expected = torch.zeros_like(y, dtype=torch.bool)
        expected[:GHOST, 2] = True
        torch.testing.assert_close(y.isnan(), expected)

        x = torch.randn(16, 90)
        x[1, 2] = x[9, 85] = bad
        for dtype in DTYPES:
            y, *_ = cpu.ghost_batch_norm(x.to(dtype), None, None, GHOST, 1e-5, relu=relu)
            expected = torch.zeros_like(y, dtype=torch.bool)
            expected[:GHOST, 2] = expected[GHOST:, 85] = True
            torch.testing.assert_close(y.isnan(), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "shape", [(16, 64, 12, 12), (16, 48, 8, 8), (16, 128, 28, 28), (17, 16, 31, 31), (24, 144, 3, 3), (24, 80)]
)
@pytest.mark.usefixtures("instruction_set")
def test_outputs_written_past_the_cache_are_the_same_bits(shape, dtype, layout):
    """Rows of 48 in bfloat16, and planes of 12 × 12, do not all begin a line of it."""
    x, residual, dy = (laid_out(torch.randn(shape), layout).to(dtype) for _ in range(3))
    weight, bias = torch.rand(shape[1]), torch.randn(shape[1])

    def results():
        inputs = x.detach().requires_grad_(), residual.detach().requires_grad_()
        y, *_ = cpu.ghost_batch_norm(inputs[0], weight, bias, GHOST, 1e-5, inputs[1], relu=True)
        return y, *torch.autograd.grad(y, inputs, dy)

    expected = results()
    with streaming():
        for streamed, plain in zip(results(), expected, strict=True):
            assert torch.equal(streamed, plain)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.usefixtures("instruction_set")
def test_a_ghost_is_the_same_bits_alone_and_among_others(dtype, layout, monkeypatch):
    """Alone its planes are cut into two slabs, among others they are one."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    x, residual, dy = (laid_out(torch.randn(48, 8, 31, 31), layout).to(dtype) for _ in range(3))
    weight, bias = torch.rand(8), torch.randn(8)

    def results(x, residual, dy):
        x, residual = x.detach().requires_grad_(), residual.detach().requires_grad_()
        y, *_ = cpu.ghost_batch_norm(x, weight, bias, GHOST, 1e-5, residual, relu=True)
        return y, *torch.autograd.grad(y, (x, residual), dy)

    alone = [results(*ghost) for ghost in zip(*(tensor.split(GHOST) for tensor in (x, residual, dy)), strict=True)]
    for together, *parts in zip(results(x, residual, dy), *alone, strict=True):
        assert torch.equal(together, torch.cat(parts))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("instruction_set")
def test_threads_that_share_a_ghost_write_past_the_cache_from_any_row_on(layout, monkeypatch):
    x, dy = (laid_out(torch.randn(64, 16, 12, 12), layout).bfloat16() for _ in range(2))
    x.requires_grad_()
    results = []
    for threads in (1, 3, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        with streaming():
            y, *_ = cpu.ghost_batch_norm(x, None, None, 64, 1e-5, relu=True)
            results.append((y, *torch.autograd.grad(y, x, dy)))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_ghost_on_two_threads(kernel, threads, layout):
    x = laid_out(torch.randn(32, 4, 9, 9), layout).requires_grad_()
    dy = torch.randn_like(x)
    y, true_y = kernel(x, None, None, 32, 1e-5)[0], oracle(x, None, None, 32)[0]
    torch.testing.assert_close(y.double(), true_y, rtol=1e-5, atol=1e-5)
    (dx,), (true_dx,) = torch.autograd.grad(y, x, dy), torch.autograd.grad(true_y, x, dy.double())
    torch.testing.assert_close(dx, true_dx, rtol=1e-5, atol=1e-5)


def test_any_strides_are_read(kernel):
    wide = torch.randn(8, 12, 6, 10)
    for x in (wide[:, ::2], wide[..., ::3], wide.transpose(2, 3), laid_out(wide, "channels_last")[:, :7], wide[::2]):
        x = x.detach().requires_grad_()
        y, true_y = kernel(x, None, None, 2, 1e-5)[0], oracle(x, None, None, 2)[0]
        torch.testing.assert_close(y.double(), true_y, rtol=1e-5, atol=1e-5)
        dy = torch.randn(1, 1, 1, x.shape[3]).expand(x.shape)
        (dx,), (true_dx,) = torch.autograd.grad(y, x, dy), torch.autograd.grad(true_y, x, dy.double())
        torch.testing.assert_close(dx, true_dx, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_only_what_the_gradient_needs_is_kept(kernel, fusion):
    adds, relu = FUSIONS[fusion]
    x, residual = (torch.randn(8, 6, 5, 5, requires_grad=True) for _ in range(2))
    large = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: large.append(t) if t.shape == x.shape else t, lambda t: t):
        y, *_ = kernel(x, None, None, GHOST, 1e-5, residual if adds else None, relu)
    assert {tensor.data_ptr() for tensor in large} == (
        {x.data_ptr(), y.data_ptr()} if adds and relu else {x.data_ptr()}
    )


@pytest.mark.parametrize("fusion", FUSIONS)
def test_second_derivatives(kernel, fusion):
    adds, relu = FUSIONS[fusion]
    x, residual, dy = (torch.randn(10, 3, 4, 4) for _ in range(3))
    inputs = [x, torch.rand(3) + 0.5, torch.randn(3)] + ([residual] if adds else [])
    inputs = [tensor.requires_grad_() for tensor in inputs]

    def gradients_of_a_gradient_norm(y, dy):
        first = torch.autograd.grad(y, inputs, dy, create_graph=True)
        return torch.autograd.grad(
            sum(gradient.square().sum() for gradient in first), inputs[:3], materialize_grads=True
        )

    y, *_ = kernel(*inputs[:3], GHOST, 1e-5, *inputs[3:], relu=relu)
    true_y, *_ = oracle(*inputs[:3], GHOST, *inputs[3:], relu=relu)
    ours, true = gradients_of_a_gradient_norm(y, dy), gradients_of_a_gradient_norm(true_y, dy.double())
    for mine, other in zip(ours, true, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("relu", [False, True])
def test_the_gradient_of_a_residual_alone_can_be_differentiated_again(kernel, relu):
    x, residual = torch.randn(10, 3, 4, 4), torch.randn(10, 3, 4, 4, requires_grad=True)
    y, *_ = kernel(x, torch.ones(3), torch.zeros(3), GHOST, 1e-5, residual, relu)
    (gradient,) = torch.autograd.grad(y.square().sum(), residual, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), residual)
    torch.testing.assert_close(gradient, 2 * y)
    torch.testing.assert_close(second, 2.0 * (y > 0) if relu else torch.full_like(y, 2))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_compiles_without_a_graph_break(kernel, fusion, dynamic):
    adds, relu = FUSIONS[fusion]

    def layer(x, weight, bias, residual):
        y, mean, variance = kernel(x.sin(), weight, bias, GHOST, 1e-5, residual, relu)
        return y.cos(), mean, variance

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for samples in (8, 10):
        x, residual = (torch.randn(samples, 6, 5, 5, requires_grad=True) for _ in range(2))
        weight, bias = (torch.randn(6, requires_grad=True) for _ in range(2))
        inputs = (x, weight, bias, residual) if adds else (x, weight, bias)
        results = []
        for function in (layer, compiled):
            y, *statistics = function(x, weight, bias, residual if adds else None)
            results.append([y, *statistics, *torch.autograd.grad(y.square().sum(), inputs)])
        torch.testing.assert_close(*results)
    torch._dynamo.reset()


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck looks
def test_operators_keep_their_promises_to_torch(kernel, adds):
    x, residual = (laid_out(torch.randn(10, 6, 5, 5), "channels_last").requires_grad_() for _ in range(2))
    weight, bias = (torch.randn(6, requires_grad=True) for _ in range(2))
    inputs = (x, residual if adds else None, weight, bias, GHOST, 1e-5, True)
    torch.library.opcheck(torch.ops.gbnzoo.ghost_batch_norm.default, inputs)

    y, statistics = torch.ops.gbnzoo.ghost_batch_norm(*inputs)
    arguments = (x, x, y if adds else None, weight, bias, statistics, GHOST, True)
    arguments = tuple(each.detach() if isinstance(each, torch.Tensor) else each for each in arguments)
    backward, checks = torch.ops.gbnzoo.ghost_batch_norm_backward.default, ("test_schema", "test_faketensor")
    torch.library.opcheck(backward, arguments, test_utils=checks)

    wanted = (x, residual, weight, bias) if adds else (x, weight, bias)
    expected, *_ = kernel(x, weight, bias, GHOST, 1e-5, residual if adds else None, True)
    assert torch.equal(y, expected)
    for ours, theirs in zip(*(torch.autograd.grad(each.square().sum(), wanted) for each in (y, expected)), strict=True):
        assert torch.equal(ours, theirs)


class Onlooker(TorchDispatchMode):
    """Under it the kernels are operators, see `cpu.is_direct`."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.usefixtures("kernel")
def test_past_the_dispatcher_and_as_operators_the_kernels_give_the_same_bits(dtype, layout, fusion):
    adds, relu = FUSIONS[fusion]
    x, residual, dy = (laid_out(torch.randn(20, 6, 5, 5), layout).to(dtype) for _ in range(3))

    def results(layer):
        inputs = [x.requires_grad_(), *layer.parameters()] + ([residual.requires_grad_()] if adds else [])
        y = layer.normalize(x, residual if adds else None, relu)
        return y.detach(), *torch.autograd.grad(y, inputs, dy)

    direct = GhostBatchNorm2d(6, ghost_batch_size=GHOST)
    watched = copy.deepcopy(direct)
    with Onlooker():
        theirs = results(watched)
    for mine, other in zip(results(direct), theirs, strict=True):
        assert torch.equal(mine, other)
    torch.testing.assert_close(direct.state_dict(), watched.state_dict(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 3)])
@pytest.mark.usefixtures("instruction_set")
def test_running_statistics_are_those_of_one_ghost_after_the_other(momentum, rank, world_size):
    """A loop in float64 over all processes' ghosts, of which this one knows its own, the others being zero."""
    layer = GhostBatchNorm2d(70, ghost_batch_size=2, momentum=momentum)
    shard_running_statistics(layer, rank, world_size)
    mean, variance = layer.running_mean.double(), layer.running_var.double()
    seen = 0
    for samples in (9, 40):
        x = 3 * torch.randn(samples, 70, 3, 3) + 2
        layer(x)
        for i in range(samples // 2):
            ghost = x[2 * i : None if i == samples // 2 - 1 else 2 * i + 2].double()
            for process in range(world_size):
                seen += 1
                fraction = 1 / seen if momentum is None else momentum
                mine = process == rank
                mean = (1 - fraction) * mean + fraction * mine * ghost.mean((0, 2, 3))
                variance = (1 - fraction) * variance + fraction * mine * ghost.transpose(0, 1).flatten(1).var(1)
    torch.testing.assert_close(layer.running_mean.double(), mean, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(layer.running_var.double(), variance, rtol=1e-6, atol=1e-7)
    assert layer.num_batches_tracked == seen


def test_a_batch_that_changes_what_a_pending_gradient_needs_is_noticed(kernel):
    layer = GhostBatchNorm2d(3, ghost_batch_size=2)
    x = torch.randn(4, 3, 2, 2)
    loss = layer.eval()(x.requires_grad_()).square().sum()
    layer.train()(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_who_looks_on_sees_operators(kernel):
    layer, x = GhostBatchNorm2d(3, ghost_batch_size=2), torch.randn(4, 3, 2, 2)
    assert cpu.is_direct(x)
    with torch.autograd.profiler.profile() as profile:
        layer(x.requires_grad_()).sum().backward()
    names = {event.name for event in profile.function_events}
    assert {"gbnzoo::ghost_batch_norm", "gbnzoo::ghost_batch_norm_backward"} <= names
    assert torch.func.vmap(lambda x: torch.tensor(cpu.is_direct(x)).expand(1))(x).logical_not().all()
    assert not cpu.is_direct(x, x.to("meta"))


DENSE = {
    "vectors transposed": torch.empty(6, 10).t(),
    "planes transposed": torch.empty(10, 6, 5, 4).transpose(2, 3),
    "channels last, planes transposed": torch.empty(10, 5, 4, 6).permute(0, 3, 2, 1),
    "samples behind channels": torch.empty(6, 10, 4, 5).transpose(0, 1),
    "volumes": torch.empty(10, 3, 4, 2, 6).permute(0, 4, 2, 1, 3),
}


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("layout", DENSE)
def test_operators_promise_the_layout_that_they_give(kernel, layout, adds):
    x, residual, dy = (torch.randn_like(DENSE[layout]) for _ in range(3))
    assert x.stride() == DENSE[layout].stride()
    inputs = (x, residual if adds else None, torch.rand(6), torch.rand(6), GHOST, 1e-5, True)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.gbnzoo.ghost_batch_norm.default, inputs, test_utils=checks)
    y, statistics = torch.ops.gbnzoo.ghost_batch_norm(*inputs)
    inputs = (dy, x, y if adds else None, *inputs[2:4], statistics, GHOST, True)
    torch.library.opcheck(torch.ops.gbnzoo.ghost_batch_norm_backward.default, inputs, test_utils=checks)


def test_what_a_hook_lays_out_anew_is_read_as_it_lies(kernel):
    x, residual = (laid_out(torch.randn(8, 6, 5, 4), "channels_last").requires_grad_() for _ in range(2))

    def gradients():
        y, *_ = kernel(x, None, None, GHOST, 1e-5, residual, True)
        return torch.autograd.grad(y.square().sum(), (x, residual))

    def pack(tensor):
        return tensor.contiguous() if tensor.dim() == 4 and (tensor >= 0).all() else tensor

    expected = gradients()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        assert all(map(torch.equal, gradients(), expected))


@pytest.mark.parametrize("ghost_batch_size", [2**40, 2**62, sys.maxsize, 2**63])
def test_ghosts_beyond_all_numbers_are_one(kernel, ghost_batch_size):
    x = torch.randn(8, 3, 4, 4)
    whole = GhostBatchNorm2d(3, ghost_batch_size=8)
    assert torch.equal(GhostBatchNorm2d(3, ghost_batch_size=ghost_batch_size)(x), whole(x))


@pytest.mark.parametrize("samples", [8, 7])
def test_layers_can_be_vectorised(kernel, samples):
    layer = GhostBatchNorm2d(3, ghost_batch_size=2, track_running_stats=False)
    xs = torch.randn(4, samples, 3, 2, 2)
    torch.testing.assert_close(torch.vmap(layer)(xs), torch.stack([layer(x) for x in xs]))
    gradient = torch.func.grad(lambda x: layer(x).pow(3).sum())
    torch.testing.assert_close(torch.vmap(gradient)(xs), torch.stack([gradient(x) for x in xs]), rtol=1e-4, atol=1e-4)


def test_many_gradients_at_once(kernel):
    x, dys = torch.randn(8, 3, 2, 2, requires_grad=True), torch.randn(5, 8, 3, 2, 2)
    y, *_ = kernel(x, None, None, GHOST, 1e-5)
    (together,) = torch.autograd.grad(y, x, dys, is_grads_batched=True, retain_graph=True)
    for dy, dx in zip(dys, together, strict=True):
        assert torch.equal(torch.autograd.grad(y, x, dy, retain_graph=True)[0], dx)


def test_parameters_of_other_channels_are_refused(kernel):
    layer = GhostBatchNorm2d(3, ghost_batch_size=2, track_running_stats=False)
    with pytest.raises(RuntimeError, match=r"5 channels .* \(3,\)"):
        layer(torch.randn(4, 5, 2, 2))


def test_a_kernel_of_other_arguments_is_not_loaded(kernel, monkeypatch):
    monkeypatch.setattr(cpu, "_INTERFACE", cpu._INTERFACE + 1)
    assert [cpu.load(name) for name in cpu.INSTRUCTION_SETS] == [None, None, None]


def test_pick_leaves_to_torch_what_no_kernel_does(kernel):
    x = torch.randn(8, 3, 2, 2)
    assert kernels.pick(x, 4) is kernel
    assert kernels.pick(x.bfloat16(), 4) is kernel
    assert kernels.pick(x.half(), 4) is None
    assert kernels.pick(x.double(), 4) is None
    assert kernels.pick(x.to("meta"), 4) is None
    assert kernels.pick(x, 1) is kernel
    assert kernels.pick(x[..., :1, :1], 1) is None
    assert torch.func.vmap(lambda x: torch.tensor(kernels.pick(x, 4) is None).expand(1))(x[None]).all()


@pytest.mark.parametrize("ghost_class", [GhostBatchNorm2d, GhostBatchNormAct2d])
def test_layers_train_with_the_kernel(kernel, ghost_class):
    layer = ghost_class(6, ghost_batch_size=GHOST)
    x = torch.randn(10, 6, 5, 5, requires_grad=True)
    assert len(kernel_nodes(layer(x).grad_fn)) == 1
    assert not kernel_nodes(layer.double()(x.double()).grad_fn)


def kernel_nodes(node):
    """The kernel's nodes in the graph that ends in a node."""
    found = [node] if "GhostBatchNorm" in type(node).__name__ else []
    return found + [each for inner, _ in node.next_functions if inner for each in kernel_nodes(inner)]


def test_environment_turns_kernels_off():
    code = "import torch; from gbnzoo import kernels; print(kernels.pick(torch.randn(8, 3), 4))"
    environment = os.environ | {"GBNZOO_KERNELS": "0"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout == "None\n"


def test_without_a_compiler_the_package_installs_and_trains_and_says_so_once(tmp_path):
    root = Path(__file__).parents[1]
    for name in ("gbnzoo", "recipes"):
        shutil.copytree(root / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, tmp_path)
    without_compiler = os.environ | {"CC": "/bin/false", "CXX": "/bin/false"}
    build = "from setuptools import build_meta; import os; os.rename(build_meta.build_wheel('.'), 'installed.whl')"
    train = (
        "import importlib.metadata as m; m.distributions = lambda **_: []; "  # none but this one
        "import torch, gbnzoo as g; l = g.GhostBatchNorm1d(3, ghost_batch_size=4); l(l(torch.randn(8, 3))); print(g)"
    )

    def run(code):
        command = [sys.executable, "-c", code]
        return subprocess.run(command, cwd=tmp_path, env=without_compiler, capture_output=True, text=True, check=True)

    run(build)
    with zipfile.ZipFile(tmp_path / "installed.whl") as wheel:
        assert not [name for name in wheel.namelist() if name.endswith(".so")]
        wheel.extractall(tmp_path / "installed")
    without_compiler["PYTHONPATH"] = str(tmp_path / "installed")
    shutil.rmtree(tmp_path / "gbnzoo")
    trained = run(train)
    assert str(tmp_path / "installed") in trained.stdout
    assert trained.stderr.count("no compiled CPU kernels") == 1


@pytest.mark.skipif(cpu.LIBRARY is None, reason="no kernel was compiled")
def test_a_checkout_runs_the_kernels_that_were_installed_from_its_sources(tmp_path):
    package = Path(kernels.__file__).parents[1]
    shutil.copytree(package, tmp_path / "installed" / "gbnzoo")
    (tmp_path / "installed" / "gbnzoo-0.dist-info").mkdir()
    (tmp_path / "installed" / "gbnzoo-0.dist-info" / "METADATA").write_text("Name: gbnzoo\nVersion: 0\n")
    checkout = tmp_path / "checkout" / "gbnzoo"
    shutil.copytree(package, checkout, ignore=shutil.ignore_patterns("*.so"))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (checkout.parent, tmp_path / "installed")))}

    def has_kernels():
        code = "from gbnzoo.kernels import cpu; print(cpu.__file__); print(cpu.LIBRARY is not None)"
        command = [sys.executable, "-c", code]
        run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        file, answer = run.stdout.split()
        assert Path(file).is_relative_to(checkout)
        return answer == "True"

    assert {file.name for file in (checkout / "kernels").iterdir() if file.suffix in (".cpp", ".h")} <= {*cpu._SOURCES}
    assert has_kernels()
    with open(checkout / "kernels" / "ghost_norm.cpp", "a") as source:
        source.write("// of another version\n")
    assert not has_kernels()


def test_missing_kernels_are_mentioned_once(monkeypatch, caplog):
    monkeypatch.setattr(cpu, "LIBRARY", None)
    kernels._say_none_was_built.cache_clear()
    assert kernels.pick(torch.randn(8, 3), 4) is None
    assert kernels.pick(torch.randn(8, 3), 4) is None
    assert len(caplog.records) == 1
    assert "compiler" in caplog.text


@pytest.mark.parametrize("fusion", FUSIONS)
def test_reference(fusion):
    adds, relu = FUSIONS[fusion]
    x, residual = (torch.randn(10, 3, 4, 4, dtype=torch.float64) for _ in range(2))
    weight, bias = (torch.randn(3, dtype=torch.float64) for _ in range(2))
    arguments = (x, weight, bias, GHOST)
    residual = residual if adds else None
    torch.testing.assert_close(
        reference.ghost_batch_norm(*arguments, 1e-5, residual, relu), oracle(*arguments, residual, relu)
    )


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("channels", [1, 2, 3, 5])
@pytest.mark.parametrize("kind", ["none", "pad2_crop", "pad2_crop_flip"])
@pytest.mark.parametrize("dtype", cpu.DTYPES)
@pytest.mark.usefixtures("instruction_set")
def test_crops_are_those_of_torchs_operators(dtype, kind, channels, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    mean, std = torch.rand(2, channels).tolist()
    for height, width in ((12, 20), (5, 7), (28, 28), (1, 1), (3, 300), (2, 259)):
        pixels = torch.from_numpy(random_pixels(9, height, width, channels))
        image_set = ImageSet(pixels, torch.zeros(9, dtype=torch.int64), (), mean, std, "random", "train")
        augment = Augment(image_set, kind, 0, dtype)
        images, how = augment.images, augment.normalise
        for size in (0, 1, 2, 200):
            corners, flipped = augment._places(torch.randint(9, (size,)), torch.arange(size))
            made = crops.gather(images, corners, flipped, augment.crop, how.mean, how.std, dtype)
            assert torch.equal(made, how.values(augment._gather(corners, flipped)))


@pytest.mark.parametrize("corner", [-1, 2 * 12 * 12 - 7 * 12 - 8 + 1])
@pytest.mark.usefixtures("instruction_set")
def test_a_crop_outside_of_the_images_is_refused(corner):
    images, one = torch.from_numpy(random_pixels(2, 12, 12, 3)), torch.ones(3)
    with pytest.raises(IndexError, match="wanted 0 to 196, in 2 images of 12 × 12"):
        crops.gather(images, torch.tensor([0, corner]), None, (8, 8), one, one, torch.float32)
    with pytest.raises(ValueError, match="mean and std of 3 and 2 channels, for images of 3"):
        crops.gather(images, torch.tensor([0]), None, (8, 8), one, one[:2], torch.float32)


@pytest.mark.parametrize("samples", [1, 2, 3, 5, 16, 17, 1000, 60_000, 65_536, 2**31 - 1, 10**12])
@pytest.mark.usefixtures("instruction_set")
def test_the_order_is_that_of_numpy(samples, monkeypatch):
    places = torch.randperm(4099)[:1234]
    for seed, batch_size, update in ((0, 4099, 0), (7, 5000, 3), (2**63 - 1, 4099, 10**9)):
        batches = GlobalBatches(samples, batch_size, seed)
        drawn = torch.stack(batches.at(update, places))
        with monkeypatch.context() as off:
            off.setattr(kernels, "_ARE_ON", False)
            assert kernels.pick_order(places) is None
            assert torch.equal(torch.stack(batches.at(update, places)), drawn)


@pytest.mark.parametrize("missing", ["triton", "CUDA"])
def test_without_triton_or_torch_for_cuda_there_are_no_gpu_kernels(missing):
    code = f"""if True:
        import importlib.util, torch
        find_spec = importlib.util.find_spec
        if {missing == "triton"}:
            importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find_spec(name, *rest)
        if {missing == "CUDA"}:
            torch.version.cuda = None
        from gbnzoo import kernels
        assert not hasattr(kernels, "gpu")
        print(kernels.pick(torch.empty(8, 3, device="meta"), 4))
    """
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "None\n"


def test_to_import_the_package_leaves_the_gpu_alone():
    # Processes forked from one that has asked for it cannot use it, such as those of accelerate's notebook_launcher.
    code = """if True:
        import torch
        def refuse(*arguments): raise AssertionError("asked for a GPU")
        torch._C._cuda_getDeviceCount = torch._C._cuda_init = torch.cuda.device_count = refuse
        import gbnzoo
        print(gbnzoo.kernels._DTYPES.keys())
    """
    assert "cpu" in subprocess.check_output([sys.executable, "-c", code], text=True)
