"""Train one recipe: `gbnzoo train RECIPE --processes N`, or under any launcher `accelerate launch -m gbnzoo.train RECIPE`.

The run is a function of recipe and seed. The layout (processes, accumulation, micro-batches) changes only who computes
what: an update's global batch, its ghosts, its augmentation and its learning rate are the same on any machine, so the weights
and running statistics are too, to the rounding of sums. That is 1e-9 in float64 (tested; 1e-14 is usual). In float32 it is
1e-6, until an activation near zero falls on the other side of its ReLU: after 20 updates of the digits' recipe it was 1e-6 on
two layouts and 1e-2 on a third, at the same top-1.

Dropout and drop path alone have no key for each sample: their masks are fixed by seed, update and layout, so that a run with
them can be repeated and resumed on its layout, and is another draw on any other.
"""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from accelerate import PartialState

from gbnzoo.allocator import keep_freed_memory
from gbnzoo.launch import (
    TerminatedError,
    is_launched,
    leaving_process_group,
    naming_lost_processes,
    plain_errors,
    start_processes,
    watching_for_stop,
)
from gbnzoo.recipe import Recipe, load_recipe
from gbnzoo.trainer import EVALUATION_BATCH_SIZE as EVALUATION_BATCH_SIZE
from gbnzoo.trainer import Trainer
from gbnzoo.trainer import check_recipe as check_recipe
from gbnzoo.trainer import known_shape as known_shape
from gbnzoo.trainer import load_sets as load_sets
from gbnzoo.trainer import sketched_model as sketched_model

LOST_SECONDS = 300.0
Tracker = Annotated[
    str | None, typer.Option(help="tensorboard (in the run's folder), trackio or wandb; gets every row of the log")
]


def train(
    recipe: Recipe,
    *,
    data_dir: str | Path | None = None,
    out: str | Path = "runs",
    resume: bool = False,
    processes: int | None = None,
    micro_batch_size: int | None = None,
    tracker: str | None = None,
    checkpoint_seconds: float = 60,
    timeout_seconds: float = LOST_SECONDS,
    compile_backend: str | None = None,
    cuda_graphs: bool = True,
    show_progress: bool = True,
) -> Path:
    """Train a recipe to its last update, scoring it on the validation split where the recipe holds one out, else the test.

    Args:
        recipe: what to train; nothing else changes the result.
        data_dir: folder with the data set; None asks the environment variable GBNZOO_DATA, then the Hub.
        out: where the run's folder is made.
        resume: go on with a run that was stopped; a finished one is left as it is.
        processes: how many a launcher must have started; None for as many as it did.
        micro_batch_size: samples of one forward pass on one device; None for that of the run's last start, or, where the run
            is long enough to earn it, the fastest on this machine, as measured now or before (`gbnzoo.tuning`).
        tracker: one of TRACKERS, which then gets every row of the log too.
        checkpoint_seconds: time between checkpoints.
        timeout_seconds: how long a process waits for another before it takes it for lost.
        compile_backend: of torch.compile, for the forward pass of training; None for none. Sums are then rounded otherwise.
        cuda_graphs: whether one process on a CUDA device replays its passes from a graph; only speed and memory change.
        show_progress: a progress bar, or a line for each evaluation where the output is not a terminal.

    Returns:
        The run's folder.

    Raises:
        ValueError: if data, recipe, layout and number of processes do not fit together.
        RunError: if the folder cannot be used or a checkpoint not be written.
        DivergedError: if the loss or a weight stops being finite.
        TerminatedError: on SIGTERM or Ctrl-C, when a checkpoint has been written.
        LostProcessError: if another process is gone.
    """
    keep_freed_memory()
    with naming_lost_processes(), watching_for_stop(signal.SIGTERM) as is_terminated:
        trainer = Trainer(
            recipe,
            data_dir=data_dir,
            out=out,
            processes=processes,
            micro_batch_size=micro_batch_size,
            tracker=tracker,
            checkpoint_seconds=checkpoint_seconds,
            timeout_seconds=timeout_seconds,
            compile_backend=compile_backend,
            cuda_graphs=cuda_graphs,
        )
        with (
            trainer.opened_run(resume),
            trainer.progress_bar(show_progress) as bar,
            watching_for_stop(signal.SIGINT) as is_interrupted,
        ):

            def stopped(where: str) -> TerminatedError:
                sign = signal.SIGTERM if is_terminated() or not is_interrupted() else signal.SIGINT
                return TerminatedError(f"{trainer.folder}: stopped {where}", 128 + sign)

            total_updates = trainer.regime.total_updates
            trainer.model.train()
            for update in range(trainer.first_update, total_updates):
                trainer.set_rates(update)
                trainer.add_gradients(update)
                grad_norm = trainer.clip_gradients(update)
                trainer.add_isotropic_noise(update)
                trainer.optimizer.step()
                trainer.optimizer.zero_grad()
                trainer.count_update()
                bar.update()

                done = update + 1
                is_last = done == total_updates
                if is_last or done in trainer.logged_updates or done >= trainer.next_poll:
                    save_is_due, must_stop = trainer.agree(done, is_terminated() or is_interrupted())
                    if is_last and recipe.statistics == "recalibrated":
                        trainer.recalibrate()
                    if done in trainer.logged_updates:
                        trainer.log(done, grad_norm, bar)
                    if save_is_due or must_stop or is_last:
                        trainer.save(done)
                    if must_stop and not is_last:
                        raise stopped(f"after update {done}; --resume goes on from there")
        if is_terminated() or is_interrupted():  # for what follows not to begin
            raise stopped("after its last update; it is complete")
    return trainer.folder


