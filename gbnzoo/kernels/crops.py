"""Crops of an image set on CPUs, normalised: `crops.cpp`, called through ctypes."""

import struct

import torch
from torch import Tensor

from gbnzoo.kernels import cpu

_ARGUMENTS = struct.Struct("6Q6q")


def gather(
    images: Tensor,
    corners: Tensor,
    flipped: Tensor | None,
    shape: tuple[int, int],
    mean: Tensor,
    std: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """(image - mean) / std of crops of images, mirrored left to right where `flipped`; rounded to dtype from float32.

    Args:
        images: uint8 [N, H, W, C], contiguous, on the CPU.
        corners: int64 [B], contiguous, each crop's first pixel, counted over all images; the crop must lie within one.
        flipped: int64 [B], contiguous, 0 or 1; None flips nothing.
        shape: height and width of a crop.
        mean, std: float32 [C], of pixels from 0 to 255.
        dtype: a key of `cpu.DTYPES`.

    Returns:
        [B, height, width, C].

    Raises:
        ValueError: if mean and std are not of one value for each channel.
        IndexError: if a crop begins outside of the images, or ends beyond the last.
    """
    (height, width), (number, rows, columns, channels) = shape, images.shape
    if not mean.shape == std.shape == (channels,):
        raise ValueError(f"mean and std of {mean.numel()} and {std.numel()} channels, for images of {channels}")
    last = number * rows * columns - (height - 1) * columns - width
    lowest, highest = corners.aminmax() if len(corners) else (0, 0)
    if lowest < 0 or highest > last:
        raise IndexError(
            f"crops at {lowest} to {highest}: wanted 0 to {last}, in {number} images of {rows} × {columns}"
        )
    out = images.new_empty((len(corners), height, width, channels), dtype=dtype)
    arguments = _ARGUMENTS.pack(
        *(0 if tensor is None else tensor.data_ptr() for tensor in (images, corners, flipped, mean, std, out)),
        *(len(corners), height, width, columns, channels, torch.get_num_threads()),
    )
    getattr(cpu.LIBRARY, f"gather_crops_{cpu.DTYPES[dtype]}")(arguments)
    return out
