"""The ghost layers, against nn.BatchNorm applied ghost by ghost."""

import copy

import pytest
import torch
from timm.layers import BatchNormAct2d, freeze_batch_norm_2d
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from gbnzoo.norm import (
    GhostBatchNorm1d,
    GhostBatchNorm2d,
    GhostBatchNorm3d,
    GhostBatchNormAct2d,
    convert_ghost_batchnorm,
    gathered_running_statistics,
    recalibrate,
    shard_running_statistics,
)

CHANNELS, GHOST = 5, 4
LAYERS = [
    pytest.param(GhostBatchNorm1d, nn.BatchNorm1d, (), id="1d"),
    pytest.param(GhostBatchNorm1d, nn.BatchNorm1d, (3,), id="1d-length"),
    pytest.param(GhostBatchNorm2d, nn.BatchNorm2d, (3, 2), id="2d"),
    pytest.param(GhostBatchNorm3d, nn.BatchNorm3d, (2, 3, 2), id="3d"),
    pytest.param(GhostBatchNormAct2d, BatchNormAct2d, (3, 2), id="act2d"),
]
MEMORY_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


class GhostByGhost(nn.Module):
    """The twin: a BatchNorm shown the ghosts one after the other, the last one with the remainder."""

    def __init__(self, norm, ghost_rows):
        super().__init__()
        self.norm, self.ghost_rows = norm, ghost_rows

    def forward(self, x):
        if not self.training:
            return self.norm(x)
        whole_ghosts = max(1, len(x) // self.ghost_rows)
        sizes = [self.ghost_rows] * (whole_ghosts - 1)
        return torch.cat([self.norm(ghost) for ghost in x.split([*sizes, len(x) - sum(sizes)])])


def pair(ghost_class, plain_class, ghost_batch_size=GHOST, **kwargs):
    """A ghost layer and its twin with the same random weights."""
    kwargs = {"dtype": torch.float64} | kwargs
    layer = ghost_class(CHANNELS, ghost_batch_size=ghost_batch_size, **kwargs)
    twin = GhostByGhost(plain_class(CHANNELS, **kwargs), ghost_batch_size)
    if layer.affine:
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    twin.norm.load_state_dict(layer.state_dict())
    return layer, twin


def batch(samples, shape, dtype=torch.float64, offset=3.0):
    return (2 * torch.randn(samples, CHANNELS, *shape, dtype=torch.float64) + offset).to(dtype)


def output_and_gradients(layer, x, dy):
    x = x.detach().requires_grad_()
    y = layer(x)
    return y, *torch.autograd.grad(y, [x, *layer.parameters()], dy)


def assert_same_layer(layer, twin, x, **tolerance):
    dy = torch.randn_like(x)
    ours, theirs = output_and_gradients(layer, x, dy), output_and_gradients(twin, x, dy)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, **tolerance)
    buffers = zip(layer.buffers(), twin.buffers(), strict=True)
    for mine, other in buffers:
        torch.testing.assert_close(mine, other, **tolerance)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(("ghost_class", "plain_class", "shape"), LAYERS)
