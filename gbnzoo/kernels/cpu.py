"""The ghost norm on CPUs: `ghost_norm.cpp`, called through ctypes, as two torch operators and their autograd function.

The operators have fake implementations, so torch.compile and torch.export trace them; what they compute is
`reference.ghost_batch_norm`.
"""

import contextlib
import ctypes
import filecmp
from collections.abc import Iterator
from ctypes import c_float, c_int, c_int64, c_void_p
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.metadata import distributions
from pathlib import Path

import torch
from torch import Tensor

from gbnzoo.kernels import reference

INSTRUCTION_SETS = ("avx512", "avx2", "portable")  # best first
DTYPES = {torch.float32: "float", torch.bfloat16: "bfloat16"}

_SHAPE = [c_int64, c_int64, c_int64, c_int64, c_int, c_int, c_int64]
_ARGUMENTS = {"forward": [*_SHAPE, c_float, *[c_void_p] * 8], "backward": [*_SHAPE, *[c_void_p] * 11]}


def _folders() -> Iterator[Path]:
    """Where compiled kernels may lie: here, and for a checkout where its very sources were installed."""
    here = Path(__file__).parent
    yield here
    for installed in distributions(name="gbnzoo"):
        folder = Path(str(installed.locate_file("gbnzoo/kernels")))
        sources = ("cpu.py", "ghost_norm.cpp")
        with contextlib.suppress(OSError):
            if all(filecmp.cmp(here / name, folder / name, shallow=False) for name in sources):
                yield folder


def load(instruction_set: str) -> ctypes.CDLL | None:
    """The kernel compiled for an instruction set; None if it was not compiled or this processor cannot run it."""
    names = [f"_ghost_norm_{instruction_set}{suffix}" for suffix in EXTENSION_SUFFIXES]
    paths = [folder / name for folder in _folders() for name in names]
    path = next(filter(Path.exists, paths), None)
    if path is None:
        return None
    library = ctypes.CDLL(str(path))
    if not library.ghost_norm_is_supported():
        return None
    for dtype in DTYPES.values():
        for direction, arguments in _ARGUMENTS.items():
            function = getattr(library, f"ghost_norm_{direction}_{dtype}")
            function.argtypes, function.restype = arguments, None
    # The OpenMP runtime torch has loaded for all to see: a second one would fight it for the cores. Without, one thread works.
    if gomp_parallel := getattr(ctypes.CDLL(None), "GOMP_parallel", None):
        library.ghost_norm_use_threads_of(gomp_parallel)
    return library


LIBRARY = next(filter(None, map(load, INSTRUCTION_SETS)), None)


