"""Ghost Batch Normalization: BatchNorm whose training statistics come from small groups of samples, the ghosts.

The layers are torch's and timm's BatchNorm with one more argument, `ghost_batch_size`: same state dict, same eval. At the
end of the file stands what happens to them where other libraries replace BatchNorm layers by class.

Source: Hoffer et al. 2017, arXiv 1705.08741, algorithm 1.
"""

import contextlib
import functools
import operator
from collections.abc import Callable, Iterable, Iterator

import timm.layers.norm_act
import timm.layers.split_batchnorm
import timm.models.efficientvit_msra
import timm.models.levit
import timm.utils.model
import torch
import torch.fx
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d
from torch import Tensor, nn
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.parallel import DistributedDataParallel
from torchvision.ops.misc import FrozenBatchNorm2d

from gbnzoo import kernels
from gbnzoo.kernels import reference
from gbnzoo.kernels.cpu import Decay, Folding
from gbnzoo.spanning import spanning_batch_norm


def ghost_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    ghost_rows: int,
    eps: float,
    residual: Tensor | None = None,
    relu: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise each ghost, `ghost_rows` consecutive rows of x, by its own mean and biased variance.

    The last ghost also takes the remainder, so none is smaller than ghost_rows unless x is. Statistics are float32 or wider.
    What follows, the addition of a residual and a ReLU, costs next to nothing where there is a kernel, see gbnzoo.kernels.

    Args:
        x: [N, C] or [N, C, ...], N > 0, in any memory format.
        weight: scale [C], or None for 1.
        bias: shift [C], or None for 0.
        ghost_rows: rows of dim 0 in a ghost, at least 1.
        eps: added to the variance.
        residual: added to what is normalised, as x; None for none.
        relu: whether a ReLU then follows.

    Returns:
        y: as x in shape, dtype and memory format.
        mean: of each of the G = max(1, N // ghost_rows) ghosts, [G, C], without gradient.
        variance: the unbiased one, [G, C], without gradient.

    Raises:
        ValueError: BatchNorm's own, if a ghost holds a single value per channel.
        RuntimeError: as BatchNorm, if weight or bias do not fit x.

    Source: Hoffer et al. 2017, arXiv 1705.08741, algorithm 1.
    """
    rows = x.shape[0]
    if not torch.jit.is_scripting():
        # A constant to torch.compile, which then compiles once per batch size; about a symbolic one it reasons for minutes.
        rows = operator.index(rows)
        for parameter in (weight, bias):
            if parameter is not None and parameter.shape != x.shape[1:2]:
                raise RuntimeError(
                    f"weight and bias must have one element for each of the {x.shape[1]} channels of the input, not the shape"
                    f" {tuple(parameter.shape)}"
                )
        kernel = kernels.pick(x, ghost_rows, residual)
        if kernel is not None:
            return kernel(x, weight, bias, ghost_rows, eps, residual, relu)
        if _is_vectorized() and min(rows, ghost_rows) * x.shape[2:].numel() > 1:
            # Without BatchNorm's operator, which writes statistics into tensors that are not vectorised.
            return reference.ghost_batch_norm(x, weight, bias, ghost_rows, eps, residual, relu)
    ghosts = max(1, rows // ghost_rows)
    whole_rows = (ghosts - 1) * ghost_rows
    if rows == whole_rows + ghost_rows or ghosts == 1:
        y, mean, var = _normalize_equal_ghosts(x, weight, bias, ghosts, eps)
    else:
        y, mean, var = _normalize_equal_ghosts(x[:whole_rows], weight, bias, ghosts - 1, eps)
        last_y, last_mean, last_var = _normalize_equal_ghosts(x[whole_rows:], weight, bias, 1, eps)
        y, mean, var = torch.cat((y, last_y)), torch.cat((mean, last_mean)), torch.cat((var, last_var))
    return _add_and_relu(y, residual, relu), mean, var


def _is_vectorized() -> bool:
    """Whether this runs inside torch.vmap."""
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return False
    return any(each.key() == TransformType.Vmap for each in get_interpreter_stack())


def _add_and_relu(y: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    """In place, as residual blocks do it."""
    if residual is not None:
        y = y.add_(residual)
    return y.relu_() if relu else y


def _normalize_equal_ghosts(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, ghosts: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As `ghost_batch_norm`, for equal ghosts: lay them side by side, so that each is some channels of one batch."""
    channels = x.shape[1]
    is_channels_last = x.dim() > 2 and x.stride(1) == 1
    rows = x.movedim(1, -1).flatten(0, -2) if is_channels_last else x
    folded = rows.unflatten(0, (ghosts, -1)).transpose(0, 1).flatten(1, 2)  # [rows of one ghost, ghosts · C, ...]

    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if weight is not None:
        weight = weight.to(dtype).repeat(ghosts)
    if bias is not None:
        bias = bias.to(dtype).repeat(ghosts)
    # Running averages of momentum 1 are the batch's own statistics.
    mean = torch.zeros(ghosts * channels, dtype=dtype, device=x.device)
    var = torch.zeros(ghosts * channels, dtype=dtype, device=x.device)
    folded = F.batch_norm(folded, mean, var, weight, bias, training=True, momentum=1.0, eps=eps)

    y = folded.unflatten(1, (ghosts, channels)).transpose(0, 1).flatten(0, 1)
    if is_channels_last:
        y = y.unflatten(0, x.shape[:1] + x.shape[2:]).movedim(-1, 1)
    return y, mean.view(ghosts, channels), var.view(ghosts, channels)


_GHOST_ATTRIBUTES = ("ghost_batch_size", "rows_per_sample", "rank", "world_size", "process_group")


class _GhostBatchNorm(_BatchNorm):
    """What the ghost layers share; torch's and timm's classes, which they also inherit from, hold the rest."""

    __constants__ = (*_BatchNorm.__constants__, *_GHOST_ATTRIBUTES)

    ghost_batch_size = None
    samples = None  # in the batch of the forward in progress, where count_samples tells
    rows_per_sample = 1
    rank = 0
    world_size = 1
    process_group = None  # of the processes that hold each ghost together

    def __init__(self, *args, ghost_batch_size: int | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.ghost_batch_size = _checked(ghost_batch_size)

    def forward(self, input: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102, for torch.jit skips what stands inside, not what stands beside
            if isinstance(input, torch.fx.Proxy):
                # One node to every FX tracer, as torch's own layers are: what it does depends on the batch.
                return input.tracer.create_proxy("call_module", input.tracer.path_of_module(self), (input,), {})
        return self.normalize_and_activate(input)

    def normalize_and_activate(self, input: Tensor) -> Tensor:
        return self.normalize(input)

    def normalize(self, input: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """BatchNorm's output, + residual, then ReLU; see `ghost_batch_norm`."""
        self._check_input_dim(input)
        if not torch.jit.is_scripting():
            y = self._normalize_directly(input, residual, relu)
            if y is not None:
                return y
        if self.ghost_batch_size is not None and self.training and input.shape[0] > 0:
            return self.normalize_ghosts(input, residual, relu)
        if not self.training and self.world_size > 1:
            raise RuntimeError(
                "the running statistics are split over processes: evaluate inside gathered_running_statistics(model)"
            )

        # From here on nn.BatchNorm's own forward, written out because torch.jit compiles no call of super().
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        uses_running = not self.training or self.track_running_stats
        y = F.batch_norm(
            input,
            self.running_mean if uses_running else None,
            self.running_var if uses_running else None,
            self.weight,
            self.bias,
            self.training or (self.running_mean is None and self.running_var is None),
            momentum,
            self.eps,
        )
        return _add_and_relu(y, residual, relu)

    def normalize_ghosts(self, input: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
        if not torch.jit.is_scripting():
            self._count_rows(input.shape[0])
        ghost_rows = self.ghost_batch_size * self.rows_per_sample
        if self.process_group is None:
            y, mean, var = ghost_batch_norm(input, self.weight, self.bias, ghost_rows, self.eps, residual, relu)
        else:
            y, mean, var = self._normalize_part_of_ghost(input, ghost_rows)
            y = _add_and_relu(y, residual, relu)
        if self.track_running_stats and not _is_recomputation():
            self.update_running_statistics(mean, var)
        return y

    def _normalize_directly(self, input: Tensor, residual: Tensor | None, relu: bool) -> Tensor | None:
        """All that `normalize` does in training, by one call of a kernel; None where there is none that can."""
        if not self.training or self.ghost_batch_size is None or self.process_group is not None:
            return None
        kernel = kernels.pick_direct(input)
        if kernel is None:
            return None
        rows = input.shape[0]
        if self.samples is not None and rows > 0:
            self._count_rows(rows)
        ghost_rows, folding = self.ghost_batch_size * self.rows_per_sample, None
        if self.track_running_stats and not _is_recomputation():
            buffers = self._buffers  # sooner than through nn.Module.__getattr__
            if self.momentum is None or buffers["running_mean"] is None:
                return None
            running = buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
            ghosts = max(1, rows // ghost_rows)
            folding = Folding(*running, _remembered_decay(self.momentum, ghosts, self.world_size, self.rank))
        parameters = self._parameters  # as are the buffers; not there where something computes them
        if "weight" not in parameters or "bias" not in parameters:
            return None
        return kernel(input, parameters["weight"], parameters["bias"], ghost_rows, self.eps, residual, relu, folding)

    def _normalize_part_of_ghost(self, input: Tensor, ghost_rows: int) -> tuple[Tensor, Tensor, Tensor]:
        processes = torch.distributed.get_world_size(self.process_group)
        if input.shape[0] * processes != ghost_rows:
            raise ValueError(
                f"{input.shape[0]} rows on each of {processes} processes make no ghost of {ghost_rows} rows"
                f" ({self.ghost_batch_size} samples); each must bring an equal part of one"
            )
        return spanning_batch_norm(input, self.weight, self.bias, self.eps, self.process_group)

    def _count_rows(self, rows: int) -> None:
        """Where the batch's samples are counted, find how many consecutive rows of dim 0 belong to each."""
        if self.samples is None:
            return
        if rows % self.samples:
            raise ValueError(
                f"cannot tell which of the {rows} rows of dim 0 belong to which of the model's {self.samples} samples;"
                " with ghost_batch_size = None this layer normalises all of them together"
            )
        self.rows_per_sample = rows // self.samples

    def update_running_statistics(self, mean: Tensor, var: Tensor) -> None:
        """Fold the statistics [G, C] of consecutive ghosts into the running ones, as if one by one; count each ghost.

        With several processes this is process `rank`'s term of a sum, see `shard_running_statistics`.
        """
        if not torch.jit.is_scripting():
            running = self.running_mean, self.running_var, self.num_batches_tracked
            if self.momentum is not None and self.momentum <= 1 and all(buffer is not None for buffer in running):
                fold = kernels.pick_fold(mean, running)
                if fold is not None:
                    decay = _decay(self.momentum, mean.shape[0], self.world_size, self.rank)
                    fold(mean, var, Folding(*running, decay))
                    return
        ghosts, counted = mean.shape[0], mean.shape[0] * self.world_size
        if self.running_mean is None or (self.momentum is None and self.num_batches_tracked is None):
            pass
        elif self.momentum is None:
            total = self.num_batches_tracked.to(mean.dtype) + counted
            keep, weights = 1 - counted / total, (1 / total).expand(ghosts)
            for running, ghost in ((self.running_mean, mean), (self.running_var, var)):
                running.copy_(keep * running.to(ghost.dtype) + (weights.unsqueeze(1) * ghost).sum(0))
        else:
            later_ghosts = torch.arange(
                counted - 1 - self.rank, -1 - self.rank, -self.world_size, device=mean.device, dtype=mean.dtype
            )
            keep, weights = (1 - self.momentum) ** counted, (1 - self.momentum) ** later_ghosts
            for running, ghost in ((self.running_mean, mean), (self.running_var, var)):
                wide = running.to(ghost.dtype)
                running.copy_(wide.addmv_(ghost.t(), weights, beta=keep, alpha=self.momentum))
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(counted)

    def reset_running_stats(self) -> None:
        super().reset_running_stats()
        if self.track_running_stats and self.rank > 0:
            self.running_var.zero_()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, ghost_batch_size={self.ghost_batch_size}"


class GhostBatchNorm1d(_GhostBatchNorm, nn.BatchNorm1d):
    """nn.BatchNorm1d that in training normalises each ghost, `ghost_batch_size` consecutive samples, by itself.

    Departs from the paper in that a batch need not be a multiple of the ghost: the last ghost takes the remainder.
    Running statistics see every ghost in turn, and `num_batches_tracked` counts ghosts. Forwards that gradient
    checkpointing repeats are not counted twice. In eval, and with ghost_batch_size None, it is nn.BatchNorm1d.

    Args:
        *args, **kwargs: as nn.BatchNorm1d.
        ghost_batch_size: samples in a ghost, at least 1; None for plain BatchNorm.

    Raises:
        ValueError: if ghost_batch_size is no positive integer; in training, BatchNorm's own, if a ghost holds a single
            value per channel.

    Source: Hoffer et al. 2017, arXiv 1705.08741, algorithm 1.
    """


class GhostBatchNorm2d(_GhostBatchNorm, nn.BatchNorm2d):
    """nn.BatchNorm2d over ghosts; see GhostBatchNorm1d."""


class GhostBatchNorm3d(_GhostBatchNorm, nn.BatchNorm3d):
    """nn.BatchNorm3d over ghosts; see GhostBatchNorm1d."""


class GhostBatchNormAct2d(_GhostBatchNorm, BatchNormAct2d):
    """timm's BatchNormAct2d over ghosts; see GhostBatchNorm1d."""

    def normalize_and_activate(self, input: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102, as above
            if self.training and type(self.drop) is nn.Identity and is_plain_relu(self.act):
                return self.normalize(input, relu=True)
        return self.act(self.drop(self.normalize(input)))


def is_plain_relu(module: nn.Module) -> bool:
    """Whether nobody can tell if this module ran or somebody else took its input's ReLU."""
    return type(module) is nn.ReLU and not has_hooks(module)


def has_hooks(module: nn.Module) -> bool:
    """Whether others look at or change what goes in and out of a module when it is called.

    By hooks of its own or of all modules, or by a `forward` put in place of its class's, as Accelerate's hooks do.
    """
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(len(each) > 0 for each in hooks) or "forward" in module.__dict__ or _has_any_global_hook()


def _checked(ghost_batch_size: int | None) -> int | None:
    is_integer = isinstance(ghost_batch_size, int) and not isinstance(ghost_batch_size, bool)
    if ghost_batch_size is not None and not (is_integer and ghost_batch_size > 0):
        raise ValueError(
            f"ghost_batch_size {ghost_batch_size!r}: wanted a positive integer, or None for plain BatchNorm"
        )
    return ghost_batch_size


def _decay(momentum: float, ghosts: int, world_size: int, rank: int) -> Decay:
    """What `update_running_statistics` does, for a kernel to do."""
    keep = 1 - momentum
    step = keep**world_size
    return Decay(ghosts * world_size, step**ghosts, step, momentum * keep ** (world_size - 1 - rank))


_remembered_decay = functools.lru_cache(maxsize=1024)(_decay)  # not for torch.compile, which warns of such a cache


def _is_recomputation() -> bool:
    """Whether this forward is one that gradient checkpointing repeats, which it does inside the backward pass."""
    if torch.jit.is_scripting() or torch.compiler.is_compiling():
        return False
    return torch._C._current_graph_task_id() != -1


_GHOST_CLASSES = {
    nn.BatchNorm1d: GhostBatchNorm1d,
    nn.BatchNorm2d: GhostBatchNorm2d,
    nn.BatchNorm3d: GhostBatchNorm3d,
    BatchNormAct2d: GhostBatchNormAct2d,
}
_PLAIN_CLASSES = {ghost: plain for plain, ghost in _GHOST_CLASSES.items()}
_FROZEN_CLASSES = (FrozenBatchNorm2d, FrozenBatchNormAct2d)

FOLDING_MODULES = (timm.models.levit.LinearNorm, timm.models.efficientvit_msra.LocalWindowAttention)
"""timm's that fold tokens and windows into dim 0, each sample's rows together; in all its others dim 0 is the samples."""


def convert_ghost_batchnorm(model: nn.Module, ghost_batch_size: int | None) -> nn.Module:
    """Make every BatchNorm of a model a ghost layer, in place.

    The layers stay the objects they are and only change their class, so parameters, buffers, training mode, device,
    dtype, hooks, requires_grad and weight sharing are untouched. The model gets two forward hooks of its own, because a
    ghost is so many of *its* samples, the dim 0 of its first tensor argument: a layer that meets k times as many rows takes
    k consecutive rows for one sample. `torch.jit.script` compiles no such hook, and FX traces without: for the one revert
    first, and train no trace of a model that folds anything into dim 0. Neither is one called where only a part of the model
    is, by `forward_features` say: there samples are counted in FOLDING_MODULES alone, and elsewhere are the rows of dim 0.
    If the model folds by modules of its own, each forward under gradient checkpointing is followed by its backward.

    Tools that look for BatchNorm's own class, as FX fusion and quantization do, pass ghost layers by: revert first.

    Frozen BatchNorm layers, torchvision's and timm's, take no batch statistics and are left as they are.

    Args:
        model: any module; a layer of it that already has ghosts only changes their size.
        ghost_batch_size: samples in a ghost, at least 1; None for plain BatchNorm.

    Returns:
        The same model; the same layer if the model is one.

    Raises:
        ValueError: if ghost_batch_size is no positive integer.
        TypeError: if the model holds a BatchNorm that would lose what it is: a lazy one that has seen no batch, a
            SyncBatchNorm, or a class of somebody else's. The model is then unchanged.
    """
    become_ghosts(model, ghost_batch_size)
    _remove_hooks(model, _begin_counting, _end_counting)
    model.register_forward_pre_hook(_begin_counting, with_kwargs=True)
    model.register_forward_hook(_end_counting, always_call=True)
    return model


def revert_ghost_batchnorm(model: nn.Module) -> nn.Module:
    """Make every ghost layer of a model the plain BatchNorm it was, in place: nothing of gbnzoo is left in it.

    Returns:
        The same model.
    """
    for layer in _ghost_layers(model):
        layer.__class__ = _PLAIN_CLASSES[type(layer)]
        for name in (*_GHOST_ATTRIBUTES, "samples"):
            layer.__dict__.pop(name, None)
    for module in model.modules():
        if isinstance(module, _FROZEN_CLASSES):
            module.__dict__.pop("ghost_batch_size", None)
    _remove_hooks(model, _begin_counting, _end_counting, count_samples)
    return model


def become_ghosts(model: nn.Module, ghost_batch_size: int | None) -> None:
    """`convert_ghost_batchnorm` without its hooks on the model, for models that fold into dim 0 in FOLDING_MODULES alone."""
    _checked(ghost_batch_size)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    for name, layer in layers.items():
        if not isinstance(layer, _GhostBatchNorm) and type(layer) not in _GHOST_CLASSES:
            raise TypeError(f"{name or 'the model'} is a {type(layer).__name__}: {_way_out(layer)}")
    for layer in layers.values():
        layer.__class__ = _GHOST_CLASSES.get(type(layer), type(layer))
        layer.ghost_batch_size = ghost_batch_size
    for module in model.modules():
        if isinstance(module, FOLDING_MODULES) and count_samples not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(count_samples)


def _way_out(layer: _BatchNorm) -> str:
    if isinstance(layer, nn.modules.lazy.LazyModuleMixin):
        return "run one batch through the model, which makes it a BatchNorm, and convert then"
    if isinstance(layer, nn.SyncBatchNorm):
        return "it takes its statistics over processes, a ghost layer over ghosts; convert the model it was made from"
    return "a subclass may do more than BatchNorm does; put one of torch's or timm's own classes in its place first"


def count_samples(module: nn.Module, args: tuple[Tensor]) -> None:
    """Forward pre-hook for a module that folds tokens or windows into dim 0: tells its ghost layers the true samples.

    Every sample's rows must be consecutive. A scripted module cannot tell, and refuses to train; so does one that FX has
    traced through.
    """
    if torch.jit.is_scripting():
        assert not module.training, "ghosts of folded samples cannot be trained in TorchScript"
    elif isinstance(args[0], torch.fx.Proxy):
        if module.training:
            raise TypeError(
                f"a traced {type(module).__name__} cannot tell its samples from what it folds them with: trace it in eval,"
                " or as one node, by timm.models.create_feature_extractor"
            )
    else:
        _set_samples(module, args[0].shape[0])


def _begin_counting(model: nn.Module, args: tuple, kwargs: dict) -> None:
    if any(layer.training for layer in _ghost_layers(model)):
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim() > 0]
        _set_samples(model, tensors[0].shape[0] if tensors else None)


def _end_counting(model: nn.Module, args: tuple, output: object) -> None:
    # A submodule may be called by itself next, with another batch. What checkpointing repeats uses rows_per_sample.
    if any(layer.training for layer in _ghost_layers(model)):
        _set_samples(model, None)


def _set_samples(module: nn.Module, samples: int | None) -> None:
    for layer in _ghost_layers(module):
        layer.samples = samples


def _ghost_layers(model: nn.Module) -> list[_GhostBatchNorm]:
    return [module for module in model.modules() if isinstance(module, _GhostBatchNorm)]


def _remove_hooks(model: nn.Module, *ours: Callable) -> None:
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if hook in ours]:
                del hooks[key]
                for flags in (module._forward_pre_hooks_with_kwargs, module._forward_hooks_always_called):
                    flags.pop(key, None)


def span_processes(model: nn.Module, process_group: torch.distributed.ProcessGroup) -> None:
    """Let each ghost lie over the processes of a group, an equal part of its samples on each; statistics are theirs together.

    From then on these processes must run the model together, forward and backward, each on ghost_batch_size / processes
    samples. With one group of all processes and the whole batch as ghost this is SyncBatchNorm, on CPUs too. All processes of
    a group hold the same running statistics. Layers without ghosts stay as they are.

    Args:
        model: changed in place.
        process_group: of at least two processes, e.g. from `torch.distributed.new_subgroups`.
    """
    for layer in _ghost_layers(model):
        if layer.ghost_batch_size is not None:
            layer.process_group = process_group


def shard_running_statistics(model: nn.Module, rank: int, world_size: int) -> None:
    """Split the running statistics exactly over processes, so that training needs no communication to keep them.

    This process has ghosts rank, rank + W, rank + 2W, ... of every batch, W = world_size. Algorithm 1 is linear: with each
    of its ghosts, of statistics s, a process does r ← (1-m)^W r + m (1-m)^(W-1-rank) s, where all but the first start at
    zero. The sum over processes is then the value one process would hold; `gathered_running_statistics` takes it. With
    momentum None, each ghost counts 1 / (number of all ghosts). `num_batches_tracked` counts all ghosts on every process.

    Call it when the statistics are whole and the same everywhere, on the model that DistributedDataParallel is going to wrap,
    which is told to leave these buffers alone. Layers without ghosts stay as they are.

    Args:
        model: changed in place.
        rank: this process's place, 0 <= rank < world_size.
        world_size: number of processes, at least 1. All must get the same number of ghosts of each batch.

    Raises:
        ValueError: if rank and world_size do not fit, or the model is already split.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} of {world_size} processes: wanted 0 <= rank < world_size")
    ignored = list(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    for name, layer in model.named_modules():
        if not isinstance(layer, _GhostBatchNorm) or layer.ghost_batch_size is None:
            continue
        if layer.world_size > 1:
            raise ValueError(f"the running statistics of {name or 'the model'} are already split")
        layer.rank, layer.world_size = rank, world_size
        if layer.track_running_stats:
            ignored += [f"{name}.{buffer}".lstrip(".") for buffer in ("running_mean", "running_var")]
            if rank > 0:
                layer.running_mean.zero_()
                layer.running_var.zero_()
    if world_size > 1:
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)


@contextlib.contextmanager
def gathered_running_statistics(
    model: nn.Module, all_reduce: Callable[[Tensor], object] = torch.distributed.all_reduce
) -> Iterator[None]:
    """While it lasts, every process holds the whole running statistics of a split model; then its share again.

    Evaluate, save and hand out the model inside. All processes must enter together; a model that is not split needs none.

    Args:
        model: one that `shard_running_statistics` may have split.
        all_reduce: sums a tensor over the processes, in place.
    """
    layers = [layer for layer in _ghost_layers(model) if layer.world_size > 1 and layer.track_running_stats]
    if not layers:
        yield
        return
    rank, world_size = layers[0].rank, layers[0].world_size
    buffers = [buffer for layer in layers for buffer in (layer.running_mean, layer.running_var)]
    share = torch.cat(buffers)
    whole = share.clone()
    all_reduce(whole)

    def hold(values: Tensor, rank: int, world_size: int) -> None:
        for buffer, value in zip(buffers, values.split([len(buffer) for buffer in buffers]), strict=True):
            buffer.copy_(value)
        for layer in layers:
            layer.rank, layer.world_size = rank, world_size

    hold(whole, 0, 1)
    try:
        yield
    finally:
        hold(share, rank, world_size)


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Replace the running statistics by the mean of those of all ghosts in some batches: precise BatchNorm.

    The model runs as in eval (no dropout, no drop path) but for its ghost layers, which normalise by the ghosts they meet. On a
    split model each process brings its ghosts, and the sum over processes is the mean over all.

    Args:
        model: its ghost layers are changed in place; each module is then in the mode it was in.
        batches: inputs of the model, of which each process has equally many ghosts; at least one.

    Raises:
        ValueError: if there is no batch. After this and any other error the statistics are those from before.

    Source: Wu and Johnson 2021, arXiv 2105.07576, section 3.1.
    """
    layers = [layer for layer in _ghost_layers(model) if layer.track_running_stats]
    training, momenta = {module: module.training for module in model.modules()}, [layer.momentum for layer in layers]
    before = [{name: b.clone() for name, b in layer._buffers.items() if b is not None} for layer in layers]
    batch = None
    try:
        model.eval()
        for layer in layers:
            layer.training = True
            layer.momentum = None  # a plain mean
            layer.reset_running_stats()
        for batch in batches:
            model(batch)
        if batch is None:
            raise ValueError(
                "no batch to take running statistics from; wanted at least one (an iterator may be used up)"
            )
    except BaseException:
        for layer, buffers in zip(layers, before, strict=True):
            for name, buffer in buffers.items():
                layer._buffers[name].copy_(buffer)
        raise
    finally:
        for module, mode in training.items():
            module.training = mode
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum


# Where libraries replace BatchNorm layers by class.


def _refuse_ghosts(convert: Callable) -> Callable:
    """Let a converter that would drop the ghosts without a word say so instead."""

    @functools.wraps(convert)
    def guarded(module: nn.Module, *args, **kwargs) -> nn.Module:
        if isinstance(module, _GhostBatchNorm) and module.ghost_batch_size is not None:
            raise TypeError(
                f"{convert.__name__} would replace a {type(module).__name__} and lose its ghosts of"
                f" {module.ghost_batch_size} samples. They need no synchronisation, on any number of processes;"
                " for plain BatchNorm instead call gbnzoo.revert_ghost_batchnorm(model) first"
            )
        return convert(module, *args, **kwargs)

    return guarded


def _freeze_ghosts(freeze: Callable) -> Callable:
    """A frozen layer needs no ghosts, but remembers them for `_unfreeze_ghosts`."""

    @functools.wraps(freeze)
    def remembering(module: nn.Module) -> nn.Module:
        if isinstance(module, _GhostBatchNorm) and module.world_size > 1:
            raise RuntimeError(
                "the running statistics are split over processes: freeze the model before shard_running_statistics, or inside"
                " gathered_running_statistics(model)"
            )
        frozen = freeze(module)
        if isinstance(module, _GhostBatchNorm) and frozen is not module:
            frozen.ghost_batch_size = module.ghost_batch_size
            for buffer in frozen.buffers():  # the layer's own until here, which gathered_running_statistics takes back
                buffer.data = buffer.data.clone()
        return frozen

    return remembering


def _unfreeze_ghosts(unfreeze: Callable) -> Callable:
    @functools.wraps(unfreeze)
    def recalling(module: nn.Module) -> nn.Module:
        thawed = unfreeze(module)
        if isinstance(module, _FROZEN_CLASSES) and hasattr(module, "ghost_batch_size"):
            become_ghosts(thawed, module.ghost_batch_size)
        return thawed

    return recalling


def _meet_ghosts() -> None:
    """Make the converters of torch and timm, which all go by `isinstance(module, BatchNorm)`, meet a ghost layer.

    They are recursive through the name their module knows them by, so replacing that is enough even for code that
    imported them before; what they do to any other layer is unchanged.
    """
    nn.SyncBatchNorm.convert_sync_batchnorm = staticmethod(_refuse_ghosts(nn.SyncBatchNorm.convert_sync_batchnorm))
    for wrap, name, *homes in (
        (_refuse_ghosts, "convert_sync_batchnorm", timm.layers.norm_act, timm.layers),
        (_refuse_ghosts, "convert_splitbn_model", timm.layers.split_batchnorm, timm.layers),
        (_freeze_ghosts, "freeze_batch_norm_2d", timm.layers.norm_act, timm.layers, timm.utils.model, timm.utils),
        (_unfreeze_ghosts, "unfreeze_batch_norm_2d", timm.layers.norm_act, timm.layers, timm.utils.model, timm.utils),
    ):
        wrapped = wrap(getattr(homes[0], name))
        for home in homes:
            setattr(home, name, wrapped)


_meet_ghosts()