@pytest.mark.parametrize("samples", range(1, 3 * GHOST + 1))
def test_training_equals_batchnorm_ghost_by_ghost(ghost_class, plain_class, shape, samples):
    layer, twin = pair(ghost_class, plain_class)
    if samples == 1 and not shape:
        with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
            twin(batch(samples, shape))
        with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
            layer(batch(samples, shape))
        return
    for _ in range(2):
        assert_same_layer(layer, twin, batch(samples, shape), rtol=1e-12, atol=1e-12)
    assert layer.num_batches_tracked == 2 * max(1, samples // GHOST)


@pytest.mark.parametrize("samples", [8, 11])
@pytest.mark.parametrize("kwargs", [{"momentum": None}, {"momentum": 1.0}, {"affine": False}, {"eps": 0.1}])
def test_every_setting_of_batchnorm_means_the_same(kwargs, samples):
    layer, twin = pair(GhostBatchNorm2d, nn.BatchNorm2d, **kwargs)
    for _ in range(3):
        assert_same_layer(layer, twin, batch(samples, (3, 2)), rtol=1e-12, atol=1e-12)


def test_without_running_statistics_eval_uses_the_batch_as_batchnorm_does():
    layer, twin = pair(GhostBatchNorm2d, nn.BatchNorm2d, track_running_stats=False)
    assert_same_layer(layer, twin, batch(9, (3, 2)), rtol=1e-12, atol=1e-12)
    x = batch(9, (3, 2))
    torch.testing.assert_close(layer.eval()(x), twin.eval()(x), rtol=0, atol=0)


@pytest.mark.parametrize("samples", [8, 11])
@pytest.mark.parametrize(("ghost_class", "plain_class", "shape"), LAYERS[2:])
def test_channels_last_gives_the_same_and_stays_channels_last(ghost_class, plain_class, shape, samples):
    layer, twin = pair(ghost_class, plain_class)
    x = batch(samples, shape)
    x = x.to(memory_format=MEMORY_FORMATS[x.dim()])
    assert_same_layer(layer, twin, x, rtol=1e-12, atol=1e-12)
    assert layer(x).is_contiguous(memory_format=MEMORY_FORMATS[x.dim()])
    assert layer(x.contiguous()).is_contiguous()


def test_a_strided_input_gives_the_same():
    layer, twin = pair(GhostBatchNorm2d, nn.BatchNorm2d)
    x = batch(9, (6, 4))[:, :, ::2].transpose(2, 3)
    assert not x.is_contiguous()
    assert_same_layer(layer, twin, x, rtol=1e-12, atol=1e-12)


def test_running_mean_by_hand():
    """Ghost means 1, 2, 3 at momentum 1/2 from 0: 0.5, 1.25, 2.125. Their unbiased variance is 2, from 1: 1.5, 1.75, 1.875."""
    layer = GhostBatchNorm1d(1, momentum=0.5, ghost_batch_size=2)
    layer(torch.tensor([0.0, 2, 1, 3, 2, 4])[:, None])
    assert layer.running_mean.item() == 2.125
    assert layer.running_var.item() == 1.875
    assert layer.num_batches_tracked == 3


def test_without_momentum_the_average_counts_ghosts():
    layer = GhostBatchNorm1d(1, momentum=None, ghost_batch_size=2)
    layer(torch.tensor([0.0, 2, 1, 3, 2, 4])[:, None])
    layer(torch.tensor([6.0, 8])[:, None])
    assert layer.running_mean.item() == pytest.approx((1 + 2 + 3 + 7) / 4)


def test_a_ghost_of_a_single_value_raises_batchnorms_error():
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        GhostBatchNorm2d(CHANNELS, ghost_batch_size=1)(torch.randn(3, CHANNELS, 1, 1))


def test_an_empty_batch_leaves_the_statistics_as_batchnorm_does():
    layer, twin = pair(GhostBatchNorm2d, nn.BatchNorm2d)
    assert layer(batch(0, (3, 2))).shape == (0, CHANNELS, 3, 2)
    twin(batch(0, (3, 2)))
    torch.testing.assert_close(layer.state_dict(), twin.norm.state_dict())


@pytest.mark.parametrize("ghost_batch_size", [0, -4, 2.0, "32", True])
def test_an_impossible_ghost_size_is_refused(ghost_batch_size):
    with pytest.raises(ValueError, match="positive integer"):
        GhostBatchNorm2d(CHANNELS, ghost_batch_size=ghost_batch_size)


@pytest.mark.parametrize(("ghost_class", "plain_class", "shape"), LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eval_is_batchnorm_bit_for_bit(ghost_class, plain_class, shape, dtype):
    layer, twin = pair(ghost_class, plain_class, dtype=torch.float32)
    layer(batch(2 * GHOST, shape, torch.float32))
    twin.norm.load_state_dict(layer.state_dict())
    for samples in (1, 3, GHOST, 2 * GHOST + 1):
        x = batch(samples, shape, dtype)
        assert torch.equal(layer.eval()(x), twin.eval()(x))


@pytest.mark.parametrize(("ghost_class", "plain_class", "shape"), LAYERS)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_no_ghost_size_is_batchnorm_bit_for_bit(ghost_class, plain_class, shape, momentum):
    layer = ghost_class(CHANNELS, momentum=momentum)
    plain = plain_class(CHANNELS, momentum=momentum)
    for _ in range(2):
        x = batch(7, shape, torch.float32)
        assert torch.equal(layer(x), plain(x))
    torch.testing.assert_close(layer.state_dict(), plain.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(("ghost_class", "plain_class", "shape"), LAYERS)
def test_state_dicts_load_strictly_both_ways(ghost_class, plain_class, shape):
    layer, plain = ghost_class(CHANNELS, ghost_batch_size=GHOST), plain_class(CHANNELS)
    assert isinstance(layer, plain_class)
    layer(batch(8, shape, torch.float32))
    assert list(layer.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(layer.state_dict(), strict=True)
    layer.load_state_dict(plain.state_dict(), strict=True)


@pytest.mark.parametrize("weights_too", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_of_16_bit_inputs_are_float32(dtype, channels_last, weights_too):
    """Mean 200 and spread 2 leave 16-bit statistics no digits; only the last rounding, of the output, may show."""
    layer = GhostBatchNorm2d(CHANNELS, ghost_batch_size=GHOST, dtype=dtype if weights_too else None)
    twin = GhostByGhost(nn.BatchNorm2d(CHANNELS, dtype=torch.float64), GHOST)
    x = batch(9, (16, 16), dtype, offset=200)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    y = layer(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y, twin(x.double()).to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-3)
    if not weights_too:
        torch.testing.assert_close(layer.running_var.double(), twin.norm.running_var, rtol=1e-4, atol=0)


def test_running_statistics_of_bfloat16_models_are_rounded_once():
    layer = GhostBatchNorm2d(64, ghost_batch_size=GHOST, dtype=torch.bfloat16)
    nn.init.normal_(layer.running_mean)
    twin = GhostByGhost(nn.BatchNorm2d(64, dtype=torch.float64), GHOST)
    twin.norm.load_state_dict(layer.state_dict())
    x = torch.randn(8, 64, 3, 3).bfloat16()
    layer(x)
    twin(x.double())
    assert torch.equal(layer.running_mean, twin.norm.running_mean.bfloat16())


@pytest.mark.parametrize("channels_last", [False, True])
def test_variance_survives_a_mean_ten_thousand_times_larger(channels_last):
    """E[x²] − E[x]² in float32 would leave no digit: 1e8 is known to ± 8 there."""
    layer = GhostBatchNorm2d(CHANNELS, momentum=None, ghost_batch_size=GHOST)
    x = batch(2 * GHOST, (8, 8), torch.float32, offset=1e4)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    layer(x)
    variances = torch.stack([ghost.double().transpose(0, 1).flatten(1).var(1) for ghost in x.split(GHOST)])
    torch.testing.assert_close(layer.running_var.double(), variances.mean(0), rtol=1e-4, atol=0)


def test_second_derivatives_are_right():
    layer, _ = pair(GhostBatchNorm1d, nn.BatchNorm1d)
    x = batch(6, ()).requires_grad_()
    assert torch.autograd.gradcheck(layer, (x,))
    assert torch.autograd.gradgradcheck(layer, (x,))


def test_the_number_of_operations_does_not_grow_with_the_number_of_ghosts():
    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls += 1
            return func(*args, **(kwargs or {}))

    def operations(ghosts):
        layer = GhostBatchNorm2d(CHANNELS, ghost_batch_size=2)
        with Count() as count:
            layer(torch.randn(2 * ghosts + 1, CHANNELS, 2, 2).requires_grad_()).sum().backward()
        return count.calls

    assert operations(3) == operations(50)


# A ghost is so many samples, whatever dim 0 is (DESIGN fact 7).


class Tokens(nn.Module):
    """Normalises tokens as levit does: [samples, tokens, channels] folded to [samples · tokens, channels]."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, scale, tokens):
        return self.norm((scale * tokens).flatten(0, 1)).view_as(tokens)


@pytest.mark.parametrize("as_keyword", [False, True])
def test_ghosts_of_folded_tokens_hold_whole_samples(as_keyword):
    twin = GhostByGhost(nn.BatchNorm1d(CHANNELS, dtype=torch.float64), 2 * 7)
    model = convert_ghost_batchnorm(Tokens(copy.deepcopy(twin.norm)), 2)
    x = torch.randn(5, 7, CHANNELS, dtype=torch.float64)
    scale = torch.tensor(3.0)
    y = model(scale, tokens=x) if as_keyword else model(scale, x)
    torch.testing.assert_close(y, twin(3 * x.flatten(0, 1)).view_as(x))
    torch.testing.assert_close(model.norm.running_var, twin.norm.running_var)


def test_a_layer_called_by_itself_after_its_model_counts_anew():
    model = convert_ghost_batchnorm(nn.Sequential(nn.BatchNorm1d(CHANNELS, dtype=torch.float64)), 2)
    twin = GhostByGhost(nn.BatchNorm1d(CHANNELS, dtype=torch.float64), 2)
    model(batch(3, ()))
    x = batch(6, ())
    torch.testing.assert_close(model[0](x), twin(x))


def test_after_an_error_the_parts_of_a_model_count_anew():
    model = convert_ghost_batchnorm(nn.Sequential(nn.BatchNorm1d(CHANNELS), nn.Linear(CHANNELS + 1, 2)), 2)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(torch.randn(8, CHANNELS))
    assert model[0](torch.randn(9, CHANNELS)).shape == (9, CHANNELS)


def test_rows_that_belong_to_no_sample_are_refused():
    model = nn.Sequential(nn.Unflatten(0, (4, 2)), nn.Flatten(1), nn.BatchNorm1d(2 * CHANNELS))
    convert_ghost_batchnorm(model, 2)
    with pytest.raises(ValueError, match="4 rows of dim 0 belong to which of the model's 8 samples"):
        model(torch.randn(8, CHANNELS))


# Running statistics: counted once, and split over processes.


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_counts_statistics_once(use_reentrant):
    layer, twin = pair(GhostBatchNorm1d, nn.BatchNorm1d)
    model = convert_ghost_batchnorm(Tokens(layer), GHOST)
    twin.ghost_rows = GHOST * 7
    x = torch.randn(9, 7, CHANNELS, dtype=torch.float64, requires_grad=True)
    # The tanh is there because checkpointing stops at the last tensor it needs, which may lie before the count.
    y = checkpoint(lambda *args: model(*args).tanh(), torch.tensor(1.0), x, use_reentrant=use_reentrant)
    expected = twin(x.flatten(0, 1)).view_as(x).tanh()
    dy = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(expected, x, dy)[0], grad_by_backward(y, x, dy))
    torch.testing.assert_close(layer.state_dict(), twin.norm.state_dict())


def test_checkpointing_inside_the_model_keeps_ghosts_whole_samples():
    class Checkpointed(Tokens):
        def forward(self, scale, tokens):
            return checkpoint(super().forward, scale, tokens, use_reentrant=False)

    layer, twin = pair(GhostBatchNorm1d, nn.BatchNorm1d)
    model = convert_ghost_batchnorm(Checkpointed(layer), GHOST)
    twin.ghost_rows = GHOST * 7
    x = torch.randn(9, 7, CHANNELS, dtype=torch.float64, requires_grad=True)
    dy = torch.randn_like(x)
    expected = torch.autograd.grad(twin(x.flatten(0, 1)).view_as(x), x, dy)[0]
    torch.testing.assert_close(grad_by_backward(model(torch.tensor(1.0), x), x, dy), expected)


def grad_by_backward(y, x, dy):
    x.grad = None
    y.backward(dy)
    return x.grad


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_statistics_split_over_processes_sum_to_those_of_one(world_size, momentum):
    one = nn.Sequential(GhostBatchNorm2d(CHANNELS, momentum=momentum, ghost_batch_size=GHOST, dtype=torch.float64))
    one(batch(12, (3, 2)))
    processes = [copy.deepcopy(one) for _ in range(world_size)]
    for rank, process in enumerate(processes):
        shard_running_statistics(process, rank, world_size)
    for _ in range(3):
        with gathered(processes):
            for process in processes:
                torch.testing.assert_close(process.state_dict(), one.state_dict(), rtol=1e-12, atol=1e-12)
        for _ in range(2):
            x = batch(2 * world_size * GHOST, (3, 2))
            one(x)
            for rank, process in enumerate(processes):
                process(torch.cat(x.split(GHOST)[rank::world_size]))
    with gathered(processes):
        x = batch(3, (3, 2))
        torch.testing.assert_close(processes[-1].eval()(x), one.eval()(x), rtol=1e-12, atol=1e-12)


class gathered:
    """`gathered_running_statistics` on all processes of this one: their shares are summed when all have entered."""

    def __init__(self, processes):
        shares = []
        for process in processes:
            with gathered_running_statistics(process, lambda share: shares.append(share.clone())):
                pass
        total = sum(shares)
        self.contexts = [
            gathered_running_statistics(process, lambda share: share.copy_(total)) for process in processes
        ]

    def __enter__(self):
        for context in self.contexts:
            context.__enter__()

    def __exit__(self, *error):
        for context in self.contexts:
            context.__exit__(*error)


def test_split_statistics_are_not_mistaken_for_whole_ones():
    model = nn.Sequential(GhostBatchNorm2d(CHANNELS, ghost_batch_size=GHOST))
    shard_running_statistics(model, rank=1, world_size=2)
    with pytest.raises(RuntimeError, match="inside gathered_running_statistics"):
        model.eval()(torch.randn(2, CHANNELS, 3, 2))
    with pytest.raises(ValueError, match="0 are already split"):
        shard_running_statistics(model, rank=1, world_size=2)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        shard_running_statistics(nn.Sequential(GhostBatchNorm2d(CHANNELS, ghost_batch_size=GHOST)), 2, 2)


def test_a_split_model_is_frozen_only_with_whole_statistics():
    processes = [nn.Sequential(GhostBatchNorm2d(CHANNELS, ghost_batch_size=GHOST)) for _ in range(2)]
    for rank, process in enumerate(processes):
        shard_running_statistics(process, rank, 2)
        process(batch(8, (3, 2), torch.float32))
    with pytest.raises(RuntimeError, match="inside gathered_running_statistics"):
        freeze_batch_norm_2d(processes[1])
    with gathered(processes):
        variances = [freeze_batch_norm_2d(process)[0].running_var for process in processes]
    assert torch.equal(*variances)
    assert variances[1].min() > 0


@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("ghost_batch_size", [None, GHOST])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("missing", [["num_batches_tracked"], ["running_mean", "running_var"]])
def test_buffers_that_somebody_took_away_are_not_missed(missing, momentum, ghost_batch_size, kernel):
    dtype = torch.float32 if kernel else torch.float64
    layer, twin = pair(GhostBatchNorm1d, nn.BatchNorm1d, ghost_batch_size, momentum=momentum, dtype=dtype)
    twin.ghost_rows = twin.ghost_rows or 8
    for name in missing:
        setattr(layer, name, None)
        setattr(twin.norm, name, None)
    x = batch(8, (), layer.weight.dtype)
    torch.testing.assert_close(layer(x), twin(x))
    torch.testing.assert_close(layer.state_dict(), twin.norm.state_dict())


@pytest.mark.parametrize(
    ("batches", "error"), [([], ValueError), ([torch.ones(8, CHANNELS), torch.ones(8, 1)], RuntimeError)]
)
def test_recalibration_that_fails_leaves_the_statistics_as_they_were(batches, error):
    layer = GhostBatchNorm1d(CHANNELS, ghost_batch_size=GHOST)
    layer(batch(8, (), torch.float32))
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(error):
        recalibrate(layer, iter(batches))
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)
    assert layer.training
    assert layer.momentum == 0.1


def test_resetting_split_statistics_starts_the_sum_anew():
    processes = [nn.Sequential(GhostBatchNorm1d(CHANNELS, ghost_batch_size=GHOST)) for _ in range(2)]
    for rank, process in enumerate(processes):
        shard_running_statistics(process, rank, 2)
        process(batch(8, (), torch.float32))
        process[0].reset_running_stats()
    with gathered(processes):
        assert torch.equal(processes[1][0].running_var, torch.ones(CHANNELS))
