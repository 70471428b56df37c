"""`gbnzoo diagnose`: which weights and images it takes, what it writes, and what it says of a batch."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from small_run import finished_run, random_weights, small_recipe
from typer.testing import CliRunner

from gbnzoo import cli
from gbnzoo.data import load_images
from gbnzoo.diagnose import advice, diagnose, find_subject
from gbnzoo.diagnostics import Estimate
from gbnzoo.metrics import evaluate
from gbnzoo.publish import publish
from gbnzoo.run import Checkpoint, Run
from gbnzoo.trainer import build_model

FAST = ("--samples", 40, "--ghosts", 5, "--subspace", 3, "--directions", 2, "--eigenvalues", 2, "--device", "cpu")


@pytest.fixture
def data_dir(image_parquet):
    return image_parquet("shapes", {"train": 40, "test": 20}, shape=(8, 8, 3), num_classes=6)


def say(*arguments, exit_code=0):
    result = CliRunner().invoke(cli.app, ["diagnose", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == exit_code, result.output
    return result.output


def measured(source, data_dir, out, *arguments):
    say(source, "--data-dir", data_dir, "--out", out, *FAST, *arguments)
    return json.loads((out / "diagnosis.json").read_text())


def test_a_run_is_diagnosed(tmp_path, data_dir):
    """The loss over all training images is that of `evaluate`, the distance is that from the seed's weights."""
    folder = finished_run(tmp_path / "runs")
    said = say(folder, "--data-dir", data_dir, "--out", tmp_path / "out", *FAST)
    found = json.loads((tmp_path / "out" / "diagnosis.json").read_text())
    assert (found["name"], found["update"]) == (f"{folder.name}-update5", 5)

    subject = find_subject(str(folder), data_dir=data_dir)
    train_set = load_images("shapes", "train", data_dir=data_dir)
    assert found["loss"] == pytest.approx(evaluate(subject.model, train_set.batches(7)).loss, rel=1e-5)
    weights = random_weights(small_recipe())
    fresh = build_model(small_recipe(), train_set, 4)
    keys = [key for key, _ in fresh.named_parameters()]
    start, end = (np.concatenate([w[key].numpy().ravel() for key in keys]) for w in (fresh.state_dict(), weights))
    assert found["weight_distance"] == pytest.approx(np.linalg.norm((end - start).astype(float)), rel=1e-6)
    assert found["weight_norm"] == pytest.approx(np.linalg.norm(end.astype(float)), rel=1e-6)
    assert found["num_weights"] == len(end)
    assert found["potential"]["distances"][-1] == pytest.approx(found["weight_distance"])

    assert (found["noise_scale"]["ghosts"], found["noise_scale"]["ghost_batch_size"]) == (5, 4)
    assert len(found["hessian"]["eigenvalues"]) == 2
    assert found["sharpness"]["percent"] > found["sharpness_subspace"]["percent"] > 0
    assert found["sharpness"]["loss"] == pytest.approx(found["loss"], rel=1e-6)
    table = (tmp_path / "out" / "potential.csv").read_text().splitlines()
    assert table[0] == "distance,std,rms,mean"
    assert len(table) == 11
    assert (tmp_path / "out" / "potential.png").read_bytes().startswith(b"\x89PNG")
    for words in (
        "40 training images of shapes",
        "float32, dropout off",
        "built again from seed 0",
        "noise scale",
        "α",
    ):
        assert words in said
    assert "at this point of training: " in said


def test_the_top_eigenvalue_is_that_of_the_whole_hessian(tmp_path, data_dir):
    """Power iteration on float64 differences of gradients, by torch's own operators alone."""
    folder = finished_run(tmp_path / "runs")
    found = measured(folder, data_dir, tmp_path / "out", "--only", "hessian", "--eigenvalues", 1)
    model = find_subject(str(folder), data_dir=data_dir).model.double().eval()
    images, labels = next(load_images("shapes", "train", data_dir=data_dir).batches(40, torch.float64))
    parameters = list(model.parameters())
    point = torch.nn.utils.parameters_to_vector(parameters).detach().clone()

    def gradient(at):
        torch.nn.utils.vector_to_parameters(at, parameters)
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])

    top = found["hessian"]["eigenvalues"][0]
    vector, shift, value = torch.randn_like(point), top, 0.0
    for _ in range(60):  # shifted, so that the largest is also the largest in size
        vector /= vector.norm()
        product = (gradient(point + 1e-6 * vector) - gradient(point - 1e-6 * vector)) / 2e-6
        value, vector = torch.dot(vector, product).item(), product + shift * vector
    assert top == pytest.approx(value, rel=0.03)


