"""BatchNorm over one batch that several processes hold in equal parts: what a ghost over processes needs.

It is what torch.nn.SyncBatchNorm does, which runs on GPUs only and in float32.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def spanning_batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise by mean and biased variance of what all processes of the group give together.

    One exchange of two numbers per channel forward, one backward. The gradient of x is that of the sum of the processes'
    losses; those of weight and bias are this process's part, which data parallelism adds up as ever. Statistics are float32
    or wider, each process's own taken around its own mean, so that nothing cancels.

    Args:
        x: this process's part, [n, C] or [n, C, ...], of the same shape on each.
        weight: scale [C], or None for 1.
        bias: shift [C], or None for 0.
        eps: added to the variance.
        group: the processes, at least two. All must call this together, and the backward pass too.

    Returns:
        y: as x in shape, dtype and memory format.
        mean: of the whole batch, [1, C], without gradient.
        variance: the unbiased one, [1, C], without gradient.

    Source: torch.nn.SyncBatchNorm; the parts are combined as in Chan, Golub and LeVeque 1979.
    """
    return _SpanningBatchNorm.apply(x, weight, bias, eps, group)


class _SpanningBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps, group):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        ctx.count = dist.get_world_size(group) * wide[:, :1].numel()
        own = torch.stack(torch.var_mean(wide, _all_but_channels(x), correction=0))
        parts = own.new_empty(dist.get_world_size(group), *own.shape)
        dist.all_gather(list(parts), own, group=group)
        variances, means = parts.unbind(1)
        mean = means.mean(0)
        variance = (variances + (means - mean).square()).mean(0)

        invstd = torch.rsqrt(variance + eps)
        scale = invstd if weight is None else invstd * weight
        y = (wide - _per_channel(mean, x)) * _per_channel(scale, x)
        if bias is not None:
            y += _per_channel(bias, x)
        ctx.save_for_backward(x, weight, bias, mean, invstd)
        ctx.group = group
        statistics = mean[None], variance[None] * (ctx.count / (ctx.count - 1))
        ctx.mark_non_differentiable(*statistics)
        return y.to(x.dtype), *statistics

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, *_):
        x, weight, bias, mean, invstd = ctx.saved_tensors
        dims = _all_but_channels(x)
        dy = dy.to(mean.dtype)
        normalised = (x.to(mean.dtype) - _per_channel(mean, x)) * _per_channel(invstd, x)
        own = torch.stack((dy.sum(dims), (dy * normalised).sum(dims)))
        sums = own.clone()
        dist.all_reduce(sums, group=ctx.group)
        along_mean, along_x = sums / ctx.count
        dx = dy - _per_channel(along_mean, x) - normalised * _per_channel(along_x, x)
        dx *= _per_channel(invstd if weight is None else invstd * weight, x)
        return (
            dx.to(x.dtype),
            None if weight is None else own[1].to(weight.dtype),
            None if bias is None else own[0].to(bias.dtype),
            None,
            None,
        )


def _all_but_channels(x: Tensor) -> list[int]:
    return [dim for dim in range(x.dim()) if dim != 1]


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.view(-1, *[1] * (x.dim() - 2))
