"""Crops of an image set on CPUs: `crops.cpp`, called through ctypes."""

import struct

import torch
from torch import Tensor

from gbnzoo.kernels.cpu import LIBRARY

_ARGUMENTS = struct.Struct("4Q6q")


def gather(images: Tensor, corners: Tensor, flipped: Tensor, shape: tuple[int, int]) -> Tensor:
    """Crops of images, mirrored left to right where `flipped`.

    Args:
        images: [N, H, W, C], contiguous, on the CPU.
        corners: int64 [B], each crop's first pixel, counted over all images; the crop must lie within one.
        flipped: int64 [B], 0 or 1.
        shape: height and width of a crop.

    Returns:
        [B, height, width, C].
    """
    (height, width), channels = shape, images.shape[3]
    out = images.new_empty((len(corners), height, width, channels))
    LIBRARY.gather_crops(
        _ARGUMENTS.pack(
            *(tensor.data_ptr() for tensor in (images, corners, flipped, out)),
            *(len(corners), height, width, images.shape[2], channels * images.element_size(), torch.get_num_threads()),
        )
    )
    return out