def test_it_is_the_same_again_alone_and_published(tmp_path, data_dir, monkeypatch):
    """And another seed is another draw."""
    folder = finished_run(tmp_path / "runs")
    whole = measured(folder, data_dir, tmp_path / "a")
    for parts in ("sharpness,hessian", "potential,noise_scale"):
        alone = measured(folder, data_dir, tmp_path / "b", "--only", parts)
        for part in ("hessian", "sharpness", "noise_scale", "potential"):
            assert alone[part] == (whole[part] if part in parts else None)
    other = measured(folder, data_dir, tmp_path / "d", "--seed", 1, "--only", "potential,noise_scale")
    assert other["noise_scale"]["trace"] != whole["noise_scale"]["trace"]
    assert other["potential"]["alpha"] != whole["potential"]["alpha"]

    hub = publish(folder, tmp_path / "hub")
    own = {"name", "initial"}
    published = measured(hub, data_dir, tmp_path / "e")
    assert {k: v for k, v in published.items() if k not in own} == {k: v for k, v in whole.items() if k not in own}
    monkeypatch.setenv("GBNZOO_HUB", str(hub.parent))
    named = measured(hub.name, data_dir, tmp_path / "f", "--only", "noise_scale")
    assert (named["name"], named["noise_scale"]) == (published["name"], published["noise_scale"])
    # As it comes from the Hub, without its recipe.
    (hub / "recipe.yaml").unlink()
    without = measured(hub, data_dir, tmp_path / "g", "--only", "noise_scale")
    for part in ("noise_scale", "loss", "batch_size"):
        assert without[part] == whole[part]
    assert without["weight_distance"] is None


def test_checkpoints_of_a_run_stopped_on_its_way(tmp_path, data_dir):
    folder = finished_run(tmp_path / "runs", finished=False)
    run = Run(folder)
    weights = random_weights(small_recipe())
    start = {key: value + 1 if value.is_floating_point() else value for key, value in weights.items()}
    run.save_initial(start)
    run.save_checkpoint(Checkpoint(5, 6, weights))
    assert find_subject(str(folder), data_dir=data_dir).update == 5
    earlier = next((folder / "checkpoints").glob("update000000004*"))
    found = measured(earlier, data_dir, tmp_path / "out", "--only", "noise_scale")
    assert found["update"] == 4
    # Each weight is 1 away from where this run is said to have started.
    assert found["weight_distance"] == pytest.approx(found["num_weights"] ** 0.5, rel=1e-5)
    assert found["initial"] == "checkpoints/initial.safetensors"
    found = measured(
        folder / "checkpoints" / "initial.safetensors", data_dir, tmp_path / "out", "--only", "noise_scale"
    )
    assert (found["update"], found["weight_distance"]) == (0, 0)

    damaged = bytearray(earlier.read_bytes())
    damaged[-1] ^= 1
    earlier.write_bytes(damaged)
    assert "is damaged" in say(earlier, "--data-dir", data_dir, exit_code=2)


def test_ghosts_statistics_are_each_ghosts_own(tmp_path, data_dir):
    """One ghost of everything: BatchNorm in training."""
    subject = find_subject(str(finished_run(tmp_path / "runs")), data_dir=data_dir)
    found = diagnose(subject, only=(), samples=40, ghost_batch_size=40, statistics="ghosts")
    images, labels = next(load_images("shapes", "train", data_dir=data_dir).batches(40))
    subject.model.train()
    for module in subject.model.modules():
        if hasattr(module, "ghost_batch_size"):
            module.ghost_batch_size = None
    expected = torch.nn.functional.cross_entropy(subject.model(images), labels).item()
    assert found.loss == pytest.approx(expected, rel=1e-5)


def test_a_scale_that_batch_norm_undoes_moves_no_relative_curvature(tmp_path, data_dir):
    def curvatures(scale):
        subject = find_subject(str(folder), data_dir=data_dir)
        norm, weight = subject.model.bn1, subject.model.conv1.weight
        norm.eps = 0.0  # or the scale would not be undone quite
        with torch.no_grad():
            weight.mul_(scale)
            norm.running_mean.mul_(scale)
            norm.running_var.mul_(scale**2)
        found = diagnose(subject, only=("hessian",), samples=40, eigenvalues=1)
        return found.loss, found.hessian.eigenvalues[0], found.relative_hessian.eigenvalues[0]

    folder = finished_run(tmp_path / "runs")
    (loss, plain, relative), (scaled_loss, scaled_plain, scaled_relative) = curvatures(1), curvatures(0.1)
    assert scaled_loss == pytest.approx(loss, rel=1e-5)
    assert scaled_relative == pytest.approx(relative, rel=0.02)
    assert abs(scaled_plain / plain - 1) > 0.5


