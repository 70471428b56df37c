"""A training pass as one CUDA graph: the thousands of launches that a host makes for each micro-batch become one call.

Source: pytorch.org/docs, CUDA semantics, "Whole-network capture".
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from gbnzoo.run import RunError

PLAIN_PASSES = 3
"""Passes before the capture, in which kernels are compiled and algorithms chosen."""


class GraphedPass:
    """A forward and backward pass that from its fourth call on is the replay of a CUDA graph, with the same result.

    What Python decides in a pass, such as which branch to take, is decided once, at the capture; tensors keep their places.

    Args:
        parameters: those that get gradients.
        accumulates: whether several passes are made before the gradients are dropped; else they need no copy.
    """

    def __init__(self, parameters: Sequence[Parameter], *, accumulates: bool):
        self.parameters, self.accumulates = parameters, accumulates
        self.plain_passes_left = PLAIN_PASSES
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, run: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
        """What `run` returns for the inputs, which holds until the next call.

        Args:
            run: does a pass, adds the parameters' gradients and returns a tensor; without waiting for the GPU. The same at each
                call, and not kept: who owns this object may well be what it is a method of.
            inputs: of the same shapes at each call.

        Raises:
            RunError: if the pass cannot be captured.
        """
        if self.plain_passes_left:
            self.plain_passes_left -= 1
            return run(*inputs)
        if self.graph is None:
            self._capture(run, inputs)
        for own, given in zip(self.inputs, inputs, strict=True):
            if given is not None:
                own.copy_(given)
        self.graph.replay()
        self._add_gradients()
        return self.output

    def _capture(self, run: Callable[..., Tensor], inputs: Sequence[Tensor | None]) -> None:
        self.inputs = [tensor if tensor is None else torch.empty_like(tensor) for tensor in inputs]
        gradients = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None  # so that the graph writes its gradients instead of adding them to others
        self.graph = torch.cuda.CUDAGraph()
        try:
            # Other threads, such as those that load images, may do what they like in the meantime.
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.output = run(*self.inputs)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise RunError(
                f"a pass of this network cannot be captured as a CUDA graph ({reason}); `gbnzoo train` trains without"
                " under --no-cuda-graphs"
            ) from error
        self.trained = [parameter for parameter in self.parameters if parameter.grad is not None]
        self.gradients = [parameter.grad for parameter in self.trained]
        self.sums = [torch.empty_like(gradient) for gradient in self.gradients] if self.accumulates else self.gradients
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient

    def _add_gradients(self) -> None:
        if self.trained[0].grad is not None:
            torch._foreach_add_([parameter.grad for parameter in self.trained], self.gradients)
            return
        if self.accumulates:
            torch._foreach_copy_(self.sums, self.gradients)
        for parameter, total in zip(self.trained, self.sums, strict=True):
            parameter.grad = total
