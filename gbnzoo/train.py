"""Train one recipe: `accelerate launch -m gbnzoo.train RECIPE`, or `gbnzoo train RECIPE` for one process.

The run is a function of recipe and seed. The layout (processes, accumulation, micro-batches) changes only who computes
what: an update's global batch, its ghosts, its augmentation and its learning rate are the same on any machine.
"""

import contextlib
import importlib.util
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import typer
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.state import AcceleratorState
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from tqdm import tqdm

import gbnzoo.models
from gbnzoo.data import Augment, GlobalBatches, ImageSet, keyed_normal, load_images
from gbnzoo.metrics import Metrics, evaluate
from gbnzoo.norm import gathered_running_statistics, shard_running_statistics
from gbnzoo.recipe import Optimizer, Recipe, load_recipe
from gbnzoo.regime import choose_layout
from gbnzoo.run import Checkpoint, Run, RunError

TRACKERS = ("tensorboard", "trackio", "wandb")
EVALUATION_BATCH_SIZE = 256


class DivergedError(RunError):
    """The loss or a weight is no longer a finite number."""


def train(
    recipe: Recipe,
    *,
    data_dir: str | Path | None = None,
    out: str | Path = "runs",
    resume: bool = False,
    micro_batch_size: int | None = None,
    tracker: str | None = None,
    checkpoint_seconds: float = 60,
    show_progress: bool = True,
) -> Path:
    """Train a recipe to its last update, scoring it on the validation split where the recipe holds one out, else the test.

    Args:
        recipe: what to train; nothing else changes the result.
        data_dir: folder with the data set; None asks the environment variable GBNZOO_DATA, then the Hub.
        out: where the run's folder is made.
        resume: go on with a run that was stopped; a finished one is left as it is.
        micro_batch_size: samples of one forward pass on one device; None lets it be chosen.
        tracker: one of TRACKERS, which then gets every row of the log too.
        checkpoint_seconds: time between checkpoints.
        show_progress: a progress bar, or a line for each evaluation where the output is not a terminal.

    Returns:
        The run's folder.

    Raises:
        ValueError: if data, recipe and layout do not fit together.
        RunError: if the folder cannot be used or a checkpoint not be written.
        DivergedError: if the loss or a weight stops being finite.
    """
    trainer = Trainer(
        recipe, data_dir=data_dir, out=out, resume=resume, micro_batch_size=micro_batch_size, tracker=tracker
    )
    regime, last_saved = trainer.regime, time.monotonic()
    bar = trainer.progress_bar(show_progress)
    trainer.model.train()
    for update in range(trainer.first_update, regime.total_updates):
        trainer.set_rates(update)
        trainer.add_gradients(update)
        grad_norm = trainer.clip_gradients(update)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        trainer.count_update()
        bar.update()

        done = update + 1
        is_last = done == regime.total_updates
        save_is_due = time.monotonic() - last_saved > checkpoint_seconds
        if is_last or done in trainer.logged_updates or done % trainer.poll_updates == 0:
            save_is_due = trainer.agree(update, save_is_due)
            if done in trainer.logged_updates:
                trainer.log(done, grad_norm, bar)
            if save_is_due or is_last:
                trainer.save(done)
                last_saved = time.monotonic()
    bar.close()
    trainer.accelerator.end_training()
    return trainer.run.folder


