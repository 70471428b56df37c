"""A graphed pass on a CPU, where a graph that runs the pass again stands in for CUDA's."""

import contextlib

import pytest
import torch
from torch import nn

from gbnzoo import graphs
from gbnzoo.run import RunError


class Again:
    """A graph whose replay does again what was done when it was captured, and leaves the results in the same places."""

    def __init__(self):
        self.work = None

    def replay(self):
        self.work()


@pytest.fixture(autouse=True)
def _no_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Again)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, capture_error_mode: contextlib.nullcontext())


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.unused, self.first, self.second = nn.Linear(2, 2), nn.Linear(4, 8), nn.Linear(8, 1)

    def loss(self, x, scale):
        loss = self.second(self.first(x).relu()).square().mean()
        return loss if scale is None else loss * scale


def updated(updates, passes, set_to_none, graphed):
    """The weights after some updates of some passes each, with clipping, momentum and weight decay."""
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    generator = torch.Generator().manual_seed(1)
    own = graphs.GraphedPass(list(net.parameters()), accumulates=passes > 1)

    def run(x, scale):
        loss = net.loss(x, scale)
        loss.backward()
        return loss.detach()

    def work():
        """What a replay does: the pass on the inputs' places, gradients and output into theirs."""
        held = [parameter.grad for parameter in net.parameters()]
        for parameter in net.parameters():
            parameter.grad = None
        own.output.copy_(run(*own.inputs))
        for parameter, gradient in zip(own.trained, own.gradients, strict=True):
            gradient.copy_(parameter.grad)
        for parameter, gradient in zip(net.parameters(), held, strict=True):
            parameter.grad = gradient

    losses = []
    for _ in range(updates):
        for _ in range(passes):
            x, scale = torch.randn(5, 4, generator=generator), torch.rand((), generator=generator)
            if graphed:
                if own.graph is not None:
                    own.graph.work = work
                elif not own.plain_passes_left:
                    own._capture(run, (x, scale))
                    own.graph.work = work
                losses.append(own(run, x, scale).clone())
            else:
                losses.append(run(x, scale))
        assert net.unused.weight.grad is None
        nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad(set_to_none)
    return [*net.parameters(), *losses]


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("passes", [1, 2, 4])
def test_gradients_add_up_as_without_a_graph(passes, set_to_none):
    plain, graphed = (updated(6, passes, set_to_none, on) for on in (False, True))
    torch.testing.assert_close(plain, graphed, rtol=1e-6, atol=1e-7)


def test_what_cannot_be_captured_is_said_with_the_way_out():
    own = graphs.GraphedPass([nn.Parameter(torch.zeros(1))], accumulates=False)

    def run(x):
        if own.graph is not None:
            raise RuntimeError("operation not permitted when stream is capturing\nSearch for it in the documentation")
        return x

    for _ in range(graphs.PLAIN_PASSES):
        own(run, torch.zeros(1))
    with pytest.raises(RunError, match=r"\(operation not permitted when stream is capturing\); .* --no-cuda-graphs"):
        own(run, torch.zeros(1))
