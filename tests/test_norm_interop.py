"""The ghost layers met by the rest of torch and timm: what works on BatchNorm works on them, and no ghost is lost unsaid."""

import copy
import pickle

import pytest
import timm.layers
import timm.utils
import torch
import torchvision.models.feature_extraction
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d
from timm.utils import ModelEmaV3, distribute_bn
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import update_bn
from torchvision.ops.misc import FrozenBatchNorm2d

from gbnzoo.norm import (
    GhostBatchNorm1d,
    GhostBatchNorm2d,
    GhostBatchNormAct2d,
    revert_ghost_batchnorm,
    shard_running_statistics,
)

GHOST = 2
NORMS = {
    "bn1": (GhostBatchNorm2d, nn.BatchNorm2d, 4),
    "bn2": (GhostBatchNormAct2d, BatchNormAct2d, 3),
    "bn3": (GhostBatchNorm1d, nn.BatchNorm1d, 3),
}


class GhostByGhost(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        sizes = [GHOST] * (len(x) // GHOST - 1)
        return torch.cat([self.norm(ghost) for ghost in x.split([*sizes, len(x) - sum(sizes)])])


class Net(nn.Module):
    """Two convolutions and a classifier, each followed by another kind of norm layer."""

    def __init__(self, make_norm):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3), make_norm("bn1")
        self.conv2, self.bn2 = nn.Conv2d(4, 3, 3), make_norm("bn2")
        self.pool, self.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.bn3, self.fc = make_norm("bn3"), nn.Linear(3, 2)

    def forward(self, x):
        x = self.bn2(self.conv2(self.bn1(self.conv1(x))))
        return self.fc(self.bn3(self.flatten(self.pool(x))))


def ghost_net():
    return Net(lambda name: NORMS[name][0](NORMS[name][2], ghost_batch_size=GHOST))


def twin_of(net):
    """The same weights under plain BatchNorm shown ghost by ghost."""
    twin = Net(lambda name: NORMS[name][1](NORMS[name][2]))
    twin.load_state_dict(net.state_dict())
    twin.train(net.training)
    for name in NORMS:
        setattr(twin, name, GhostByGhost(getattr(twin, name)))
    return twin


def images(samples=5):
    return torch.randn(samples, 3, 8, 8)


def assert_trains_as(model, twin, x, **tolerance):
    """Same output, same gradients, same buffers after one batch; the twin in float64, whose own error would count else."""
    model.train(), twin.double().train()
    tolerance["check_dtype"] = False
    y, expected = model(x), twin(x.double())
    torch.testing.assert_close(y, expected, **tolerance)
    y.square().sum().backward()
    expected.square().sum().backward()
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, **tolerance)
    for mine, other in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(mine, other, **tolerance)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
torchscript = pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated")


def test_compiles_without_graph_breaks():
    net = ghost_net()
    twin = twin_of(net)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    for samples in (4, 5):
        assert_trains_as(compiled, twin, images(samples), **TOLERANCE)
    x = images()
    assert torch.equal(compiled.eval()(x), net.eval()(x))


def test_compiling_for_another_batch_size_reasons_about_no_symbol():
    """With a symbolic N, N // g in four layers took the compiler two minutes."""
    batch_sizes = []

    def record(graph, _):
        inputs = [node.meta["example_value"] for node in graph.graph.nodes if node.op == "placeholder"]
        batch_sizes.extend(str(x.shape[0]) for x in inputs if isinstance(x, torch.Tensor) and x.dim() == 2)
        return graph

    compiled = torch.compile(GhostBatchNorm1d(3, ghost_batch_size=GHOST), fullgraph=True, backend=record)
    for samples in (4, 5, 7):
        compiled(torch.randn(samples, 3))
    assert batch_sizes == ["4", "5", "7"]


@pytest.mark.slow
def test_inductor_compiles_the_same():
    net = ghost_net()
    assert_trains_as(torch.compile(net, fullgraph=True), twin_of(net), images(), **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_normalises_as_batchnorm_does(dtype):
    net = ghost_net()
    twin = twin_of(net)
    x = images()
    with torch.autocast("cpu", dtype):
        assert net.bn1(net.conv1(x)).dtype == twin.bn1(twin.conv1(x)).dtype
        y, expected = net(x), twin(x)
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05)
    assert net.bn1.running_mean.dtype == torch.float32
    torch.testing.assert_close(net.bn1.running_var, twin.bn1.norm.running_var, rtol=1e-4, atol=1e-4)


def test_channels_last_models_stay_channels_last():
    net = ghost_net().to(memory_format=torch.channels_last)
    x = images().to(memory_format=torch.channels_last)
    assert_trains_as(net, twin_of(net), x, **TOLERANCE)
    assert net.bn1(net.conv1(x)).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_copy_is_a_ghost_net_of_its_own(duplicate):
    net = ghost_net()
    copied, twin = duplicate(net), twin_of(net)
    net(images())
    assert copied.bn1.num_batches_tracked == 0
    assert_trains_as(copied, twin, images(), **TOLERANCE)


