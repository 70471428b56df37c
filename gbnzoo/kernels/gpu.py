"""The ghost norm on NVIDIA GPUs, in Triton: the operators of `cpu.py` for CUDA tensors.

Tensors are seen as [samples, C, P] with P pixels; in channels-last layouts the pixels count as samples, and P is 1. A *slab*
is one channel of one ghost, or, where P is 1, some adjacent channels of it. `plan` chooses one of two ways by its size:

- resident: a program holds a slab in registers, and memory is read once and written once;
- split: several programs share a slab. One launch takes the statistics of all slabs, a second one normalises them, from the
  last rows to the first, of which the cache still holds some. Two ways to read memory only once were no faster (LOG.md):
  two launches for each group of slabs that fit the cache, and one launch whose programs take parts from a queue.

Values are float32, bfloat16 or float16, all arithmetic is float32.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from gbnzoo.kernels.cpu import _as, _dense

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Of each tensor that it reads, a program holds so many bytes in registers, or so many values; with more it spills.
RESIDENT_BYTES = 64 << 10
RESIDENT_VALUES = {"forward": 32768, "backward": 16384}
STREAMED_TILE = 2048  # values of a tensor that a program works on at a time where its slab is not resident
PROGRAMS_PER_PROCESSOR = 8  # at least, where slabs are split and that takes no more than
MAX_SPLITS = 256  # of one: each of its programs merges the statistics of all
VALUES_PER_THREAD = 16  # two accesses of 16 bytes in bfloat16


@dataclass(frozen=True)
class Plan:
    """How a tensor's slabs are worked on: `rows` × `channels` values of one at a time."""

    way: str
    rows: int
    channels: int
    slabs: int
    splits: int  # programs that share a slab

    @property
    def warps(self) -> int:
        return min(16, max(1, self.rows * self.channels // (32 * VALUES_PER_THREAD)))


@functools.lru_cache(maxsize=1024)
def plan(
    direction: str, ghosts: int, values: int, channels: int, pixels: int, element_bytes: int, processors: int
) -> Plan:
    """How to normalise equal ghosts.

    Args:
        direction: "forward" or "backward".
        values: of one channel in each ghost.
        channels, pixels: C and P.
        element_bytes: of one value.
        processors: of the device, its multiprocessors.
    """
    # Adjacent channels that make whole sectors of 32 bytes, better whole cache lines.
    widths = [1] if pixels > 1 else [min(triton.next_power_of_2(channels), n // element_bytes) for n in (64, 32)]
    most = min(RESIDENT_VALUES[direction], RESIDENT_BYTES // element_bytes)
    for width in widths:
        rows = triton.next_power_of_2(values)
        if rows * width <= most:
            slabs = ghosts * triton.cdiv(channels, width)
            return Plan("resident", rows, width, slabs, 1)

    width = widths[0]
    rows = STREAMED_TILE // width
    slabs = ghosts * triton.cdiv(channels, width)
    splits = min(triton.cdiv(PROGRAMS_PER_PROCESSOR * processors, slabs), triton.cdiv(values, rows))
    return Plan("split", rows, width, slabs, min(MAX_SPLITS, triton.next_power_of_2(splits)))


# ------------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _channels(slab, C: tl.constexpr, CHANNELS: tl.constexpr):
    """The slab's ghost and its channels."""
    blocks: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    return slab // blocks, slab % blocks * CHANNELS + tl.arange(0, CHANNELS)


@triton.jit
def _tile(
    slab,
    row,
    end,
    values,
    C: tl.constexpr,
    P: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Where the slab's rows from `row` on lie, and which of them are before `end`: both [ROWS, CHANNELS]."""
    ghost, channels = _channels(slab, C, CHANNELS)
    rows = row + tl.arange(0, ROWS)
    first = tl.cast(ghost * (values // P), tl.int64) * (C * P)
    offsets = ((rows // P) * (C * P) + rows % P)[:, None] + (channels * P)[None, :]
    mask = tl.full([ROWS, CHANNELS], True, tl.int1) if EVEN else (rows < end)[:, None] & (channels < C)[None, :]
    return first + offsets, mask


@triton.jit
def _load(x, offsets, mask, POLICY: tl.constexpr):
    return tl.load(x + offsets, mask=mask, other=0.0, eviction_policy=POLICY).to(tl.float32)


@triton.jit
def _store(x, offsets, values, mask):
    tl.store(x + offsets, values.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _read(statistics, slab, C: tl.constexpr, CHANNELS: tl.constexpr):
    """The slab's entries of a tensor [G, C]."""
    ghost, channels = _channels(slab, C, CHANNELS)
    return tl.load(statistics + ghost * C + channels, mask=channels < C, other=0.0)


@triton.jit
def _write(statistics, slab, entries, C: tl.constexpr, CHANNELS: tl.constexpr):
    ghost, channels = _channels(slab, C, CHANNELS)
    tl.store(statistics + ghost * C + channels, entries, mask=channels < C)


@triton.jit
def _read_parts(parts, entries, slab, C: tl.constexpr, CHANNELS: tl.constexpr, SPLITS: tl.constexpr):
    """The slab's entries of a tensor [splits, G, C] with so many entries to a split: [splits, channels]."""
    ghost, channels = _channels(slab, C, CHANNELS)
    offsets = tl.arange(0, SPLITS)[:, None] * entries + (ghost * C + channels)[None, :]
    return tl.load(parts + offsets, mask=(channels < C)[None, :], other=0.0)


@triton.jit
def _parameter(parameter, slab, C: tl.constexpr, CHANNELS: tl.constexpr, DEFAULT: tl.constexpr):
    """The slab's entries of a parameter [C], or what stands for it where there is none."""
    _, channels = _channels(slab, C, CHANNELS)
    if parameter is None:
        values = tl.full([CHANNELS], DEFAULT, tl.float32)
    else:
        values = tl.load(parameter + channels, mask=channels < C, other=DEFAULT).to(tl.float32)
    return values


@triton.jit
def _merge(mean, squares, count, total):
    """Mean, what rounding it left over, and sum of squared deviations of all parts along axis 0, from those of each part.

    The mean is taken twice, the second time of what the first one missed: rounding its sum has cost it digits.
    """
    rough = tl.sum(mean * count, 0) / total
    missed = tl.sum((mean - rough[None, :]) * count, 0) / total
    mean_of_all = rough + missed
    deviation = mean - mean_of_all[None, :]
    return mean_of_all, (rough - mean_of_all) + missed, tl.sum(squares + deviation * deviation * count, 0)


@triton.jit
def _moments(
    x,
    slab,
    begin,
    end,
    values,
    C: tl.constexpr,
    P: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """`_merge` of some rows of a slab, which stay in L2: by Welford's algorithm in every lane of a tile."""
    mean = tl.zeros([ROWS, CHANNELS], tl.float32)
    squares = tl.zeros([ROWS, CHANNELS], tl.float32)
    seen = 0.0
    for row in range(begin, end, ROWS):
        offsets, mask = _tile(slab, row, end, values, C, P, ROWS, CHANNELS, EVEN)
        value = _load(x, offsets, mask, "evict_last")
        seen += 1.0
        deviation = tl.where(mask, value - mean, 0.0)
        mean += deviation * (1.0 / seen)
        squares += deviation * (value - mean)
    count = tl.maximum(end - begin - tl.arange(0, ROWS) + ROWS - 1, 0) // ROWS
    return _merge(mean, squares, count.to(tl.float32)[:, None], tl.maximum(end - begin, 1))


@triton.jit
def _save_statistics(
    mean, squares, mean_out, variance_out, invstd_out, slab, values, eps, C: tl.constexpr, CHANNELS: tl.constexpr
):
    invstd = tl.div_rn(1.0, tl.sqrt_rn(squares / values + eps))
    _write(mean_out, slab, mean, C, CHANNELS)
    _write(variance_out, slab, squares / (values - 1), C, CHANNELS)
    _write(invstd_out, slab, invstd, C, CHANNELS)
    return invstd


@triton.jit
def _normalize(value, mean, scale, shift):
    return (value - mean[None, :]) * scale[None, :] + shift[None, :]


@triton.jit
def _finish(normalized, residual, y, offsets, mask, RELU: tl.constexpr):
    """Add the residual, take the ReLU, write."""
    if residual is not None:
        normalized += _load(residual, offsets, mask, "evict_first")
    if RELU:
        normalized = tl.where(normalized < 0.0, 0.0, normalized)  # NaN stays; tl.maximum drops it
    _store(y, offsets, normalized, mask)


@triton.jit
def _backwards(step, begin, end, ROWS: tl.constexpr):
    """The row that is `step` rows before the last tile of those from begin to end: what was read last is still in the cache."""
    return begin + (end - begin - 1) // ROWS * ROWS - step


@triton.jit
def _normalize_rows(
    x, residual, y, mean, scale, shift, slab, begin, end, values,
    C: tl.constexpr, P: tl.constexpr, RELU: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    for step in range(0, end - begin, ROWS):
        row = _backwards(step, begin, end, ROWS)
        offsets, mask = _tile(slab, row, end, values, C, P, ROWS, CHANNELS, EVEN)
        value = _load(x, offsets, mask, "evict_first")
        _finish(_normalize(value, mean, scale, shift), residual, y, offsets, mask, RELU)


@triton.jit
def _forward(
    x, residual, y, weight, bias, mean_out, variance_out, invstd_out, values, eps,
    C: tl.constexpr, P: tl.constexpr, RELU: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """A slab that fits the tile."""
    slab = tl.program_id(0)
    offsets, mask = _tile(slab, 0, values, values, C, P, ROWS, CHANNELS, EVEN)
    value = _load(x, offsets, mask, "evict_first")
    mean, rest, squares = _merge(value, 0.0, mask.to(tl.float32), values)
    invstd = _save_statistics(mean, squares, mean_out, variance_out, invstd_out, slab, values, eps, C, CHANNELS)
    scale = invstd * _parameter(weight, slab, C, CHANNELS, 1.0)
    shift = _parameter(bias, slab, C, CHANNELS, 0.0) - rest * scale
    _finish(_normalize(value, mean, scale, shift), residual, y, offsets, mask, RELU)


@triton.jit
def _forward_statistics(
    x, means, squares, values, values_of_part, entries,
    C: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Mean and squared deviations of each part of a slab, into tensors [splits, G, C]."""
    slab, part = tl.program_id(0), tl.program_id(1)
    begin = part * values_of_part
    end = tl.minimum(begin + values_of_part, values)
    mean, _, square = _moments(x, slab, begin, end, values, C, P, ROWS, CHANNELS, EVEN)
    _write(means + part * entries, slab, mean, C, CHANNELS)
    _write(squares + part * entries, slab, square, C, CHANNELS)


@triton.jit
def _forward_apply(
    x, residual, y, weight, bias, means, squares, mean_out, variance_out, invstd_out,
    values, values_of_part, entries, eps,
    C: tl.constexpr, P: tl.constexpr, RELU: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, EVEN: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """Normalise each part of a slab. All its programs merge the parts' statistics and write the same result."""
    slab, part = tl.program_id(0), tl.program_id(1)
    means = _read_parts(means, entries, slab, C, CHANNELS, SPLITS)
    squares = _read_parts(squares, entries, slab, C, CHANNELS, SPLITS)
    count = tl.minimum(tl.maximum(values - tl.arange(0, SPLITS) * values_of_part, 0), values_of_part)
    mean, rest, square = _merge(means, squares, count.to(tl.float32)[:, None], values)
    invstd = _save_statistics(mean, square, mean_out, variance_out, invstd_out, slab, values, eps, C, CHANNELS)
    scale = invstd * _parameter(weight, slab, C, CHANNELS, 1.0)
    shift = _parameter(bias, slab, C, CHANNELS, 0.0) - rest * scale
    begin = part * values_of_part
    end = tl.minimum(begin + values_of_part, values)
    _normalize_rows(x, residual, y, mean, scale, shift, slab, begin, end, values, C, P, RELU, ROWS, CHANNELS, EVEN)


@triton.jit
def _gradient(dy, y, deviation, scale, shift, offsets, mask, RELU: tl.constexpr, POLICY: tl.constexpr):
    """dy where the ReLU let its input pass: its output is y, or not kept, and computed again."""
    gradient = _load(dy, offsets, mask, POLICY)
    if RELU:
        output = deviation * scale[None, :] + shift[None, :] if y is None else _load(y, offsets, mask, "evict_first")
        gradient = tl.where(output > 0.0, gradient, 0.0)
    return gradient


@triton.jit
def _store_dx(dx, gradient, deviation, total, dot, scale, invstd, values, offsets, mask):
    slope = invstd * invstd * dot / values
    centered = gradient - (total / values)[None, :] - deviation * slope[None, :]
    _store(dx, offsets, scale[None, :] * centered, mask)


@triton.jit
def _sums(
    dy, x, y, dresidual, mean, scale, shift, slab, begin, end, values,
    C: tl.constexpr, P: tl.constexpr, RELU: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Over some rows of a slab, the sums of the gradient and of its product with x - mean.

    What the second pass reads stays in L2: x and dy, or x and the residual's gradient, which is written here.
    """
    total = tl.zeros([ROWS, CHANNELS], tl.float32)
    dot = tl.zeros([ROWS, CHANNELS], tl.float32)
    policy: tl.constexpr = "evict_last" if y is None else "evict_first"
    for row in range(begin, end, ROWS):
        offsets, mask = _tile(slab, row, end, values, C, P, ROWS, CHANNELS, EVEN)
        deviation = _load(x, offsets, mask, "evict_last") - mean[None, :]
        gradient = _gradient(dy, y, deviation, scale, shift, offsets, mask, RELU, policy)
        if y is not None:
            _store(dresidual, offsets, gradient, mask)
        total += gradient
        dot += gradient * deviation
    return tl.sum(total, 0), tl.sum(dot, 0)


@triton.jit
def _dx_rows(
    dy, x, y, dx, dresidual, mean, invstd, scale, shift, total, dot, slab, begin, end, values,
    C: tl.constexpr, P: tl.constexpr, RELU: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    for step in range(0, end - begin, ROWS):
        row = _backwards(step, begin, end, ROWS)
        offsets, mask = _tile(slab, row, end, values, C, P, ROWS, CHANNELS, EVEN)
        deviation = _load(x, offsets, mask, "evict_first") - mean[None, :]
        if y is None:
            gradient = _gradient(dy, None, deviation, scale, shift, offsets, mask, RELU, "evict_first")
        else:
            gradient = _load(dresidual, offsets, mask, "evict_first")
        _store_dx(dx, gradient, deviation, total, dot, scale, invstd, values, offsets, mask)


@triton.jit
def _backward(
    dy, x, y, weight, bias, mean, invstd, dx, dresidual, dweight, dbias, values,
    C: tl.constexpr, P: tl.constexpr, RELU: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """A slab that fits the tile; dweight and dbias of each ghost into tensors [G, C].

    y is kept where a ReLU followed a residual.
    """
    slab = tl.program_id(0)
    slab_mean, slab_invstd = _read(mean, slab, C, CHANNELS), _read(invstd, slab, C, CHANNELS)
    scale = slab_invstd * _parameter(weight, slab, C, CHANNELS, 1.0)
    shift = _parameter(bias, slab, C, CHANNELS, 0.0)
    offsets, mask = _tile(slab, 0, values, values, C, P, ROWS, CHANNELS, EVEN)
    deviation = _load(x, offsets, mask, "evict_first") - slab_mean[None, :]
    gradient = _gradient(dy, y, deviation, scale, shift, offsets, mask, RELU, "evict_first")
    if y is not None:
        _store(dresidual, offsets, gradient, mask)
    total, dot = tl.sum(gradient, 0), tl.sum(gradient * deviation, 0)
    _store_dx(dx, gradient, deviation, total, dot, scale, slab_invstd, values, offsets, mask)
    _write(dweight, slab, dot * slab_invstd, C, CHANNELS)
    _write(dbias, slab, total, C, CHANNELS)


@triton.jit
def _backward_sums(
    dy, x, y, weight, bias, mean, invstd, dresidual, totals, dots, values, values_of_part, entries,
    C: tl.constexpr, P: tl.constexpr, RELU: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """`_sums` of each part of a slab, into tensors [splits, G, C]."""
    slab, part = tl.program_id(0), tl.program_id(1)
    scale = _read(invstd, slab, C, CHANNELS) * _parameter(weight, slab, C, CHANNELS, 1.0)
    shift = _parameter(bias, slab, C, CHANNELS, 0.0)
    begin = part * values_of_part
    end = tl.minimum(begin + values_of_part, values)
    total, dot = _sums(
        dy, x, y, dresidual, _read(mean, slab, C, CHANNELS), scale, shift, slab, begin, end, values,
        C, P, RELU, ROWS, CHANNELS, EVEN,
    )  # fmt: skip
    _write(totals + part * entries, slab, total, C, CHANNELS)
    _write(dots + part * entries, slab, dot, C, CHANNELS)


@triton.jit
def _backward_apply(
    dy, x, y, weight, bias, mean, invstd, dx, dresidual, dweight, dbias, totals, dots,
    values, values_of_part, entries,
    C: tl.constexpr, P: tl.constexpr, RELU: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, EVEN: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    slab, part = tl.program_id(0), tl.program_id(1)
    total = tl.sum(_read_parts(totals, entries, slab, C, CHANNELS, SPLITS), 0)
    dot = tl.sum(_read_parts(dots, entries, slab, C, CHANNELS, SPLITS), 0)
    slab_mean, slab_invstd = _read(mean, slab, C, CHANNELS), _read(invstd, slab, C, CHANNELS)
    _write(dweight, slab, dot * slab_invstd, C, CHANNELS)
    _write(dbias, slab, total, C, CHANNELS)
    scale = slab_invstd * _parameter(weight, slab, C, CHANNELS, 1.0)
    shift = _parameter(bias, slab, C, CHANNELS, 0.0)
    begin = part * values_of_part
    end = tl.minimum(begin + values_of_part, values)
    _dx_rows(
        dy, x, y, dx, dresidual, slab_mean, slab_invstd, scale, shift, total, dot, slab, begin, end, values,
        C, P, RELU, ROWS, CHANNELS, EVEN,
    )  # fmt: skip


@triton.jit
def _fold(
    mean, variance, running_mean, running_variance, count, ghosts, counted, keep, log2_step, last,
    C: tl.constexpr, GHOSTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """r ← keep · r + last · Σ_g step^(G-1-g) · s_g for some channels, mean and variance."""
    _, channels = _channels(tl.program_id(0), C, CHANNELS)
    mask = channels < C
    mean_sum = tl.zeros([CHANNELS], tl.float32)
    variance_sum = tl.zeros([CHANNELS], tl.float32)
    for first in range(0, ghosts, GHOSTS):
        ghost = first + tl.arange(0, GHOSTS)
        share = tl.exp2(tl.maximum(ghosts - 1 - ghost, 0).to(tl.float32) * log2_step)[:, None]
        offsets, inside = ghost[:, None] * C + channels[None, :], (ghost < ghosts)[:, None] & mask[None, :]
        mean_sum += tl.sum(tl.load(mean + offsets, mask=inside, other=0.0) * share, 0)
        variance_sum += tl.sum(tl.load(variance + offsets, mask=inside, other=0.0) * share, 0)
    old_mean = tl.load(running_mean + channels, mask=mask, other=0.0)
    old_variance = tl.load(running_variance + channels, mask=mask, other=0.0)
    tl.store(running_mean + channels, keep * old_mean + last * mean_sum, mask=mask)
    tl.store(running_variance + channels, keep * old_variance + last * variance_sum, mask=mask)
    if tl.program_id(0) == 0:
        tl.store(count, tl.load(count) + counted)


# ----------------------------------------------------------------------------------------------------------- operators


def is_able(x: Tensor, ghost_rows: int) -> bool:
    """Whether x's device runs the kernels, and the 32 bits suffice in which they count a channel's values, and a ghost's."""
    largest_ghost = min(x.shape[0], 2 * ghost_rows) * x.shape[1:].numel()
    is_small = max(largest_ghost, x.shape[0] * x.shape[2:].numel()) < 2**31
    return is_small and torch.cuda.get_device_capability(x.device) >= (8, 0)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _launch(kernel, x: Tensor, grid: tuple[int, ...], *arguments, warps: int, **constants) -> None:
    with torch.cuda.device_of(x):
        # Triton 3.9 warns where fused multiply-adds are left to it: from 3.10 on it makes none.
        kernel[grid](*arguments, num_warps=warps, enable_fp_fusion=True, **constants)


def _equal_ghosts(rows: int, ghost_rows: int) -> Iterator[tuple[slice, slice, int]]:
    """The whole ghosts and, if it is larger, the last one: their rows of dim 0, their ghosts, the rows of each."""
    ghosts = max(1, rows // ghost_rows)
    whole = ghosts if rows == ghosts * ghost_rows else ghosts - 1
    if whole:
        yield slice(0, whole * ghost_rows), slice(0, whole), ghost_rows
    if whole < ghosts:
        yield slice(whole * ghost_rows, rows), slice(whole, ghosts), rows - whole * ghost_rows


def _rows(tensor: Tensor | None, rows: slice) -> Tensor | None:
    return None if tensor is None else tensor[rows]


def _dense_parameter(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.contiguous()


def _plan(direction: str, x: Tensor, channels_last: bool, ghosts: int, rows: int) -> tuple[Plan, int, dict]:
    """The plan for ghosts of so many rows of x, the values in each of their channels, and the kernels' constants."""
    channels, pixels = x.shape[1], x.shape[2:].numel()
    values = rows * pixels
    pixels = 1 if channels_last else pixels
    how = plan(direction, ghosts, values, channels, pixels, x.element_size(), _processors(x.device))
    return (
        how,
        values,
        {
            "C": channels,
            "P": pixels,
            "ROWS": how.rows,
            "CHANNELS": how.channels,
            "EVEN": values % how.rows == 0 and channels % how.channels == 0,
            "warps": how.warps,
        },
    )


def _parts(how: Plan, values: int, x: Tensor, entries: int) -> tuple[int, list[Tensor]]:
    """The values of each part of a slab, and room for two statistics of all parts."""
    tiles = triton.cdiv(values, how.rows)
    return triton.cdiv(tiles, how.splits) * how.rows, [
        x.new_empty((how.splits, entries), dtype=torch.float32) for _ in range(2)
    ]


def forward(x, residual, weight, bias, ghost_rows, eps, relu):
    x, channels_last = _dense(x)
    residual = None if residual is None else _as(residual, x)
    weight, bias = _dense_parameter(weight), _dense_parameter(bias)
    y = torch.empty_like(x)
    ghosts = max(1, x.shape[0] // ghost_rows)
    statistics = x.new_empty((3, ghosts, x.shape[1]), dtype=torch.float32)
    for rows, ghosts, rows_of_ghost in _equal_ghosts(len(x), ghost_rows):
        part, outs = x[rows], [statistic[ghosts] for statistic in statistics.unbind()]
        how, values, constants = _plan("forward", x, channels_last, len(outs[0]), rows_of_ghost)
        ins = part, _rows(residual, rows), y[rows], weight, bias
        if how.way == "resident":
            _launch(_forward, x, (how.slabs,), *ins, *outs, values, eps, RELU=relu, **constants)
            continue
        entries = outs[0].numel()
        of_part, parts = _parts(how, values, x, entries)
        grid, sizes = (how.slabs, how.splits), (values, of_part, entries)
        _launch(_forward_statistics, x, grid, part, *parts, *sizes, **constants)
        _launch(_forward_apply, x, grid, *ins, *parts, *outs, *sizes, eps, RELU=relu, SPLITS=how.splits, **constants)
    return y, statistics


def backward(dy, x, y, weight, bias, statistics, ghost_rows, relu):
    mean, _, invstd = statistics.unbind()
    x, channels_last = _dense(x)
    dy, y = _as(dy, x), None if y is None else _as(y, x)
    weight, bias = _dense_parameter(weight), _dense_parameter(bias)
    dx = torch.empty_like(x)
    dresidual = None if y is None else torch.empty_like(x)
    dweight, dbias = torch.empty_like(mean), torch.empty_like(mean)  # of each ghost
    for rows, ghosts, rows_of_ghost in _equal_ghosts(len(x), ghost_rows):
        how, values, constants = _plan("backward", x, channels_last, len(mean[ghosts]), rows_of_ghost)
        constants["RELU"] = relu
        ins = dy[rows], x[rows], _rows(y, rows), weight, bias, mean[ghosts], invstd[ghosts]
        outs = dx[rows], _rows(dresidual, rows), dweight[ghosts], dbias[ghosts]
        if how.way == "resident":
            _launch(_backward, x, (how.slabs,), *ins, *outs, values, **constants)
            continue
        entries = outs[2].numel()
        of_part, parts = _parts(how, values, x, entries)
        grid, sizes = (how.slabs, how.splits), (values, of_part, entries)
        _launch(_backward_sums, x, grid, *ins, outs[1], *parts, *sizes, **constants)
        _launch(_backward_apply, x, grid, *ins, *outs, *parts, *sizes, SPLITS=how.splits, **constants)
    if len(mean) == 1:
        dweight, dbias = dweight[0], dbias[0]
    else:
        dweight, dbias = dweight.sum(0), dbias.sum(0)
    return dx, x.new_empty(0) if dresidual is None else dresidual, dweight, dbias


def fold(mean, variance, running_mean, running_variance, count, counted, keep, step, last):
    ghosts, channels = mean.shape
    width = min(64, triton.next_power_of_2(channels))
    _launch(
        _fold, mean, (triton.cdiv(channels, width),), mean, variance, running_mean, running_variance, count,
        ghosts, counted, keep, math.log2(step) if step else -1e4, last,
        C=channels, GHOSTS=min(32, triton.next_power_of_2(ghosts)), CHANNELS=width, warps=4,
    )  # fmt: skip


torch.library.impl("gbnzoo::ghost_batch_norm", "CUDA", forward)
torch.library.impl("gbnzoo::ghost_batch_norm_backward", "CUDA", backward)
torch.library.impl("gbnzoo::fold_ghosts", "CUDA", fold)
