"""Update time as the batch and the processes grow, what of it is communication, and on paper for many devices.

    python -m benchmarks.scaling measure recipes/mnist/mlp5_gbn.yaml --data-dir data
    python -m benchmarks.scaling model --images-per-second 2470 --megabytes 102

`measure` prints two Markdown tables. Bytes are those that cross the loopback interface; for a clean count it has one of its
own: `unshare --net sh -c 'ip link set lo up; GLOO_SOCKET_IFNAME=lo python -m benchmarks.scaling measure …'`. CPU seconds
are what a process computes; the machine's other work takes nothing from them, and on a free core they are the seconds.
"""

import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import torch.distributed as dist
import typer

from gbnzoo.allocator import keep_freed_memory
from gbnzoo.launch import leaving_process_group, start_processes
from gbnzoo.recipe import load_recipe
from gbnzoo.trainer import Trainer, load_sets

BATCHES = "128 512 2048 8192 32768"
SECONDS_A_ROUND = 5.0

Recipe = Annotated[str, typer.Argument(help="YAML file; its large-batch regime with ghosts is timed, in float32")]
DataDir = Annotated[Path | None, typer.Option(help="folder with the data set; else GBNZOO_DATA, else the Hub")]
Rounds = Annotated[
    int, typer.Option(min=1, help="all sizes in turn, so often; the shortest round is the least disturbed")
]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def measure(
    recipe: Recipe,
    data_dir: DataDir = None,
    batches: Annotated[str, typer.Option(help="batch sizes on one process; the whole data set is added")] = BATCHES,
    batch_size: Annotated[int, typer.Option(help="batch size over processes")] = 4096,
    max_processes: int = 4,
    rounds: Rounds = 3,
) -> None:
    """Time updates: growing batches on one process of one thread, then one batch on 1, 2, … processes."""
    settings = load_recipe(recipe)
    num_samples, ghost = len(load_sets(settings, data_dir)[0]), settings.large.ghost_batch_size
    sizes = [*(b for b in map(int, batches.split()) if b < num_samples), num_samples // ghost * ghost]

    print(f"{settings.model.name} on {settings.data.name}, ghosts of {ghost}, load {os.getloadavg()[0]:.1f}\n")
    print("| batch | s an update | CPU s | CPU ms a sample | slowest round |\n|---|---|---|---|---|")
    records = timed(recipe, sizes, 1, data_dir, rounds)
    for size in sizes:
        of_size = [record for record in records if record["batch_size"] == size]
        busy = [record["cpu_seconds"] for record in of_size]
        print(
            f"| {size:,} | {min(record['seconds'] for record in of_size):.3f} | {min(busy):.3f} |"
            f" {1000 * min(busy) / size:.4f} | +{max(busy) / min(busy) - 1:.0%} |"
        )

    counts = [n for n in range(1, max_processes + 1) if batch_size // ghost % n == 0]
    launches = [timed(recipe, [batch_size], n, data_dir, rounds=1)[0] for _ in range(rounds) for n in counts]
    print(f"\nload {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores\n")
    print(
        f"| processes | s an update of {batch_size:,} | CPU s, the busiest | efficiency on a core each | reduction s |"
        " its share | bytes sent | over the minimum |\n|---|---|---|---|---|---|---|---|"
    )
    alone = None
    for n in counts:
        of_count = [launch for launch in launches if launch["processes"] == n]
        least = {key: min(launch[key] for launch in of_count) for key in of_count[0]}
        busy = least["cpu_seconds"]
        alone = alone or busy
        minimum = 2 * (n - 1) * least["gradient_bytes"]  # 2 (W-1) / W of the gradient, from each of W
        sent = f"{least['bytes_sent']:,.0f} | {least['bytes_sent'] / minimum:.4f}" if minimum else "0 | "
        # The reduction's copying is in the CPU seconds too: counted twice, so that its waiting is in.
        print(
            f"| {n} | {least['seconds']:.3f} | {busy:.3f} | {alone / n / (busy + least['reduction_seconds']):.1%} |"
            f" {least['reduction_seconds']:.4f} | {least['reduction_seconds'] / busy:.2%} | {sent} |"
        )


def timed(
    recipe: str, batch_sizes: list[int], processes: int, data_dir: Path | None, rounds: int
) -> list[dict[str, Any]]:
    """`time_updates` in so many new processes of one thread each."""
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["time-updates", recipe, " ".join(map(str, batch_sizes)), folder, "--rounds", str(rounds)]
        arguments += ["--data-dir", str(data_dir)] if data_dir else []
        if processes == 1:
            subprocess.run([sys.executable, "-m", "benchmarks.scaling", *arguments], check=True)
        elif code := start_processes(processes, "benchmarks.scaling", arguments):
            raise typer.Exit(code)
        return json.loads((Path(folder) / "records.json").read_text())


@app.command()
def time_updates(recipe: Recipe, batch_sizes: str, folder: Path, data_dir: DataDir = None, rounds: Rounds = 3) -> None:
    """What each process of `measure` does: one record for each round and batch size."""
    keep_freed_memory()
    with leaving_process_group(), contextlib.ExitStack() as held:
        trainers = []
        for batch_size in map(int, batch_sizes.split()):
            changes = {"large.batch_size": batch_size, "base.epochs": 10_000, "base.lr": 1e-6, "base.milestones": []}
            overrides = [f"{key}={value}" for key, value in changes.items()]
            trainer = Trainer(
                load_recipe(recipe, [*overrides, "precision=fp32"], rung="gbn"),
                data_dir=data_dir,
                out=folder,
                processes=None,
                micro_batch_size=None,
                tracker=None,
                checkpoint_seconds=math.inf,
                timeout_seconds=1800,
            )
            held.enter_context(trainer.opened_run(resume=False))
            trainer.model.train()
            trainers.append((trainer, time_update(trainer, 0)["seconds"]))
        records = [time_round(trainer, turn, first) for turn in range(rounds) for trainer, first in trainers]
    if trainer.rank == 0:
        (folder / "records.json").write_text(json.dumps(records))


def time_round(trainer: Trainer, turn: int, first_seconds: float) -> dict[str, Any]:
    """Medians of some updates, each size's over as many seconds, and the shortest of some reductions by themselves."""
    repeats = torch.tensor(max(1, min(50, int(SECONDS_A_ROUND / first_seconds))))
    if trainer.world_size > 1:
        dist.broadcast(repeats, src=0)
    updates = [time_update(trainer, 1 + turn * 50 + i) for i in range(int(repeats))]
    gradient = torch.cat([parameter.detach().flatten() for parameter in trainer.parameters])
    return {key: statistics.median(update[key] for update in updates) for key in updates[0]} | {
        "batch_size": trainer.regime.batch_size,
        "processes": trainer.world_size,
        "gradient_bytes": gradient.nbytes,
        "reduction_seconds": min(seconds_of_reduction(trainer, gradient) for _ in range(20)),
    }


def time_update(trainer: Trainer, update: int) -> dict[str, float]:
    """Seconds, the CPU seconds of the busiest process, and the bytes sent by all of them."""
    trainer.accelerator.wait_for_everyone()
    sent, busy, began = psutil.net_io_counters(pernic=True)["lo"].bytes_sent, time.process_time(), time.perf_counter()
    trainer.set_rates(update)
    trainer.add_gradients(update)
    trainer.clip_gradients(update)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    trainer.accelerator.wait_for_everyone()
    seconds, busy = time.perf_counter() - began, torch.tensor(time.process_time() - busy)
    sent = psutil.net_io_counters(pernic=True)["lo"].bytes_sent - sent
    if trainer.world_size > 1:
        dist.all_reduce(busy, dist.ReduceOp.MAX)
    return {"seconds": seconds, "cpu_seconds": busy.item(), "bytes_sent": sent}


def seconds_of_reduction(trainer: Trainer, gradient: torch.Tensor) -> float:
    trainer.accelerator.wait_for_everyone()
    began = time.perf_counter()
    if trainer.world_size > 1:
        dist.all_reduce(gradient)
    return time.perf_counter() - began


@app.command()
def model(
    images_per_second: Annotated[float, typer.Option(help="of one device alone")],
    megabytes: Annotated[float, typer.Option(help="of the gradient")],
    smallest: Annotated[int, typer.Option(help="samples that a device needs at once to reach its rate")] = 256,
    fixed_milliseconds: Annotated[float, typer.Option(help="of an update whatever its batch: launches, optimizer")] = 3,
    per_machine: Annotated[int, typer.Option(help="devices")] = 8,
    inside_gigabytes: Annotated[float, typer.Option(help="per second and device, one way, within a machine")] = 240,
    network_gigabytes: Annotated[float, typer.Option(help="per second and device, one way, between machines")] = 20,
    hop_microseconds: Annotated[float, typer.Option(help="latency from one device to the next")] = 10,
) -> None:
    """On paper, for 8 to 1024 devices: time of an update and the batch worth using, which keeps nine tenths computing."""
    print("| devices | reduction ms | batch worth using | a device | its update ms | computing | images/s |")
    print("|---|---|---|---|---|---|---|")
    for devices in (2**k for k in range(3, 11)):
        reduction = reduction_seconds(
            1e6 * megabytes,
            devices,
            per_machine,
            inside=1e9 * inside_gigabytes,
            network=1e9 * network_gigabytes,
            hop=1e-6 * hop_microseconds,
        )
        waiting = reduction + 1e-3 * fixed_milliseconds
        each = max(smallest, math.ceil(9 * waiting * images_per_second))
        computing = each / images_per_second
        update = computing + waiting
        print(
            f"| {devices:,} | {1000 * reduction:.2f} | {devices * each:,} | {each:,} | {1000 * update:.0f} |"
            f" {computing / update:.0%} | {devices * each / update:,.0f} |"
        )


def reduction_seconds(
    size: float, devices: int, per_machine: int, *, inside: float, network: float, hop: float
) -> float:
    """Time of an all-reduce: summed up in parts within each machine, each part over the machines, then handed round.

    Each of w takes in and gives out (w-1) / w of what it reduces, twice, in 2 log2(w) hops.

    Args:
        size: bytes.
        devices, per_machine: how many there are; each device has its own way to the network.
        inside, network: bytes per second of one device, one way.
        hop: seconds from one device to the next.

    Source: Thakur, Rabenseifner and Gropp 2005, "Optimization of collective communication operations in MPICH".
    """
    local = min(devices, per_machine)
    levels = ((local, size, inside), (devices // local, size / local, network))
    return sum(2 * (w - 1) / w * amount / rate + 2 * math.log2(w) * hop for w, amount, rate in levels)


if __name__ == "__main__":
    app()
