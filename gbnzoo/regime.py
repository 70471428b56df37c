"""Training regimes as pure arithmetic: which batches, how many updates, which learning rate when, spread out how.

The ladder of Hoffer, Hubara and Soudry 2017 (arXiv 1705.08741): every rung adds one cure to the rung before it. Standard
library only, so that `gbnzoo plan` can tell what a run will do before anything heavy is imported.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

Schedule = Literal["milestones", "cosine", "linear", "quadratic", "constant"]
LrScaling = Literal["none", "sqrt", "linear"]


@dataclass(frozen=True)
class Rung:
    """How much of the paper applies to a run.

    `adapts_lr` also brings what the paper joins to it: gradient-norm clipping and, where a recipe has it, gradient noise.
    """

    name: str
    is_large: bool = False
    adapts_lr: bool = False
    has_ghosts: bool = False
    adapts_length: bool = False


RUNGS = {
    rung.name: rung
    for rung in (
        Rung("sb"),
        Rung("lb", is_large=True),
        Rung("lr", is_large=True, adapts_lr=True),
        Rung("gbn", is_large=True, adapts_lr=True, has_ghosts=True),
        Rung("ra", is_large=True, adapts_lr=True, has_ghosts=True, adapts_length=True),
    )
}


@dataclass(frozen=True)
class Regime:
    """What one run does, counted in updates (optimiser steps).

    Args:
        num_samples: training samples in the data set.
        batch_size: samples per update, over all devices and accumulation steps.
        ghost_batch_size: samples normalised together; divides batch_size.
        total_updates: length of the run.
        lr: learning rate after scaling with the batch, before the schedule.
        schedule: "milestones" multiplies by one factor of `lr_decay` at each milestone; "cosine", "linear" and "quadratic"
            (the polynomial of power 2 that LARS is used with) fall to zero over the updates after warm-up; "constant" stays.
        milestones: updates at which the rate changes, ascending.
        lr_decay: one factor per milestone.
        warmup_updates: updates over which the rate rises linearly to `lr`.
        weight_decay_updates: updates after which weight decay is zero.
        clip_grad_norm: bound on the norm of the whole gradient, or None.
        gradient_noise_sigma: standard deviation of the noise on the gradient, 0 for none.
    """

    rung: Rung
    num_samples: int
    batch_size: int
    ghost_batch_size: int
    total_updates: int
    lr: float
    schedule: Schedule
    milestones: tuple[int, ...]
    lr_decay: tuple[float, ...]
    warmup_updates: int
    weight_decay_updates: int
    clip_grad_norm: float | None
    gradient_noise_sigma: float

    @property
    def num_ghosts(self) -> int:
        return self.batch_size // self.ghost_batch_size

    @property
    def samples_seen(self) -> int:
        return self.total_updates * self.batch_size

    @property
    def epochs(self) -> float:
        return self.samples_seen / self.num_samples

    @property
    def highest_lr(self) -> float:
        """No update's is higher."""
        return self.lr * max(math.prod(self.lr_decay[:k]) for k in range(len(self.lr_decay) + 1))

    def begins_epoch(self, update: int) -> bool:
        """Whether an update is the first that begins in its pass over the data, the very first pass aside."""
        return update * self.batch_size // self.num_samples > max(0, update - 1) * self.batch_size // self.num_samples

    def lr_at(self, update: int) -> float:
        """Learning rate of one update.

        Linear warm-up multiplies whatever the schedule says; decay to zero begins where warm-up ends.

        Args:
            update: optimiser steps finished so far, 0 <= update < total_updates.
        """
        warmup = min(1.0, (update + 1) / self.warmup_updates) if self.warmup_updates else 1.0
        if self.schedule == "milestones":
            return (
                self.lr
                * warmup
                * math.prod(d for m, d in zip(self.milestones, self.lr_decay, strict=True) if update >= m)
            )
        progress = max(0, update - self.warmup_updates) / max(1, self.total_updates - self.warmup_updates)
        decay = {
            "cosine": (1 + math.cos(math.pi * progress)) / 2,
            "linear": 1 - progress,
            "quadratic": (1 - progress) ** 2,
            "constant": 1.0,
        }
        return self.lr * warmup * decay[self.schedule]


