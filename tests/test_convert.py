"""convert_ghost_batchnorm and revert_ghost_batchnorm, on models that know nothing of gbnzoo."""

import copy
import pickle

import pytest
import torch
import torchvision
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d, SplitBatchNorm2d
from torch import nn
from torchvision.ops.misc import FrozenBatchNorm2d

from gbnzoo import (
    GhostBatchNorm1d,
    GhostBatchNorm2d,
    GhostBatchNorm3d,
    GhostBatchNormAct2d,
    convert_ghost_batchnorm,
    revert_ghost_batchnorm,
)

GHOST = 2


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def small_net():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 5, 3),
        BatchNormAct2d(5),
        nn.Flatten(),
        nn.LazyLinear(2),
    )


def split_into_ghosts(model):
    """Show every BatchNorm of a model the ghosts of its input one after the other, through a hook and a loop."""

    def ghost_by_ghost(x, forward):
        sizes = [GHOST] * (len(x) // GHOST - 1)
        return torch.cat([forward(ghost) for ghost in x.split([*sizes, len(x) - sum(sizes)])])

    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.forward = lambda x, forward=layer.forward: ghost_by_ghost(x, forward)
    return model


def test_every_batchnorm_becomes_its_ghost_class_in_place():
    layers = {nn.BatchNorm1d(3): GhostBatchNorm1d, nn.BatchNorm2d(3): GhostBatchNorm2d}
    layers |= {nn.BatchNorm3d(3): GhostBatchNorm3d, BatchNormAct2d(3): GhostBatchNormAct2d}
    layers |= {nn.InstanceNorm2d(3): nn.InstanceNorm2d, nn.GroupNorm(1, 3): nn.GroupNorm}
    model = nn.Sequential(*layers)
    assert convert_ghost_batchnorm(model, ghost_batch_size=GHOST) is model
    for converted, (layer, ghost_class) in zip(model, layers.items(), strict=True):
        assert converted is layer
        assert type(layer) is ghost_class


def test_a_torchvision_model_trains_ghost_by_ghost():
    model = torchvision.models.resnet18(num_classes=2).double()
    twin = split_into_ghosts(copy.deepcopy(model))
    convert_ghost_batchnorm(model, GHOST)
    x = torch.randn(5, 3, 40, 40, dtype=torch.float64)
    y, expected = model(x), twin(x)
    torch.testing.assert_close(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)
    torch.testing.assert_close(model.state_dict(), twin.state_dict())


def test_a_converted_model_evaluates_bit_for_bit_and_keeps_its_keys():
    model = small_net().eval()
    x = torch.randn(5, 3, 8, 8)
    expected, keys = model(x), list(model.state_dict())
    convert_ghost_batchnorm(model, GHOST)
    assert torch.equal(model(x), expected)
    assert list(model.state_dict()) == keys


def test_what_a_layer_was_it_stays():
    calls = []
    layer = nn.BatchNorm2d(3, eps=0.1, momentum=0.3, dtype=torch.float64)
    layer.eval().weight.requires_grad_(False)
    layer.register_forward_hook(lambda *_: calls.append(1))
    parameters, buffers = dict(layer.named_parameters()), dict(layer.named_buffers())
    model = nn.ModuleDict({"one": layer, "same": layer})
    convert_ghost_batchnorm(model, GHOST)
    assert model["one"] is model["same"]
    assert all(parameter is parameters[name] for name, parameter in layer.named_parameters())
    assert all(buffer is buffers[name] for name, buffer in layer.named_buffers())
    assert (layer.eps, layer.momentum, layer.training, layer.weight.requires_grad) == (0.1, 0.3, False, False)
    layer(torch.zeros(1, 3, 1, 1, dtype=torch.float64))
    assert calls == [1]


@pytest.mark.parametrize("kwargs", [{"affine": False}, {"track_running_stats": False}, {"device": "meta"}])
def test_layers_without_weights_statistics_or_memory_convert(kwargs):
    layer = convert_ghost_batchnorm(nn.BatchNorm2d(3, **kwargs), GHOST)
    assert layer(torch.zeros(5, 3, 2, 2, device=kwargs.get("device"))).shape == (5, 3, 2, 2)


def test_a_layer_by_itself_converts_and_reverts():
    layer = nn.BatchNorm1d(3)
    assert type(convert_ghost_batchnorm(layer, GHOST)) is GhostBatchNorm1d
    assert type(revert_ghost_batchnorm(layer)) is nn.BatchNorm1d


def test_converting_again_only_changes_the_ghost_size():
    model = convert_ghost_batchnorm(convert_ghost_batchnorm(small_net(), 4), GHOST)
    assert model[1].ghost_batch_size == model[4].ghost_batch_size == GHOST
    once = convert_ghost_batchnorm(small_net(), GHOST)
    assert len(model._forward_pre_hooks) == len(once._forward_pre_hooks)
    assert len(model._forward_hooks) == len(once._forward_hooks)


def test_a_converted_part_of_a_converted_model_counts_the_models_samples():
    fold = nn.Sequential(nn.Flatten(0, 1), nn.BatchNorm1d(3))
    model = nn.Sequential(convert_ghost_batchnorm(fold, GHOST))
    convert_ghost_batchnorm(model, GHOST)
    x = torch.randn(5, 7, 3)
    expected = torch.cat([nn.BatchNorm1d(3)(ghost.flatten(0, 1)) for ghost in x.split([2, 3])])
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_counts_its_own_samples(duplicate):
    model = convert_ghost_batchnorm(nn.Sequential(nn.Flatten(0, 1), nn.BatchNorm1d(3)), GHOST)
    copied = duplicate(model)
    model(torch.randn(9, 2, 3))
    x = torch.randn(5, 7, 3)
    expected = torch.cat([nn.BatchNorm1d(3)(ghost.flatten(0, 1)) for ghost in x.split([2, 3])])
    torch.testing.assert_close(copied(x), expected)


class CalledByName(nn.Module):
    """As the networks of transformers are: images by keyword, and a record of outputs."""

    def __init__(self):
        super().__init__()
        self.fold, self.norm = nn.Flatten(0, 1), nn.BatchNorm1d(3)

    def forward(self, labels=None, pixel_values=None):
        return {"loss": None, "logits": self.norm(self.fold(pixel_values))}


def test_a_model_called_by_name_counts_its_samples():
    model = convert_ghost_batchnorm(CalledByName(), GHOST)
    x = torch.randn(5, 7, 3)
    expected = torch.cat([nn.BatchNorm1d(3)(ghost.flatten(0, 1)) for ghost in x.split([2, 3])])
    torch.testing.assert_close(model(pixel_values=x)["logits"], expected)


def test_a_model_of_transformers_trains_ghost_by_ghost():
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
    model = transformers.ResNetForImageClassification(config).double()
    twin = split_into_ghosts(copy.deepcopy(model))
    convert_ghost_batchnorm(model, GHOST)
    x = torch.randn(5, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(model(pixel_values=x).logits, twin(pixel_values=x).logits)
    torch.testing.assert_close(model.state_dict(), twin.state_dict())


def test_a_converted_model_compiles_without_graph_breaks():
    model = convert_ghost_batchnorm(nn.Sequential(nn.Flatten(0, 1), nn.BatchNorm1d(3)), GHOST)
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for samples in (4, 5):
        x = torch.randn(samples, 7, 3)
        torch.testing.assert_close(compiled(x), eager(x))
    torch.testing.assert_close(model.state_dict(), eager.state_dict())


def test_a_converted_model_exports_in_eval():
    model, x = convert_ghost_batchnorm(small_net(), GHOST).eval(), torch.randn(5, 3, 8, 8)
    expected = model(x)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)


def test_no_ghost_size_is_plain_batchnorm():
    model, x = small_net(), torch.randn(5, 3, 8, 8)
    model(x)
    plain = copy.deepcopy(model)
    assert torch.equal(convert_ghost_batchnorm(model, None)(x), plain(x))
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=0, atol=0)


