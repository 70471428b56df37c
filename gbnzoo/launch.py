"""The processes of a run: started, counted, and stopped together.

torch.distributed and Accelerate do the work; this is what a run asks of them, and what they leave unsaid.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import typer
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import parse_flag_from_env
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from gbnzoo.run import RunError

T = TypeVar("T")


JOB_VARIABLE = "GBNZOO_JOB"
"""In the environment of what `gbnzoo.jobs` starts."""


class TerminatedError(RunError):
    """SIGTERM or Ctrl-C came, and a checkpoint was written before the run ended."""

    def __init__(self, message: str, exit_code: int = 128 + signal.SIGTERM):
        super().__init__(message)
        self.exit_code = exit_code  # as shells and Kubernetes count it: to be started again


class LostProcessError(RunError):
    """Another process of the run is dead or out of reach."""


def is_launched() -> bool:
    """Whether this is one of the processes that torchrun, `accelerate launch` or `start_processes` started together."""
    return "WORLD_SIZE" in os.environ


def start_processes(processes: int, module: str, arguments: Sequence[str]) -> int:
    """Run `python -m module` in so many processes on this machine, one per GPU where there are any, until all have ended.

    SIGTERM is passed on to them. When one dies the others get SIGTERM, and 30 seconds later SIGKILL (torch's
    TORCH_ELASTIC_SHUTDOWN_TIMEOUT).

    Returns:
        An exit code: 0, or that of the first process that failed; 128 + n after signal n came to this one.

    Raises:
        ValueError: if there are GPUs, but not so many.
        LostProcessError: if a process was killed.
    """
    devices = 0 if parse_flag_from_env("ACCELERATE_USE_CPU") else torch.accelerator.device_count()
    if 0 < devices < processes:
        raise ValueError(
            f"{processes} processes need as many GPUs; this machine has {devices}. ACCELERATE_USE_CPU=true in the environment"
            " puts them on CPU cores"
        )
    # Otherwise each process would take all cores for itself.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // processes)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=f"gbnzoo-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-m", module, *arguments)
    except SignalException as stop:
        return 128 + stop.sigval
    except ChildFailedError as error:
        # Those that fail at the loss of another exit by themselves; the one that was killed comes first.
        rank, failure = min(error.failures.items(), key=lambda item: (item[1].exitcode >= 0, item[1].timestamp))
        if failure.exitcode >= 0:
            return failure.exitcode
        raise LostProcessError(
            f"process {rank} of {processes} was killed by {signal.Signals(-failure.exitcode).name}, and the others stopped;"
            " --resume goes on from the last checkpoint"
        ) from None
    return 0


def usable_accelerator() -> torch.device | None:
    """The accelerator that runs here are on, if any: not Apple's, which has no float64 for losses to be summed in."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return None if accelerator is None or accelerator.type == "mps" else accelerator


def connect(processes: int | None, timeout_seconds: float, **options: Any) -> Accelerator:
    """Accelerate, with as many processes as were asked for.

    Args:
        processes: how many there must be; None for as many as were started.
        timeout_seconds: how long one waits for another before it takes it for lost.
        options: as Accelerator's.

    Raises:
        ValueError: if there are more or fewer, or Accelerate is told to split the model or to scale the loss.
    """
    # Accelerate divides each loss by its accumulation steps; what splits a model leaves no process a whole one to save.
    told = [
        name for way in ("DEEPSPEED", "FSDP", "MEGATRON_LM") if parse_flag_from_env(name := f"ACCELERATE_USE_{way}")
    ]
    if os.environ.get(steps := "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1") != "1":
        told.append(steps)
    if told:
        raise ValueError(
            f"{', '.join(told)} in the environment, from Accelerate's configuration or command line: wanted plain data"
            " parallelism without; the recipe fixes the batch, and --micro-batch-size how it is accumulated"
        )
    # Accelerate keeps the precision of the first run in this process for ever.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        cpu=usable_accelerator() is None,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=timeout_seconds))],
        **options,
    )
    # `accelerate launch --cpu --num_processes 2` starts one process, and leaves in its environment where two would meet.
    is_alone = not is_launched() and {"ACCELERATE_MIXED_PRECISION", "MASTER_PORT"} <= os.environ.keys()
    started, wanted = accelerator.num_processes, processes or int(os.environ.get("WORLD_SIZE", 1))
    if started != wanted or (is_alone and processes is None):
        raise ValueError(
            f"{'several' if is_alone else wanted} processes were asked for, {started} started:"
            " accelerate launch --cpu starts a single one. `gbnzoo train … --processes N` starts N on this machine, as does"
            " `accelerate launch --multi_gpu --num_processes N -m gbnzoo.train …`, on CPUs too; --processes 1 asks for one"
        )
    return accelerator


