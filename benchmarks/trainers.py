"""A trainer as `gbnzoo train` opens one, of a run that nothing is kept of."""

import contextlib
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

from gbnzoo.recipe import Recipe
from gbnzoo.trainer import Trainer


@contextlib.contextmanager
def opened_trainer(
    recipe: Recipe, data_dir: Path | None, *, micro_batch_size: int | None = None, cuda_graphs: bool = True
) -> Iterator[Trainer]:
    with tempfile.TemporaryDirectory() as out:
        trainer = Trainer(
            recipe,
            data_dir=data_dir,
            out=out,
            processes=1,
            micro_batch_size=micro_batch_size,
            tracker=None,
            checkpoint_seconds=math.inf,
            timeout_seconds=600,
            cuda_graphs=cuda_graphs,
        )
        with trainer.opened_run(resume=False):
            yield trainer