def derive_regime(
    rung: str,
    *,
    num_samples: int,
    batch_size: int,
    epochs: float,
    lr: float,
    large_batch_size: int,
    ghost_batch_size: int,
    lr_scaling: LrScaling = "sqrt",
    lr_reference_batch_size: int | None = None,
    schedule: Schedule = "milestones",
    milestones: tuple[float, ...] = (),
    lr_decay: tuple[float, ...] = (),
    warmup_epochs: float = 0,
    weight_decay_epochs: float | None = None,
    clip_grad_norm: float | None = None,
    gradient_noise_sigma: float = 0.0,
) -> Regime:
    """One rung of the ladder, derived from the small-batch regime.

    `sb lb lr gbn` make floor(epochs · n / batch) updates; `ra` makes exactly as many as `sb`. A point in time given in
    epochs falls at floor(epoch · n / batch) of the rung, for `ra` at the update where `sb` has it. Where a rung has no
    ghosts of its own the whole batch is one.

    Args:
        rung: key of RUNGS.
        num_samples: training samples in the data set.
        batch_size, epochs, lr, milestones (epochs), lr_decay, warmup_epochs, weight_decay_epochs: the small-batch regime.
        large_batch_size, ghost_batch_size, lr_scaling, lr_reference_batch_size, clip_grad_norm, gradient_noise_sigma: what the
            large-batch rungs use; lr_scaling multiplies lr by 1, sqrt(L / S) or L / S for the large batch L and the reference
            S, which is batch_size where none is given.

    Raises:
        ValueError: if no update would be made.

    Source: Hoffer et al. 2017, arXiv 1705.08741, sections 4 to 6.
    """
    chosen = RUNGS[rung]
    batch = large_batch_size if chosen.is_large else batch_size
    clock_batch = batch_size if chosen.adapts_length else batch

    def updates(at_epoch: float) -> int:
        # Through the decimal digits, so that 0.7 epochs of 1000 samples is 700 and not 699.
        return math.floor(Fraction(str(at_epoch)) * num_samples / clock_batch)

    total_updates = updates(epochs)
    if total_updates < 1:
        raise ValueError(
            f"rung {rung} would make no update: {epochs} epochs of {num_samples} samples in batches of {batch};"
            f" at least {math.ceil(clock_batch / num_samples * 100) / 100} epochs are needed"
        )
    ratio = large_batch_size / (lr_reference_batch_size or batch_size)
    scale = {"none": 1.0, "sqrt": math.sqrt(ratio), "linear": ratio}[lr_scaling] if chosen.adapts_lr else 1.0
    return Regime(
        rung=chosen,
        num_samples=num_samples,
        batch_size=batch,
        ghost_batch_size=ghost_batch_size if chosen.has_ghosts else batch,
        total_updates=total_updates,
        lr=lr * scale,
        schedule=schedule,
        milestones=tuple(updates(m) for m in milestones),
        lr_decay=lr_decay,
        warmup_updates=updates(warmup_epochs),
        weight_decay_updates=total_updates if weight_decay_epochs is None else updates(weight_decay_epochs),
        clip_grad_norm=clip_grad_norm if chosen.adapts_lr else None,
        gradient_noise_sigma=gradient_noise_sigma if chosen.adapts_lr else 0.0,
    )