class Trainer:
    """One process's share of a run: its parts, and what is done with them at each update.

    Raises:
        As `train`.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        data_dir: str | Path | None,
        out: str | Path,
        resume: bool,
        micro_batch_size: int | None,
        tracker: str | None,
    ):
        folder = Path(out) / recipe.run_name
        self.recipe = recipe
        self.accelerator = _accelerator(recipe.precision, tracker, folder)
        self.device, self.rank = self.accelerator.device, self.accelerator.process_index
        self.world_size = self.accelerator.num_processes

        dtype = torch.float64 if recipe.precision == "fp64" else torch.float32
        self.train_set, self.scored_set = (images.to(self.device) for images in load_sets(recipe, data_dir))
        self.regime = regime = recipe.regime(len(self.train_set))
        self.batches = GlobalBatches(len(self.train_set), regime.batch_size, recipe.seed)
        self.augment = Augment(self.train_set, recipe.data.augment, recipe.seed, dtype)
        self.layout = choose_layout(
            regime.batch_size,
            regime.ghost_batch_size,
            processes=self.world_size,
            micro_batch_size=micro_batch_size,
            max_micro_batch_size=512 if self.device.type == "cpu" else 4096,
        )
        self.positions = [
            torch.tensor([position for ghost in ghosts for position in ghost])
            for ghosts in self.layout.micro_batches(self.rank)
        ]
        total, evaluations = regime.total_updates, recipe.evaluations
        self.evaluated_updates = {round(total * (i + 1) / evaluations) for i in range(evaluations)} - {0}
        self.logged_updates = self.evaluated_updates | _log_spaced(total)
        # To ask at every update whether the loss is finite, or a checkpoint due, makes a GPU or other processes wait.
        self.poll_updates = 1 if self.device.type == "cpu" and self.world_size == 1 else 20

        self.bare_model = build_model(recipe, self.train_set, regime.ghost_batch_size)
        self.bare_model.to(self.device, dtype, memory_format=torch.channels_last)
        self.parameters = list(self.bare_model.parameters())
        optimizer = build_optimizer(recipe.optimizer, self.bare_model)

        # Nothing is written before all of the above has been found to fit together.
        if self.accelerator.is_main_process:
            Run.start(recipe, out, resume=resume)
        self.accelerator.wait_for_everyone()
        self.run = Run(folder)
        self.model, self.optimizer = self._begin(self.run.latest_checkpoint(), optimizer)
        self.accelerator.init_trackers("gbnzoo", config={"recipe": recipe.run_name})

    def _begin(self, checkpoint: Checkpoint | None, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        """Put model, optimizer and log where the checkpoint has them, or at the start; returns Accelerate's of both."""
        progress = {"loss_sum": 0.0, "row_updates": 0, "row_seconds": 0.0, "train_seconds": 0.0}
        self.first_update = 0
        if checkpoint:
            self.bare_model.load_state_dict(checkpoint.model)
            optimizer.load_state_dict(optimizer.state_dict() | {"state": checkpoint.optimizer})
            self.first_update, progress = checkpoint.update, checkpoint.progress
        if self.accelerator.is_main_process:
            if not checkpoint:
                self.run.save_initial(self.bare_model.state_dict())
            self.run.rewind_log(self.first_update)
            if self.first_update < self.regime.total_updates:
                self.run.record_environment(self._environment())
        self.accelerator.wait_for_everyone()
        initial = self.run.initial_weights()
        self.initial = [initial[name].to(self.device) for name, _ in self.bare_model.named_parameters()]
        # BatchNorm's buffers are merged by hand, exactly, where they are read; see gbnzoo.norm.
        shard_running_statistics(self.bare_model, self.rank, self.world_size)

        self.first_bad_update = torch.tensor(self.regime.total_updates, device=self.device)
        # Kept as this process's part; the first carries on what a checkpoint summed up.
        loss_sum = progress["loss_sum"] if self.rank == 0 else 0.0
        self.loss_sum = torch.tensor(loss_sum, dtype=torch.float64, device=self.device)
        self.row_updates = int(progress["row_updates"])
        self._clock_zero = time.perf_counter() - progress["train_seconds"]
        self.row_began = progress["train_seconds"] - progress["row_seconds"]
        return self.accelerator.prepare(self.bare_model, optimizer)

    @property
    def train_seconds(self) -> float:
        """Seconds since the run's start, stretches before a resume included."""
        return time.perf_counter() - self._clock_zero

    def set_rates(self, update: int) -> None:
        # Accelerate steps a prepared scheduler once per process, so the rate is set here.
        for group in self.optimizer.param_groups:
            group["lr"] = self.regime.lr_at(update)
            if update >= self.regime.weight_decay_updates:
                group["weight_decay"] = 0.0

    def add_gradients(self, update: int) -> None:
        """Leave the gradient of the global batch's mean loss on the parameters of every process."""
        indices, epochs = self.batches.at(update)
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        for step, positions in enumerate(self.positions):
            index, epoch = indices[positions], epochs[positions]
            # Dropout has no key per sample: it is fixed by seed and update, and by where the layout cuts the batch.
            torch.manual_seed(hash((self.recipe.seed, update, int(positions[0]))))
            is_last = step == len(self.positions) - 1
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(self.model):
                logits = self.model(self.augment(index, epoch))
                labels = self.train_set.labels[index.to(self.device)]
                losses = nn.functional.cross_entropy(
                    logits, labels, label_smoothing=self.recipe.label_smoothing, reduction="none"
                )
                loss += losses.detach().sum(dtype=torch.float64) / self.regime.batch_size
                if self.regime.gradient_noise_sigma:
                    noise = keyed_normal(self.recipe.seed, "gradient_noise", epoch, index).to(losses)
                    losses = losses * (1 + self.regime.gradient_noise_sigma * noise)
                # Data parallelism averages over processes; times their number, that is the mean over the global batch.
                self.accelerator.backward(losses.sum() * (self.world_size / self.regime.batch_size))
        self.loss_sum += loss
        self.first_bad_update.clamp_(max=torch.where(loss.isfinite(), self.regime.total_updates, update))

    def clip_gradients(self, update: int) -> Tensor | None:
        """Clip, and return the gradient's norm before clipping where it was needed."""
        if self.regime.clip_grad_norm:
            return nn.utils.clip_grad_norm_(self.parameters, self.regime.clip_grad_norm)
        if update + 1 in self.logged_updates:
            return nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        return None

    def count_update(self) -> None:
        self.row_updates += 1

    def agree(self, update: int, save_is_due: bool) -> bool:
        """Let all processes know whether the first finds a checkpoint due.

        Raises:
            DivergedError: on all of them, if the loss has not been finite on any.
        """
        status = torch.stack((self.first_bad_update, self.first_bad_update.new_tensor(save_is_due)))
        bad_updates, due = self.accelerator.gather(status[None]).T.tolist()
        if min(bad_updates) < self.regime.total_updates:
            raise self._diverged("the loss", min(bad_updates))
        return bool(due[0])

    def log(self, done: int, grad_norm: Tensor, bar: tqdm) -> None:
        """Write a row of the log; where an evaluation is due, evaluate."""
        images_per_second = self.row_updates * self.regime.batch_size / (self.train_seconds - self.row_began)
        row = {
            "update": done,
            "samples": done * self.regime.batch_size,
            "lr": self.regime.lr_at(done - 1),
            "train_loss": self._over_processes(self.loss_sum).item() / self.row_updates,
            "grad_norm": grad_norm.item(),
            **self._weight_distances(),
            "images_per_second": round(images_per_second, 1),
        }
        if done in self.evaluated_updates:
            metrics = self.evaluate()
            row |= {
                "split": self.scored_set.split,
                "top1_percent": metrics.top1_percent,
                "top5_percent": metrics.top5_percent,
                "eval_loss": metrics.loss,
            }
            bar.set_postfix(loss=f"{row['train_loss']:.3f}", top1=f"{metrics.top1_percent:.2f}")
            if bar.disable and self.show_lines:
                print(
                    f"{self.recipe.run_name}: update {done}/{self.regime.total_updates}, loss {row['train_loss']:.4f},"
                    f" top-1 {metrics.top1_percent:.2f} %, {images_per_second:.0f} images/s",
                    flush=True,
                )
        row["train_seconds"] = round(self.train_seconds, 2)
        if self.accelerator.is_main_process:
            self.run.log(row)
        self.accelerator.log({k: v for k, v in row.items() if k != "split"}, step=done)
        self.loss_sum.zero_()
        self.row_updates, self.row_began = 0, self.train_seconds

    def evaluate(self) -> Metrics:
        """Score the model as it stands, each sample counted once whatever the number of processes."""
        with gathered_running_statistics(self.bare_model):
            shares = self.scored_set.batches(EVALUATION_BATCH_SIZE, self.augment.dtype, self.rank, self.world_size)
            return evaluate(self.bare_model, shares, reduce=self._over_processes)

    def save(self, done: int) -> None:
        """Write a checkpoint.

        Raises:
            DivergedError: if a weight is not finite; a checkpoint of it would be worthless.
        """
        if not all(p.isfinite().all() for p in self.parameters):
            raise self._diverged("a weight", done - 1)
        progress = {
            "loss_sum": self._over_processes(self.loss_sum).item(),
            "row_updates": self.row_updates,
            "row_seconds": self.train_seconds - self.row_began,
            "train_seconds": self.train_seconds,
        }
        with gathered_running_statistics(self.bare_model):
            if self.accelerator.is_main_process:
                model, optimizer = self.bare_model.state_dict(), self.optimizer.state_dict()["state"]
                self.run.save_checkpoint(Checkpoint(done, self.regime.total_updates, model, optimizer, progress))

    def progress_bar(self, show: bool) -> tqdm:
        self.show_lines = show and self.accelerator.is_main_process
        return tqdm(
            desc=self.recipe.run_name,
            initial=self.first_update,
            total=self.regime.total_updates,
            unit="update",
            dynamic_ncols=True,
            disable=None if self.show_lines else True,  # None: where the output is not a terminal
        )

    def _over_processes(self, value: Tensor) -> Tensor:
        return self.accelerator.reduce(value) if self.world_size > 1 else value

    @torch.no_grad()
    def _weight_distances(self) -> dict[str, float]:
        squares = torch.stack(
            [(p - w).double().square().sum() for p, w in zip(self.parameters, self.initial, strict=True)]
        )
        return {"weight_distance": squares.sum().sqrt().item(), "weight_distance_first": squares[0].sqrt().item()}

    def _diverged(self, what: str, update: int) -> DivergedError:
        checkpoint = self.run.latest_checkpoint()
        kept = f"checkpoint of update {checkpoint.update}" if checkpoint else "no checkpoint yet"
        return DivergedError(
            f"{self.run.folder}: {what} is not finite after update {update} at learning rate {self.regime.lr_at(update):g};"
            f" last good: {kept}. A lower base.lr, base.warmup_epochs or optimizer.clip_grad_norm is what usually helps"
        )

    def _environment(self) -> dict[str, Any]:
        """What env.json holds of one start of the run."""
        layout, train_set = self.layout, self.train_set
        return {
            "first_update": self.first_update,
            "total_updates": self.regime.total_updates,
            "processes": layout.processes,
            "accumulation": layout.accumulation,
            "micro_batch_size": layout.micro_batch_size,
            "threads": torch.get_num_threads(),
            "hardware": _hardware(self.device),
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
                "input_size": list(train_set.input_size),
            },
        }


