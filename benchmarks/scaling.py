"""Update time as the batch and the processes grow, how much of it is communication, and on paper for many GPUs.

    python -m benchmarks.scaling measure recipes/mnist/mlp5_gbn.yaml --data-dir data
    python -m benchmarks.scaling model --images-per-second 3000 --megabytes 102

`measure` prints two Markdown tables; bytes are those that cross the loopback interface, so for a clean count give it one of
its own: `unshare --net sh -c 'ip link set lo up; python -m benchmarks.scaling measure …'`.
"""

import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import typer

from gbnzoo.launch import start_processes
from gbnzoo.recipe import load_recipe
from gbnzoo.trainer import Trainer, load_sets

BATCHES = (128, 512, 2048, 8192, 32768)
SECONDS_EACH = 20.0

Recipe = Annotated[str, typer.Argument(help="YAML file; its large-batch regime with ghosts is timed, in float32")]
DataDir = Annotated[Path | None, typer.Option(help="folder with the data set; else GBNZOO_DATA, else the Hub")]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def measure(
    recipe: Recipe,
    data_dir: DataDir = None,
    batches: Annotated[str, typer.Option(help="batch sizes on one process; the whole data set is added")] = " ".join(
        map(str, BATCHES)
    ),
    batch_size: Annotated[int, typer.Option(help="batch size over processes")] = 4096,
    max_processes: int = 4,
) -> None:
    """Time updates: growing batches on one process of one thread, then one batch on 1, 2, … processes."""
    settings = load_recipe(recipe)
    num_samples, ghost = len(load_sets(settings, data_dir)[0]), settings.large.ghost_batch_size
    sizes = [*(b for b in map(int, batches.split()) if b < num_samples), num_samples // ghost * ghost]

    print(f"{settings.model.name} on {settings.data.name}, ghosts of {ghost}, load {os.getloadavg()[0]:.1f}\n")
    print("| batch | s an update | ms a sample |\n|---|---|---|")
    for size in sizes:
        record = timed(recipe, size, 1, data_dir)
        print(f"| {size:,} | {record['seconds']:.3f} | {1000 * record['seconds'] / size:.4f} |", flush=True)

    print(
        f"\n| processes | s an update of {batch_size:,} | efficiency | communication | bytes sent | over the minimum |"
    )
    print("|---|---|---|---|---|---|")
    one = None
    for processes in (n for n in range(1, max_processes + 1) if batch_size // ghost % n == 0):
        record = timed(recipe, batch_size, processes, data_dir)
        one = one or record["seconds"]
        minimum = 2 * (processes - 1) * record["gradient_bytes"]  # 2 (W-1) / W of the gradient, from each of W
        sent = f"{record['bytes_sent']:,.0f} | {record['bytes_sent'] / minimum:.3f}" if minimum else "0 | "
        print(
            f"| {processes} | {record['seconds']:.3f} | {one / processes / record['seconds']:.0%} |"
            f" {1 - record['seconds_alone'] / record['seconds']:.0%} | {sent} |",
            flush=True,
        )


def timed(recipe: str, batch_size: int, processes: int, data_dir: Path | None) -> dict[str, Any]:
    """`time_updates` in so many new processes of one thread each."""
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        arguments = [
            "time-updates",
            recipe,
            str(batch_size),
            folder,
            *(["--data-dir", str(data_dir)] if data_dir else []),
        ]
        if processes == 1:
            subprocess.run([sys.executable, "-m", "benchmarks.scaling", *arguments], check=True)
        elif code := start_processes(processes, "benchmarks.scaling", arguments):
            raise typer.Exit(code)
        return json.loads((Path(folder) / "record.json").read_text())


@app.command()
def time_updates(recipe: Recipe, batch_size: int, folder: Path, data_dir: DataDir = None) -> None:
    """What each process of `measure` does: time updates with and without their reduction, and count the bytes of one."""
    overrides = [f"large.batch_size={batch_size}", "base.epochs=1000", "base.milestones=[]", "precision=fp32"]
    trainer = Trainer(
        load_recipe(recipe, overrides, rung="gbn"),
        data_dir=data_dir,
        out=folder,
        processes=None,
        micro_batch_size=None,
        tracker=None,
        checkpoint_seconds=math.inf,
        timeout_seconds=600,
    )
    with trainer.opened_run(resume=False):
        trainer.model.train()
        first = seconds_of_update(trainer, 0)
        repeats = torch.tensor(max(1, min(20, int(SECONDS_EACH / 2 / first))))
        if trainer.world_size > 1:
            torch.distributed.broadcast(repeats, src=0)
        # In turns, so that what else the machine does meets both; the shortest is the least disturbed.
        rounds = [
            (seconds_of_update(trainer, 2 * i + 1), seconds_of_update(trainer, 2 * i + 2, reduces=False))
            for i in range(int(repeats))
        ]
        seconds, seconds_alone = (min(times) for times in zip(*rounds, strict=True))
        before = psutil.net_io_counters(pernic=True)["lo"].bytes_sent
        seconds_of_update(trainer, 2 * int(repeats) + 1)
        sent = psutil.net_io_counters(pernic=True)["lo"].bytes_sent - before
    if trainer.rank == 0:
        record = {
            "seconds": seconds,
            "seconds_alone": seconds_alone,
            "gradient_bytes": sum(parameter.nbytes for parameter in trainer.parameters),
            "bytes_sent": sent,
        }
        (folder / "record.json").write_text(json.dumps(record))


def seconds_of_update(trainer: Trainer, update: int, *, reduces: bool = True) -> float:
    trainer.accelerator.wait_for_everyone()
    began = time.perf_counter()
    trainer.set_rates(update)
    with contextlib.nullcontext() if reduces else trainer.accelerator.no_sync(trainer.model):
        trainer.add_gradients(update)
    trainer.clip_gradients(update)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    trainer.accelerator.wait_for_everyone()
    return time.perf_counter() - began


@app.command()
def model(
    images_per_second: Annotated[float, typer.Option(help="of one GPU alone")],
    megabytes: Annotated[float, typer.Option(help="of the gradient")],
    machine_gigabytes: Annotated[float, typer.Option(help="per second and GPU, one way, within a machine")] = 450,
    network_gigabytes: Annotated[float, typer.Option(help="per second and GPU, one way, between machines")] = 50,
    hop_microseconds: Annotated[float, typer.Option(help="latency of one hop")] = 10,
    fixed_milliseconds: Annotated[
        float, typer.Option(help="of an update, whatever the batch: launches, optimizer")
    ] = 3,
) -> None:
    """On paper: time of an update on 8 to 1024 GPUs, and the batch at which nine tenths of it are computing."""
    print("| GPUs | reduction ms | batch for 90 % | a GPU | its update ms | images/s |\n|---|---|---|---|---|---|")
    for gpus in (2**k for k in range(3, 11)):
        reduction = reduction_seconds(
            gpus, 1e6 * megabytes, 1e9 * machine_gigabytes, 1e9 * network_gigabytes, 1e-6 * hop_microseconds
        )
        waiting = reduction + 1e-3 * fixed_milliseconds
        each = 9 * waiting * images_per_second
        print(
            f"| {gpus:,} | {1000 * reduction:.2f} | {gpus * each:,.0f} | {each:,.0f} | {10_000 * waiting:.1f} |"
            f" {0.9 * gpus * images_per_second:,.0f} |"
        )


def reduction_seconds(gpus: int, size: float, machine_rate: float, network_rate: float, hop: float) -> float:
    """Time of an all-reduce in machines of 8: the slowest link passes 2 (W-1) / W of the gradient, along a tree of hops.

    Args:
        size: bytes of the gradient.
        machine_rate, network_rate: bytes per second of one GPU, one way.
        hop: seconds from one GPU to the next.

    Source: Thakur, Rabenseifner and Gropp 2005, "Optimization of collective communication operations in MPICH".
    """
    rate = machine_rate if gpus <= 8 else network_rate
    return 2 * (gpus - 1) / gpus * size / rate + 2 * math.log2(gpus) * hop


if __name__ == "__main__":
    app()