def test_a_small_set_is_looked_at_whole(tmp_path, data_dir):
    subject = find_subject(str(finished_run(tmp_path / "runs")), data_dir=data_dir)
    assert diagnose(subject, only=()).settings["samples"] == 40
    assert diagnose(subject, only=(), ghost_batch_size=16, statistics="ghosts").settings["samples"] == 32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--only", "hessian,sharpnes"), "'sharpnes' is none of noise_scale, hessian, sharpness, potential"),
        (("--samples", 41), "--samples 41 of 40 training images"),
        (("--samples", 38, "--statistics", "ghosts"), "makes no whole ghosts of 4; wanted 36 or 40"),
        (("--ghosts", 11), "--ghosts 11 of 4 are 44 samples of 40 training images; wanted at most 10 of 4"),
        (("--distance", 1e9, "--only", "potential"), "not finite at distance"),
        (("--distance", -1), "--distance -1: wanted a number above 0"),
        (("--distance", 0), "--distance 0: wanted a number above 0"),
        (("--epsilon", "inf"), "--epsilon inf: wanted a number above 0"),
        (("--epsilon", 1e30, "--only", "sharpness"), "not finite in the box of epsilon 1e+30"),
        (("--eigenvalues", 2000000, "--only", "hessian"), "2000000 eigenvalues of "),
        (("--device", "nowhere"), "--device nowhere: cannot be used here"),
        (("--data", "nothing"), "nothing"),
    ],
)
def test_what_cannot_be_measured_is_said(arguments, message, tmp_path, data_dir):
    folder = finished_run(tmp_path / "runs")
    said = say(folder, "--data-dir", data_dir, "--out", tmp_path / "out", *FAST, *arguments, exit_code=2)
    assert message in said
    assert not (tmp_path / "out").exists()


def test_sources_that_are_none_of_those_wanted(tmp_path, data_dir):
    folder = finished_run(tmp_path / "runs")
    loose = tmp_path / "weights.safetensors"
    shutil.copy(next((folder / "checkpoints").iterdir()), loose)
    assert "says neither their network nor their data" in say(loose, exit_code=2)
    gone = folder / "checkpoints" / "update000000001.0123456789abcdef.safetensors"
    assert "no checkpoint of this run; wanted one of update000000005." in say(gone, exit_code=2)
    assert "neither a hub folder" in say("nowhere", exit_code=2)
    shutil.rmtree(folder / "checkpoints")
    assert "has no checkpoint yet" in say(folder, "--data-dir", data_dir, exit_code=2)


@pytest.mark.parametrize(
    ("scale", "batch_size", "words"),
    [
        # (1 + 9000/4096) / (1 + 9000/512) = 3.197 / 18.58 = 0.17; (1 + 4096/9000) / (1 + 512/9000) = 1.455 / 1.057 = 1.4.
        (
            Estimate(9000, 7100, 12_345),
            512,
            "your batch 512 could be 4,096 at sqrt-lr (× 2.83), with 0.17 times the updates and 1.4 times the samples;"
            " beyond 9,000 (95 %: 7,100 to 12,000) you mostly pay",
        ),
        (
            Estimate(900, 700, 1100),
            512,
            "your batch 512 is about as large as is known to pay; beyond 900 (95 %: 700 to",
        ),
        # (1 + 4096/1024) / 2 = 2.5.
        (
            Estimate(1024, 900, 1100),
            4096,
            "your batch 4,096 takes 2.5 times the samples of a batch of 1,000, and saves less than half of its updates;"
            " beyond 1,000 (95 %: 900 to 1,100) you mostly pay",
        ),
        (Estimate(9000, 7100, 9900), None, "beyond 9,000 (95 %: 7,100 to 9,900) you mostly pay"),
        # The lower end stands for what was not found: 7100 / 2 = 3550 is above 2048.
        (
            Estimate(9000, 7100, math.inf),
            512,
            "your batch 512 could be 2,048 at sqrt-lr (× 2), with 0.3 times the updates and 1.2 times the samples; where you"
            " mostly pay was not found, but not below 7,100 (95 %); more --ghosts may tell",
        ),
        (Estimate(math.inf, 52_000, math.inf), 40_000, "your batch 40,000 is about as large as is known to pay; where"),
        (Estimate(1e5, 0, math.inf), 512, "so few ghosts tell nothing of the noise scale"),
        (Estimate(math.inf, math.inf, math.inf), 512, "noise alone was found"),
        (Estimate(0.5, 0.4, 0.6), 128, "beyond 0.5 (95 %: 0.4 to 0.6) you mostly pay"),
    ],
)
def test_advice(scale, batch_size, words):
    assert words in advice(scale, batch_size)


def test_advice_keeps_to_the_images_there_are_and_to_the_rule():
    scale = Estimate(1e6, 9e5, 2e6)
    assert "could be 32,768 at linear-lr (× 256)" in advice(scale, 128, lr_scaling="linear", num_images=60_000)
    assert "could be 32,768, with" in advice(scale, 128, lr_scaling="none", num_images=60_000)
