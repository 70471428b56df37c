"""Fused blocks, against the same model left as it was: only the time may differ."""

import copy
import pickle
from collections import Counter

import accelerate.hooks
import pytest
import timm
import timm.layers
import timm.utils
import torch
from torch import nn

from gbnzoo import kernels
from gbnzoo.fusion import FusedSequential, fuse_ghost_batchnorm, unfuse_ghost_batchnorm
from gbnzoo.kernels import cpu
from gbnzoo.norm import GhostBatchNorm2d, GhostBatchNormAct2d, convert_ghost_batchnorm, revert_ghost_batchnorm

GHOST, SAMPLES = 4, 10
MODELS = {  # arguments, input shape, and how many ReLUs and additions remain that no norm took over
    "resnet8_thin_gbn": ({}, (1, 8, 8), (0, 0)),
    "cifar_resnet18_gbn": ({"channels": (4, 8, 8, 16)}, (3, 16, 16), (0, 0)),
    "preact_resnet20_gbn": ({"channels": (4, 8, 16)}, (3, 8, 8), (0, 9)),
    "resnet9_gbn": ({"channels": (4, 8, 8, 16)}, (3, 16, 16), (0, 2)),
    "cifar_vgg16_gbn": ({}, (3, 32, 32), (0, 0)),
    "mlp5_gbn": ({"width": 32}, (1, 28, 28), (0, 0)),
    "cifar_alexnet_gbn": ({"drop_rate": 0.0}, (3, 28, 28), (0, 0)),
    "resnet14t_gbn": ({}, (3, 32, 32), (0, 0)),  # bottlenecks and a stem of three convolutions
    "resnet10t_gbn": ({"drop_path_rate": 0.5}, (3, 32, 32), (3, 3)),  # none in the first of four blocks
    "resnet10t_gbn block dropout": ({"drop_block_rate": 0.5}, (3, 32, 32), (2, 0)),
    "seresnet18_gbn": ({"layers": (1, 1, 1, 1)}, (3, 32, 32), (8, 4)),
    "regnetx_002_gbn": ({}, (3, 32, 32), (13, 13)),  # norms with activations, and blocks that are not known
}
TRAINED = [case for case in MODELS if case != "cifar_vgg16_gbn"]  # whose 15M parameters take long
TOLERANCE = {torch.float64: {"rtol": 1e-9, "atol": 1e-12}, torch.float32: {"rtol": 1e-3, "atol": 1e-4}}
torchscript = pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated")


