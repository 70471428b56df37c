"""How fast a recipe trains here on one process of many threads, on many of one thread, and between: the same result.

Threads of one process wait for each other at the end of every operator, processes once an update; on a machine that others
use too, each such wait is for the one that was held up.
"""

import json
import math
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer

from gbnzoo.allocator import keep_freed_memory
from gbnzoo.launch import leaving_process_group, on_first_process, plain_errors, start_processes
from gbnzoo.recipe import load_recipe
from gbnzoo.trainer import Trainer

SECONDS = 5.0
_LEAST_UPDATES, _MOST_UPDATES = 3, 200


@dataclass(frozen=True)
class Rate:
    """What so many processes, of so many threads each, made together.

    Args:
        processes, threads: how many; threads are of each process.
        micro_batch_size: of each process.
        images_per_second: of all, by the shortest of some updates.
    """

    processes: int
    threads: int
    micro_batch_size: int
    images_per_second: float


def splits(threads: int) -> list[tuple[int, int]]:
    """Processes, and threads of each, that use so many threads in all."""
    return [(n, threads // n) for n in range(1, threads + 1) if threads % n == 0]


def measure_rate(
    recipe: str,
    overrides: Sequence[str],
    *,
    rung: str,
    processes: int,
    threads: int,
    data_dir: Path | None,
    seconds: float = SECONDS,
) -> Rate:
    """Train some updates in new processes and time them; nothing is left of the run.

    Raises:
        ValueError: if the batch cannot be spread over so many processes.
        RunError: if training fails.
    """
    with tempfile.TemporaryDirectory() as out:
        arguments = [recipe, *overrides, "--rung", rung, "--out", out, "--seconds", str(seconds)]
        arguments += ["--data-dir", str(data_dir)] if data_dir else []
        before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = str(threads)
        try:
            code = start_processes(processes, "gbnzoo.rates", arguments)
        finally:
            os.environ.pop("OMP_NUM_THREADS") if before is None else os.environ.update(OMP_NUM_THREADS=before)
        if code:
            raise typer.Exit(code)
        return Rate(processes, threads, **json.loads((Path(out) / "rate.json").read_text()))


def fastest(rates: Sequence[Rate]) -> Rate:
    """The one to train with: the fewest processes of those within 3 % of the highest rate, which is noise."""
    most = max(rate.images_per_second for rate in rates)
    return min((rate for rate in rates if 1.03 * rate.images_per_second >= most), key=lambda rate: rate.processes)


def main(
    recipe: str,
    overrides: Annotated[list[str] | None, typer.Argument()] = None,
    rung: Annotated[str, typer.Option()] = "ra",
    out: Annotated[Path, typer.Option()] = Path("rates"),
    seconds: Annotated[float, typer.Option()] = SECONDS,
    data_dir: Annotated[Path | None, typer.Option()] = None,
) -> None:
    """What each process of `measure_rate` does."""
    keep_freed_memory()
    with plain_errors(), leaving_process_group():
        trainer = Trainer(
            load_recipe(recipe, overrides or (), rung=rung),
            data_dir=data_dir,
            out=out,
            processes=None,
            micro_batch_size=None,
            tracker=None,
            checkpoint_seconds=math.inf,
            timeout_seconds=600,
        )
        with trainer.opened_run(resume=False):
            trainer.model.train()
            _time_update(trainer, 0)  # allocates
            first = _time_update(trainer, 1)
            wanted = on_first_process(lambda: min(_MOST_UPDATES, max(_LEAST_UPDATES, round(seconds / first))))
            updates = range(2, min(2 + wanted, trainer.regime.total_updates))
            shortest = min([first, *(_time_update(trainer, update) for update in updates)])
        rate = {
            "micro_batch_size": trainer.layout.micro_batch_size,
            "images_per_second": trainer.regime.batch_size / shortest,
        }
        on_first_process(lambda: (out / "rate.json").write_text(json.dumps(rate)))


def _time_update(trainer: Trainer, update: int) -> float:
    """Seconds until all processes have made it."""
    began = _now_for_everyone(trainer)
    trainer.set_rates(update)
    trainer.add_gradients(update)
    trainer.clip_gradients(update)
    trainer.add_isotropic_noise(update)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    return _now_for_everyone(trainer) - began


def _now_for_everyone(trainer: Trainer) -> float:
    """The time once all processes are here, and their GPUs have done what was asked of them."""
    if trainer.device.type == "cuda":
        torch.cuda.synchronize(trainer.device)
    trainer.accelerator.wait_for_everyone()
    return time.perf_counter()


if __name__ == "__main__":
    typer.run(main)
