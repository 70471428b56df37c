"""One process's share of a run: what `gbnzoo.train` does at each update, and what it needs for that.

Only the first process reads and writes the run's folder; the others get from it what they need.
"""

import contextlib
import difflib
import importlib.util
import logging
import math
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import torch
from timm.loss import BinaryCrossEntropy
from timm.optim import create_optimizer_v2, list_optimizers
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import gbnzoo.models
from gbnzoo import tuning
from gbnzoo.data import (
    AUGMENTATIONS,
    GlobalBatches,
    ImageSet,
    find_spec,
    keyed_bits,
    keyed_normal,
    load_images,
    scored_split,
    with_random_labels,
)
from gbnzoo.fusion import fuse_ghost_batchnorm
from gbnzoo.graphs import GraphedPass
from gbnzoo.image_files import ImageFiles, open_images
from gbnzoo.launch import connect, on_first_process
from gbnzoo.metrics import Metrics, evaluate
from gbnzoo.norm import gathered_running_statistics, recalibrate, shard_running_statistics, span_processes
from gbnzoo.recipe import Optimizer, Recipe
from gbnzoo.run import Checkpoint, Run, RunError

TRACKERS = ("tensorboard", "trackio", "wandb")
EVALUATION_BATCH_SIZE = 256
POLL_SECONDS = 1.0
_FUSED_OPTIMIZERS = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
_UNFIT_OPTIMIZERS = {  # by how their names begin
    "adahessian": "needs second derivatives, which training does not take",
    "kron": "keeps lists of tensors for each parameter, which checkpoints do not hold",
}


class DivergedError(RunError):
    """The loss or a weight is no longer a finite number."""