@dataclass(frozen=True)
class Layout:
    """How the batch of one update is spread over processes and accumulation steps; never changes the result.

    Processes stand in groups: of one where a micro-batch holds whole ghosts, else of the consecutive processes that hold
    each ghost together. Group j of G has the ghosts j, j + G, j + 2G, … of the global batch and takes them in that order, so
    that running statistics can be merged exactly (see `gbnzoo.norm.shard_running_statistics`).

    Args:
        batch_size: samples per update.
        ghost_batch_size: samples normalised together.
        processes: one per device.
        micro_batch_size: samples of one forward pass on one process: some whole ghosts, or an equal part of one.
    """

    batch_size: int
    ghost_batch_size: int
    processes: int
    micro_batch_size: int

    def __str__(self) -> str:
        spread = (
            f"{self.processes} process(es) × {self.accumulation} accumulation × micro-batch {self.micro_batch_size:,}"
        )
        return f"{spread}, each ghost over {self.processes_per_ghost}" if self.processes_per_ghost > 1 else spread

    @property
    def accumulation(self) -> int:
        return self.batch_size // (self.processes * self.micro_batch_size)

    @property
    def processes_per_ghost(self) -> int:
        return max(1, self.ghost_batch_size // self.micro_batch_size)

    @property
    def groups(self) -> int:
        return self.processes // self.processes_per_ghost

    def micro_batches(self, rank: int) -> list[list[range]]:
        """Positions in the global batch that process `rank` takes: per accumulation step, one range per ghost."""
        group, place = divmod(rank, self.processes_per_ghost)
        part = min(self.micro_batch_size, self.ghost_batch_size)
        first = group * self.ghost_batch_size + place * part
        ghosts = [
            range(start, start + part) for start in range(first, self.batch_size, self.groups * self.ghost_batch_size)
        ]
        per_step = self.micro_batch_size // part
        return [ghosts[i : i + per_step] for i in range(0, len(ghosts), per_step)]


def choose_layout(
    batch_size: int,
    ghost_batch_size: int,
    *,
    processes: int = 1,
    micro_batch_size: int | None = None,
    max_micro_batch_size: int = 512,
) -> Layout:
    """The layout asked for, or the one with the largest micro-batch up to `max_micro_batch_size`.

    Whole ghosts go before parts, which cost an exchange in every normalisation, forward and backward. Where every micro-batch
    is above the maximum, the smallest is taken.

    Raises:
        ValueError: naming the process counts or micro-batch sizes that fit.
    """
    ghosts = batch_size // ghost_batch_size
    whole, parts = micro_batch_sizes(batch_size, ghost_batch_size, processes)
    if not whole and not parts:
        near = {n for n in range(1, 2 * processes + 1) if any(micro_batch_sizes(batch_size, ghost_batch_size, n))}
        raise ValueError(
            f"batch_size {batch_size} cannot be split over {processes} processes into micro-batches that are multiples, or"
            f" equal parts, of ghost_batch_size {ghost_batch_size}; it fits on {_listed({*_divisors(ghosts)} | near)} processes"
        )
    if micro_batch_size is None:
        sizes = whole or parts
        micro_batch_size = max((size for size in sizes if size <= max_micro_batch_size), default=min(sizes))
    if micro_batch_size not in (*whole, *parts):
        elsewhere = ""
        if 0 < micro_batch_size < ghost_batch_size and ghost_batch_size % micro_batch_size == 0:
            members = ghost_batch_size // micro_batch_size
            elsewhere = f", and {micro_batch_size} fits on {_listed(members * d for d in _divisors(ghosts))} processes"
        raise ValueError(
            f"micro_batch_size {micro_batch_size} does not cut batch_size {batch_size} over {processes} process(es) into whole"
            f" ghosts of {ghost_batch_size}, nor into equal parts that lie on different processes (accumulation steps cannot"
            f" share a ghost); {_listed([*parts, *whole])} fit{elsewhere}"
        )
    return Layout(batch_size, ghost_batch_size, processes, micro_batch_size)


def micro_batch_sizes(batch_size: int, ghost_batch_size: int, processes: int) -> tuple[list[int], list[int]]:
    """Sizes that give each process whole ghosts, ascending, and sizes that give it an equal part of one."""
    ghosts = batch_size // ghost_batch_size
    whole = [ghost_batch_size * d for d in _divisors(ghosts // processes)] if ghosts % processes == 0 else []
    parts = [
        ghost_batch_size // members
        for members in _divisors(processes)[1:]
        if ghost_batch_size % members == 0 and ghosts % (processes // members) == 0
    ]
    return whole, parts


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _listed(values: Iterable[int]) -> str:
    *head, last = map(str, sorted(values))
    return f"{', '.join(head)} or {last}" if head else last
