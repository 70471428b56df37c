"""The paper's networks: shapes, parameter counts, and timm's conventions."""

from collections import OrderedDict

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.models import create_feature_extractor, get_pretrained_cfg, group_parameters
from torch import nn
from torchvision.models import resnet as torchvision_resnet

from gbnzoo.data import AUGMENTATIONS, DATASETS
from gbnzoo.models import CifarResNet
from gbnzoo.recipe import load_recipe, shipped_recipes

# Parameters worked out by hand: k·k·in·out for a convolution, 2·channels for BatchNorm, in·out + out for Linear.
PARAMETERS = {
    # Linear 784→512 401_920, four 512→512 of 262_656, five norms of 1_024, 512→10 5_130.
    "mlp5_gbn": 1_462_794,
    # Stem 72 + 16; stages 1_152 + 32, (1_152 + 2_304 + 64) + (128 + 32), (4_608 + 9_216 + 128) + (512 + 64); 32→10 330.
    "resnet8_thin_gbn": 19_810,
    # Stem 432 + 32. A block in a stage: 2·2_304 + 64 = 4_672, 2·9_216 + 128 = 18_560, 2·36_864 + 256 = 73_984. A block
    # that doubles: 4_608 + 9_216 + 128 + (512 + 64) = 14_528 and 18_432 + 36_864 + 256 + (2_048 + 128) = 57_728. 64→10 650.
    # So 464 + 3·4_672 + 14_528 + 2·18_560 + 57_728 + 2·73_984 + 650, and 97_216 for each further block in every stage.
    # He et al. 2015, table 6, gives 0.27M, 0.46M, 0.66M, 0.85M, 1.7M; their shortcuts lack our 2_752 parameters.
    "resnet20_gbn": 272_474,
    "resnet32_gbn": 272_474 + 2 * 97_216,
    "resnet44_gbn": 272_474 + 4 * 97_216,
    "resnet56_gbn": 272_474 + 6 * 97_216,
    "resnet110_gbn": 272_474 + 15 * 97_216,
    # Stem 1_728 + 128; 2 · 73_984; 73_728 + 147_456 + 512 + 8_192 + 256 and 295_424; 294_912 + 589_824 + 1_024 + 32_768 +
    # 512 and 1_180_672; 256→10 2_570.
    "wide_resnet16_4_gbn": 2_777_674,
    # The same up to 256 channels (2_775_104), then 1_179_648 + 2_359_296 + 2_048 + 131_072 + 1_024 and 4_720_640; 512→10
    # 5_130. kuangliu/pytorch-cifar's ResNet-18 has as many.
    "cifar_resnet18_gbn": 11_173_962,
    # Stem 432; 3·4_672; 4_608 + 9_216 + (32 + 64) + 512 and 2·18_560; 18_432 + 36_864 + (64 + 128) + 2_048 and 2·73_984;
    # last norm 128; 64→10 650.
    "preact_resnet20_gbn": 272_282,
    # Stem 432; stages 256_352 + 3·461_440, 1_434_560 + 3·1_844_480, 5_736_320 + 3·7_375_360; last norm 1_280; 640→10
    # 6_410. Zagoruyko and Komodakis 2016, table 5: 36.5M.
    "wide_resnet28_10_gbn": 36_479_194,
    # 1_856; 73_984 and 2·147_712; 295_424; 1_180_672 and 2·2_360_320; 512→10 5_130.
    "resnet9_gbn": 6_573_130,
    # 10 classes (C1): 4_800 + 128, 102_400 + 128, 3136→384 1_204_224 + 768, 384→192 73_728 + 384, 192→10 1_930.
    "cifar_alexnet_gbn": 1_388_490,
    # VGG-16 before its classifier: 14_714_688 (the count Keras prints without top); 4_224 channels of norm 8_448; 512→10 5_130.
    "cifar_vgg16_gbn": 14_728_266,
    # torchvision's alexnet has 61_100_840, 9_344 of them biases that are not here; norms of 64, 192, 384, 256, 256, 4096 and
    # 4096 channels have 18_688.
    "alexnet_owt_gbn": 61_110_184,
}
SMALL = ["mlp5_gbn", "resnet8_thin_gbn", "preact_resnet20_gbn", "resnet9_gbn", "cifar_vgg16_gbn", "cifar_alexnet_gbn"]


