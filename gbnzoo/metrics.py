"""Accuracy and loss of a classifier."""

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Metrics:
    """Scores over `n` samples: percentages of them, and the mean cross-entropy in nats."""

    top1_percent: float
    top5_percent: float
    loss: float
    n: int


def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> Metrics:
    """Score a model in eval mode; afterwards each module is in the mode it was in.

    Correct answers are counted exactly and the loss is summed in float64. With fewer than five classes, all count for top-5.

    Args:
        model: maps images to logits [B, classes]. Over processes the bare module, not its DistributedDataParallel: that
            would wait for the others at each batch, and the processes' shares may differ.
        batches: images [B, C, H, W] and labels int64 [B], on the model's device.
        autocast: makes the context that the model runs in, e.g. `accelerator.autocast`.
        reduce: sums a float64 tensor over processes, e.g. `accelerator.reduce`; each process then gets the scores of all
            batches.

    Raises:
        ValueError: if there is no sample.
    """
    training = {module: module.training for module in model.modules()}
    model.eval()
    hits, losses = [], []
    try:
        with torch.inference_mode():
            for images, labels in batches:
                with autocast():
                    logits = model(images)
                logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
                hits.append(logits.topk(min(5, logits.shape[1])).indices == labels[:, None])
                losses.append(F.cross_entropy(logits, labels, reduction="none"))
    finally:
        for module, mode in training.items():
            module.training = mode

    totals = torch.zeros(4, dtype=torch.float64)  # whole numbers stay exact up to 2**53
    if hits:
        hit, loss = torch.cat(hits).cpu(), torch.cat(losses).cpu()
        totals = totals.new_tensor([hit[:, 0].sum(), hit.sum(), loss.double().sum(), len(hit)])
    if reduce is not None:
        totals = reduce(totals.to(next(model.parameters(), totals).device))
    top1, top5, loss_sum, n = totals.tolist()
    if not n:
        raise ValueError("there is no sample to evaluate")
    return Metrics(100 * top1 / n, 100 * top5 / n, loss_sum / n, int(n))
