"""One training step: ours through `gbnzoo train`'s own trainer, the bare step, and BatchNorm as others train it.

    OMP_NUM_THREADS=1 python -m benchmarks.step --data-dir data

Every contender makes the same updates of one network at one batch size: forward, loss, backward, clipping, SGD with momentum.
The others have a ready batch of random numbers; only the trainer also draws, crops, flips and normalises its own, logs a row
and looks out for signals. The bare step does nothing that an update does not need; the one below it is as one writes it, with
images in float32, which autocast rounds, and torch's clipping, which also multiplies by 1. In turns; on a CPU one thread's CPU
time, on a GPU the clock's. The roofline is what convolutions and matrix products would take at the rate of a large product.
"""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import timm
import torch
import typer
from timm.optim import create_optimizer_v2
from timm.utils import dispatch_clip_grad
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import gbnzoo
from benchmarks.timing import interleave, rate, ratio, setting
from benchmarks.trainers import opened_trainer
from gbnzoo.allocator import keep_freed_memory
from gbnzoo.data import MicroBatch, MicroBatches
from gbnzoo.fusion import fuse_ghost_batchnorm
from gbnzoo.recipe import load_recipe
from gbnzoo.trainer import Trainer, build_model, build_optimizer, clip_gradients

RECIPES = [  # and the batch of one update
    ("recipes/cifar10/resnet44_gbn.yaml", 128),
    ("recipes/cifar100/wide_resnet16_4_gbn.yaml", 128),
    ("recipes/mnist/mlp5_gbn.yaml", 4096),
]
RECIPES_ON_GPU = [
    ("recipes/cifar10/resnet44_gbn.yaml", 128),
    ("recipes/cifar10/resnet44_gbn.yaml", 4096),
    ("recipes/cifar10/cifar_resnet18_gbn.yaml", 4096),
    ("recipes/cifar100/wide_resnet16_4_gbn.yaml", 4096),
]
UPDATES_A_ROW = 16  # of the log; the shortest run of the paper's, F1's, writes one every 18


def main(
    data_dir: Annotated[Path | None, typer.Option(help="folder with the sets; else GBNZOO_DATA, else the Hub")] = None,
    recipes: Annotated[str, typer.Option(help="such as PATH:128,PATH:4096; else those of the tables")] = "",
    rounds: int = 7,
    inductor: Annotated[
        bool, typer.Option("--inductor", help="timm's loop with --torchcompile too, on a GPU; takes minutes")
    ] = False,
) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    on_gpu = torch.cuda.is_available()
    print(torch.cuda.get_device_name() + "; " + setting() if on_gpu else setting())
    chosen = RECIPES_ON_GPU if on_gpu else RECIPES
    if recipes:
        chosen = [(path, int(size)) for path, _, size in (each.rpartition(":") for each in recipes.split(","))]
    for path, batch_size in chosen:
        measure(path, batch_size, data_dir, rounds, inductor)


