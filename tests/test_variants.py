"""The ghost twins of timm's architectures, against the originals.

`python tests/test_variants.py` writes hub/compat.csv, one row for each architecture, and goes on where it stopped.
"""

import copy
import csv
import multiprocessing
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import timm.models._builder
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from timm.models import (
    create_feature_extractor,
    get_arch_pretrained_cfgs,
    get_pretrained_cfg,
    model_entrypoint,
)
from timm.models.levit import LinearNorm
from timm.utils import reparameterize_model
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from gbnzoo import convert_ghost_batchnorm, revert_ghost_batchnorm
from gbnzoo.models import variants
from gbnzoo.norm import _GhostBatchNorm, become_ghosts, count_samples

SAMPLES, GHOST = 4, 2
COMPAT = Path(__file__).parents[1] / "hub" / "compat.csv"
IMAGE_SIZES = (64, 96, 128, 160, 192, 224, 256)
BATCH_NORM_COUNTS = variants.batch_norm_counts()
NAMES = [name for name, count in BATCH_NORM_COUNTS.items() if count and timm.is_model(name)]  # an older timm has fewer

# A small one from each of 40 of the 59 modules of timm that hold a BatchNorm.
FAMILIES = [
    *("test_byobnet", "cpubone_nano", "cs3darknet_focus_s", "cspnext_tiny", "densenet121", "dla46_c", "dpn48b"),
    *("efficientformer_l1", "efficientformerv2_s0", "test_efficientnet", "efficientvim_m1", "efficientvit_b0"),
    *("efficientvit_m0", "fasternet_t0", "fastvit_t8", "ghostnet_050", "hardcorenas_b", "hgnetv2_b0", "iformer_t"),
    *("inception_next_atto", "lcnetv2_small", "levit_128s", "test_coatnet", "mobilenetv3_small_050", "mobilevit_xxs"),
    *("regnetx_002", "repghostnet_050", "repvit_m1", "resnest14d", "test_resnet", "resnetv2_18", "rexnet_100"),
    *("legacy_seresnet18", "shvit_s1", "skresnet18", "starnet_s050", "swiftformer_xs", "tiny_vit_5m_224"),
    *("ese_vovnet19b_slim_dw", "xcit_nano_12_p16_224"),
]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def hold_against_original(name: str) -> None:
    """Assert that a twin has its original's keys, takes its weights strictly, evaluates to the same bits, and trains.

    In one training step every gradient is finite, and every call of every norm layer gives what BatchNorm gives ghost by
    ghost, and counts the ghosts.
    """
    size, args = smallest_size(name)
    original = timm.create_model(name, **args).eval()
    x = torch.randn(SAMPLES, *original.pretrained_cfg["input_size"][:1], size, size)
    with torch.no_grad():
        expected = original(x)
    weights, norm_layers = original.state_dict(), sum(isinstance(m, _BatchNorm) for m in original.modules())
    twin = timm.create_model(f"{name}_gbn", ghost_batch_size=GHOST, **args).eval()
    del original

    assert list(twin.state_dict()) == list(weights)
    twin.load_state_dict(weights, strict=True)
    with torch.no_grad():
        torch.testing.assert_close(twin(x), expected, rtol=0, atol=0, equal_nan=True)

    layers = [module for module in twin.modules() if isinstance(module, _BatchNorm)]
    assert len(layers) == norm_layers > 0
    assert all(isinstance(layer, _GhostBatchNorm) for layer in layers)
    counted = {layer: int(layer.num_batches_tracked) for layer in layers}

    def check_call(layer: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        torch.testing.assert_close(output, ghost_by_ghost(layer, *args), rtol=1e-3, atol=1e-3)
        counted[layer] += SAMPLES // GHOST
        assert layer.num_batches_tracked == counted[layer]

    for layer in layers:
        layer.register_forward_hook(check_call)
    sum(y.square().mean() for y in tensors_in(twin.train()(x))).backward()
    gradients = [parameter.grad for parameter in twin.parameters() if parameter.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients), "a gradient is not finite"


@torch.no_grad()
def ghost_by_ghost(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The output of a norm layer, its input's dim 0 being the samples' rows, all of one after all of another."""
    rows = GHOST * len(x) // SAMPLES
    y = torch.cat(
        [F.batch_norm(ghost, None, None, layer.weight, layer.bias, True, 0, layer.eps) for ghost in x.split(rows)]
    )
    return layer.act(layer.drop(y)) if isinstance(layer, BatchNormAct2d) else y


def smallest_size(name: str) -> tuple[int, dict[str, int]]:
    """A small image size that an architecture can be trained with, and the arguments that build it for that size."""
    cfg = get_pretrained_cfg(name)
    # In a small image one window of efficientvit_msra holds everything, and nothing is folded.
    for size in () if name.startswith("efficientvit_m") else IMAGE_SIZES:
        args = {"img_size": size} if cfg.fixed_input_size else {}
        try:
            with torch.device("meta"):
                timm.create_model(name, **args).train()(torch.empty(SAMPLES, cfg.input_size[0], size, size))
        except Exception:
            continue
        return size, args
    return cfg.input_size[-1], {}


def tensors_in(output: object) -> list[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        return [output]
    return [tensor for part in output for tensor in tensors_in(part)]


@pytest.mark.parametrize("name", [name for name in FAMILIES if timm.is_model(name)])
def test_a_sample_of_families_equals_its_originals(name):
    hold_against_original(name)


@pytest.mark.zoo
@pytest.mark.parametrize("name", NAMES)
def test_every_twin_equals_its_original(name):
    hold_against_original(name)


@pytest.mark.zoo
@pytest.mark.parametrize("name", [name for name in FAMILIES if timm.is_model(name)])
def test_a_batch_in_micro_batches_has_the_gradients_of_the_whole(name):
    """On which it rests that a layout changes nothing (tests/test_distributed.py), for a sample of families, in float64.

    What else draws lots is turned off: dropout, drop-path.
    """
    size, args = smallest_size(name)
    whole = timm.create_model(f"{name}_gbn", ghost_batch_size=GHOST, **args).double().train()
    for module in whole.modules():
        for attribute in ("drop_prob", "drop_rate", "p"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.0)
    parts = copy.deepcopy(whole)
    x = torch.randn(SAMPLES, whole.pretrained_cfg["input_size"][0], size, size, dtype=torch.float64)
    sum(y.square().mean() for y in tensors_in(whole(x))).backward()
    for ghost in x.split(GHOST):
        sum(y.square().mean() for y in tensors_in(parts(ghost))).div(SAMPLES // GHOST).backward()
    for (key, expected), parameter in zip(whole.named_parameters(), parts.parameters(), strict=True):
        assert (parameter.grad is None) == (expected.grad is None), key
        if expected.grad is not None:
            assert_near(parameter.grad, expected.grad, key)
    for (key, expected), value in zip(whole.named_buffers(), parts.buffers(), strict=True):
        assert_near(value, expected, key)


def assert_near(ours: torch.Tensor, expected: torch.Tensor, key: str) -> None:
    """To 1e-9 of the tensor's largest value, one of less than 1e-3 counting as that."""
    largest = max(expected.abs().max().item(), 1e-3)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9 * largest, msg=lambda text: f"{key}: {text}")


# The registry.


def test_every_known_architecture_has_a_twin_and_no_name_is_taken_twice():
    registered = {name.removesuffix("_gbn") for name in timm.list_models("*_gbn")}
    assert set(NAMES) <= registered
    for name in registered:
        assert (model_entrypoint(f"{name}_gbn").__module__ == variants.__name__) == (name in NAMES)


def test_this_timm_has_no_architecture_that_the_list_does_not_know():
    """If it fails, add the new names with their number of BatchNorm layers to gbnzoo/models/batchnorm_models.csv."""
    assert {name for name in timm.list_models() if not name.endswith("_gbn")} <= set(BATCH_NORM_COUNTS)


def batch_norms(name):
    with torch.device("meta"):
        return sum(isinstance(module, _BatchNorm) for module in timm.create_model(name).modules())


@pytest.mark.parametrize(
    "name", ["test_resnet", "test_byobnet", "levit_128s", "test_vit", "test_convnext", "test_nfnet"]
)
def test_the_list_counts_batch_norms(name):
    assert BATCH_NORM_COUNTS[name] == batch_norms(name)


@pytest.mark.zoo
@pytest.mark.parametrize("name", [name for name in BATCH_NORM_COUNTS if timm.is_model(name)])
def test_the_list_is_what_timm_holds(name):
    assert BATCH_NORM_COUNTS[name] == batch_norms(name)


def test_the_table_of_all_twins_is_whole():
    with open(COMPAT, newline="") as file:
        rows = {row["architecture"]: row for row in csv.DictReader(file)}
    assert set(rows) == {name for name, count in BATCH_NORM_COUNTS.items() if count}
    assert len(rows) == 743
    for name, row in rows.items():
        assert int(row["norm_layers"]) == BATCH_NORM_COUNTS[name]
        assert row["result"] == "pass" or row["reason"]


def test_a_timm_that_is_newer_than_the_list_is_told_of(monkeypatch, caplog):
    built = []
    monkeypatch.setattr(timm, "list_models", lambda: ["test_resnet", "brand_new_net"])
    monkeypatch.setattr(variants, "_register_twin", built.append)
    variants.register_twins()
    assert built == ["test_resnet"]
    assert "1 architectures that this gbnzoo does not know" in caplog.text
    assert "brand_new_net" in caplog.text
    assert "convert_ghost_batchnorm" in caplog.text


def test_importing_gbnzoo_costs_under_half_a_second():
    code = "import timm, time; start = time.process_time(); import gbnzoo; print(time.process_time() - start)"
    assert float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout) < 0.5


