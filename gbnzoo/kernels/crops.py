"""Crops of an image set on CPUs: `crops.cpp`, called through ctypes."""

import struct

import torch
from torch import Tensor

from gbnzoo.kernels import cpu

_ARGUMENTS = struct.Struct("4Q6q")


def gather(images: Tensor, corners: Tensor, flipped: Tensor, shape: tuple[int, int]) -> Tensor:
    """Crops of images, mirrored left to right where `flipped`.

    Args:
        images: [N, H, W, C], contiguous, on the CPU.
        corners: int64 [B], contiguous, each crop's first pixel, counted over all images; the crop must lie within one.
        flipped: int64 [B], contiguous, 0 or 1.
        shape: height and width of a crop.

    Returns:
        [B, height, width, C].

    Raises:
        IndexError: if a crop begins outside of the images, or ends beyond the last.
    """
    (height, width), (number, rows, columns, channels) = shape, images.shape
    last = number * rows * columns - (height - 1) * columns - width
    lowest, highest = corners.aminmax() if len(corners) else (0, 0)
    if lowest < 0 or highest > last:
        raise IndexError(
            f"crops at {lowest} to {highest}: wanted 0 to {last}, in {number} images of {rows} × {columns}"
        )
    out = images.new_empty((len(corners), height, width, channels))
    cpu.LIBRARY.gather_crops(
        _ARGUMENTS.pack(
            *(tensor.data_ptr() for tensor in (images, corners, flipped, out)),
            *(len(corners), height, width, columns, channels * images.element_size(), torch.get_num_threads()),
        )
    )
    return out
