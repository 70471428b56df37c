"""Runs with a log made by hand, for what draws and tells logs."""

from pathlib import Path

from small_run import ENVIRONMENT, NUM_SAMPLES, small_recipe

from gbnzoo.run import Run

UPDATES = (1, 2, 3, 4, 6, 8, 10, 13, 18, 24, 32, 42, 56, 75, 100, 133, 178, 237, 316, 422, 562, 750, 1000)
BASE = {"batch_size": 4, "epochs": 100, "lr": 0.1}  # sb makes 1000 updates of the 40 images


def logged_run(out: Path, distance, *, until: int | None = None, layers=(), base=BASE, **changes) -> Path:
    """A run whose weights are `distance(t)` away after t updates, logged at UPDATES and the last one.

    Args:
        until: the last update logged, where the run is not finished.
        layers: names, the k-th of which has gone k + 1 times as far as the network.
    """
    recipe = small_recipe(base=base, **changes)
    regime = recipe.regime(NUM_SAMPLES)
    run = Run.start(recipe, out, resume=False)
    run.record_environment(ENVIRONMENT)
    last = regime.total_updates if until is None else until
    for update in sorted({t for t in UPDATES if t < last} | {last}):
        scored = {"split": "test", "top1_percent": 90 - 50 / update, "top5_percent": 99.0, "eval_loss": 2 / update}
        run.log(
            {
                "update": update,
                "samples": update * regime.batch_size,
                "lr": regime.lr_at(update - 1),
                "train_loss": 2.5 / update**0.5,
                "grad_norm": 1.0,
                "weight_distance": distance(update),
                "train_seconds": round(update * 0.37, 2),
                **(scored if update % 2 == 0 else {}),
            },
            {name: (k + 1) * distance(update) for k, name in enumerate(layers)},
        )
    return run.folder
