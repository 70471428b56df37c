"""What it costs to log: the CPU time of a row of log.csv and layers.csv beside that of an update, and the share of a whole run.

    OMP_NUM_THREADS=1 python -m benchmarks.log --data-dir data

Through `gbnzoo train`'s own trainer. A row is all that is done for one, but for the evaluation, which is a result and not its
record. Rows and updates are as many as the recipe makes of them. One thread, CPU time, in turns.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.timing import interleave, quartiles, setting
from benchmarks.trainers import opened_trainer
from gbnzoo.allocator import keep_freed_memory
from gbnzoo.recipe import load_recipe

RUNS = (  # recipe, rung, overrides: from many updates to few, and the shortest
    ("recipes/mnist/mlp5_gbn.yaml", "gbn", []),
    ("recipes/cifar10/resnet20_gbn_modern.yaml", "gbn", []),
    ("recipes/mnist/mlp5_gbn_distance.yaml", "gbn", ["large.batch_size=4096"]),
    ("recipes/digits/resnet8_thin_gbn.yaml", "lb", []),
)


def main(
    data_dir: Annotated[Path | None, typer.Option(help="folder with the sets; else GBNZOO_DATA, else the Hub")] = None,
    rounds: int = 9,
) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    print(setting())
    print("\n| run | update, ms | row, ms | updates | rows | share of the run, % |\n|---|---|---|---|---|---|")
    for path, rung, overrides in RUNS:
        measure(path, rung, overrides, data_dir, rounds)


def measure(path: str, rung: str, overrides: list[str], data_dir: Path | None, rounds: int) -> None:
    recipe = load_recipe(path, overrides, rung=rung)
    with opened_trainer(recipe, data_dir) as trainer:
        updates, rows = trainer.regime.total_updates, len(trainer.logged_updates)
        trainer.evaluated_updates = set()
        bar = trainer.progress_bar(False)
        trainer.model.train()

        def update() -> None:
            trainer.set_rates(0)
            trainer.optimizer.zero_grad()
            trainer.add_gradients(0)
            trainer.clip_gradients(0)
            trainer.optimizer.step()
            trainer.count_update()

        def row() -> None:  # right after an update, whose gradients are still there
            grad_norm = torch.nn.utils.get_total_norm([p.grad for p in trainer.parameters])
            trainer.log(1, grad_norm, bar)

        times = interleave({"update": update, "row": row}, rounds)
    low, middle, high = quartiles(
        [
            100 * rows * row_seconds / (updates * update_seconds + rows * row_seconds)
            for row_seconds, update_seconds in zip(times["row"], times["update"], strict=True)
        ]
    )
    update_ms, row_ms = (1000 * quartiles(times[name])[1] for name in ("update", "row"))
    share = f"{middle:.3f} ({low:.3f}–{high:.3f})"
    print(f"| {recipe.name} | {update_ms:,.1f} | {row_ms:.2f} | {updates:,} | {rows} | {share} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