def images(name, n=4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, *get_pretrained_cfg(name).input_size, generator=generator, dtype=dtype)


def create(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **kwargs)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_and_output_shape(name):
    model = create(name, ghost_batch_size=8).eval()
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert norms
    assert all(norm.ghost_batch_size == 8 for norm in norms)

    x = images(name, n=1)
    with torch.no_grad():
        features = model.forward_features(x)
        assert features.shape[1] == model.num_features
        assert model.forward_head(features, pre_logits=True).shape == (1, model.head_hidden_size)
        assert model(x).shape == (1, model.num_classes)

    cfg = model.pretrained_cfg
    assert model.num_classes == cfg["num_classes"]
    assert model.get_submodule(cfg["classifier"]) is model.get_classifier()
    if cfg["first_conv"]:
        assert model.get_submodule(cfg["first_conv"]) is next(m for m in model.modules() if isinstance(m, nn.Conv2d))
        assert tuple(features.shape[2:]) == cfg["pool_size"]


def test_resnet50_is_the_published_one():
    """25,557,032 parameters: torchvision's table for ResNet50_Weights, and timm's 25.56M."""
    model = create("resnet50_gbn", ghost_batch_size=8).eval()
    assert sum(p.numel() for p in model.parameters()) == 25_557_032
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 53  # one for the stem, three for each of 16 blocks, one for each of 4 shortcuts
    assert all(norm.ghost_batch_size == 8 for norm in norms)
    with torch.no_grad():
        features = model.forward_features(torch.randn(1, 3, 224, 224))
        assert features.shape == (1, 2048, 7, 7)
        assert model.forward_head(features).shape == (1, 1000)


def test_hundred_classes_of_c3_and_wrn():
    # 90 classes more than above, of 192 and 256 features.
    assert sum(p.numel() for p in create("cifar_alexnet_gbn", num_classes=100).parameters()) == 1_388_490 + 90 * 193
    assert sum(p.numel() for p in create("wide_resnet16_4_gbn", num_classes=100).parameters()) == 2_777_674 + 90 * 257


@pytest.mark.parametrize("name", SMALL)
def test_a_batch_of_two_ghosts_is_two_batches(name):
    ghosts = create(name, ghost_batch_size=4, drop_rate=0.0).double()
    plain = create(name, drop_rate=0.0).double()
    x = images(name, n=8, dtype=torch.float64)
    torch.testing.assert_close(ghosts(x), torch.cat([plain(x[:4]), plain(x[4:])]))
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(ghosts.get_buffer(name), buffer)


@pytest.mark.parametrize("name", SMALL)
def test_classifier_and_input_can_be_changed(name):
    model = create(name, num_classes=0).eval()
    assert model(images(name)).shape == (4, model.head_hidden_size)
    model.reset_classifier(7)
    assert model(images(name)).shape == (4, 7)
    assert model.get_classifier().out_features == model.num_classes == 7

    model = create(name, in_chans=2, num_classes=3)
    assert model(torch.randn(4, 2, *images(name).shape[2:])).shape == (4, 3)


@pytest.mark.parametrize("name", ["resnet20_gbn", "preact_resnet20_gbn", "cifar_vgg16_gbn"])
def test_global_pool_is_a_choice(name):
    model = create(name, num_classes=0, global_pool="")
    assert model(images(name)).shape == model.forward_features(images(name)).shape
    model.reset_classifier(5, global_pool="catavgmax")
    assert model.head_hidden_size == 2 * model.num_features
    assert model(images(name)).shape == (4, 5)


@pytest.mark.parametrize("name", ["mlp5_gbn", "cifar_alexnet_gbn"])
def test_networks_without_pooling_refuse_to_pool(name):
    with pytest.raises(ValueError, match="does not pool: given global_pool='avg'"):
        create(name, global_pool="avg")
    with pytest.raises(ValueError, match="does not pool"):
        create(name).reset_classifier(10, "max")


