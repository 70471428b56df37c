"""The micro-batch that computes fastest on this machine: measured where a run is long enough to earn it, and kept.

Micro-batches change who computes what, never the result (`gbnzoo.train`), but float32 sums in another order round otherwise.
So that a run can be repeated to the bit on its machine, the choice must not hang on chance: whether to measure follows from
counted work, what was measured is kept and asked before anything is measured again, and a run that goes on stays with the
micro-batch that its env.json names.
"""

import contextlib
import copy
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate.utils import parse_flag_from_env
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gbnzoo.data import cache_folder, one_at_a_time
from gbnzoo.launch import usable_accelerator
from gbnzoo.recipe import Recipe
from gbnzoo.regime import Layout, Regime, choose_layout, micro_batch_sizes

MAX_MICRO_BATCH_SIZE = {"cpu": 512, "cuda": 4096}
"""Of the rule that holds where nothing is measured: the largest micro-batch up to this many samples."""

_SHARE_OF_RUN = 0.01  # that measuring may cost
_MIN_SECONDS, _MAX_SECONDS = 1.0, 10.0  # less measures nothing, more is not needed
_MAX_CANDIDATES = 6
_ROUNDS = 5
_GAIN = 1.03  # by which the rule's choice must be beaten: less than that is noise
_MEMORY_SHARE = 0.85  # of what is free on the device: the optimizer's state and the reduction's buckets come later
# More than this no network here has reached (F1 and ResNet-44 in bfloat16: 6.1e11 and 3.1e11 on one core with AVX-512; ResNet-9
# 2.6e14 on an H200, whose matrix products come to 7.9e14), so that no run is thought longer than it is.
_FLOPS_PER_CPU_THREAD, _FLOPS_PER_GPU = 8e11, 8e14  # a second


@dataclass(frozen=True)
class Setting:
    """All that the speed of micro-batches hangs on; what was measured is kept under it.

    Args:
        architecture, architecture_args: as the recipe's `model`.
        input_size: (channels, height, width).
        num_classes: of the output.
        ghost_batch_size: samples normalised together.
        sizes: the micro-batches to choose from, ascending; multiples of ghost_batch_size.
        precision: as the recipe's.
        device: its name; see `device_name`.
        threads: of one process on the CPU; 0 on other devices.
        processes_on_device: that share a GPU's memory, in other runs; the environment's GBNZOO_GPU_SHARE.
        versions: of what computes.
    """

    architecture: str
    architecture_args: Mapping[str, Any]
    input_size: tuple[int, int, int]
    num_classes: int
    ghost_batch_size: int
    sizes: tuple[int, ...]
    precision: str
    device: str
    threads: int
    processes_on_device: int = 1
    versions: Mapping[str, str] = field(default_factory=lambda: {name: version(name) for name in ("gbnzoo", "torch")})

    @property
    def file(self) -> Path:
        """Where what was measured is kept."""
        key = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]
        return cache_folder() / "tuning" / f"{self.architecture}-{key}.json"


def likely_device() -> torch.device:
    """The device that a run started here would be on."""
    if parse_flag_from_env("ACCELERATE_USE_CPU"):
        return torch.device("cpu")
    return usable_accelerator() or torch.device("cpu")


def advice_on_threads(threads: int) -> str:
    """What to say where a process's threads share their cores with other work; nothing where they have them for themselves."""
    if threads == 1:
        return ""
    process = psutil.Process()
    cores = process.cpu_affinity() if hasattr(process, "cpu_affinity") else range(psutil.cpu_count())
    taken_of_each = psutil.cpu_percent(interval=0.2, percpu=True)
    if max(cores) >= len(taken_of_each):  # numbered otherwise there: containers do so, and cores may be off
        return ""
    taken = sum(taken_of_each[core] for core in cores) / 100
    if threads + taken < len(cores) + 0.5:
        return ""
    return (
        f"other work takes {taken:.1f} of {len(cores)} cores, and {threads} threads wait for each other at every step:"
        " OMP_NUM_THREADS=1, or --processes in place of threads, is then faster by far; gbnzoo plan RECIPE --measure times them"
    )