def on_first_process(work: Callable[[], T]) -> T:
    """What `work` returns on the first process, or raises there, on all of them."""
    if not dist.is_initialized():
        return work()
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = work()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    result, error = outcome
    if error is not None:
        raise error
    return result


@contextlib.contextmanager
def watching_for_stop(sign: signal.Signals) -> Iterator[Callable[[], bool]]:
    """While it lasts a signal ends nothing; the function given tells whether it came, or the launcher of this process died.

    A second Ctrl-C ends a process that nobody launched.
    """
    # Accelerate starts a single process without torchrun, and passes no signal on to it.
    is_started_by_launcher = {"TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION", JOB_VARIABLE} & os.environ.keys()
    launcher = os.getppid() if is_started_by_launcher else None
    came, process = threading.Event(), os.getpid()

    def note(*_: object) -> None:
        if os.getpid() != process:  # a worker that inherited this; its process will end it
            return
        is_second = came.is_set()
        came.set()
        if sign == signal.SIGINT and not is_started_by_launcher:
            if is_second:
                raise KeyboardInterrupt
            with contextlib.suppress(OSError):  # whoever reads it may have ended by the same Ctrl-C
                os.write(2, b"stopping with a checkpoint; Ctrl-C again stops at once\n")

    def is_asked_to_stop() -> bool:
        return came.is_set() or (launcher is not None and os.getppid() != launcher)

    is_ignored = signal.getsignal(sign) is signal.SIG_IGN  # as Ctrl-C is in what a script began with &
    if is_ignored or threading.current_thread() is not threading.main_thread():  # which alone may handle signals
        yield is_asked_to_stop
        return
    before = signal.signal(sign, note)
    try:
        yield is_asked_to_stop
    finally:
        signal.signal(sign, before)


@contextlib.contextmanager
def naming_lost_processes() -> Iterator[None]:
    """What torch's communication raises when another process is gone, as one error that says so."""
    try:
        yield
    except RuntimeError as error:
        # gloo's errors have no class of their own.
        if isinstance(error, RunError) or (not isinstance(error, dist.DistError) and "gloo" not in str(error)):
            raise
        who = f"process {dist.get_rank()} of {dist.get_world_size()}" if dist.is_initialized() else "this process"
        reason = str(error).partition("] ")[2].partition(". ")[0] or str(error)  # gloo's: [file:line] reason. Advice.
        raise LostProcessError(
            f"{who} has lost another, which died, hangs or is out of reach ({reason});"
            " --resume goes on from the last checkpoint, on any number of processes"
        ) from error


@contextlib.contextmanager
def leaving_process_group() -> Iterator[None]:
    """At the end of a command, also by an error: threads of the group that outlive Python would abort the process."""
    try:
        yield
    except LostProcessError:
        raise  # to leave could mean to wait for the one that is lost
    except BaseException:
        _leave_process_group()
        raise
    _leave_process_group()


def _leave_process_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """For command lines: what a user can mend is one message and an exit code, not a traceback.

    The exit code is 2, after SIGTERM 143, after Ctrl-C 130. What all processes of a machine have found is said by the first
    of them.
    """
    try:
        yield
    except (ValueError, RunError, OSError, ImportError) as error:
        is_first = os.environ.get("LOCAL_RANK", "0") == "0"
        if is_first or isinstance(error, LostProcessError | OSError):
            print(f"error: {error}", file=sys.stderr, flush=True)
        raise typer.Exit(error.exit_code if isinstance(error, RunError) else 2) from None