@pytest.mark.parametrize("name", [*SMALL, "resnet20_gbn", "cifar_resnet18_gbn"])
def test_features_only_gives_each_stage(name):
    model = create(name, features_only=True)
    x = images(name)
    features = model(x)
    assert [f.shape[1] for f in features] == model.feature_info.channels()
    if name == "mlp5_gbn":
        assert [f.ndim for f in features] == [2] * 5
    else:
        assert [x.shape[-1] // f.shape[-1] for f in features] == model.feature_info.reduction()
    assert len(create(name, features_only=True, out_indices=(1,))(x)) == 1


@pytest.mark.parametrize("name", SMALL)
def test_checkpointing_leaves_gradients_alone(name):
    gradients = []
    for enable in (False, True):
        model = create(name, drop_rate=0.0).double()
        model.set_grad_checkpointing(enable)
        model(images(name, dtype=torch.float64)).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize("coarse", [False, True])
def test_parameter_groups_follow_the_network(name, coarse):
    with torch.device("meta"):
        model = timm.create_model(name)
    groups = group_parameters(model, model.group_matcher(coarse=coarse))
    assert sum(len(group) for group in groups.values()) == len(list(model.parameters()))
    assert len(groups) >= 3
    assert any(p.startswith("head.") for p in groups[max(groups)])


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore:.*torch.jit.*:FutureWarning")
@pytest.mark.parametrize("name", SMALL)
def test_scripted_and_traced_networks_are_the_same(name):
    model = create(name).eval()
    x = images(name)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))
    traced = create_feature_extractor(model, {"head.fc": "logits"})
    torch.testing.assert_close(traced(x)["logits"], model(x))


@pytest.mark.parametrize("name", SMALL)
def test_dropout_is_only_before_classifiers(name):
    model = create(name, drop_rate=0.25)
    dropouts = [m.p for m in model.modules() if isinstance(m, nn.Dropout)]
    assert dropouts == [0.25] * (2 if name == "cifar_alexnet_gbn" else 1)


@pytest.mark.parametrize("name", ["resnet20_gbn", "resnet9_gbn", "cifar_vgg16_gbn", "cifar_alexnet_gbn"])
def test_weights_of_other_classes_and_channels_load(name, tmp_path):
    weights = create(name)
    save_file(weights.state_dict(), tmp_path / "model.safetensors")
    cfg = {"file": str(tmp_path / "model.safetensors")}
    torch.manual_seed(1)
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=cfg, num_classes=5, in_chans=1)
    assert model.get_classifier().out_features == 5
    first_conv = f"{weights.pretrained_cfg['first_conv']}.weight"
    for key, value in weights.state_dict().items():
        if key != first_conv and not key.startswith("head."):
            torch.testing.assert_close(model.state_dict()[key], value, rtol=0, atol=0)
    # timm adapts the stem so that a grey image gives the response of three equal channels.
    torch.testing.assert_close(model.get_parameter(first_conv).sum(1), weights.get_parameter(first_conv).sum(1))


@pytest.mark.parametrize(
    ("name", "data"), [("mlp5_gbn", "mnist"), ("resnet8_thin_gbn", "digits"), ("resnet20_gbn", "cifar10")]
)
def test_defaults_are_those_of_the_data(name, data):
    cfg, spec = get_pretrained_cfg(name), DATASETS[data]
    assert (cfg.mean, cfg.std, cfg.num_classes) == (spec.mean, spec.std, spec.num_classes)
    assert cfg.input_size == (len(spec.mean), spec.image_size, spec.image_size)


@pytest.mark.parametrize("recipe", shipped_recipes())
def test_shipped_recipes_name_what_there_is(recipe):
    recipe = load_recipe(f"recipes/{recipe}")
    assert timm.is_model(recipe.model.name)
    assert recipe.data.augment in AUGMENTATIONS


def test_mlp_takes_other_images():
    # 3·8·8 inputs instead of 784.
    model = create("mlp5_gbn", img_size=8, in_chans=3)
    assert sum(p.numel() for p in model.parameters()) == 1_462_794 + (192 - 784) * 512
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 10)


def copy_in_order(source, target):
    """Load the tensors of one network into another that holds the same ones in the same order under other names."""
    values = source.state_dict().values()
    target.load_state_dict(OrderedDict(zip(target.state_dict(), values, strict=True)), strict=True)


def randomise_norms(model):
    for m in model.modules():
        if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d):
            for tensor in (m.weight.data, m.bias.data, m.running_mean):
                tensor.normal_()
            m.running_var.uniform_(0.5, 2)