def test_twins_have_their_originals_tags_and_default():
    pretrained = set(timm.list_models("*_gbn", pretrained=True))
    for name in NAMES:
        cfgs = get_arch_pretrained_cfgs(name)
        twin_cfgs = list(get_arch_pretrained_cfgs(f"{name}_gbn").items())[: len(cfgs)]
        for (full_name, cfg), (twin_name, twin_cfg) in zip(cfgs.items(), twin_cfgs, strict=True):
            assert twin_name == f"{name}_gbn{full_name.removeprefix(name)}"
            assert twin_cfg == replace(cfg, architecture=f"{name}_gbn")
            assert (twin_name in pretrained) == bool(cfg.has_weights)
        assert replace(get_pretrained_cfg(f"{name}_gbn"), architecture=name) == get_pretrained_cfg(name)


# timm's ways of building and loading a model.


def test_a_tag_brings_the_originals_weights(monkeypatch):
    weights = timm.create_model("test_resnet").state_dict()
    asked = []

    def download(hf_hub_id, *args, **kwargs):
        asked.append(hf_hub_id)
        return copy.deepcopy(weights)

    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", download)
    monkeypatch.setattr(timm.models._builder, "has_hf_hub", lambda *args, **kwargs: True)
    for name in ("test_resnet_gbn", "test_resnet_gbn.r160_in1k"):
        model = timm.create_model(name, pretrained=True, ghost_batch_size=GHOST)
        torch.testing.assert_close(model.state_dict(), weights, rtol=0, atol=0)
    assert asked == ["timm/test_resnet.r160_in1k"] * 2


