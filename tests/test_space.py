"""hub/space/app.py, started as a Space is and asked through its API."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import timm
import torch
from hub_worker import Worker
from small_run import CLASS_NAMES, MEAN, STD, finished_run, random_weights, small_recipe

from gbnzoo.publish import publish, record_result

APP = Path(__file__).parents[1] / "hub" / "space" / "app.py"
NAME = "resnet8_thin_gbn.shapes_gbn8"
ASK = """
from gradio_client import Client, handle_file
client = Client(url, verbose=False, download_files=here)
said, plot = client.predict(name, api_name="/chosen")
prediction = client.predict(name, handle_file(image), api_name="/predict")
nothing = client.predict(name, None, api_name="/predict")
result = [said, plot, prediction, nothing]
"""


@pytest.fixture(autouse=True)
def _gradio():
    pytest.importorskip("gradio", reason="needs gradio, as in hub/space/requirements.txt")


def environment(**changes):
    ours = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "GBNZOO_", "GRADIO_"))}
    return ours | {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | changes


def answers(url):
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status == 200
    except urllib.error.URLError:
        return False


def undecided_weights():
    """Random ones whose probabilities are all far from 0 and 1."""
    weights = random_weights(small_recipe())
    weights["head.fc.weight"] *= 0.01
    return weights


@pytest.fixture
def hub(tmp_path):
    """A hub with one weight, another rung on its ladder, and a copy of the app."""
    publish(finished_run(tmp_path, weights=undecided_weights(), top1_percent=50.0), tmp_path / "hub")
    record_result(finished_run(tmp_path, top1_percent=75.0, rung="ra"), tmp_path / "hub")
    (tmp_path / "hub" / "space").mkdir()
    shutil.copy(APP, tmp_path / "hub" / "space")
    return tmp_path / "hub"


def test_the_space_predicts_and_shows_the_ladder(hub, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/"
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / "image.png")
    code = [sys.executable, str(hub / "space" / "app.py")]
    at = {"GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port), "GBNZOO_HUB": str(hub)}
    with (
        open(tmp_path / "said.txt", "w") as said,
        subprocess.Popen(code, env=environment(**at), stdout=said, stderr=said) as space,
    ):
        try:
            while not answers(url):
                assert space.poll() is None, (tmp_path / "said.txt").read_text()
                time.sleep(0.2)
            with Worker(tmp_path / "worker") as worker:
                values = {"url": url, "name": NAME, "image": str(tmp_path / "image.png"), "here": str(tmp_path)}
                reply = worker(ASK, **values)
        finally:
            space.kill()
    assert reply.error is None, reply
    facts, plot, prediction, nothing = reply.result
    assert facts.startswith("**50.000 %** top-1 on the test split of shapes: rung `gbn`, batches of 8 normalised by 4")
    with PIL.Image.open(plot) as png:
        assert png.size > (1000, 500)
    assert not (nothing or {}).get("confidences")

    model = timm.create_model("resnet8_thin_gbn", num_classes=6, in_chans=3).double().eval()
    model.load_state_dict(undecided_weights())
    normalised = torch.from_numpy(((pixels / 255 - np.array(MEAN)) / np.array(STD)).transpose(2, 0, 1))
    probabilities = model(normalised.unsqueeze(0)).softmax(-1)[0]
    expected = dict(zip(CLASS_NAMES, probabilities.tolist(), strict=True))
    best = sorted(expected, key=expected.get, reverse=True)[:5]
    assert prediction["label"] == best[0]
    assert [entry["label"] for entry in prediction["confidences"]] == best
    found = {entry["label"]: entry["confidence"] for entry in prediction["confidences"]}
    assert found == pytest.approx({label: expected[label] for label in best}, abs=1e-4)


def test_without_results_the_space_says_what_it_wants(hub):
    (hub / "results.csv").unlink()
    code = [sys.executable, str(hub / "space" / "app.py")]
    ended = subprocess.run(code, env=environment(), capture_output=True, text=True)
    assert ended.returncode == 1
    assert f"no published weights: wanted their rows in {hub / 'space' / 'results.csv'}" in ended.stderr
