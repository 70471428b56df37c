"""The fused ghost norm, normalised crops of images, and the order of samples; `pick` and its like choose the kernel.

`GBNZOO_KERNELS=0` in the environment turns every kernel off.
"""

import functools
import importlib.util
import logging
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from gbnzoo.kernels import cpu, crops, order

_ARE_ON = os.environ.get("GBNZOO_KERNELS") != "0"
_DTYPES = {"cpu": cpu.DTYPES}
# Whether there is a GPU is not asked: torch begins to use it then, and who forks later cannot.
if torch.version.cuda and importlib.util.find_spec("triton"):
    from gbnzoo.kernels import gpu

    _DTYPES["cuda"] = gpu.DTYPES


def pick(
    x: Tensor, ghost_rows: int, residual: Tensor | None = None
) -> Callable[..., tuple[Tensor, Tensor, Tensor]] | None:
    """A kernel that does for x what `gbnzoo.norm.ghost_batch_norm` does with torch's own operators.

    Args:
        x: [N, C] or [N, C, ...].
        ghost_rows: rows of dim 0 in a ghost, at least 1.
        residual: what is added to the result, if anything.

    Returns:
        A function of ghost_batch_norm's arguments; None where there is no kernel: for other devices and dtypes, a single
        value per channel, a residual of another dtype or shape, forward-mode and vectorised differentiation.
    """
    values = min(x.shape[0], ghost_rows) * x.shape[2:].numel()
    if not _ARE_ON or x.dtype not in _DTYPES.get(x.device.type, ()) or values < 2 or x.shape[1] == 0:
        return None
    if residual is not None and (residual.shape, residual.dtype) != (x.shape, x.dtype):
        return None
    if not torch.compiler.is_compiling():
        if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:
            return None
        if x.device.type == "cpu" and cpu.LIBRARY is None:
            _say_none_was_built()
    is_able = gpu.is_able(x, ghost_rows) if x.device.type == "cuda" else cpu.LIBRARY is not None
    return cpu.ghost_batch_norm if is_able else None


def pick_direct(x: Tensor) -> Callable[..., Tensor | None] | None:
    """`cpu.fold_and_normalize`, which may still refuse; None on other devices and where kernels must be operators."""
    is_able = _ARE_ON and cpu.LIBRARY is not None and not cpu.is_watched() and x.is_cpu
    return cpu.fold_and_normalize if is_able else None


def pick_fold(mean: Tensor, running: tuple[Tensor, Tensor, Tensor]) -> Callable[..., None] | None:
    """`cpu.fold` where the ghosts' means, and so their variances, lie on a GPU that can; else None.

    Where each of torch's operators is a launch, to fold them one by one takes longer than to normalise a small layer.

    Args:
        mean: of each ghost, [G, C].
        running: mean, variance and count.
    """
    if not _ARE_ON or mean.dtype != torch.float32 or mean.device.type not in _DTYPES or mean.device.type == "cpu":
        return None
    if torch._C._are_functorch_transforms_active() or not gpu.is_able(mean, 1):
        return None
    is_plain = all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in running[:2])
    return cpu.fold if is_plain and mean.is_contiguous() else None


def pick_crops(images: Tensor, dtype: torch.dtype) -> Callable[..., Tensor] | None:
    """`crops.gather`, or None where there is no kernel for images that lie there, or to make them in that dtype."""
    is_able = (
        _ARE_ON and cpu.LIBRARY is not None and images.is_cpu and images.dtype is torch.uint8 and dtype in cpu.DTYPES
    )
    return crops.gather if is_able else None


def pick_order(places: Tensor) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """`order.draw`, or None where there is no kernel for places of that shape and dtype, or that lie there."""
    is_able = (
        _ARE_ON and cpu.LIBRARY is not None and places.is_cpu and places.dtype is torch.int64 and places.dim() == 1
    )
    return order.draw if is_able else None


@functools.cache
def _say_none_was_built() -> None:
    logging.getLogger(__name__).warning(
        "gbnzoo in %s has no compiled CPU kernels: ghost norm takes the slower path through torch's operators."
        " With a C++ compiler at hand, install it again from its sources; GBNZOO_KERNELS=0 silences this",
        Path(__file__).parents[1],
    )