@pytest.fixture
def saved(tmp_path):
    """A plain model with weights and statistics of its own, and the file they are saved in."""
    model = timm.create_model("test_resnet")
    model(torch.randn(SAMPLES, 3, 64, 64))
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    return model.eval(), str(tmp_path / "weights.pth")


@pytest.mark.parametrize("way", ["checkpoint_path", "overlay", "cfg"])
def test_local_weights_load(saved, way):
    model, file = saved
    args = {
        "checkpoint_path": {"checkpoint_path": file},
        "overlay": {"pretrained": True, "pretrained_cfg_overlay": {"file": file}},
        "cfg": {"pretrained": True, "pretrained_cfg": {"file": file, "classifier": "fc", "first_conv": "conv1.0"}},
    }
    twin = timm.create_model("test_resnet_gbn", ghost_batch_size=GHOST, **args[way]).eval()
    x = torch.randn(SAMPLES, 3, 64, 64)
    assert torch.equal(twin(x), model(x))
    assert twin.pretrained_cfg["architecture"] == "test_resnet_gbn"


@pytest.mark.parametrize("changes", [{"num_classes": 7}, {"in_chans": 1}, {"num_classes": 0, "global_pool": ""}])
def test_pretrained_weights_adapt_as_the_originals(saved, changes):
    args = {"pretrained": True, "pretrained_cfg_overlay": {"file": saved[1]}} | changes
    torch.manual_seed(0)
    original = timm.create_model("test_resnet", **args).eval()
    torch.manual_seed(0)
    twin = timm.create_model("test_resnet_gbn", ghost_batch_size=GHOST, **args).eval()
    x = torch.randn(SAMPLES, changes.get("in_chans", 3), 64, 64)
    assert torch.equal(twin(x), original(x))


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_byobnet", "levit_128s"])
def test_features_are_the_originals(name):
    torch.manual_seed(0)
    original = timm.create_model(name, features_only=True, out_indices=(0, 2)).eval()
    torch.manual_seed(0)
    twin = timm.create_model(f"{name}_gbn", features_only=True, out_indices=(0, 2), ghost_batch_size=GHOST).eval()
    assert twin.feature_info.channels() == original.feature_info.channels()
    x = torch.randn(SAMPLES, 3, *original.pretrained_cfg["input_size"][1:])
    for mine, other in zip(twin(x), original(x), strict=True):
        assert torch.equal(mine, other)
    assert any(isinstance(module, _GhostBatchNorm) for module in twin.modules())