def load_sets(recipe: Recipe, data_dir: str | Path | None) -> tuple[ImageSet, ImageSet]:
    """The training images, and those the recipe is scored on: the held-out ones, or the test split."""
    options = {"data_dir": data_dir, **recipe.data.model_dump(exclude={"name", "augment"})}
    scored = "validation" if recipe.data.holdout else "test"
    return load_images(recipe.data.name, "train", **options), load_images(recipe.data.name, scored, **options)


def build_model(recipe: Recipe, train_set: ImageSet, ghost_batch_size: int) -> nn.Module:
    """The recipe's network for the data, its initial weights a function of the seed alone, so that rungs share them.

    Raises:
        ValueError: if timm knows no such architecture, or its entry point refuses the arguments.
    """
    if not timm.is_model(recipe.model.name):
        raise ValueError(
            f"model.name {recipe.model.name!r} is no architecture that timm or gbnzoo knows; see timm.list_models('*_gbn')"
        )
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        return timm.create_model(
            recipe.model.name,
            num_classes=len(train_set.class_names),
            in_chans=train_set.input_size[0],
            ghost_batch_size=ghost_batch_size,
            pretrained_cfg_overlay={"input_size": train_set.input_size, "mean": train_set.mean, "std": train_set.std},
            **recipe.model.args,
        )