def bn_relu(channels, norm=nn.BatchNorm2d):
    return [norm(channels), nn.ReLU()]


def linear_bn_relu(ins, outs, bias):
    return [nn.Linear(ins, outs, bias), *bn_relu(outs, nn.BatchNorm1d)]


def authors_networks():
    """The networks of eladhoffer/bigBatch as plain torch, layer by layer, and kuangliu's VGG-16."""
    pool = nn.MaxPool2d(3, 2)
    yield (
        "mlp5_gbn",
        nn.Sequential(
            nn.Flatten(),
            *linear_bn_relu(784, 512, True),
            *(layer for _ in range(4) for layer in linear_bn_relu(512, 512, True)),
            nn.Linear(512, 10),
        ),
    )
    yield (
        "cifar_alexnet_gbn",
        nn.Sequential(
            *(nn.Conv2d(3, 64, 5, padding=2, bias=False), pool, *bn_relu(64)),
            *(nn.Conv2d(64, 64, 5, padding=2, bias=False), pool, *bn_relu(64)),
            nn.Flatten(),
            *linear_bn_relu(64 * 7 * 7, 384, False),
            *linear_bn_relu(384, 192, False),
            nn.Linear(192, 10),
        ),
    )
    yield (
        "alexnet_owt_gbn",
        nn.Sequential(
            *(nn.Conv2d(3, 64, 11, 4, 2, bias=False), pool, nn.BatchNorm2d(64), nn.ReLU()),
            *(nn.Conv2d(64, 192, 5, padding=2, bias=False), pool, nn.ReLU(), nn.BatchNorm2d(192)),
            *(nn.Conv2d(192, 384, 3, padding=1, bias=False), nn.ReLU(), nn.BatchNorm2d(384)),
            *(nn.Conv2d(384, 256, 3, padding=1, bias=False), nn.ReLU(), nn.BatchNorm2d(256)),
            *(nn.Conv2d(256, 256, 3, padding=1, bias=False), pool, nn.ReLU(), nn.BatchNorm2d(256)),
            nn.Flatten(),
            *linear_bn_relu(256 * 6 * 6, 4096, False),
            *linear_bn_relu(4096, 4096, False),
            nn.Linear(4096, 1000),
        ),
    )
    vgg, chans = [], 3
    for width in (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"):
        if width == "M":
            vgg.append(nn.MaxPool2d(2))
        else:
            vgg += [nn.Conv2d(chans, width, 3, padding=1), *bn_relu(width)]
            chans = width
    yield "cifar_vgg16_gbn", nn.Sequential(*vgg, nn.Flatten(), nn.Linear(512, 10))


@pytest.mark.parametrize(("name", "authors"), [pytest.param(*pair, id=pair[0]) for pair in authors_networks()])
def test_plain_networks_are_the_authors(name, authors):
    model = create(name).eval()
    randomise_norms(model)
    copy_in_order(model, authors.eval())
    x = images(name)
    with torch.no_grad():
        torch.testing.assert_close(model(x), authors(x))


def test_resnet_is_torchvisions_without_its_large_stem():
    torch.manual_seed(0)
    model = CifarResNet(blocks=(2, 2, 2, 2), channels=(64, 128, 256, 512)).eval()
    randomise_norms(model)
    oracle = torchvision_resnet.resnet18(num_classes=10).eval()
    oracle.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    oracle.maxpool = nn.Identity()
    copy_in_order(model, oracle)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(x), oracle(x))


def test_full_batch_resnet_averages_on_its_shortcuts():
    model = create("cifar_resnet18_gbn").eval()
    block = model.stages[1][0]
    randomise_norms(block)
    x = torch.randn(2, 64, 32, 32)
    with torch.no_grad():
        _, conv, norm = block.downsample
        averaged = (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
        residual = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x)))))
        torch.testing.assert_close(block(x), F.relu(residual + norm(conv(averaged))))