@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated")
@pytest.mark.parametrize(
    "name", ["test_efficientnet", "levit_128s", pytest.param("efficientvit_m0", marks=pytest.mark.slow)]
)
def test_scriptable_twins_script(name):
    twin = timm.create_model(f"{name}_gbn", ghost_batch_size=GHOST, scriptable=True, exportable=True).eval()
    x = torch.randn(SAMPLES, *twin.pretrained_cfg["input_size"])
    assert torch.equal(torch.jit.script(twin)(x), twin(x))


@pytest.mark.parametrize("config", ["exportable", "scriptable"])
@pytest.mark.parametrize("name", ["test_efficientnet", "mobilenetv3_small_050", "levit_128s"])
def test_layer_configurations_reach_the_twin(name, config):
    original, twin = (timm.create_model(each, **{config: True}) for each in (name, f"{name}_gbn"))
    for module, other in zip(twin.modules(), original.modules(), strict=True):
        assert type(module) is type(other) or type(module).__bases__[-1] is type(other)


def test_a_twin_exports_and_fuses_as_its_original():
    original, twin = (timm.create_model(name).eval() for name in ("test_resnet", "test_resnet_gbn"))
    twin.load_state_dict(original.state_dict())
    x = torch.randn(SAMPLES, 3, 64, 64)
    with torch.no_grad():
        expected = original(x)
        assert torch.equal(torch.export.export(twin, (x,)).module()(x), expected)
        fused = [fuse_conv_bn_eval(model.conv1[0], model.conv1[1]) for model in (twin, original)]
        assert torch.equal(fused[0](x), fused[1](x))


def test_a_twin_compiles_for_training_without_graph_breaks():
    twin = timm.create_model("test_resnet_gbn", ghost_batch_size=GHOST)
    eager, x = copy.deepcopy(twin), torch.randn(SAMPLES + 1, 3, 64, 64)
    torch.testing.assert_close(torch.compile(twin, fullgraph=True, backend="aot_eager")(x), eager(x))
    torch.testing.assert_close(twin.state_dict(), eager.state_dict())


@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated")
def test_a_scripted_twin_that_cannot_tell_its_samples_refuses_to_train():
    twin = timm.create_model("levit_128s_gbn", img_size=64, ghost_batch_size=GHOST)
    with pytest.raises(torch.jit.Error, match="cannot be trained in TorchScript"):
        torch.jit.script(twin)(torch.randn(SAMPLES, 3, 64, 64))


@pytest.mark.parametrize("name", ["test_efficientnet", "levit_128s"])
def test_gradient_checkpointing_changes_nothing(name):
    plain = timm.create_model(f"{name}_gbn", ghost_batch_size=GHOST).double()
    checkpointed = copy.deepcopy(plain)
    checkpointed.set_grad_checkpointing()
    x = torch.randn(5, 3, *plain.pretrained_cfg["input_size"][1:], dtype=torch.float64)
    for model in (plain, checkpointed):
        torch.manual_seed(1)
        model(x).square().mean().backward()
    for mine, other in zip(checkpointed.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)
    torch.testing.assert_close(checkpointed.state_dict(), plain.state_dict())


