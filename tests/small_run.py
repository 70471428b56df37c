"""A finished run made by hand, for the tests of what comes after training."""

from pathlib import Path

import timm
import torch

import gbnzoo  # noqa: F401
from gbnzoo.recipe import Recipe
from gbnzoo.run import Checkpoint, Run

NUM_SAMPLES, SCORED_SAMPLES, CLASS_NAMES = 40, 20, tuple(f"class {k}" for k in range(6))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ENVIRONMENT = {
    "hardware": "4 × a processor",
    "commit": "0123456789ab",
    "versions": {"gbnzoo": "0.1.0", "torch": "2.15.0"},
    "data": {
        "num_samples": NUM_SAMPLES,
        "scored_split": "test",
        "scored_samples": SCORED_SAMPLES,
        "class_names": list(CLASS_NAMES),
        "mean": list(MEAN),
        "std": list(STD),
        "input_size": [3, 8, 8],
    },
}


def small_recipe(**changes) -> Recipe:
    """On 40 images: 10 updates of 4 for sb and ra, 5 of 8 for the others."""
    return Recipe.model_validate(
        {
            "model": {"name": "resnet8_thin_gbn"},
            "data": {"name": "shapes"},
            "base": {"batch_size": 4, "epochs": 1, "lr": 0.1},
            "large": {"batch_size": 8, "ghost_batch_size": 4},
            "rung": "gbn",
            **changes,
        }
    )


def random_weights(recipe: Recipe) -> dict[str, torch.Tensor]:
    """Weights of the recipe's network, its running statistics away from where they begin."""
    generator = torch.Generator().manual_seed(recipe.seed)
    weights = timm.create_model(
        recipe.model.name, num_classes=len(CLASS_NAMES), in_chans=3, ghost_batch_size=4
    ).state_dict()
    for key, value in weights.items():
        if key.endswith(("running_mean", "running_var", "weight", "bias")):
            value.copy_(torch.rand(value.shape, generator=generator) + (-0.5 if value.ndim > 1 else 0.5))
    return weights


def finished_run(
    out: Path,
    *,
    top1_percent: float = 50.0,
    weights: dict[str, torch.Tensor] | None = None,
    finished: bool = True,
    **changes,
) -> Path:
    """A run's folder that ends with these weights (random ones by default) and this accuracy in its log."""
    recipe = small_recipe(**changes)
    run = Run.start(recipe, out, resume=False)
    run.record_environment(ENVIRONMENT)
    total = recipe.regime(NUM_SAMPLES).total_updates
    update = total if finished else total - 1
    run.save_checkpoint(Checkpoint(update, total, random_weights(recipe) if weights is None else weights))
    row = {"update": update, "samples": NUM_SAMPLES, "train_seconds": 1.25, "split": "test"}
    run.log(row | {"top1_percent": top1_percent, "top5_percent": 95.0, "eval_loss": 1.5})
    return run.folder
