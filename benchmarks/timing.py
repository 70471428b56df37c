"""Contenders in one run, in turns, so that what else the machine does meets all of them."""

import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version

import torch

Times = dict[str, list[float]]


def interleave(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    warmups: int = 1,
    clock: Callable[[], float] = time.process_time,
) -> Times:
    """Seconds of CPU time of this process for each call, `rounds` of each contender, in turns.

    CPU time, since waiting for a shared core is nobody's fault; so give it one thread, or another clock. Each round has an
    order and a heap of its own: what ran before leaves caches warm or cold, and whether new tensors come to lie where the last
    ones did is luck that lasts as long as a process. Either has been a third of a call's time.
    """
    times: Times = {name: [] for name in contenders}
    draw, names = random.Random(0), list(contenders)
    for i in range(warmups + rounds):
        draw.shuffle(names)
        blocks = [torch.empty(draw.randrange(1 << 22), dtype=torch.uint8) for _ in range(16)]
        del blocks[::2]
        for name in names:
            began = clock()
            contenders[name]()
            if i >= warmups:
                times[name].append(clock() - began)
    return times


def ratio(times: Times, numerator: str, denominator: str) -> str:
    """Median and quartiles over the rounds of numerator's time over denominator's: `2.31 (2.28–2.35)`."""
    low, middle, high = quartiles([a / b for a, b in zip(times[numerator], times[denominator], strict=True)])
    return f"{middle:.2f} ({low:.2f}–{high:.2f})"


def rate(times: Sequence[float], images: int) -> str:
    """Median images per second with its quartiles."""
    low, middle, high = quartiles([images / seconds for seconds in times])
    return f"{middle:,.0f} ({low:,.0f}–{high:,.0f})"


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def setting() -> str:
    """Processor, threads, load and versions, for the line above a table."""
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            model = next((line.split(": ")[1].strip() for line in lines if line.startswith("model name")), model)
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision", "timm"))
    capability = torch.backends.cpu.get_cpu_capability()
    threads = torch.get_num_threads()
    return f"{model} ({capability}), {threads} thread(s), load {os.getloadavg()[0]:.1f}; {versions}"