def device_name(device: torch.device) -> str:
    """What a machine calls its processor, its cores counted, or its GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} × {_cpu_name()}"


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def layout_by_rule(regime: Regime, processes: int, device: torch.device, micro_batch_size: int | None = None) -> Layout:
    """What is asked for, or what holds where nothing was measured; raises as `gbnzoo.regime.choose_layout`."""
    return choose_layout(
        regime.batch_size,
        regime.ghost_batch_size,
        processes=processes,
        micro_batch_size=micro_batch_size,
        max_micro_batch_size=MAX_MICRO_BATCH_SIZE["cpu" if device.type == "cpu" else "cuda"],
    )


def setting_of(
    recipe: Recipe,
    layout: Layout,
    input_size: tuple[int, int, int],
    num_classes: int,
    device: torch.device,
    threads: int,
) -> Setting | None:
    """What micro-batches are measured for; None where there is only one, a ghost lies over several processes, or the device is
    neither a CPU nor a CUDA GPU.

    Args:
        recipe: of the run.
        layout: the rule's.
        input_size: (channels, height, width).
        num_classes: in the data.
        device: of one process.
        threads: of one process, were it on a CPU.
    """
    sizes, _ = micro_batch_sizes(layout.batch_size, layout.ghost_batch_size, layout.processes)
    if len(sizes) < 2 or layout.processes_per_ghost > 1 or device.type not in ("cpu", "cuda"):
        return None
    return Setting(
        recipe.model.name,
        recipe.model.args,
        tuple(input_size),
        num_classes,
        layout.ghost_batch_size,
        spread(sizes, layout.micro_batch_size),
        recipe.precision,
        device_name(device),
        threads if device.type == "cpu" else 0,
        int(os.environ.get("GBNZOO_GPU_SHARE", 1)) if device.type == "cuda" else 1,
    )


def spread(sizes: Sequence[int], around: int) -> tuple[int, ...]:
    """At most six of the micro-batches that fit, ascending: `around`, and what is nearest to it divided and times 2, 4 and 8.

    More of the smaller ones: a cache, or memory, may want them, and to try them takes less time.
    """
    chosen = {around}
    for power in (-1, -2, 1, -3, 2, -4, 3, -5, -6):
        if len(chosen) < _MAX_CANDIDATES:
            chosen.add(min(sizes, key=lambda size: abs(size - around * 2**power)))
    return tuple(sorted(chosen))


def measuring_seconds(model: nn.Module, setting: Setting, samples: int) -> float:
    """How long may be measured for a run's sake, 0 for not at all: a hundredth of the shortest time it can take.

    Under one second nothing is measured. That time is the run's work, counted and not measured, so that the answer is the same
    each time: floating-point operations of a forward pass, three times that with the backward pass, on so many threads.

    Args:
        model: on any device, "meta" too; left as it is.
        setting: of the run.
        samples: that one process will run forward.
    """
    parameter = next(model.parameters())
    model = copy.deepcopy(model).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, *setting.input_size, device=parameter.device, dtype=parameter.dtype))
    per_second = setting.threads * _FLOPS_PER_CPU_THREAD or _FLOPS_PER_GPU
    seconds = _SHARE_OF_RUN * 3 * counter.get_total_flops() * samples / per_second
    return min(seconds, _MAX_SECONDS) if seconds >= _MIN_SECONDS else 0.0


def fastest_micro_batch(setting: Setting, default: int, measure: Callable[[], Mapping[int, float]]) -> int:
    """The micro-batch that took least time for each sample, as it was measured before, or else is now.

    Args:
        setting: of the run.
        default: what the rule would take; it stays unless it is beaten by 3 %.
        measure: gives the seconds for each sample by micro-batch, of those that could be tried; called at most once, and by
            one process of a machine at a time. Where the result cannot be kept, each run measures.
    """
    seconds = kept(setting)
    if seconds is None:
        with one_at_a_time(setting.file.parent):
            seconds = kept(setting)
            if seconds is None:
                seconds = dict(measure())
                with contextlib.suppress(OSError):
                    _keep(setting, seconds)
    return choose(seconds, setting.sizes, default)


def choose(seconds: Mapping[int, float], sizes: Sequence[int], default: int) -> int:
    """By the seconds for each sample; the smallest of all sizes where not even that could be tried."""
    if not seconds:
        return min(sizes)
    best = min(seconds, key=seconds.__getitem__)
    return default if default in seconds and seconds[default] < _GAIN * seconds[best] else best


def kept(setting: Setting) -> dict[int, float] | None:
    """Seconds for each sample by micro-batch, as measured before; None where they were not."""
    try:
        content = json.loads(setting.file.read_text(encoding="utf-8"))
        return {int(size): float(seconds) for size, seconds in content["seconds_per_sample"].items()}
    except (OSError, ValueError, KeyError, AttributeError):
        return None


def _keep(setting: Setting, seconds: Mapping[int, float]) -> None:
    content = {"setting": asdict(setting), "seconds_per_sample": dict(seconds)}
    aside = setting.file.with_suffix(f".{os.getpid()}.writing")
    aside.write_text(json.dumps(content, indent=1), encoding="utf-8")
    aside.replace(setting.file)


def time_sizes(sizes: Sequence[int], time_pass: Callable[[int], float], max_seconds: float) -> dict[int, float]:
    """Seconds for each sample, by micro-batch: the best of up to five passes each, in turns, after one that warms up.

    It begins with the smallest. One that ran out of memory, and one that would need more than its share of the time by what the
    smaller ones took, ends the trying of larger ones.

    Args:
        sizes: ascending.
        time_pass: runs one micro-batch forward and backward and returns its seconds; raises torch.OutOfMemoryError.
        max_seconds: for all.
    """
    best: dict[int, float] = {}
    spent = 0.0
    for size in sizes:
        if best and 2 * size * min(best.values()) > min(max_seconds / 4, max_seconds - spent):
            break
        try:
            warm_up, seconds = time_pass(size), time_pass(size)
        except torch.OutOfMemoryError:
            break
        spent += warm_up + seconds
        best[size] = seconds / size
    for _ in range(_ROUNDS - 1):
        for size in best:
            if spent + size * best[size] > max_seconds:
                return best
            seconds = time_pass(size)
            spent += seconds
            best[size] = min(best[size], seconds / size)
    return best


def training_pass(model: nn.Module, setting: Setting) -> Callable[[int], float]:
    """A function that trains one micro-batch of random images on a copy of the model, without an update, and times it.

    The model's parameters, gradients and running statistics, and the state of torch's random generators, stay what they are.
    One thread is timed by its CPU time, from which a busy machine takes nothing; more threads and GPUs by the clock.

    Args:
        model: on its device.
        setting: of the run.

    Returns:
        A function of the micro-batch size that returns seconds. It raises torch.OutOfMemoryError where the device's memory, or
        the share of it that training can count on, is not enough.
    """
    model = copy.deepcopy(model).train()
    parameter = next(model.parameters())
    device, dtype = parameter.device, parameter.dtype
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    generator = torch.Generator().manual_seed(0)

    def run(size: int) -> float:
        images = torch.randn(size, *setting.input_size, generator=generator)
        images = images.to(device, dtype, memory_format=torch.channels_last)
        labels = torch.randint(setting.num_classes, (size,), generator=generator).to(device)
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            _within_memory(device, setting.processes_on_device),
        ):
            began = _now(device, clock)
            with torch.autocast(device.type, torch.bfloat16, enabled=setting.precision == "bf16"):
                loss = nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            seconds = _now(device, clock) - began
        model.zero_grad()
        return seconds

    return run


def _now(device: torch.device, clock: Callable[[], float]) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock()


@contextlib.contextmanager
def _within_memory(device: torch.device, processes: int) -> Iterator[None]:
    """Raise torch.OutOfMemoryError where what is done inside leaves too little of a GPU's memory."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    ours = min(free, total / processes)
    before = torch.cuda.memory_reserved(device)
    torch.cuda.reset_peak_memory_stats(device)
    yield
    used = torch.cuda.max_memory_reserved(device) - before
    if used > _MEMORY_SHARE * ours:
        raise torch.OutOfMemoryError(f"{used:,} bytes of {ours:,} that can be had on {device}")