@pytest.mark.parametrize("name", ["repghostnet_050", "levit_128s", "shvit_s1", "mobileone_s0"])
def test_reparameterized_twins_are_reparameterized_originals(name):
    original = timm.create_model(name).eval()
    twin = timm.create_model(f"{name}_gbn", ghost_batch_size=GHOST).eval()
    twin.load_state_dict(original.state_dict())
    fused, x = reparameterize_model(twin), torch.randn(1, *original.pretrained_cfg["input_size"])
    assert len(fused.state_dict()) < len(twin.state_dict())
    assert torch.equal(fused(x), reparameterize_model(original)(x))


# Ghosts of samples where tokens and windows are folded into dim 0 (DESIGN fact 7), whichever way the model is entered.


@pytest.mark.filterwarnings("ignore:NOTE. The nodes obtained by tracing")
@pytest.mark.parametrize("name", ["levit_128s", "efficientvit_m0"])
@pytest.mark.parametrize("way", ["forward_features", "forward_intermediates", "extractor"])
@pytest.mark.parametrize("converted", [False, True], ids=["twin", "converted"])
def test_ghosts_are_samples_whichever_way_a_model_is_entered(name, way, converted):
    if converted:
        twin = convert_ghost_batchnorm(timm.create_model(name), GHOST)
    else:
        twin = timm.create_model(f"{name}_gbn", ghost_batch_size=GHOST)
    last = "head.linear" if name == "levit_128s" else "head"
    enter = create_feature_extractor(twin, [last]) if way == "extractor" else getattr(twin, way)
    checked = set()

    def check_call(layer: nn.Module, args: tuple[torch.Tensor], y: torch.Tensor) -> None:
        torch.testing.assert_close(y, ghost_by_ghost(layer, *args), rtol=1e-3, atol=1e-3)
        checked.add(len(args[0]))

    for module in twin.modules():
        if isinstance(module, _GhostBatchNorm):
            module.register_forward_hook(check_call)
    enter(torch.randn(SAMPLES, 3, 224, 224))
    assert max(checked) > SAMPLES


def test_a_module_that_folds_samples_compiles_without_graph_breaks():
    module = LinearNorm(3, 4)
    become_ghosts(module, GHOST)
    become_ghosts(module, GHOST)
    assert [*module._forward_pre_hooks.values()] == [count_samples]
    eager = copy.deepcopy(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for samples in (4, 5):
        x = torch.randn(samples, 7, 3)
        torch.testing.assert_close(compiled(x), eager(x))
    torch.testing.assert_close(module.state_dict(), eager.state_dict())


def test_fx_refuses_to_lose_the_number_of_samples():
    module = LinearNorm(3, 4)
    module.register_forward_pre_hook(count_samples)
    with pytest.raises(TypeError, match="cannot tell its samples"):
        torch.fx.symbolic_trace(nn.Sequential(module))


def test_a_reverted_twin_is_the_original():
    twin = revert_ghost_batchnorm(timm.create_model("levit_128s_gbn", ghost_batch_size=GHOST))
    original = timm.create_model("levit_128s")
    assert [type(module) for module in twin.modules()] == [type(module) for module in original.modules()]
    assert not any(module._forward_pre_hooks for module in twin.modules())


def compat_row(name: str) -> dict[str, object]:
    """The row of hub/compat.csv for one architecture, tested in a process of its own, for memory may run out."""
    with torch.device("meta"):
        model = timm.create_model(name)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as process:
        error = process.submit(hold_against_original, name).exception()
    return {
        "architecture": name,
        "timm": timm.__version__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "norm_layers": sum(isinstance(module, _BatchNorm) for module in model.modules()),
        "image_size": smallest_size(name)[0],
        "result": "fail" if error else "pass",
        "reason": " ".join(f"{type(error).__name__}: {error}".split()) if error else "",
    }


def write_compat(path: Path) -> None:
    rows = list(csv.DictReader(path.open(newline=""))) if path.exists() else []
    for name in sorted(set(NAMES) - {row["architecture"] for row in rows}):
        rows.append(compat_row(name))
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(sorted(rows, key=lambda row: row["architecture"]))
        print(*rows[-1].values(), flush=True)


if __name__ == "__main__":
    write_compat(COMPAT)