@torchscript
def test_scripts_for_training_and_eval():
    net = ghost_net()
    scripted = torch.jit.script(copy.deepcopy(net))
    assert_trains_as(scripted, twin_of(net), images(), **TOLERANCE)
    net.load_state_dict(scripted.state_dict())
    x = images(3)
    assert torch.equal(scripted.eval()(x), net.eval()(x))


@torchscript
def test_scripts_without_ghosts_and_without_momentum():
    for layer in (GhostBatchNorm2d(3), GhostBatchNorm2d(3, momentum=None, ghost_batch_size=GHOST)):
        scripted = torch.jit.script(copy.deepcopy(layer))
        x = torch.randn(5, 3, 4, 4)
        torch.testing.assert_close(scripted(x), layer(x))
        torch.testing.assert_close(scripted.state_dict(), layer.state_dict())


@torchscript
def test_traces_in_eval():
    net, x = ghost_net().eval(), images()
    assert torch.equal(torch.jit.trace(net, x)(x), net(x))


def test_exports_in_eval():
    net, x = ghost_net().eval(), images()
    exported = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("samples")},))
    x = images(7)
    torch.testing.assert_close(exported.module()(x), net(x))


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # the exporter of torch 2.11 about itself
def test_exports_to_onnx_in_eval():
    pytest.importorskip("onnx", reason="torch.onnx.export needs onnx and onnxscript")
    pytest.importorskip("onnxscript", reason="torch.onnx.export needs onnx and onnxscript")
    from onnx.reference import ReferenceEvaluator

    net, x = ghost_net().eval(), images()
    program = torch.onnx.export(net, (x,), dynamo=True, verbose=False)
    evaluator = ReferenceEvaluator(program.model_proto)
    (y,) = evaluator.run(None, {evaluator.input_names[0]: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), net(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "create_feature_extractor",
    [timm.layers.create_feature_extractor, torchvision.models.feature_extraction.create_feature_extractor],
)
def test_feature_extractors_find_the_norm_layers(create_feature_extractor):
    net = ghost_net()
    twin = twin_of(net)
    extractor = create_feature_extractor(net, ["bn1", "bn2"])
    x = images()
    features = extractor(x)
    expected = twin.bn1(twin.conv1(x))
    torch.testing.assert_close(features["bn1"], expected, **TOLERANCE)
    torch.testing.assert_close(features["bn2"], twin.bn2(twin.conv2(expected)), **TOLERANCE)


def test_symbolic_traces_keep_the_ghosts():
    net = ghost_net()
    assert_trains_as(torch.fx.symbolic_trace(net), twin_of(net), images(), **TOLERANCE)


def test_functional_call_writes_the_buffers_it_was_given():
    net = ghost_net()
    twin = twin_of(net)
    given = {name: value.detach().clone() for name, value in net.state_dict().items()}
    before = copy.deepcopy(net.state_dict())
    x = images()
    torch.testing.assert_close(torch.func.functional_call(net, given, (x,)), twin(x), **TOLERANCE)
    torch.testing.assert_close(given["bn1.running_var"], twin.bn1.norm.running_var, **TOLERANCE)
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("compiled", [False, True])
def test_functional_gradients(compiled):
    net = ghost_net()
    twin, x = twin_of(net), images()
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}

    def loss(parameters):
        own_buffers = {name: buffer.clone() for name, buffer in buffers.items()}
        return torch.func.functional_call(net, (parameters, own_buffers), (x,)).square().sum()

    gradient = torch.func.grad(loss)
    if compiled:
        gradient = torch.compile(
            lambda parameters: torch.func.grad(loss)(parameters), fullgraph=True, backend="aot_eager"
        )
    gradients = gradient(dict(net.named_parameters()))
    twin(x).square().sum().backward()
    for mine, parameter in zip(gradients.values(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad, **TOLERANCE)


def test_update_bn_averages_over_all_ghosts():
    net = ghost_net()
    batches = [images(4), images(5), images(2)]
    update_bn(batches, net)
    ghosts = [
        ghost
        for batch in batches
        for ghost in net.conv1(batch).split([2] * (len(batch) // 2 - 1) + [2 + len(batch) % 2])
    ]
    mean = torch.stack([ghost.mean((0, 2, 3)) for ghost in ghosts]).mean(0)
    variance = torch.stack([ghost.transpose(0, 1).flatten(1).var(1) for ghost in ghosts]).mean(0)
    torch.testing.assert_close(net.bn1.running_mean, mean)
    torch.testing.assert_close(net.bn1.running_var, variance)
    assert net.bn1.num_batches_tracked == len(ghosts) == 5
    assert net.bn1.momentum == 0.1


def test_model_ema_follows_the_running_statistics():
    net = ghost_net()
    ema = ModelEmaV3(net, decay=0.5)
    for name in NORMS:
        assert getattr(ema.module, name).ghost_batch_size == GHOST
    before = net.bn1.running_mean.clone()
    net(images())
    ema.update(net)
    torch.testing.assert_close(ema.module.bn1.running_mean, (before + net.bn1.running_mean) / 2)
    assert ema.module.bn1.num_batches_tracked == net.bn1.num_batches_tracked == 2


def test_distribute_bn_reaches_every_ghost_layer(monkeypatch):
    sent = []
    monkeypatch.setattr(torch.distributed, "broadcast", lambda buffer, source: sent.append(buffer.data_ptr()))
    net = ghost_net()
    distribute_bn(net, world_size=2)
    assert set(sent) == {
        buffer.data_ptr()
        for name in NORMS
        for buffer in list(getattr(net, name).buffers())
        if buffer.is_floating_point()
    }


@pytest.mark.parametrize(
    "convert",
    [
        nn.SyncBatchNorm.convert_sync_batchnorm,
        timm.layers.convert_sync_batchnorm,
        timm.layers.convert_splitbn_model,
    ],
)
def test_converters_refuse_to_drop_ghosts(convert):
    with pytest.raises(TypeError, match=r"lose its ghosts of 2 samples.*revert_ghost_batchnorm"):
        convert(ghost_net())
    with pytest.raises(TypeError, match="lose its ghosts of 2 samples"):
        convert(GhostBatchNorm2d(3, ghost_batch_size=GHOST))


@pytest.mark.parametrize(
    ("convert", "converted_class"),
    [
        (nn.SyncBatchNorm.convert_sync_batchnorm, nn.SyncBatchNorm),
        (timm.layers.convert_sync_batchnorm, nn.SyncBatchNorm),
        (timm.layers.convert_splitbn_model, timm.layers.SplitBatchNorm2d),
    ],
)
def test_converters_still_convert_what_has_no_ghosts(convert, converted_class):
    net = convert(nn.Sequential(nn.BatchNorm2d(3), GhostBatchNorm2d(3)))
    assert [type(layer) for layer in net] == [converted_class, converted_class]


def test_converters_imported_before_gbnzoo_refuse_too():
    """They look themselves up by name in their module when they descend into a model."""
    original = timm.layers.convert_sync_batchnorm.__wrapped__
    assert original.__module__ == "timm.layers.norm_act"
    with pytest.raises(TypeError, match="lose its ghosts"):
        original(ghost_net())


def test_frozen_layers_remember_their_ghosts():
    net = ghost_net()
    net(images())
    x, expected = images(3), copy.deepcopy(net).eval()
    frozen = timm.utils.freeze_batch_norm_2d(net)
    assert isinstance(frozen.bn1, FrozenBatchNorm2d)
    assert isinstance(frozen.bn2, FrozenBatchNormAct2d)
    frozen.bn3.eval()
    torch.testing.assert_close(frozen(x), expected(x))
    thawed = timm.utils.unfreeze_batch_norm_2d(frozen)
    assert (type(thawed.bn1), type(thawed.bn2)) == (GhostBatchNorm2d, GhostBatchNormAct2d)
    assert thawed.bn1.ghost_batch_size == thawed.bn2.ghost_batch_size == GHOST
    assert_trains_as(thawed, twin_of(thawed), images(), **TOLERANCE)


def test_a_frozen_model_that_is_reverted_thaws_without_ghosts():
    frozen = timm.utils.freeze_batch_norm_2d(ghost_net())
    thawed = timm.utils.unfreeze_batch_norm_2d(revert_ghost_batchnorm(frozen))
    assert (type(thawed.bn1), type(thawed.bn2)) == (nn.BatchNorm2d, BatchNormAct2d)


def test_freezing_by_name_remembers_too():
    net = ghost_net()
    timm.utils.freeze(net, ["bn1"])
    assert isinstance(net.bn1, FrozenBatchNorm2d)
    timm.utils.unfreeze(net, ["bn1"])
    assert net.bn1.ghost_batch_size == GHOST


def test_plain_layers_freeze_and_thaw_as_ever():
    thawed = timm.utils.unfreeze_batch_norm_2d(timm.utils.freeze_batch_norm_2d(nn.Sequential(nn.BatchNorm2d(3))))
    assert type(thawed[0]) is nn.BatchNorm2d


@pytest.fixture
def _one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("_one_process")
def test_data_parallelism_leaves_split_statistics_alone():
    """It broadcasts the first process's buffers over the others', which would double or erase what they hold."""
    net = ghost_net()
    assert len(DistributedDataParallel(copy.deepcopy(net)).modules_buffers) > 0
    shard_running_statistics(net, rank=1, world_size=2)
    left = DistributedDataParallel(net).modules_buffers
    assert {buffer.data_ptr() for buffer in left} == {
        getattr(net, name).num_batches_tracked.data_ptr() for name in NORMS
    }