def main(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="YAML file, e.g. recipes/mnist/mlp5_gbn.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="single keys, e.g. large.batch_size=2048")] = None,
    rung: Annotated[str | None, typer.Option(help="sb, lb, lr, gbn or ra; how much of the paper applies")] = None,
    seed: Annotated[int | None, typer.Option(help="fixes weights, order, augmentation and noise")] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="folder with the data set; else GBNZOO_DATA, else the Hub")
    ] = None,
    out: Annotated[Path, typer.Option(help="where the run's folder is made")] = Path("runs"),
    resume: Annotated[bool, typer.Option("--resume", help="go on with a run that was stopped")] = False,
    processes: Annotated[
        int | None, typer.Option(min=1, help="start so many here; under a launcher, demand that it started so many")
    ] = None,
    micro_batch_size: Annotated[
        int | None,
        typer.Option(help="samples of one forward pass on one device; else the fastest, measured in long runs"),
    ] = None,
    tracker: Tracker = None,
    checkpoint_seconds: Annotated[float, typer.Option(min=0, help="time between checkpoints")] = 60,
    timeout_seconds: Annotated[
        float, typer.Option(min=1, help="how long to wait for another process before the run ends")
    ] = LOST_SECONDS,
    compile: Annotated[
        bool,
        typer.Option(
            "--compile/--no-compile",
            help="torch.compile the network's training pass; never tried on a GPU, no gain on CPUs",
        ),
    ] = False,
    cuda_graphs: Annotated[
        bool,
        typer.Option(
            "--cuda-graphs/--no-cuda-graphs",
            help="on one CUDA device, replay each pass from a graph; a network that waits for the host cannot",
        ),
    ] = True,
) -> None:
    """Train a recipe. The result depends on recipe and seed alone, not on the machine.

    Exit codes: 0 at the last update, 2 after an error that it names, 143 after SIGTERM and 130 after Ctrl-C, with a
    checkpoint for --resume, or with the run complete where they came after the last update.
    """
    with plain_errors():
        settings = load_recipe(recipe, overrides or (), rung=rung, seed=seed)
        if processes and processes > 1 and not is_launched():
            raise typer.Exit(start_processes(processes, "gbnzoo.train", _command_line(context.params)))
        with leaving_process_group():
            folder = train(
                settings,
                data_dir=data_dir,
                out=out,
                resume=resume,
                processes=processes,
                micro_batch_size=micro_batch_size,
                tracker=tracker,
                checkpoint_seconds=checkpoint_seconds,
                timeout_seconds=timeout_seconds,
                compile_backend="inductor" if compile else None,
                cuda_graphs=cuda_graphs,
            )
            if PartialState().is_main_process:
                print(folder)


def _command_line(params: dict[str, Any]) -> Iterator[str]:
    """The arguments that `main` was given."""
    params = dict(params)
    yield params.pop("recipe")
    yield from params.pop("overrides") or ()
    for name, value in params.items():
        option = "--" + name.replace("_", "-")
        if value is True:
            yield option
        elif value is not None and value is not False:
            yield from (option, str(value))


if __name__ == "__main__":
    typer.run(main)
