"""The ghost norm as its definition reads: the twin that every kernel is tested against, and their second derivative."""

import torch
from torch import Tensor


def ghost_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    ghost_rows: int,
    eps: float,
    residual: Tensor | None = None,
    relu: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `gbnzoo.norm.ghost_batch_norm`, then + residual, then ReLU; one ghost at a time, and slow.

    Source: Hoffer et al. 2017, arXiv 1705.08741, algorithm 1.
    """
    ghosts = max(1, x.shape[0] // ghost_rows)
    per_channel = (1, -1) + (1,) * (x.dim() - 2)
    dims = [dim for dim in range(x.dim()) if dim != 1]
    wide = torch.promote_types(x.dtype, torch.float32)
    pieces, means, variances = [], [], []
    for ghost in x.to(wide).tensor_split([ghost_rows * i for i in range(1, ghosts)]):
        variance, mean = torch.var_mean(ghost, dims, correction=0)
        pieces.append((ghost - mean.view(per_channel)) / torch.sqrt(variance.view(per_channel) + eps))
        means.append(mean.detach())
        variances.append(ghost.detach().var(dims))
    y = torch.cat(pieces)
    if weight is not None:
        y = y * weight.to(wide).view(per_channel)
    if bias is not None:
        y = y + bias.to(wide).view(per_channel)
    if residual is not None:
        y = y + residual
    if relu:
        y = y.relu()
    return y.to(x.dtype), torch.stack(means), torch.stack(variances)
