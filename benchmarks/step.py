"""One training step: ours through `gbnzoo train`'s own trainer, the bare step, and BatchNorm as others train it.

    OMP_NUM_THREADS=1 python -m benchmarks.step --data-dir data

Every contender makes the same updates of one network at one batch size: forward, loss, backward, SGD with momentum. The others
have a ready batch of random numbers; only the trainer also draws, crops, flips and normalises its own, clips, logs a row and
looks out for signals. One thread, CPU time, in turns.
"""

import contextlib
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import timm
import torch
import typer
from timm.optim import create_optimizer_v2
from timm.utils import dispatch_clip_grad
from torch import nn

import gbnzoo
from benchmarks.timing import interleave, rate, ratio, setting
from gbnzoo.allocator import keep_freed_memory
from gbnzoo.fusion import fuse_ghost_batchnorm
from gbnzoo.recipe import load_recipe
from gbnzoo.trainer import Trainer, build_model, build_optimizer

RECIPES = {  # and the batch of one update
    "recipes/cifar10/resnet44_gbn.yaml": 128,
    "recipes/cifar100/wide_resnet16_4_gbn.yaml": 128,
    "recipes/mnist/mlp5_gbn.yaml": 4096,
}
UPDATES_A_ROW = 8  # of the log; a real run writes far fewer


def main(
    data_dir: Annotated[Path | None, typer.Option(help="folder with the sets; else GBNZOO_DATA, else the Hub")] = None,
    rounds: int = 7,
) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    print(setting())
    for path, batch_size in RECIPES.items():
        measure(path, batch_size, data_dir, rounds)


def measure(path: str, batch_size: int, data_dir: Path | None, rounds: int) -> None:
    overrides = [f"large.batch_size={batch_size}", "base.epochs=1000"]
    recipe = load_recipe(path, overrides, rung="gbn")
    with tempfile.TemporaryDirectory() as out, contextlib.ExitStack() as stack:
        trainer = Trainer(
            recipe,
            data_dir=data_dir,
            out=out,
            processes=1,
            micro_batch_size=batch_size,
            tracker=None,
            checkpoint_seconds=math.inf,
            timeout_seconds=600,
        )
        stack.enter_context(trainer.opened_run(resume=False))
        times = interleave(
            {
                "gbnzoo train": lambda: _trained(trainer),
                "bare step, ghost norm, bf16 channels_last": _bare_step(trainer, recipe.large.ghost_batch_size),
                "nn.BatchNorm, bf16 channels_last, timm's loop": _timm_loop(trainer, batch_size, torch.bfloat16),
                "nn.BatchNorm, fp32 NCHW, timm's loop": _timm_loop(trainer, batch_size, None),
            },
            rounds,
        )
    print(f"\n{recipe.model.name}, batch {batch_size}\n\n| step | images/s | time over the bare step |\n|---|---|---|")
    bare = list(times)[1]
    for name, seconds in times.items():
        print(f"| {name} | {rate(seconds, UPDATES_A_ROW * batch_size)} | {ratio(times, name, bare)} |", flush=True)


def _trained(trainer: Trainer) -> None:
    """What `gbnzoo.train.train` does in so many updates and for one row of the log."""
    trainer.model.train()
    done = trainer.first_update
    for update in range(done, done + UPDATES_A_ROW):
        trainer.set_rates(update)
        trainer.add_gradients(update)
        grad_norm = trainer.clip_gradients(update)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        trainer.count_update()
    trainer.first_update = done + UPDATES_A_ROW
    trainer.agree(trainer.first_update, False)
    trainer.log(trainer.first_update, grad_norm, bar=trainer.progress_bar(False))


def _bare_step(trainer: Trainer, ghost_batch_size: int) -> Callable[[], None]:
    model = fuse_ghost_batchnorm(build_model(trainer.recipe, trainer.train_set, ghost_batch_size))
    model.to(memory_format=torch.channels_last)
    optimizer = build_optimizer(trainer.recipe.optimizer, model)
    images, labels = _random_batch(trainer, torch.channels_last)

    def step() -> None:
        for _ in range(UPDATES_A_ROW):
            with torch.autocast("cpu", torch.bfloat16):
                loss = nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return step


def _timm_loop(trainer: Trainer, batch_size: int, amp_dtype: torch.dtype | None) -> Callable[[], None]:
    """The body of timm's train.py, `--channels-last --amp --amp-dtype bfloat16` where amp_dtype is given."""
    model = gbnzoo.revert_ghost_batchnorm(build_model(trainer.recipe, trainer.train_set, batch_size))
    memory_format = torch.channels_last if amp_dtype else torch.contiguous_format
    model.to(memory_format=memory_format)
    optimizer = create_optimizer_v2(model, opt="momentum", lr=0.1, weight_decay=1e-4, momentum=0.9)
    images, labels = _random_batch(trainer, memory_format)
    autocast = (lambda: torch.autocast("cpu", amp_dtype)) if amp_dtype else contextlib.nullcontext
    losses = timm.utils.AverageMeter()

    def step() -> None:
        model.train()
        for _ in range(UPDATES_A_ROW):
            with autocast():
                loss = nn.functional.cross_entropy(model(images), labels)
            losses.update(loss.item(), batch_size)
            loss.backward()
            dispatch_clip_grad(model.parameters(), value=5.0)
            optimizer.step()
            optimizer.zero_grad()

    return step


def _random_batch(trainer: Trainer, memory_format: torch.memory_format) -> tuple[torch.Tensor, torch.Tensor]:
    size = trainer.regime.batch_size
    images = torch.randn(size, *trainer.train_set.input_size).to(memory_format=memory_format)
    return images, torch.randint(len(trainer.train_set.class_names), (size,))


if __name__ == "__main__":
    typer.run(main)