@pytest.fixture(autouse=True)
def _settings(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(kernels, "_ARE_ON", True)


@pytest.fixture
def _kernel():
    if cpu.LIBRARY is None:
        pytest.skip("no kernel is built: python setup.py build_ext --inplace")


def built(case, dtype=torch.float32):
    """A model in training, its fused copy, and a batch."""
    arguments, shape, _ = MODELS[case]
    model = timm.create_model(case.split()[0], ghost_batch_size=GHOST, **arguments).to(dtype).train()
    return model, fuse_ghost_batchnorm(copy.deepcopy(model)), torch.randn(SAMPLES, *shape, dtype=dtype)


def trained(model, x):
    """What a step makes of a model: outputs, gradients, buffers."""
    torch.manual_seed(1)
    y = model(x)
    gradients = torch.autograd.grad(y.square().mean(), list(model.parameters()))
    return y.detach(), gradients, [buffer.clone() for buffer in model.buffers()]


def assert_trains_alike(model, other, x):
    torch.testing.assert_close(trained(model, x), trained(other, x), **TOLERANCE[x.dtype])


def nodes(y):
    """The names of all nodes of the graph that ends in y."""
    found, left = set(), [y.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in found:
            found.add(node)
            left += [inner for inner, _ in node.next_functions]
    return [type(node).__name__ for node in found]


@pytest.mark.parametrize("case", TRAINED)
def test_a_fused_model_trains_as_it_did(case):
    """In float64, where no kernel runs, a wrong order of operations has no rounding to hide in."""
    model, fused, x = built(case, torch.float64)
    for _ in range(2):
        assert_trains_alike(model, fused, x)
    assert list(model.state_dict()) == list(fused.state_dict())
    assert [name for name, _ in model.named_modules()] == [name for name, _ in fused.named_modules()]
    assert torch.equal(model.eval()(x), fused.eval()(x))


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.usefixtures("_kernel")
def test_kernels_take_over_every_relu_and_addition_that_the_structure_shows(case):
    _, fused, x = built(case)
    left = nodes(fused(x))
    assert (left.count("ReluBackward0"), left.count("AddBackward0")) == MODELS[case][2]


@pytest.mark.parametrize("case", TRAINED)
@pytest.mark.usefixtures("_kernel")
def test_a_model_fused_by_kernels_trains_as_it_did(case):
    model, fused, x = built(case)
    for _ in range(2):
        assert_trains_alike(model, fused, x)
    assert torch.equal(model.eval()(x), fused.eval()(x))


@pytest.mark.usefixtures("_kernel")
def test_bfloat16_is_at_least_as_close_to_the_truth():
    """One rounding takes the place of three."""
    model, fused, x = built("resnet8_thin_gbn", torch.float64)
    truth, errors = model(x), []
    for each in (model, fused):
        each.bfloat16()
        errors.append((each(x.bfloat16()).double() - truth).abs().mean().item())
    assert errors[1] <= 1.2 * errors[0]


@pytest.mark.parametrize("case", ["resnet8_thin_gbn", "resnet14t_gbn", "preact_resnet20_gbn", "mlp5_gbn"])
def test_with_gradient_checkpointing(case):
    model, fused, x = built(case)
    fused.set_grad_checkpointing()
    assert_trains_alike(model, fused, x.requires_grad_())


@pytest.mark.parametrize("case", ["resnet8_thin_gbn", "resnet9_gbn"])
def test_compiles_without_graph_breaks(case):
    model, fused, x = built(case)
    assert_trains_alike(model, torch.compile(fused, fullgraph=True, backend="aot_eager"), x)
    torch._dynamo.reset()


def test_under_autocast_a_residual_of_another_dtype_is_added_as_before():
    model, fused, x = built("resnet8_thin_gbn")
    for each in (model, fused):
        each.stages[0].register_forward_pre_hook(lambda module, args: args[0].float())
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = fused(x), model(x)
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", ["act1", "bn1", "stages.0.0.act1", "stages.0.0.act2", "stages.1.0.bn2"])
def test_hooks_on_a_fused_layer_see_what_they_saw(name):
    model, fused, x = built("resnet8_thin_gbn")
    seen = []
    for each in (model, fused):
        each.get_submodule(name).register_forward_hook(lambda module, args, y: seen.append(y.clone()))
        each(x)
    torch.testing.assert_close(*seen)


def test_a_replaced_forward_of_a_fused_layer_is_called():
    class Count(accelerate.hooks.ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1
            return args, kwargs

    _, fused, x = built("resnet8_thin_gbn")
    hooks = [
        accelerate.hooks.add_hook_to_module(fused.get_submodule(name), Count())._hf_hook for name in ("bn1", "act1")
    ]
    fused(x)
    assert [hook.calls for hook in hooks] == [1, 1]


def test_hooks_on_all_modules_see_a_fused_model_as_it_was():
    counts = []
    model, fused, x = built("resnet8_thin_gbn")
    for each in (model, fused):
        counts.append(Counter())
        with nn.modules.module.register_module_forward_hook(
            lambda module, *_: counts[-1].update([type(module).__name__])
        ):
            each(x)
    for name in ("GhostBatchNorm2d", "ReLU", "Conv2d", "Linear"):
        assert counts[1][name] == counts[0][name] > 0


def test_feature_extractors_find_the_same_nodes():
    model, fused, x = built("resnet8_thin_gbn")
    names = ["bn1", "act1", "stages.1.0.act2"]
    for extract in (
        lambda model: timm.layers.create_feature_extractor(model, names),
        lambda model: timm.models.create_feature_extractor(model, names),
    ):
        torch.testing.assert_close(extract(fused)(x), extract(model)(x))
    assert torch.equal(torch.fx.symbolic_trace(fused)(x), torch.fx.symbolic_trace(model)(x))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_fused_too(duplicate):
    model, fused, x = built("resnet8_thin_gbn")
    copied = duplicate(fused)
    assert type(copied) is type(fused)
    assert_trains_alike(model, copied, x)


@torchscript
def test_unfusing_gives_back_the_classes():
    model, fused, x = built("cifar_vgg16_gbn")
    assert not any(type(module) is FusedSequential for module in model.modules())
    assert any(type(module) is FusedSequential for module in fused.modules())
    unfuse_ghost_batchnorm(fused)
    assert [type(module) for module in fused.modules()] == [type(module) for module in model.modules()]
    assert torch.equal(torch.jit.script(fused).eval()(x), model.eval()(x))


def test_environment_turns_fusion_off(monkeypatch):
    monkeypatch.setenv("GBNZOO_FUSION", "0")
    model, fused, _ = built("resnet8_thin_gbn")
    assert [type(module) for module in fused.modules()] == [type(module) for module in model.modules()]


def test_what_takes_the_place_of_a_ghost_layer_is_called_as_before():
    model, fused, x = built("resnet8_thin_gbn")
    for each in (model, fused):
        revert_ghost_batchnorm(each)
    assert_trains_alike(model, fused, x)
    model, fused = (timm.utils.freeze_batch_norm_2d(each) for each in built("resnet8_thin_gbn")[:2])
    assert_trains_alike(model, fused, x)
    plain = nn.Sequential(nn.BatchNorm2d(1), nn.ReLU(), GhostBatchNormAct2d(1, act_layer=nn.Tanh), nn.ReLU())
    assert_trains_alike(plain, fuse_ghost_batchnorm(copy.deepcopy(plain)), x)


def test_a_ghost_layer_in_eval_inside_a_training_model():
    model, fused, x = built("resnet8_thin_gbn")
    for each in (model, fused):
        trained(each, x)
        each.stages[1].eval()
        each.bn1.eval()
    assert_trains_alike(model, fused, x)


def test_a_model_fused_before_it_gets_ghosts():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    fused = fuse_ghost_batchnorm(copy.deepcopy(model))
    for each in (model, fused):
        convert_ghost_batchnorm(each, GHOST)
    assert_trains_alike(model, fused, torch.randn(SAMPLES, 3, 5, 5))


@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU, nn.Identity])
@pytest.mark.parametrize("drop", [None, nn.Dropout])
@pytest.mark.usefixtures("_kernel")
def test_norms_with_an_activation_fuse_a_relu_by_themselves(act, drop):
    layer = GhostBatchNormAct2d(6, act_layer=act, drop_layer=drop, ghost_batch_size=GHOST)
    norm = GhostBatchNorm2d(6, ghost_batch_size=GHOST)
    x = torch.randn(SAMPLES, 6, 5, 5, requires_grad=True)
    torch.manual_seed(1)
    y = layer(x)
    torch.manual_seed(1)
    expected = act()((drop or nn.Identity)()(norm(x)))
    dy = torch.randn_like(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(torch.autograd.grad(y, x, dy), torch.autograd.grad(expected, x, dy))
    torch.testing.assert_close(layer.running_var, norm.running_var)
    assert nodes(y).count("ReluBackward0") == (act is nn.ReLU and drop is not None)


def test_a_hook_on_the_activation_of_a_norm_sees_what_it_saw():
    layer = GhostBatchNormAct2d(6, ghost_batch_size=GHOST)
    seen = []
    layer.act.register_forward_hook(lambda module, args, y: seen.append(y))
    y = layer(torch.randn(SAMPLES, 6, 5, 5))
    assert torch.equal(seen[0], y)