def measure(path: str, batch_size: int, data_dir: Path | None, rounds: int, inductor: bool) -> None:
    overrides = [f"large.batch_size={batch_size}", "base.epochs=1000"]
    recipe = load_recipe(path, overrides, rung="gbn")
    with contextlib.ExitStack() as stack:

        def opened(cuda_graphs: bool) -> Trainer:
            return stack.enter_context(
                opened_trainer(recipe, data_dir, micro_batch_size=batch_size, cuda_graphs=cuda_graphs)
            )

        trainer = opened(cuda_graphs=True)
        bare_step = _bare_step(trainer, recipe.large.ghost_batch_size, is_bare=True)
        contenders = {
            "gbnzoo train": _trained(trainer),
            "bare step, ghost norm, bf16 channels_last": bare_step,
            "the same, images in float32": _bare_step(trainer, recipe.large.ghost_batch_size, is_bare=False),
            "nn.BatchNorm, bf16 channels_last, timm's loop": _timm_loop(trainer, batch_size, torch.bfloat16),
            "nn.BatchNorm, fp32 NCHW, timm's loop": _timm_loop(trainer, batch_size, None),
        }
        clock = time.process_time
        if trainer.device.type == "cuda":
            contenders["gbnzoo train --no-cuda-graphs"] = _trained(opened(cuda_graphs=False))
            if inductor:
                contenders["nn.BatchNorm, bf16 channels_last, timm's loop, --torchcompile"] = _timm_loop(
                    trainer, batch_size, torch.bfloat16, compiled=True
                )

            def clock() -> float:
                torch.cuda.synchronize()
                return time.perf_counter()

        with FlopCounterMode(display=False) as counter:
            bare_step()
        product = torch.ones(2048, 2048, dtype=torch.bfloat16, device=trainer.device)
        contenders["product"] = lambda: product @ product
        images = trainer.micro_batches = _TimedImages(trainer.micro_batches)
        times = interleave(contenders, rounds, clock=clock)
    print(f"\n{recipe.model.name}, batch {batch_size}\n\n| step | images/s | time over the bare step |\n|---|---|---|")
    trained, bare, *_ = times
    peak = 2 * 2048**3 / statistics.median(times.pop("product"))
    for name, seconds in times.items():
        print(f"| {name} | {rate(seconds, UPDATES_A_ROW * batch_size)} | {ratio(times, name, bare)} |", flush=True)
    roofline = counter.get_total_flops() / peak / UPDATES_A_ROW
    share = roofline * UPDATES_A_ROW / statistics.median(times[bare])
    print(
        f"\nroofline: {1e3 * roofline:.2f} ms an update at {peak / 1e9:,.0f} GFLOP/s, {share:.0%} of the bare step's time"
    )
    if trainer.device.type == "cuda":
        return  # there the host does not wait for them
    milliseconds = statistics.median(images.milliseconds)
    share = milliseconds * UPDATES_A_ROW / 1e3 / statistics.median(times[trained])
    print(f"images: {milliseconds:.2f} ms an update, {share:.1%} of gbnzoo train's time")


def _trained(trainer: Trainer) -> Callable[[], None]:
    """What `gbnzoo.train.train` does in so many updates and for one row of the log."""

    def train() -> None:
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

    return train


class _TimedImages:
    """A trainer's images, and the CPU time that each update waited for them."""

    def __init__(self, micro_batches: MicroBatches):
        self.inner, self.milliseconds = micro_batches, []

    def at(self, update: int) -> Iterator[MicroBatch]:
        batches, seconds = iter(self.inner.at(update)), 0.0
        while True:
            began = time.process_time()
            batch = next(batches, None)
            seconds += time.process_time() - began
            if batch is None:
                break
            yield batch
        self.milliseconds.append(1e3 * seconds)


def _bare_step(trainer: Trainer, ghost_batch_size: int, *, is_bare: bool) -> Callable[[], None]:
    model = fuse_ghost_batchnorm(build_model(trainer.recipe, trainer.train_set, ghost_batch_size))
    model.to(trainer.device, memory_format=torch.channels_last)
    optimizer = build_optimizer(trainer.recipe.optimizer, model)
    images, labels = _random_batch(trainer, torch.channels_last)
    if is_bare:
        images = images.bfloat16()
    parameters, limit = list(model.parameters()), trainer.regime.clip_grad_norm
    clip = clip_gradients if is_bare else nn.utils.clip_grad_norm_

    def step() -> None:
        for _ in range(UPDATES_A_ROW):
            with torch.autocast(trainer.device.type, torch.bfloat16):
                loss = nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            if limit:
                clip(parameters, limit)
            optimizer.step()
            optimizer.zero_grad()

    return step


def _timm_loop(
    trainer: Trainer, batch_size: int, amp_dtype: torch.dtype | None, *, compiled: bool = False
) -> Callable[[], None]:
    """The body of timm's train.py, `--channels-last --amp --amp-dtype bfloat16` where amp_dtype is given."""
    model = gbnzoo.revert_ghost_batchnorm(build_model(trainer.recipe, trainer.train_set, batch_size))
    memory_format = torch.channels_last if amp_dtype else torch.contiguous_format
    model.to(trainer.device, memory_format=memory_format)
    optimizer = create_optimizer_v2(model, opt="momentum", lr=0.1, weight_decay=1e-4, momentum=0.9)
    images, labels = _random_batch(trainer, memory_format)
    if compiled:
        model = torch.compile(model)
    autocast = (lambda: torch.autocast(trainer.device.type, amp_dtype)) if amp_dtype else contextlib.nullcontext
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
    images = torch.randn(size, *trainer.train_set.input_size, device=trainer.device).to(memory_format=memory_format)
    return images, torch.randint(len(trainer.train_set.class_names), (size,), device=trainer.device)


if __name__ == "__main__":
    typer.run(main)
