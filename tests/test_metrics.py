"""Scores against hand counts; the model left as it was."""

import contextlib
import math

import pytest
import torch
from torch import nn

from gbnzoo.metrics import Metrics, evaluate

LN2 = math.log(2)


class Scorer(nn.Module):
    """Takes "images" that are logits already."""

    def forward(self, x):
        return x


def scored(
    logits: list[list[float]], labels: list[int], batch_size: int = 2
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    x, y = torch.tensor(logits), torch.tensor(labels)
    return list(zip(x.split(batch_size), y.split(batch_size), strict=True))


def test_counts_and_mean_loss_are_those_worked_out_by_hand():
    # Ranks of the true class: 1, 2, 5, 6, 7. With logits log(weight), the loss is log(sum of weights / weight).
    weights = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0]
    batches = scored([[math.log(w) for w in weights]] * 5, [6, 5, 2, 1, 0])
    metrics = evaluate(Scorer(), batches)
    assert (metrics.top1_percent, metrics.top5_percent, metrics.n) == (20.0, 60.0, 5)
    assert metrics.loss == pytest.approx(math.log(127) - (6 + 5 + 2 + 1 + 0) * LN2 / 5, rel=1e-6)


def test_with_three_classes_everything_is_in_the_top_five():
    metrics = evaluate(Scorer(), scored([[3.0, 2.0, 1.0]] * 4, [0, 1, 2, 2]))
    assert (metrics.top1_percent, metrics.top5_percent) == (25.0, 100.0)


def test_loss_is_summed_in_float64():
    # One loss of 2**24 and 999 of ln 2: float32 would drop each ln 2 beside 2**24 (its spacing there is 2).
    logits = [[0.0, -(2.0**24)]] + [[0.0, 0.0]] * 999
    assert evaluate(Scorer(), scored(logits, [1] * 1000, 100)).loss == pytest.approx(
        (2**24 + 999 * LN2) / 1000, rel=1e-9
    )


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_batch_size_does_not_change_the_scores(batch_size):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 10, generator=generator).tolist()
    labels = torch.randint(10, (50,), generator=generator).tolist()
    assert evaluate(Scorer(), scored(logits, labels, batch_size)) == evaluate(Scorer(), scored(logits, labels, 50))


def test_uneven_shares_of_processes_sum_to_the_whole():
    logits, labels = torch.randn(7, 10, generator=torch.Generator().manual_seed(0)).tolist(), [0, 1, 2, 3, 4, 5, 6]
    parts = []

    def record(totals):
        assert totals.dtype == torch.float64
        parts.append(totals)
        return totals

    evaluate(Scorer(), scored(logits[:5], labels[:5]), reduce=record)
    evaluate(Scorer(), scored(logits[5:], labels[5:]), reduce=record)
    whole = evaluate(Scorer(), scored(logits, labels))
    # A third process had no share at all, and reports the same scores.
    assert evaluate(Scorer(), [], reduce=lambda totals: totals + sum(parts)) == Metrics(
        whole.top1_percent, whole.top5_percent, pytest.approx(whole.loss, rel=1e-12), 7
    )


def test_model_is_evaluated_in_eval_mode_and_each_module_gets_its_mode_back():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3))
    model[0].eval()  # frozen by the user
    seen = []
    model[2].register_forward_hook(lambda *_: seen.append((model.training, model[1].training, torch.is_grad_enabled())))
    before = model[0].running_mean.clone()
    evaluate(model, [(torch.randn(6, 4), torch.zeros(6, dtype=torch.int64))])
    assert seen == [(False, False, False)]
    assert [m.training for m in (model, *model)] == [True, False, True, True]
    assert torch.equal(model[0].running_mean, before)


def test_modes_come_back_when_the_model_fails():
    model = nn.Linear(4, 3)
    with pytest.raises(RuntimeError, match="shape"):
        evaluate(model, [(torch.randn(6, 5), torch.zeros(6, dtype=torch.int64))])
    assert model.training


def test_model_runs_inside_autocast_and_the_loss_outside():
    model = nn.Linear(4, 3)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.zero_()
    entered = []

    @contextlib.contextmanager
    def autocast():
        with torch.autocast("cpu", torch.bfloat16):
            entered.append(True)
            yield

    metrics = evaluate(model, [(torch.ones(2, 4), torch.tensor([0, 1]))] * 2, autocast=autocast)
    assert entered == [True, True]
    assert metrics.loss == pytest.approx(math.log(3), rel=1e-6)  # bf16 has three digits only


def test_nothing_to_evaluate_is_an_error():
    with pytest.raises(ValueError, match="no sample"):
        evaluate(Scorer(), [])