def ghost_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    ghost_rows: int,
    eps: float,
    residual: Tensor | None = None,
    relu: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `gbnzoo.norm.ghost_batch_norm`, then + residual, then ReLU, in one pass over memory.

    Departs from it in that `residual` [as x] is added and the ReLU taken before the result is rounded to x's dtype.
    x is float32 or bfloat16, with more than one value per channel in each ghost.
    """
    y, mean, variance, _ = _GhostBatchNorm.apply(x, residual, weight, bias, ghost_rows, eps, relu)
    return y, mean, variance


class _GhostBatchNorm(torch.autograd.Function):
    """Keeps x alone for the backward pass, and y too where a residual was added before the ReLU."""

    @staticmethod
    def forward(ctx, x, residual, weight, bias, ghost_rows, eps, relu):
        y, mean, variance, invstd = torch.ops.gbnzoo.ghost_batch_norm(x, residual, weight, bias, ghost_rows, eps, relu)
        ctx.mark_non_differentiable(mean, variance, invstd)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, y if relu and residual is not None else None, weight, bias, mean, invstd)
        ctx.has_residual, ctx.ghost_rows, ctx.eps, ctx.relu = residual is not None, ghost_rows, eps, relu
        return y, mean, variance, invstd

    @staticmethod
    def backward(ctx, dy, *_):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return *_differentiable_backward(ctx, dy), None, None, None
        x, y, weight, bias, mean, invstd = ctx.saved_tensors
        dx, dresidual, dweight, dbias = torch.ops.gbnzoo.ghost_batch_norm_backward(
            dy, x, y, weight, bias, mean, invstd, ctx.ghost_rows, ctx.relu
        )
        if not ctx.has_residual:
            dresidual = None
        elif not ctx.relu:
            dresidual = dy
        dweight = None if weight is None else dweight.to(weight.dtype)
        dbias = None if bias is None else dbias.to(bias.dtype)
        return dx, dresidual, dweight, dbias, None, None, None


def _differentiable_backward(ctx, dy: Tensor) -> list[Tensor | None]:
    """The gradients of x, residual, weight and bias as functions that can be differentiated again."""
    x, y, weight, bias, _, _ = ctx.saved_tensors
    # Views, so that a gradient stops at this layer's inputs where one was computed from another.
    x, weight, bias = (tensor if tensor is None else tensor.view_as(tensor) for tensor in (x, weight, bias))
    normalized, _, _ = reference.ghost_batch_norm(x, weight, bias, ctx.ghost_rows, ctx.eps)
    if ctx.relu:
        dy = dy * ((normalized if y is None else y) > 0)
    inputs = {"x": x, "weight": weight, "bias": bias}
    wanted = {name: tensor for name, tensor in inputs.items() if tensor is not None and tensor.requires_grad}
    gradients = torch.autograd.grad(normalized, wanted.values(), dy, create_graph=True)
    gradients = dict(zip(wanted, gradients, strict=True), residual=dy if ctx.has_residual else None)
    return [gradients.get(name) for name in ("x", "residual", "weight", "bias")]


def _dense(x: Tensor) -> tuple[Tensor, bool]:
    """x in one of the layouts the kernel reads, and whether its channels are last. No copy if it is."""
    if x.is_contiguous():
        return x, x.dim() == 2 or x.shape[2:].numel() == 1
    if x.stride(1) == 1 and x.dim() > 2:
        return x.movedim(1, -1).contiguous().movedim(-1, 1), True
    return x.contiguous(), x.dim() == 2


def _as(tensor: Tensor, x: Tensor) -> Tensor:
    """The tensor laid out in memory as x is."""
    return tensor if tensor.stride() == x.stride() else torch.empty_like(x).copy_(tensor)


def _wide(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.to(torch.float32).contiguous()


def _call(direction: str, x: Tensor, channels_last: bool, ghost_rows: int, relu: bool, *arguments) -> None:
    samples, channels = x.shape[:2]
    getattr(LIBRARY, f"ghost_norm_{direction}_{DTYPES[x.dtype]}")(
        samples,
        channels,
        x.numel() // (samples * channels),
        ghost_rows,
        channels_last,
        relu,
        torch.get_num_threads(),
        *(argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments),
    )


torch.library.define(
    "gbnzoo::ghost_batch_norm",
    "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, int ghost_rows, float eps, bool relu)"
    " -> (Tensor y, Tensor mean, Tensor variance, Tensor invstd)",
)
torch.library.define(
    "gbnzoo::ghost_batch_norm_backward",
    "(Tensor dy, Tensor x, Tensor? y, Tensor? weight, Tensor? bias, Tensor mean, Tensor invstd, int ghost_rows, bool relu)"
    " -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)",
)


@torch.library.register_fake("gbnzoo::ghost_batch_norm")
def _forward_fake(x, residual, weight, bias, ghost_rows, eps, relu):
    ghosts = torch.sym_max(1, x.shape[0] // ghost_rows)
    statistics = (x.new_empty((ghosts, x.shape[1]), dtype=torch.float32) for _ in range(3))
    return torch.empty_like(x), *statistics


@torch.library.register_fake("gbnzoo::ghost_batch_norm_backward")
def _backward_fake(dy, x, y, weight, bias, mean, invstd, ghost_rows, relu):
    dresidual = torch.empty_like(x) if y is not None else x.new_empty(0)
    return torch.empty_like(x), dresidual, mean.new_empty(x.shape[1]), mean.new_empty(x.shape[1])


@torch.library.impl("gbnzoo::ghost_batch_norm", "CPU")
def _forward(x, residual, weight, bias, ghost_rows, eps, relu):
    x, channels_last = _dense(x)
    if residual is not None:
        residual = _as(residual, x)
    y = torch.empty_like(x)
    ghosts = max(1, x.shape[0] // ghost_rows)
    statistics = [x.new_empty((ghosts, x.shape[1]), dtype=torch.float32) for _ in range(3)]
    _call(
        "forward", x, channels_last, ghost_rows, relu, eps,
        x, residual, _wide(weight), _wide(bias), y, *statistics,
    )  # fmt: skip
    return y, *statistics


@torch.library.impl("gbnzoo::ghost_batch_norm_backward", "CPU")
def _backward(dy, x, y, weight, bias, mean, invstd, ghost_rows, relu):
    x, channels_last = _dense(x)
    dy = _as(dy, x)
    dx = torch.empty_like(x)
    dresidual = torch.empty_like(x) if y is not None else None
    dweight, dbias = torch.empty_like(mean[0]), torch.empty_like(mean[0])
    _call(
        "backward", x, channels_last, ghost_rows, relu,
        dy, x, y, _wide(weight), _wide(bias), mean, invstd, dx, dresidual, dweight, dbias,
    )  # fmt: skip
    return dx, x.new_empty(0) if dresidual is None else dresidual, dweight, dbias