@pytest.mark.parametrize("name", ["preact_resnet20_gbn", "wide_resnet28_10_gbn"])
def test_preactivation_network_is_zagoruykos(name):
    """Against the functional form of szagoruyko/wide-residual-networks, pytorch/resnet.py.

    There a block shares its first activation where the width changes, which is at the start of every stage of a wide
    network. He et al. also share it at the start of the first stage, where ResNet-20 keeps its width.
    """
    model = create(name).eval()
    randomise_norms(model)
    w = model.state_dict()

    def activated(x, norm):
        stats = (w[f"{norm}.{key}"] for key in ("running_mean", "running_var", "weight", "bias"))
        return F.relu(F.batch_norm(x, *stats))

    def block(x, base, stride, starts_stage):
        o1 = activated(x, f"{base}.bn1")
        y = F.conv2d(o1, w[f"{base}.conv1.weight"], stride=stride, padding=1)
        z = F.conv2d(activated(y, f"{base}.bn2"), w[f"{base}.conv2.weight"], padding=1)
        if f"{base}.shortcut.weight" in w:
            return z + F.conv2d(o1, w[f"{base}.shortcut.weight"], stride=stride)
        return z + (o1 if starts_stage else x)

    images_nchw = images(name, n=2)
    x = F.conv2d(images_nchw, w["conv1.weight"], padding=1)
    for stage in range(3):
        for i in range(len(model.stages[stage])):
            x = block(x, f"stages.{stage}.{i}", 2 if stage and not i else 1, starts_stage=not i)
    x = activated(x, "norm").mean((2, 3))
    with torch.no_grad():
        torch.testing.assert_close(model(images_nchw), F.linear(x, w["head.fc.weight"], w["head.fc.bias"]))


def test_resnet9_is_pages():
    model = create("resnet9_gbn").eval()
    randomise_norms(model)
    prep, layer1, layer2, layer3 = model.layers
    pool = nn.MaxPool2d(2)

    def unit(x, layer):
        return F.relu(layer[1](F.conv2d(x, layer[0].weight, padding=1)))

    x = images("resnet9_gbn")
    with torch.no_grad():
        h = pool(unit(unit(x, prep), layer1))
        h = h + unit(unit(h, layer1[4].res1), layer1[4].res2)
        h = pool(unit(pool(unit(h, layer2)), layer3))
        h = h + unit(unit(h, layer3[4].res1), layer3[4].res2)
        h = F.max_pool2d(h, 4).flatten(1)
        logits = 0.125 * h @ model.head.fc.weight.T + model.head.fc.bias
        torch.testing.assert_close(model(x), logits)


@pytest.mark.parametrize(
    ("name", "weight", "std"),
    [
        # sqrt(2 / (9 · 32)) for 32 output channels; 16 input channels would give 0.118.
        ("resnet20_gbn", "stages.1.0.conv1.weight", 0.0833),
        ("wide_resnet16_4_gbn", "stages.1.0.conv1.weight", 0.0417),
        ("preact_resnet20_gbn", "stages.1.0.conv1.weight", 0.0833),
        # sqrt(2 / (9 · 16)) for 16 input channels; 160 output channels would give 0.037.
        ("wide_resnet28_10_gbn", "stages.0.0.conv1.weight", 0.1179),
        # torch's own: uniform within 1 / sqrt(fan in), so 1 / sqrt(3 · 512) and 1 / sqrt(3 · 9 · 64).
        ("mlp5_gbn", "layers.1.0.weight", 0.0255),
        ("resnet9_gbn", "layers.1.0.weight", 0.0241),
    ],
)
def test_initial_weights_are_the_sources(name, weight, std):
    assert create(name).get_parameter(weight).std().item() == pytest.approx(std, rel=0.03)


def test_zeros_are_a_saddle_point():
    """Only the last bias has a gradient; the least noise on the weights gives all of them one."""
    model = timm.create_model("mlp5_gbn", ghost_batch_size=8, weight_init="zeros")
    images, labels = torch.randn(16, 1, 28, 28), torch.arange(16) % 3

    def moved():
        model.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        return {name for name, parameter in model.named_parameters() if parameter.grad.any()}

    assert moved() == {"head.fc.bias"}
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=1e-3)
    assert {f"layers.{i}.0.weight" for i in range(5)} | {"head.fc.weight"} <= moved()
    with pytest.raises(ValueError, match="weight_init 'jax'; wanted '' or 'zeros'"):
        timm.create_model("mlp5_gbn", weight_init="jax")
