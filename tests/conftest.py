"""Small image sets on disk, and caches that no test shares with the user."""

import os
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

REAL_DATA = os.environ.get("GBNZOO_DATA")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """What is decoded in a test is kept in the session's temporary folder, and no data of the user's is found."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "datasets-cache"))
    monkeypatch.delenv("GBNZOO_DATA", raising=False)


@pytest.fixture
def real_data() -> str:
    """The folder with the real data sets as parquet, where the one who runs the tests has named it."""
    return REAL_DATA or pytest.skip("needs the real data sets in the folder that GBNZOO_DATA names")


@pytest.fixture
def undrawn(monkeypatch) -> None:
    """Charts keep their data and are not drawn, which takes most of the time."""
    blank = BytesIO()
    PIL.Image.new("L", (8, 8)).save(blank, format="png")
    monkeypatch.setattr("gbnzoo.charts.Chart.png", lambda chart, theme=None, metadata=None: blank.getvalue())


@pytest.fixture
def image_parquet(tmp_path) -> Callable[..., Path]:
    """Writes `<tmp_path>/data/<name>/<split>-00000-of-00001.parquet` with random images, and returns `<tmp_path>/data`.

    Labels run 0, 1, ..., classes - 1, 0, 1, ...; images are [n, H, W] or [n, H, W, C].
    """

    def write(
        name: str = "cifar10",
        sizes: dict[str, int] | None = None,
        *,
        shape: tuple[int, ...] = (32, 32, 3),
        num_classes: int = 10,
        image_column: str = "img",
        label_column: str = "label",
        seed: int = 0,
    ) -> Path:
        from datasets import ClassLabel, Dataset, Features, Image

        folder = tmp_path / "data" / name
        folder.mkdir(parents=True, exist_ok=True)
        features = Features(
            {image_column: Image(), label_column: ClassLabel(names=[f"class {k}" for k in range(num_classes)])}
        )
        for split, n in (sizes or {"train": 40, "test": 20}).items():
            rows = {
                image_column: [
                    {"bytes": png(pixels), "path": None} for pixels in random_pixels(n, *shape, seed=seed + len(split))
                ],
                label_column: [k % num_classes for k in range(n)],
            }
            Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}-00000-of-00001.parquet")
        return folder.parent

    return write


def random_pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def png(pixels: np.ndarray) -> bytes:
    file = BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