class Trainer:
    """The parts of a run on one process, and what is done with them at each update; raises what `gbnzoo.train.train` does."""

    def __init__(
        self,
        recipe: Recipe,
        *,
        data_dir: str | Path | None,
        out: str | Path,
        processes: int | None,
        micro_batch_size: int | None,
        tracker: str | None,
        checkpoint_seconds: float,
        timeout_seconds: float,
        compile_backend: str | None = None,
        cuda_graphs: bool = True,
    ):
        check_recipe(recipe)
        self.recipe, self.folder = recipe, Path(out) / recipe.run_name
        self.checkpoint_seconds = checkpoint_seconds
        self.accelerator = connect(
            processes,
            timeout_seconds,
            mixed_precision="bf16" if recipe.precision == "bf16" else "no",
            log_with=_installed(tracker),
            project_dir=self.folder,
        )
        self.device, self.rank = self.accelerator.device, self.accelerator.process_index
        self.world_size = self.accelerator.num_processes

        self.dtype = dtype = torch.float64 if recipe.precision == "fp64" else torch.float32
        self.train_set, self.scored_set = (images.to(self.device) for images in load_sets(recipe, data_dir))
        self.regime = regime = recipe.regime(len(self.train_set))
        self.noise_kind = recipe.gradient_noise.kind if regime.gradient_noise_sigma else None
        self.bare_model = fuse_ghost_batchnorm(build_model(recipe, self.train_set, regime.ghost_batch_size))
        self.bare_model.to(self.device, dtype, memory_format=torch.channels_last)
        if micro_batch_size is None:
            micro_batch_size = on_first_process(self._choose_micro_batch)
        self.layout = tuning.layout_by_rule(regime, self.world_size, self.device, micro_batch_size)
        self.positions = [
            torch.tensor([position for ghost in ghosts for position in ghost])
            for ghosts in self.layout.micro_batches(self.rank)
        ]
        order = GlobalBatches(len(self.train_set), regime.batch_size, recipe.seed)
        # What autocast rounds first, the input of a convolution or linear layer, is made so.
        image_dtype = torch.bfloat16 if recipe.precision == "bf16" else dtype
        self.micro_batches = self.train_set.micro_batches(order, self.positions, recipe.data.augment, image_dtype)
        total, evaluations = regime.total_updates, recipe.evaluations
        self.evaluated_updates = {round(total * (i + 1) / evaluations) for i in range(evaluations)} - {0}
        self.logged_updates = self.evaluated_updates | _log_spaced(total)

        self.parameters = list(self.bare_model.parameters())
        self.optimizer = build_optimizer(recipe.optimizer, self.bare_model, self.regime.highest_lr)
        if self.layout.processes_per_ghost > 1:
            group, _ = torch.distributed.new_subgroups(
                self.layout.processes_per_ghost, timeout=timedelta(seconds=timeout_seconds)
            )
            span_processes(self.bare_model, group)
        self.compile_backend = compile_backend
        if compile_backend:
            compile_training(self.bare_model, compile_backend)
        # torch.manual_seed would reach for a GPU on CPUs too, which takes as long as a hundred small operations.
        self.seed_dropout = torch.default_generator.manual_seed if self.device.type == "cpu" else torch.manual_seed
        self.graphed_pass = None
        if cuda_graphs and self.device.type == "cuda" and self.world_size == 1:
            self.graphed_pass = GraphedPass(self.parameters, accumulates=len(self.positions) > 1)

    def _choose_micro_batch(self) -> int:
        """That of the run's last start on this machine, or the fastest where to measure pays, or the rule's."""
        regime, train_set = self.regime, self.train_set
        layout = tuning.layout_by_rule(regime, self.world_size, self.device)
        with contextlib.suppress(RunError, LookupError, ValueError):
            start = Run(self.folder).environments()[-1]
            if (start["processes"], start["hardware"]) == (self.world_size, tuning.device_name(self.device)):
                return tuning.layout_by_rule(
                    regime, self.world_size, self.device, start["micro_batch_size"]
                ).micro_batch_size
        setting = tuning.setting_of(
            self.recipe, layout, train_set.input_size, len(train_set.class_names), self.device, torch.get_num_threads()
        )
        samples = regime.samples_seen // self.world_size
        max_seconds = tuning.measuring_seconds(self.bare_model, setting, samples) if setting else 0.0
        if not max_seconds:
            return layout.micro_batch_size
        is_alone_on_cpu = self.world_size == 1 and self.device.type == "cpu"
        if is_alone_on_cpu and (advice := tuning.advice_on_threads(torch.get_num_threads())):
            logging.getLogger(__name__).warning(advice)

        def measure() -> dict[int, float]:
            time_pass = tuning.training_pass(self.bare_model, setting)
            return tuning.time_sizes(setting.sizes, time_pass, max_seconds)

        return tuning.fastest_micro_batch(setting, layout.micro_batch_size, measure)

    @contextlib.contextmanager
    def opened_run(self, resume: bool) -> Iterator[None]:
        """Start the run, or go on with it; while this lasts no other process can."""
        with contextlib.ExitStack() as held:
            self._begin(on_first_process(lambda: self._open_folder(resume, held)))
            for tracker in self.accelerator.trackers:
                held.callback(tracker.finish)  # what they hold back they write then, also when a run is stopped
            yield

    def _open_folder(self, resume: bool, held: contextlib.ExitStack) -> Checkpoint | None:
        """What is on the disk, as of the last checkpoint; nothing is written before everything was found to fit together."""
        self.run = Run.start(self.recipe, self.folder.parent, resume=resume)
        held.enter_context(self.run.sole_writer())
        checkpoint = self.run.latest_checkpoint()
        first_update = checkpoint.update if checkpoint else 0
        if not (checkpoint and self.run.has_initial):
            self.run.save_initial(self.bare_model.state_dict())
        if first_update < self.regime.total_updates:
            self.run.rewind_log(first_update)
            self.run.record_environment(self._environment(first_update))
        initial = self.run.initial_weights()
        names = [name for name, _ in self.bare_model.named_parameters()]
        self.initial = [initial[name].to(self.device) for name in names]
        self.layers = [name.rpartition(".")[0] for name in names]  # of the module that owns each
        return checkpoint

    def _begin(self, checkpoint: Checkpoint | None) -> None:
        """Put model, optimizer and counts where the checkpoint has them, or at the start."""
        progress = {"loss_sum": 0.0, "row_updates": 0, "row_seconds": 0.0, "train_seconds": 0.0}
        self.first_update = 0
        if checkpoint:
            self.bare_model.load_state_dict(checkpoint.model)
            load_optimizer_state(self.optimizer, checkpoint.optimizer, checkpoint.update)
            self.first_update, progress = checkpoint.update, checkpoint.progress
        shard_running_statistics(self.bare_model, self.rank // self.layout.processes_per_ghost, self.layout.groups)
        # They are merged by hand, exactly, where they are read; DistributedDataParallel would send them around at each forward.
        buffers = [name for name, _ in self.bare_model.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self.bare_model, buffers)
        self.model, self.optimizer = self.accelerator.prepare(self.bare_model, self.optimizer)
        # In trackio and wandb runs are told apart by name; tensorboard's lie in the run's folder.
        name = {"name": self.recipe.run_name}
        self.accelerator.init_trackers(
            "gbnzoo",
            config={"recipe": self.recipe.run_name},
            init_kwargs={"trackio": name, "wandb": name | {"dir": str(self.folder)}},
        )

        self.first_bad_update = torch.tensor(self.regime.total_updates, device=self.device)
        # Kept as this process's part; the first carries on what a checkpoint summed up.
        loss_sum = progress["loss_sum"] if self.rank == 0 else 0.0
        self.loss_sum = torch.tensor(loss_sum, dtype=torch.float64, device=self.device)
        self.row_updates = int(progress["row_updates"])
        self._clock_zero = time.perf_counter() - progress["train_seconds"]
        self.row_began = progress["train_seconds"] - progress["row_seconds"]
        self.saved_update = self.polled_update = self.first_update
        self.saved_at = self.polled_at = time.perf_counter()
        self.next_poll = self.first_update + 1

    @property
    def train_seconds(self) -> float:
        """Seconds since the run's start, stretches before a resume included."""
        return time.perf_counter() - self._clock_zero

    def set_rates(self, update: int) -> None:
        """The optimizer's rate, weight decay and gathered momentum, as an update begins with them."""
        if self.recipe.optimizer.reset_momentum_each_epoch and self.regime.begins_epoch(update):
            for state in self.optimizer.state.values():
                if (momentum := state.get("momentum_buffer")) is not None:
                    momentum.zero_()
        # Accelerate steps a prepared scheduler once per process, so the rate is set here.
        for group in self.optimizer.param_groups:
            group["lr"] = self.regime.lr_at(update)
            if update >= self.regime.weight_decay_updates:
                group["weight_decay"] = 0.0

    def add_gradients(self, update: int) -> None:
        """Leave the gradient of the global batch's mean loss on the parameters of every process."""
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        for step, batch in enumerate(self.micro_batches.at(update)):
            # Dropout has no key per sample: it is fixed by seed and update, and by where the layout cuts the batch.
            self.seed_dropout(hash((self.recipe.seed, update, int(self.positions[step][0]))))
            is_last = step == len(self.positions) - 1
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(self.model):
                noise = None
                if self.noise_kind == "multiplicative":
                    noise = keyed_normal(self.recipe.seed, "gradient_noise", batch.epochs, batch.indices)
                    noise = noise.to(self.device, self.dtype, non_blocking=True)
                inputs = batch.images, batch.labels, noise
                loss += self.graphed_pass(self.train_pass, *inputs) if self.graphed_pass else self.train_pass(*inputs)
        self.loss_sum += loss
        self.first_bad_update.clamp_(max=torch.where(loss.isfinite(), self.regime.total_updates, update))

    def train_pass(self, images: Tensor, labels: Tensor, noise: Tensor | None) -> Tensor:
        """Add a micro-batch's part of the gradient; returns its part of the loss."""
        losses = sample_losses(self.recipe, self.model(images), labels)
        loss = losses.detach().sum(dtype=torch.float64) / self.regime.batch_size
        if noise is not None:
            losses = losses * (1 + self.regime.gradient_noise_sigma * noise)
        # Data parallelism averages over processes; times their number, that is the mean over the global batch.
        self.accelerator.backward(losses.sum() * (self.world_size / self.regime.batch_size))
        return loss

    def clip_gradients(self, update: int) -> Tensor | None:
        """Clip, and return the gradient's norm before clipping where it was needed."""
        if self.regime.clip_grad_norm:
            return clip_gradients(self.parameters, self.regime.clip_grad_norm)
        if update + 1 in self.logged_updates:
            return nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        return None

    def add_isotropic_noise(self, update: int) -> None:
        """Add the recipe's noise to the gradient, the same on every process, and none where the recipe has none."""
        if self.noise_kind != "isotropic":
            return
        # Drawn on the CPU, whose generator gives the same numbers whatever the device, and in order of the parameters.
        key = keyed_bits(self.recipe.seed, "isotropic_noise", 0, torch.tensor([update]))
        generator = torch.Generator().manual_seed(int(key))
        for parameter in self.parameters:
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            if parameter.grad is not None:
                parameter.grad.add_(noise.to(self.device, non_blocking=True), alpha=self.regime.gradient_noise_sigma)

    def count_update(self) -> None:
        self.row_updates += 1

    def agree(self, done: int, is_asked_to_stop: bool) -> tuple[bool, bool]:
        """Whether to save, which the first process decides, and whether to stop, for which one that is asked to suffices.

        To ask each other makes processes wait, and GPUs: they also agree on when they do so next, in about POLL_SECONDS.

        Raises:
            DivergedError: on all of them, if the loss has not been finite on any.
        """
        now = time.perf_counter()
        seconds_per_update = (now - self.polled_at) / (done - self.polled_update)
        wait_updates = max(1, int(min(POLL_SECONDS, self.checkpoint_seconds) / seconds_per_update))
        save_is_due = now - self.saved_at > self.checkpoint_seconds
        answers = self.first_bad_update.new_tensor((save_is_due, is_asked_to_stop, wait_updates))
        status = self.accelerator.gather(torch.cat((self.first_bad_update[None], answers))[None])
        bad_updates, saves, stops, waits = status.T.tolist()
        self.polled_at, self.polled_update, self.next_poll = now, done, done + waits[0]
        if min(bad_updates) < self.regime.total_updates:
            raise self._diverged("the loss", min(bad_updates))
        return bool(saves[0]), any(stops)

    def log(self, done: int, grad_norm: Tensor, bar: tqdm) -> None:
        """Write a row of the log; where an evaluation is due, evaluate.

        Rows are so few that all together, without the evaluations, take under 1 % of a run of a hundred updates or more:
        0.18 % of one of F1 and 0.003 % of one of ResNet-20 (benchmarks/README.md).
        """
        images_per_second = self.row_updates * self.regime.batch_size / (self.train_seconds - self.row_began)
        distances, layers = on_first_process(self._weight_distances)
        row = {
            "update": done,
            "samples": done * self.regime.batch_size,
            "lr": self.regime.lr_at(done - 1),
            "train_loss": self._over_processes(self.loss_sum).item() / self.row_updates,
            "grad_norm": grad_norm.item(),
            **distances,
            "images_per_second": round(images_per_second, 1),
            "peak_memory_mib": self._peak_memory_mib(),
        }
        if done in self.evaluated_updates:
            metrics = self.evaluate()
            row |= {
                "split": self.scored_set.split,
                "top1_percent": metrics.top1_percent,
                "top5_percent": metrics.top5_percent,
                "eval_loss": metrics.loss,
            }
            self.shown["top-1"] = f"{metrics.top1_percent:.2f} %"
            if bar.disable and self.show_lines:
                print(
                    f"{self.recipe.run_name}: update {done}/{self.regime.total_updates}, loss {row['train_loss']:.4f},"
                    f" top-1 {metrics.top1_percent:.2f} %, {images_per_second:.0f} images/s",
                    flush=True,
                )
        bar.set_postfix({"loss": f"{row['train_loss']:.3f}"} | self.shown)
        row["train_seconds"] = round(self.train_seconds, 2)
        on_first_process(lambda: self.run.log(row, layers))
        scalars = row | {f"weight_distance/{layer or 'network'}": distance for layer, distance in layers.items()}
        self.accelerator.log({k: v for k, v in scalars.items() if k != "split"}, step=done)
        self.loss_sum.zero_()
        self.row_updates, self.row_began = 0, self.train_seconds

    def recalibrate(self) -> None:
        """Put in place of the running averages the statistics of one pass over the training set, in its first order."""
        updates = range(max(1, len(self.train_set) // self.regime.batch_size))
        recalibrate(self.bare_model, (batch.images for update in updates for batch in self.micro_batches.at(update)))

    def evaluate(self) -> Metrics:
        """Score the model as it stands, each sample counted once whatever the number of processes."""
        with gathered_running_statistics(self.bare_model, self._sum_over_groups):
            shares = self.scored_set.batches(EVALUATION_BATCH_SIZE, self.dtype, self.rank, self.world_size)
            return evaluate(self.bare_model, shares, reduce=self._over_processes)

    def save(self, done: int) -> None:
        """Write a checkpoint.

        Raises:
            DivergedError: if a weight is not finite; a checkpoint of it would be worthless.
            RunError: on all processes, if the first cannot write it.
        """
        if not all(p.isfinite().all() for p in self.parameters):
            raise self._diverged("a weight", done - 1)
        progress = {
            "loss_sum": self._over_processes(self.loss_sum).item(),
            "row_updates": self.row_updates,
            "row_seconds": self.train_seconds - self.row_began,
            "train_seconds": self.train_seconds,
        }
        with gathered_running_statistics(self.bare_model, self._sum_over_groups):
            on_first_process(
                lambda: self.run.save_checkpoint(
                    Checkpoint(
                        done,
                        self.regime.total_updates,
                        self.bare_model.state_dict(),
                        self.optimizer.state_dict()["state"],
                        progress,
                    )
                )
            )
        self.saved_update, self.saved_at = done, time.perf_counter()

    def progress_bar(self, show: bool) -> tqdm:
        """Updates done, time left, images/s, loss and top-1 as last logged; on a terminal, and of the first process alone."""
        self.show_lines = show and self.accelerator.is_main_process
        scored = [row for row in self.run.rows() if row["top1_percent"]] if self.show_lines else []
        # What stays in the bar from one row of the log to the next.
        self.shown = {"top-1": f"{float(scored[-1]['top1_percent']):.2f} %"} if scored else {}
        return _Bar(
            batch_size=self.regime.batch_size,
            desc=self.recipe.run_name,
            initial=self.first_update,
            total=self.regime.total_updates,
            unit="update",
            dynamic_ncols=True,
            disable=None if self.show_lines else True,  # None: where the output is not a terminal
        )

    def _over_processes(self, value: Tensor) -> Tensor:
        return self.accelerator.reduce(value) if self.world_size > 1 else value

    def _sum_over_groups(self, value: Tensor) -> None:
        # Those that share ghosts hold the same statistics; the first of them speaks for all.
        if self.rank % self.layout.processes_per_ghost:
            value.zero_()
        torch.distributed.all_reduce(value)

    @torch.no_grad()
    def _weight_distances(self) -> tuple[dict[str, float], dict[str, float]]:
        """‖w_t − w_0‖ by column of log.csv, and by layer."""
        norms = [
            torch.linalg.vector_norm(p - w, dtype=torch.float64)
            for p, w in zip(self.parameters, self.initial, strict=True)
        ]
        squares = torch.stack(norms).square().tolist()
        layers: dict[str, float] = {}
        for layer, square in zip(self.layers, squares, strict=True):
            layers[layer] = layers.get(layer, 0.0) + square
        columns = {"weight_distance": sum(squares), "weight_distance_first": squares[0]}
        return tuple({name: math.sqrt(square) for name, square in part.items()} for part in (columns, layers))

    def _peak_memory_mib(self) -> int:
        """Of the process that has taken most since it began: resident on a CPU, allocated on CUDA."""
        if self.device.type == "cuda":
            num_bytes = torch.cuda.max_memory_allocated(self.device)
        else:
            unit = 1 if sys.platform == "darwin" else 1024
            num_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        taken = self.accelerator.gather(torch.tensor([num_bytes], device=self.device))
        return round(taken.max().item() / 2**20)

    def _diverged(self, what: str, update: int) -> DivergedError:
        kept = f"checkpoint of update {self.saved_update}" if self.saved_update else "no checkpoint yet"
        return DivergedError(
            f"{self.folder}: {what} is not finite after update {update} at learning rate {self.regime.lr_at(update):g};"
            f" last good: {kept}. A lower base.lr, base.warmup_epochs or optimizer.clip_grad_norm is what usually helps"
        )

    def _environment(self, first_update: int) -> dict[str, Any]:
        """What env.json holds of one start of the run."""
        layout, train_set = self.layout, self.train_set
        return {
            "first_update": first_update,
            "total_updates": self.regime.total_updates,
            "processes": layout.processes,
            "accumulation": layout.accumulation,
            "micro_batch_size": layout.micro_batch_size,
            "processes_per_ghost": layout.processes_per_ghost,
            "threads": torch.get_num_threads(),
            "compile_backend": self.compile_backend,
            "cuda_graphs": self.graphed_pass is not None,
            "hardware": tuning.device_name(self.device),
            "commit": _commit(),
            "versions": {
                "gbnzoo": gbnzoo.__version__,
                "python": platform.python_version(),
                **{name: version(name) for name in ("torch", "timm", "accelerate")},
            },
            "data": {
                "num_samples": len(train_set),
                "scored_split": self.scored_set.split,
                "scored_samples": len(self.scored_set),
                "class_names": list(train_set.class_names),
                "mean": list(train_set.mean),
                "std": list(train_set.std),
                "input_size": list(self.scored_set.input_size),
                **(
                    how.model_dump(include={"crop_pct", "interpolation"}) if (how := self.recipe.data.transform) else {}
                ),
            },
        }


class _Bar(tqdm):
    """tqdm, which counts updates, with the rate in images/s too."""

    def __init__(self, *, batch_size: int, **options: Any):
        self.batch_size = batch_size
        form = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {images_per_second}{postfix}]"
        super().__init__(bar_format=form, **options)

    @property
    def format_dict(self) -> dict[str, Any]:
        known = super().format_dict
        seconds = known["elapsed"]
        # tqdm averages over its last refreshes; where it has had none, over all there were.
        rate = known["rate"] or ((self.n - self.initial) / seconds if seconds else None)
        images = "?" if rate is None else f"{rate * self.batch_size:,.0f}"
        return known | {"images_per_second": f"{images} images/s"}


def load_sets(recipe: Recipe, data_dir: str | Path | None) -> tuple[ImageSet | ImageFiles, ImageSet | ImageFiles]:
    """The training images, and those the recipe is scored on: the held-out ones, or the split that the set has for it.

    Where the recipe wants random labels, the training images have them.

    Raises:
        RecipeError: if the data are not such as the recipe wants them.
        OSError: if they are not to be had.
    """
    data = recipe.data
    splits = "train", "validation" if data.holdout else data.scored_split or scored_split(data.name)
    try:
        if data.transform:
            train_set, scored_set = (open_images(data, split, data_dir=data_dir) for split in splits)
        else:
            train_set, scored_set = (load_images(data.name, s, data_dir=data_dir, **data.in_memory) for s in splits)
    except ValueError as error:
        raise recipe.error(error) from error
    if data.random_labels:
        classes = len(train_set.class_names)
        labels = with_random_labels(train_set.labels, classes, data.random_labels, recipe.seed)
        train_set = replace(train_set, labels=labels)
    return train_set, scored_set


def known_shape(recipe: Recipe) -> tuple[tuple[int, int, int], int] | None:
    """Input size (channels, height, width) and number of classes, without the data; None where only they can tell."""
    data = recipe.data
    try:
        _, spec = find_spec(data.name, None, {"image_size": data.image_size, "num_classes": data.num_classes})
    except ValueError:
        return None
    if not (spec.image_size and spec.num_classes):
        return None
    return (len(spec.mean), spec.image_size, spec.image_size), spec.num_classes


def sketched_model(recipe: Recipe, input_size: tuple[int, int, int], num_classes: int) -> nn.Module | None:
    """The recipe's network on torch's "meta" device, so in no time; None where it cannot be built there."""
    with contextlib.suppress(RuntimeError), torch.device("meta"):
        return _create(
            recipe,
            num_classes=num_classes,
            in_chans=input_size[0],
            ghost_batch_size=recipe.large.ghost_batch_size,
            pretrained_cfg_overlay={"input_size": input_size},
        )
    return None


def check_recipe(recipe: Recipe) -> None:
    """Refuse what training would refuse, before it needs data or memory.

    Raises:
        RecipeError: if network, optimizer or augmentation are not known, or refuse their arguments.
    """
    data, settings = recipe.data, recipe.optimizer
    if data.augment not in AUGMENTATIONS:
        raise recipe.error(f"data.augment: given {data.augment!r}, wanted one of {', '.join(AUGMENTATIONS)}")
    # A network may not be built without memory, and is then judged when it is built for training.
    with contextlib.suppress(RuntimeError), torch.device("meta"):
        _create(recipe, ghost_batch_size=recipe.large.ghost_batch_size)
    for name, reason in _UNFIT_OPTIMIZERS.items():
        if settings.name.removeprefix("lookahead_").startswith(name):
            raise recipe.error(f"optimizer.name: given {settings.name!r}, which {reason}; wanted another")
    try:
        build_optimizer(settings, nn.Linear(1, 1), recipe.base.lr)
    except ValueError as error:
        if "not found in registry" not in str(error):
            raise recipe.error(f"optimizer: {settings.name} refuses what is given: {error}") from error
        close = difflib.get_close_matches(settings.name, list_optimizers(), n=1)
        hint = f"did you mean {close[0]}?" if close else "timm.optim.list_optimizers() has the names"
        raise recipe.error(f"optimizer.name: given {settings.name!r}, which timm does not know; {hint}") from None
    except (TypeError, AssertionError, RuntimeError) as error:
        raise recipe.error(
            f"optimizer.args: given {settings.args}, which {settings.name} refuses: {error}; wanted arguments that it takes"
        ) from error


def sample_losses(recipe: Recipe, logits: Tensor, labels: Tensor) -> Tensor:
    """The recipe's loss of each sample, [B].

    Args:
        logits: [B, classes].
        labels: int64 [B], or shares of the classes [B, classes].
    """
    if not recipe.bce:
        return nn.functional.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing, reduction="none")
    if labels.dim() == 1:
        labels = nn.functional.one_hot(labels, logits.shape[1]).to(logits)
    labels = labels * (1 - recipe.label_smoothing) + recipe.label_smoothing / logits.shape[1]
    loss = BinaryCrossEntropy(smoothing=0, target_threshold=recipe.bce.threshold, reduction="none")
    return loss(logits, labels.to(logits)).mean(1)


def build_model(recipe: Recipe, train_set: ImageSet | ImageFiles, ghost_batch_size: int) -> nn.Module:
    """The recipe's network for the data, its initial weights a function of the seed alone, so that rungs share them.

    Raises:
        RecipeError: if timm knows no such architecture, or its entry point refuses the arguments.
    """
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        return _create(
            recipe,
            num_classes=len(train_set.class_names),
            in_chans=train_set.input_size[0],
            ghost_batch_size=ghost_batch_size,
            pretrained_cfg_overlay={"input_size": train_set.input_size, "mean": train_set.mean, "std": train_set.std},
        )


def _create(recipe: Recipe, **options: Any) -> nn.Module:
    name, args = recipe.model.name, recipe.model.args
    if not timm.is_model(name):
        raise recipe.error(f"model.name: given {name!r}, no architecture that timm or gbnzoo knows; {_alike(name)}")
    try:
        return timm.create_model(name, **options, **args)
    except (TypeError, ValueError, AssertionError) as error:
        if "unexpected keyword argument 'ghost_batch_size'" in str(error):
            raise recipe.error(f"model.name: given {name!r}, which takes no ghost_batch_size; {_alike(name)}") from None
        what = f"model.args: given {args}" if args else f"model.name: given {name!r}"
        raise recipe.error(f"{what}, which the entry point of {name} refuses: {error}; wanted what it takes") from error


def _alike(name: str) -> str:
    """A hint at the ghost network that was meant."""
    known = timm.list_models("*_gbn")
    close = [f"{name}_gbn"] if f"{name}_gbn" in known else difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    return f"did you mean {close[0]}?" if close else "wanted one of timm.list_models('*_gbn')"


def compile_training(model: nn.Module, backend: str) -> None:
    """Have torch.compile do the forward pass of training, in place; state dict, hooks and evaluation stay what they are."""
    eager = model.forward
    compiled = torch.compile(eager, backend=backend)
    model.forward = lambda *args, **kwargs: (compiled if model.training else eager)(*args, **kwargs)


def clip_gradients(parameters: Sequence[nn.Parameter], limit: float) -> Tensor:
    """As `nn.utils.clip_grad_norm_`, to the bit, which multiplies by 1 where the norm is below the limit.

    To know that it is, the host would have to wait for a GPU, so there it does so too.
    """
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if not (norm.device.type == "cpu" and norm + 1e-6 <= limit):  # a NaN is clipped
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm


def build_optimizer(settings: Optimizer, model: nn.Module, lr: float = 0.0) -> torch.optim.Optimizer:
    """One of timm's optimizers, in one pass over the parameters where torch has that.

    Its rate is set at each update; `lr` is the highest of them, which some optimizers remember.
    """
    # timm calls SGD with Nesterov's momentum "sgd", and without it "momentum".
    name = "momentum" if settings.name == "sgd" and not settings.nesterov else settings.name

    def build(**more: bool) -> torch.optim.Optimizer:
        return create_optimizer_v2(
            model,
            opt=name,
            lr=lr,
            weight_decay=settings.weight_decay,
            momentum=settings.momentum,
            filter_bias_and_bn=not settings.decay_norm_and_bias,
            **settings.args,
            **more,
        )

    optimizer = build()
    if type(optimizer) in _FUSED_OPTIMIZERS and not {"foreach", "fused", "differentiable"} & settings.args.keys():
        # On one core 1.6 to 2.5 times as fast as torch's loop: F1 1.6 ms an update and not 2.7, which is 14 % of one of 128.
        optimizer = build(fused=True)
    return optimizer


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[int, dict[str, Any]], update: int) -> None:
    """Go on after so many updates with the state of each parameter, by its index, however it is laid out in memory.

    torch's fused optimizers on the CPU take it for laid out as the parameter is, and are silently wrong where it is not. Some
    of timm's (Lamb, Adan, lookahead) count updates in their groups and not in the state.
    """
    counts = {"step": update, "lookahead_step": update}
    groups = [group | counts for group in optimizer.state_dict()["param_groups"]]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _installed(tracker: str | None) -> str | None:
    """Accelerate passes over a tracker that is missing without a word."""
    if tracker and tracker not in TRACKERS:
        raise ValueError(f"tracker {tracker!r}: wanted one of {', '.join(TRACKERS)}")
    if tracker and not importlib.util.find_spec(tracker):
        raise ValueError(f"tracker {tracker!r} is not installed; pip install {tracker}")
    return tracker


def _log_spaced(total: int) -> set[int]:
    """1, 2, 3, 4, 6, 8, 10, …: eight a decade."""
    return {n for k in range(200) if (n := round(10 ** (k / 8))) <= total}


def _commit() -> str | None:
    """Commit of the checkout this code lies in, with a + where files were changed; None where it is installed."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # An environment may lie inside another project's repository.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+")
    except (OSError, subprocess.CalledProcessError):
        return None