def test_a_reverted_model_has_nothing_of_gbnzoo():
    model, x = small_net(), torch.randn(5, 3, 8, 8)
    model(x)
    plain = copy.deepcopy(model)
    convert_ghost_batchnorm(model, GHOST)
    model.load_state_dict(plain.state_dict(), strict=True)
    assert b"gbnzoo" in pickle.dumps(model)
    assert revert_ghost_batchnorm(model) is model
    assert b"gbnzoo" not in pickle.dumps(model)
    assert [type(layer) for layer in model] == [type(layer) for layer in plain]
    assert [sorted(vars(layer)) for layer in model] == [sorted(vars(layer)) for layer in plain]
    assert not model._forward_pre_hooks_with_kwargs
    assert torch.equal(model(x), plain(x))


def test_a_reverted_model_keeps_the_users_hooks():
    model, calls = nn.Sequential(nn.BatchNorm1d(3)), []
    model.register_forward_pre_hook(lambda *_: calls.append("pre"))
    model.register_forward_hook(lambda *_: calls.append("post"))
    revert_ghost_batchnorm(convert_ghost_batchnorm(model, GHOST))(torch.randn(4, 3))
    assert calls == ["pre", "post"]


class BatchNormOfSomebodyElse(nn.BatchNorm2d):
    pass


@pytest.mark.parametrize(
    ("layer", "way_out"),
    [
        (nn.LazyBatchNorm2d(), "run one batch through the model"),
        (nn.SyncBatchNorm(3), "convert the model it was made from"),
        (SplitBatchNorm2d(3), "one of torch's or timm's own classes"),
        (BatchNormOfSomebodyElse(3), "one of torch's or timm's own classes"),
    ],
)
def test_layers_that_would_lose_what_they_are_are_refused(layer, way_out):
    model = nn.Sequential(nn.BatchNorm2d(3), layer)
    with pytest.raises(TypeError, match=f"1 is a {type(layer).__name__}: .*{way_out}"):
        convert_ghost_batchnorm(model, GHOST)
    assert type(model[0]) is nn.BatchNorm2d
    assert not model._forward_pre_hooks


def test_a_lazy_layer_converts_after_its_first_batch():
    model = nn.Sequential(nn.LazyBatchNorm2d())
    model(torch.randn(4, 3, 2, 2))
    assert type(convert_ghost_batchnorm(model, GHOST)[0]) is GhostBatchNorm2d


@pytest.mark.parametrize("frozen_class", [FrozenBatchNorm2d, FrozenBatchNormAct2d])
def test_frozen_layers_are_left_as_they_are(frozen_class):
    model = convert_ghost_batchnorm(nn.Sequential(frozen_class(3)), GHOST)
    assert type(model[0]) is frozen_class


def test_an_impossible_ghost_size_leaves_the_model_unchanged():
    model = nn.Sequential(nn.BatchNorm2d(3))
    with pytest.raises(ValueError, match="positive integer"):
        convert_ghost_batchnorm(model, 0)
    assert type(model[0]) is nn.BatchNorm2d
