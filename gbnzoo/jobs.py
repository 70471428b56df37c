"""Several commands at once on one machine, where one cannot fill it: each a process with its share of threads and GPUs."""

import asyncio
import contextlib
import os
import signal
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from gbnzoo.launch import JOB_VARIABLE, TerminatedError
from gbnzoo.run import RunError

_LONGEST_LINE = 2**20


@dataclass(frozen=True)
class Job:
    """A command, and the name that its lines are printed under."""

    name: str
    command: Sequence[str]


class FailedJobsError(RunError):
    """Some jobs failed; all have ended. `names` are those that did not fail."""

    def __init__(self, message: str, names: Sequence[str]):
        super().__init__(message)
        self.names = names


def run_jobs(jobs: Sequence[Job], at_once: int) -> None:
    """Run every job, so many at once, and print what they say as it comes, each line with its job's name.

    They share this process's threads evenly, and take the GPUs in turn, a GPU's memory shared by those on it. SIGTERM and
    Ctrl-C are passed on as SIGTERM, with which a run saves; none is begun after it. A second one kills.

    Raises:
        FailedJobsError: when all have ended, if any failed.
        TerminatedError: on SIGTERM or Ctrl-C, when those that ran have ended.
    """
    codes, stopped_by = asyncio.run(_run_jobs(deque(jobs), at_once))
    if stopped_by:
        raise TerminatedError(
            f"stopped by {signal.Signals(stopped_by).name}, {sum(map(bool, codes.values()))} of {len(jobs)} at work;"
            " the same command goes on from there",
            128 + stopped_by,
        )
    failed = {name: code for name, code in codes.items() if code}
    if failed:
        listed = ", ".join(f"{name} ({_ending(code)})" for name, code in failed.items())
        raise FailedJobsError(
            f"{len(failed)} of {len(jobs)} failed: {listed}; why stands above, and the same command goes on with them",
            [name for name, code in codes.items() if not code],
        )


async def _run_jobs(waiting: deque[Job], at_once: int) -> tuple[dict[str, int], int | None]:
    """Exit code of each that was begun, and the signal that stopped them."""
    codes: dict[str, int] = {}
    running: dict[str, asyncio.subprocess.Process] = {}
    signals: list[int] = []

    def stop(sign: int) -> None:
        signals.append(sign)
        waiting.clear()
        for process in running.values():
            with contextlib.suppress(ProcessLookupError):
                process.terminate() if len(signals) == 1 else process.kill()

    async def work(slot: int) -> None:
        while waiting:
            job = waiting.popleft()
            process = await asyncio.create_subprocess_exec(
                *job.command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                env=os.environ | share(slot, at_once),
                limit=_LONGEST_LINE,
                start_new_session=True,  # or a terminal's Ctrl-C would end it before it has saved
            )
            running[job.name] = process
            if signals:
                process.terminate()
            async for line in process.stdout:
                _print(job.name, line.decode(errors="replace").rstrip())
            codes[job.name] = await process.wait()
            del running[job.name]

    loop = asyncio.get_running_loop()
    with contextlib.suppress(RuntimeError, ValueError):  # only the main thread handles signals
        for sign in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(sign, stop, sign)
    await asyncio.gather(*(work(slot) for slot in range(min(at_once, len(waiting)))))
    return codes, next(iter(signals), None)


def share(slot: int, at_once: int) -> Mapping[str, str]:
    """What the job in one of so many places finds in its environment."""
    environment = {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // at_once)), JOB_VARIABLE: str(os.getpid())}
    gpus = torch.cuda.device_count()
    if gpus > 0:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[slot % gpus]
        environment["GBNZOO_GPU_SHARE"] = str(-(-at_once // gpus))
    return environment


def _print(name: str, line: str) -> None:
    if line:
        print(line if line.startswith(name) else f"{name}: {line}", flush=True)


def _ending(code: int) -> str:
    return f"exit code {code}" if code > 0 else f"killed by {signal.Signals(-code).name}"


def training_job(name: str, recipe: str, overrides: Sequence[str], options: Mapping[str, object]) -> Job:
    """`gbnzoo train` of a recipe, going on where it was stopped; options that are None are left out."""
    given = [text for key, value in options.items() if value is not None for text in (f"--{key}", str(value))]
    return Job(name, [sys.executable, "-m", "gbnzoo.train", recipe, *overrides, "--resume", *given])
