"""A page to try the published weights: choose one, drop an image, see predictions and the ladder it stands on.

    pip install -r hub/space/requirements.txt && python hub/space/app.py

Names and accuracies come from results.csv, beside this file or in the folder above; weights from the checkout or the Hub.
"""

import functools
import tempfile
from pathlib import Path

import gradio
import timm
import torch
from PIL import Image
from torch import nn

import gbnzoo  # noqa: F401  (registers the architectures)
from gbnzoo.card import group_by_rung, ladder_of, read_results
from gbnzoo.report import ladder_plot

HERE = Path(__file__).resolve().parent
RESULTS = [row for folder in (HERE, HERE.parent) for row in read_results(folder / "results.csv")]
PUBLISHED = {row["model"]: row for row in RESULTS if row["sha256"]}
PLOTS = Path(tempfile.mkdtemp())


@functools.lru_cache(maxsize=4)
def load(name: str) -> nn.Module:
    return timm.create_model(name, pretrained=True).eval()


@torch.inference_mode()
def predict(name: str, image: Image.Image | None) -> dict[str, float]:
    """Probability of each class."""
    if image is None:
        return {}
    model = load(name)
    config = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**config, is_training=False)
    pixels = transform(image.convert("L" if config["input_size"][0] == 1 else "RGB"))
    probabilities = model(pixels.unsqueeze(0)).softmax(-1)[0].tolist()
    return dict(zip(model.pretrained_cfg["label_names"], probabilities, strict=True))


def chosen(name: str) -> tuple[str, str]:
    """What results.csv says of a published weight, and a PNG of its ladder, all seeds."""
    row = PUBLISHED[name]
    plot = PLOTS / f"{name}.png"
    if not plot.exists():
        ladder_plot(group_by_rung(other for other in RESULTS if ladder_of(other) == ladder_of(row)), plot)
    said = (
        f"**{row['top1']} %** top-1 on the {row['split']} split of {row['data']}: rung `{row['rung']}`, batches of"
        f" {row['batch_size']} normalised by {row['ghost_batch_size']}, {row['updates']} updates, seed {row['seed']}"
    )
    return said, str(plot)


if not PUBLISHED:
    raise SystemExit(
        f"no published weights: wanted their rows in {HERE / 'results.csv'} or {HERE.parent / 'results.csv'}"
    )

with gradio.Blocks(title="gbnzoo") as app:
    gradio.Markdown("# gbnzoo\nGhost-BatchNorm networks from long large-batch training: choose weights, drop an image.")
    name = gradio.Dropdown(list(PUBLISHED), label="weights")
    said = gradio.Markdown()
    with gradio.Row():
        image = gradio.Image(type="pil", label="image", height=320)
        prediction = gradio.Label(num_top_classes=5, label="prediction")
    plot = gradio.Image(show_label=False, buttons=[], interactive=False)
    gradio.on([app.load, name.change], chosen, name, [said, plot])
    gradio.on([name.change, image.change], predict, [name, image], prediction)

if __name__ == "__main__":
    app.launch()
