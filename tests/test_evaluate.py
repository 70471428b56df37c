"""evaluate.py: its numbers against a run's own and against a slow loop, and what it refuses."""

import hashlib
import json
import shutil
from io import BytesIO

import numpy as np
import PIL.Image
import pytest
import timm
import torch
import typer
from safetensors.torch import load_file, save_file
from scripts import evaluate
from small_run import CLASS_NAMES, MEAN, STD, finished_run, random_weights, small_recipe
from typer.testing import CliRunner

from gbnzoo.card import as_csv, read_results
from gbnzoo.publish import publish, record_result
from gbnzoo.recipe import load_recipe
from gbnzoo.run import Run
from gbnzoo.train import train

NAME = "resnet8_thin_gbn.shapes_gbn8"

app = typer.Typer()
app.command()(evaluate.main)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Forty random images to train on and twenty to test, of six classes."""
    from datasets import ClassLabel, Dataset, Features, Image

    folder = tmp_path_factory.mktemp("data") / "shapes"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)
    rows = {"img": [PIL.Image.fromarray(image) for image in pixels], "label": [k % 6 for k in range(60)]}
    features = Features({"img": Image(), "label": ClassLabel(names=list(CLASS_NAMES))})
    table = Dataset.from_dict(rows, features=features)
    table.select(range(40)).to_parquet(folder / "train-00000-of-00001.parquet")
    table.select(range(40, 60)).to_parquet(folder / "test-00000-of-00001.parquet")
    return folder.parent


@pytest.fixture(scope="module")
def published(tmp_path_factory, data_dir):
    """A run, and a hub with its weights; the recorded accuracy is the true one."""
    folder = tmp_path_factory.mktemp("published")
    weights = random_weights(small_recipe())
    run = finished_run(folder / "runs", weights=weights, top1_percent=slowly_measured(weights, data_dir))
    publish(run, folder / "hub")
    return folder


@pytest.fixture
def hub(published, tmp_path):
    """A copy of that hub, to be changed at will."""
    return shutil.copytree(published / "hub", tmp_path / "hub")


def pixels_and_labels(data_dir):
    import pyarrow.parquet

    (path,) = (data_dir / "shapes").glob("test*")
    table = pyarrow.parquet.read_table(path).to_pylist()
    images = [np.asarray(PIL.Image.open(BytesIO(row["img"]["bytes"]))) for row in table]
    return images, [row["label"] for row in table]


def slowly_measured(weights, data_dir):
    """Top-1 in float64, one image after the other."""
    model = timm.create_model("resnet8_thin_gbn", num_classes=6, in_chans=3).double().eval()
    model.load_state_dict(weights)
    images, labels = pixels_and_labels(data_dir)
    normalised = ((image / 255 - np.array(MEAN)) / np.array(STD) for image in images)
    hits = [
        model(torch.from_numpy(x.transpose(2, 0, 1))[None]).argmax().item() == label
        for x, label in zip(normalised, labels, strict=True)
    ]
    return 100 * sum(hits) / len(hits)


def measured(source, **settings):
    return evaluate.measure(evaluate.load_subject(str(source)), evaluate.Settings(**settings))


def run_cli(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.mark.parametrize(
    ("precision", "model"), [("fp32", "resnet8_thin_gbn"), ("bf16", "resnet8_thin_gbn"), ("fp64", "mlp5_gbn")]
)
def test_a_runs_log_comes_out_exactly(tmp_path, precision, model):
    changes = ["base.epochs=1", "base.milestones=[]", "evaluations=1", f"precision={precision}", f"model.name={model}"]
    folder = train(
        load_recipe("recipes/digits/resnet8_thin_gbn.yaml", changes, rung="lb"), out=tmp_path, show_progress=False
    )
    last = Run(folder).finished()[1]
    metrics, row = measured(folder)
    assert str(metrics.top1_percent) == last["top1_percent"]
    assert str(metrics.top5_percent) == last["top5_percent"]
    assert str(metrics.loss) == last["eval_loss"]
    assert (row["precision"], row["recorded_top1"]) == (precision, row["top1"])
    if precision != "fp64":
        assert measured(publish(folder, tmp_path / "hub"))[0] == metrics


def test_a_hub_folder_scores_what_a_slow_loop_counts(hub, data_dir):
    metrics, row = measured(hub / NAME, data_dir=data_dir)
    assert metrics.top1_percent == slowly_measured(load_file(hub / NAME / "model.safetensors"), data_dir)
    assert 0 < metrics.top1_percent < 100
    assert (metrics.n, row["recorded_top1"]) == (20, row["top1"])


@pytest.mark.parametrize("precision", ["bf16", "fp64"])
def test_a_published_name_is_measured_as_its_hub_folder(tmp_path, data_dir, monkeypatch, precision):
    folder = publish(finished_run(tmp_path, precision=precision), tmp_path / "hub")
    monkeypatch.setenv("GBNZOO_HUB", str(tmp_path / "hub"))
    assert measured(NAME, data_dir=data_dir) == measured(folder, data_dir=data_dir)
    assert measured(NAME, data_dir=data_dir)[1]["precision"] == precision
    # Less of the folder than all of it is not what was recorded.
    assert evaluate.load_subject(NAME, num_classes=3).gbn == {}


@pytest.mark.parametrize("batch_size", [1, 7])
def test_the_batch_size_does_not_matter(hub, data_dir, batch_size):
    one, other = (measured(hub / NAME, data_dir=data_dir, batch_size=b)[0] for b in (batch_size, 20))
    assert (one.top1_percent, one.top5_percent) == (other.top1_percent, other.top5_percent)
    assert one.loss == pytest.approx(other.loss, rel=1e-5)


def test_other_conditions_than_the_runs_are_not_compared_with_it(hub, data_dir):
    for settings in ({"amp": True}, {"split": "train"}, {"img_size": 12}):
        row = measured(hub / NAME, data_dir=data_dir, **settings)[1]
        assert row["recorded_top1"] == ""
    assert row["img_size"] == "12"


def test_images_are_resized_and_cropped_as_timm_does(tmp_path, data_dir):
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=6)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    subject = evaluate.Subject("test_resnet", model, {})
    metrics, row = evaluate.measure(subject, evaluate.Settings("shapes", data_dir, img_size=24, crop_pct=0.75))
    cfg = timm.data.resolve_model_data_config(model) | {
        "input_size": (3, 24, 24),
        "crop_pct": 0.75,
        "interpolation": "bicubic",
    }
    transform = timm.data.create_transform(**cfg)
    images, labels = pixels_and_labels(data_dir)
    x = torch.stack([transform(PIL.Image.fromarray(image)) for image in images])
    with torch.no_grad():
        logits = model.eval()(x)
    assert metrics.top1_percent == 100 * (logits.argmax(1) == torch.tensor(labels)).sum().item() / 20
    assert metrics.loss == pytest.approx(
        torch.nn.functional.cross_entropy(logits, torch.tensor(labels)).item(), rel=1e-4
    )
    assert (row["img_size"], row["crop_pct"], row["interpolation"]) == ("24", "0.750", "bicubic")


def test_the_table_and_the_results_file(published, data_dir, tmp_path):
    file = tmp_path / "results.csv"
    both = (published / "hub" / NAME, published / "runs" / f"{NAME}-seed0", "--data-dir", data_dir)
    for _ in range(2):  # the second is added to the first
        result = run_cli(*both, "--results-file", file)
        assert result.exit_code == 0, result.output
    assert "| model " in result.output
    assert f"| {NAME}-seed0 |" in result.output
    header, *lines = file.read_text().splitlines()
    assert header.startswith("model,img_size,top1,top1_err,top5,top5_err,param_count,crop_pct,interpolation,data,")
    assert [line.split(",")[0] for line in lines] == [NAME, NAME, f"{NAME}-seed0", f"{NAME}-seed0"]

    run_cli(*both, "--results-file", file, "--results-format", "json")
    assert sorted(row["model"] for row in json.loads(file.read_text())) == [NAME, f"{NAME}-seed0"]


def test_what_was_measured_before_an_error_is_told(hub, data_dir, tmp_path):
    out = tmp_path / "results.csv"
    result = run_cli(hub / NAME, "nowhere", "--data-dir", data_dir, "--results-file", out)
    assert result.exit_code == 2
    assert f"| {NAME} | shapes | test " in result.output
    assert out.read_text().splitlines()[1].startswith(f"{NAME},8,")


def test_a_results_file_of_other_columns_is_not_added_to(hub, data_dir, tmp_path):
    (file := tmp_path / "other.csv").write_text("model,top1\n")
    result = run_cli(hub / NAME, "--data-dir", data_dir, "--results-file", file)
    assert (result.exit_code, file.read_text()) == (2, "model,top1\n")
    assert "cannot be added to" in result.output


def test_names_come_from_wildcards_and_files(tmp_path):
    (file := tmp_path / "names.txt").write_text("resnet18\nhub/x\n")
    assert evaluate.expand_names([str(file), "resnet34.a1_in1k"]) == ["resnet18", "hub/x", "resnet34.a1_in1k"]
    assert "resnet18.a1_in1k" in evaluate.expand_names(["resnet18.*"])
    with pytest.raises(ValueError, match="no pretrained model"):
        evaluate.expand_names(["no_such*"])


def test_flags_are_spelled_as_in_timms_validate(hub, data_dir, monkeypatch):
    """`-m`, `-b`, `-j`; and a folder as timm names it."""
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    arguments = ("--model", f"local-dir:{hub / NAME}", "-b", "7", "-j", "1", "--data-dir", data_dir)
    by_flag = run_cli("-m", hub / NAME, *arguments)
    assert by_flag.exit_code == 0, by_flag.output
    (line, again) = (line for line in by_flag.output.splitlines() if line.startswith(f"| {NAME} "))
    assert line == again
    assert line in run_cli(hub / NAME, "--data-dir", data_dir).output
    assert threads == [1]


def test_a_checkpoint_of_another_number_of_classes(tmp_path, data_dir):
    model = timm.create_model("test_resnet_gbn", num_classes=6)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    arguments = ("-m", "test_resnet", "--checkpoint", tmp_path / "weights.safetensors", "--data", "shapes")
    arguments += ("--data-dir", data_dir, "--img-size", 24)
    result = run_cli(*arguments, "--num-classes", 6)
    metrics, _ = evaluate.measure(
        evaluate.Subject("twin", model, {}), evaluate.Settings("shapes", data_dir, img_size=24)
    )
    assert f" {metrics.top1_percent:.3f} " in result.output
    assert "its weights do not fit ResNet (of another shape: fc.bias, fc.weight)" in run_cli(*arguments).output


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: torch.save({"fc.bias": torch.zeros(6)}, path), "a pickle runs whatever code it holds"),
        (lambda path: path.write_bytes(b"pickle"), "unknown format"),
        (lambda path: path.write_bytes(b"short"), "no safetensors file"),
        (lambda path: save_file({"fc.bias": torch.tensor([torch.nan])}, path), "NaN or infinity in 'fc.bias'"),
    ],
)
def test_a_checkpoint_is_looked_at_before_it_is_loaded(make, message, tmp_path, data_dir):
    suffix = {"a pickle": ".pth", "unknown ": ".data"}.get(message[:8], ".safetensors")
    make(path := tmp_path / f"weights{suffix}")
    result = run_cli("test_resnet", "--checkpoint", path, "--data", "shapes", "--data-dir", data_dir)
    assert (result.exit_code, message in result.output) == (2, True), result.output


def test_weights_that_plain_timm_would_load_are_looked_at_too(tmp_path, data_dir):
    """A twin's name timm's own network, whose entry point is none of ours."""
    folder = publish(finished_run(tmp_path, model={"name": "test_resnet_gbn"}), tmp_path / "hub")
    assert measured(folder, data_dir=data_dir)[0].n == 20
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    result = run_cli(folder, "--data-dir", data_dir)
    assert (result.exit_code, "holds no model.safetensors but pytorch_model.bin" in result.output) == (2, True)


def test_weights_from_a_file(tmp_path, data_dir):
    arguments = ("resnet8_thin_gbn", "--data", "shapes", "--data-dir", data_dir, "--checkpoint")
    # As timm's default has it: one channel, ten classes.
    weights = timm.create_model("resnet8_thin_gbn").state_dict()
    save_file(weights, tmp_path / "whole.safetensors")
    assert "tells 10 classes apart, shapes has 6" in run_cli(*arguments, tmp_path / "whole.safetensors").output
    del weights["bn1.weight"]
    save_file(weights, tmp_path / "partial.safetensors")
    result = run_cli(*arguments, tmp_path / "partial.safetensors")
    assert result.exit_code == 2
    assert "partial.safetensors: its weights do not fit CifarResNet (missing: bn1.weight)" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "nothing to measure"),
        (("no_such_model", "--data", "shapes"), "nor a model of timm's"),
        (("resnet18", "--no-pretrained"), "--data is needed"),
        (("resnet18", "--no-pretrained", "--data", "shapes"), "resnet18 tells 1000 classes apart, shapes has 6"),
        (("{hub}", "--no-pretrained"), "has weights of its own"),
        (("{hub}", "--num-classes", "6"), "has weights of its own"),
        (("{hub}", "--check"), "take every row of results.csv"),
        (("--check", "--data", "shapes"), "take every row of results.csv"),
        (("--sha", "--amp"), "take every row of results.csv"),
        (
            ("resnet8_thin_gbn", "--checkpoint", "nowhere.safetensors"),
            "--checkpoint nowhere.safetensors: no such file; wanted a safetensors file",
        ),
        (("nowhere.txt",), "nowhere.txt: no such file; wanted a text file with one name a line"),
        (("{hub}", "--device", "foo"), "--device foo: cannot be used here (Expected one of cpu, cuda"),
        (("{hub}", "--device", "cuda:99"), "--device cuda:99: cannot be used here"),
        (
            ("no_such_model", "--results-file", "nowhere/x.csv"),
            "--results-file nowhere/x.csv: there is no folder nowhere",
        ),
    ],
)
def test_what_cannot_be_measured_is_one_line(arguments, message, data_dir, hub):
    result = run_cli(*(a.format(hub=hub / NAME) for a in arguments), "--data-dir", data_dir)
    assert result.exit_code == 2
    assert message in result.output
    assert result.output.splitlines()[-1].startswith("error: ")


def test_images_of_another_number_of_channels(data_dir):
    grey = evaluate.Subject("grey", timm.create_model("resnet8_thin_gbn", num_classes=6), {})
    with pytest.raises(ValueError, match=r"grey takes images of 1 channel\(s\), those of shapes have 3"):
        evaluate.measure(grey, evaluate.Settings("shapes", data_dir))


def test_images_that_are_no_longer_of_the_runs_size(hub, tmp_path, image_parquet):
    data_dir = image_parquet("shapes", shape=(9, 9, 3), num_classes=6)
    with pytest.raises(
        ValueError, match=r"trained on images of 8 × 8, those of shapes are 9 × 9; --img-size 8 resizes"
    ):
        measured(hub / NAME, data_dir=data_dir)
    assert measured(hub / NAME, data_dir=data_dir, img_size=8)[0].n == 20


def test_a_size_that_the_network_cannot_take(data_dir, tmp_path):
    model = timm.create_model("mlp5_gbn", num_classes=6, in_chans=3, img_size=8)
    folder = publish(finished_run(tmp_path, weights=model.state_dict(), model={"name": "mlp5_gbn"}), tmp_path / "hub")
    with pytest.raises(ValueError, match=r"takes images of 8 × 8 only; leave out --img-size 16"):
        measured(folder, data_dir=data_dir, img_size=16)


def test_missing_data_is_an_error_that_names_the_folder(hub, tmp_path):
    result = run_cli(hub / NAME, "--data-dir", tmp_path / "nowhere")
    assert result.exit_code == 2
    assert "nowhere" in result.output


def test_weights_in_a_hub_folder_that_do_not_fit_are_named(hub, data_dir):
    weights = load_file(hub / NAME / "model.safetensors")
    del weights["conv1.weight"]
    save_file(weights, hub / NAME / "model.safetensors")
    result = run_cli(hub / NAME, "--data-dir", data_dir)
    assert result.exit_code == 2
    assert "not the weights that were published" in result.output
    config = json.loads((hub / NAME / "config.json").read_text())
    del config["gbn"]["sha256"]
    (hub / NAME / "config.json").write_text(json.dumps(config))
    result = run_cli(hub / NAME, "--data-dir", data_dir)
    assert result.exit_code == 2
    assert "conv1.weight" in result.output


# ---- --check


def check(hub, data_dir):
    return run_cli("--check", "--hub", hub, "--data-dir", data_dir)


def edit_top1(hub, difference, **cells):
    rows = read_results(hub / "results.csv")
    rows[0] |= {"top1": f"{float(rows[0]['top1']) + difference:.3f}", **cells}
    (hub / "results.csv").write_text(as_csv(rows))


def test_check_agrees_with_what_was_published(hub, data_dir, tmp_path):
    record_result(finished_run(tmp_path, seed=1), hub)
    result = check(hub, data_dir)
    assert result.exit_code == 0, result.output
    assert "not checked | its weights are not published" in result.output
    assert result.stdout.splitlines()[-1] == "1 agree, 0 differ, 1 not checked"


@pytest.mark.parametrize(("difference", "exit_code"), [(0.02, 1), (-0.02, 1), (0.009, 0)])
def test_check_fails_above_a_hundredth_of_a_point(hub, data_dir, difference, exit_code):
    edit_top1(hub, difference)
    result = check(hub, data_dir)
    assert (result.exit_code, "DIFFERS" in result.output) == (exit_code, bool(exit_code))


@pytest.mark.parametrize(("difference", "exit_code"), [(0.06, 1), (0.04, 0)])
def test_check_of_a_row_from_a_gpu_fails_on_a_cpu_above_five_hundredths(hub, data_dir, difference, exit_code):
    edit_top1(hub, difference, hardware="NVIDIA H200")
    assert run_cli("--check", "--hub", hub, "--data-dir", data_dir, "--device", "cpu").exit_code == exit_code


@pytest.mark.parametrize("flag", ["--check", "--sha"])
def test_check_fails_for_weights_that_were_exchanged(hub, data_dir, flag):
    weights = load_file(hub / NAME / "model.safetensors")
    save_file({k: v + 1e-7 if k == "bn1.bias" else v for k, v in weights.items()}, hub / NAME / "model.safetensors")
    result = run_cli(flag, "--hub", hub, "--data-dir", data_dir)
    assert result.exit_code == 1
    assert "its sha256 is another" in result.output


def test_hashes_are_compared_without_any_data(hub, tmp_path):
    edit_top1(hub, 50)  # not its business
    result = run_cli("--sha", "--hub", hub, "--data-dir", tmp_path / "nowhere")
    assert result.exit_code == 0, result.output
    sha256 = hashlib.sha256((hub / NAME / "model.safetensors").read_bytes()).hexdigest()
    assert f"| agrees | sha256 {sha256} |" in result.output
    (hub / NAME / "model.safetensors").unlink()
    result = run_cli("--sha", "--hub", hub)
    assert (result.exit_code, "0 agree, 0 differ, 1 not checked" in result.output) == (0, True)


def test_check_says_what_is_not_at_hand(hub, data_dir, tmp_path):
    result = check(hub, tmp_path / "nowhere")
    assert result.exit_code == 0
    assert "its data are not at hand" in result.output
    (hub / NAME / "model.safetensors").unlink()
    result = check(hub, data_dir)
    assert result.exit_code == 0
    assert "its weights are not at hand" in result.output


def test_check_goes_on_behind_a_damaged_folder(hub, data_dir, tmp_path):
    other = publish(finished_run(tmp_path, rung="sb"), hub)
    (other / "config.json").write_text('{"gbn": ')
    result = run_cli("--check", "--hub", hub, "--data-dir", data_dir)
    assert (result.exit_code, "1 agree, 1 differ, 0 not checked" in result.output) == (1, True), result.output
    assert "it cannot be measured" in result.output


def test_a_config_that_lies_where_one_works_is_not_a_models_own(monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text('{"gbn": {"name": "other", "precision": "bf16"}}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate.load_subject.__globals__["timm"], "create_model", create_without_weights)
    assert evaluate.load_subject("test_resnet").gbn == {}


create_model = timm.create_model


def create_without_weights(name, pretrained, **options):
    return create_model(name, **options)


def test_check_of_no_results_says_so(tmp_path, data_dir):
    result = check(tmp_path / "empty", data_dir)
    assert (result.exit_code, result.output.strip().endswith("has no rows")) == (0, True)