def build_optimizer(settings: Optimizer, model: nn.Module) -> torch.optim.Optimizer:
    """One of timm's optimizers; its rate is set at each update."""
    # timm calls SGD with Nesterov's momentum "sgd", and without it "momentum".
    name = "momentum" if settings.name == "sgd" and not settings.nesterov else settings.name
    return create_optimizer_v2(
        model,
        opt=name,
        lr=0.0,
        weight_decay=settings.weight_decay,
        momentum=settings.momentum,
        filter_bias_and_bn=not settings.decay_norm_and_bias,
        **settings.args,
    )


def _accelerator(precision: str, tracker: str | None, folder: Path) -> Accelerator:
    if tracker and tracker not in TRACKERS:
        raise ValueError(f"tracker {tracker!r}: wanted one of {', '.join(TRACKERS)}")
    if tracker and not importlib.util.find_spec(tracker):
        raise ValueError(f"tracker {tracker!r} is not installed; pip install {tracker}")
    # Accelerate keeps the precision of the first run in this process for ever.
    AcceleratorState._reset_state()
    return Accelerator(
        mixed_precision="bf16" if precision == "bf16" else "no",
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        log_with=tracker,
        project_dir=folder,
    )


def _log_spaced(total: int) -> set[int]:
    """1, 2, 3, 4, 6, 8, 10, …: eight a decade."""
    return {n for k in range(200) if (n := round(10 ** (k / 8))) <= total}


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} × {_cpu_name()}"


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """Commit of the checkout this code lies in, with a + where files were changed; None where it is installed."""
    here = Path(__file__).parent
    try:
        command = ["git", "-C", str(here), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """For command lines: what a user can mend is one message and exit code 2, not a traceback."""
    try:
        yield
    except (ValueError, RunError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None


def main(
    recipe: Annotated[str, typer.Argument(help="YAML file, e.g. recipes/mnist/mlp5_gbn.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="single keys, e.g. base.epochs=10")] = None,
    rung: Annotated[str | None, typer.Option(help="sb, lb, lr, gbn or ra; how much of the paper applies")] = None,
    seed: Annotated[int | None, typer.Option(help="fixes weights, order, augmentation and noise")] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="folder with the data set; else GBNZOO_DATA, else the Hub")
    ] = None,
    out: Annotated[Path, typer.Option(help="where the run's folder is made")] = Path("runs"),
    resume: Annotated[bool, typer.Option("--resume", help="go on with a run that was stopped")] = False,
    micro_batch_size: Annotated[int | None, typer.Option(help="samples of one forward pass on one device")] = None,
    tracker: Annotated[str | None, typer.Option(help="tensorboard, trackio or wandb")] = None,
    checkpoint_seconds: Annotated[float, typer.Option(help="time between checkpoints")] = 60,
) -> None:
    """Train a recipe. The result depends on recipe and seed alone, not on the machine."""
    with plain_errors():
        folder = train(
            load_recipe(recipe, overrides or (), rung=rung, seed=seed),
            data_dir=data_dir,
            out=out,
            resume=resume,
            micro_batch_size=micro_batch_size,
            tracker=tracker,
            checkpoint_seconds=checkpoint_seconds,
        )
    if PartialState().is_main_process:
        print(folder)


if __name__ == "__main__":
    typer.run(main)
