"""The order of a training's samples: `order.cpp`, called through ctypes."""

import struct

from torch import Tensor

from gbnzoo.kernels import cpu

_ARGUMENTS = struct.Struct("3Q5qQ")


def draw(places: Tensor, first: int, num_samples: int, grid: tuple[int, int], key: int) -> tuple[Tensor, Tensor]:
    """Which samples stand at some places of all epochs laid end to end, and their epochs, both int64 [B].

    Args:
        places: int64 [B] on the CPU, counted from `first`; not negative with it.
        first: a place, counted from the first epoch's first.
        num_samples: in one epoch.
        grid: columns and rows of the cells that `gbnzoo.data.epoch_permutation` permutes.
        key: the hash of seed and stream that it begins with.
    """
    places = places.contiguous()
    samples, epochs = places.new_empty((2, len(places)))
    pointers = (tensor.data_ptr() for tensor in (places, samples, epochs))
    cpu.LIBRARY.draw_order(_ARGUMENTS.pack(*pointers, len(places), first, num_samples, *grid, key))
    return samples, epochs
