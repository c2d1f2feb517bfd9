"""Forward and backward pass of a training step on a GPU, recorded as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

_WARM_UP = 3  # calls before recording, in which libraries choose their kernels; as many as torch's own recorders make


class RecordedGradients:
    """Loss and gradients for batches of one shape, recorded once and replayed.

    The two passes are more than a thousand kernels of some microseconds each, which Python launches slower than a GPU
    runs them. What is recorded keeps its memory for as long as this lives.

    Args:
        compute: called with a batch; computes its loss (), detached, and adds the gradients to those of `parameters`.
            It may not look at values, nor draw random numbers.
        parameters: at whose places in memory the weights stay; what gradients they have is lost.
        batch: of the shape of those to come, on the GPU; its values are not used.
    """

    def __init__(
        self, compute: Callable[..., Tensor], parameters: Sequence[nn.Parameter], batch: Sequence[Tensor]
    ) -> None:
        self._batch = [tensor.clone() for tensor in batch]
        self._parameters = parameters
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                compute(*self._batch)
        torch.cuda.current_stream().wait_stream(stream)
        for parameter in parameters:
            parameter.grad = None  # so that the graph writes gradients of its own instead of adding to these
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):  # a loader may pin memory meanwhile
            self._loss = compute(*self._batch)
        self._gradients = [parameter.grad for parameter in parameters]

    def __call__(self, *batch: Tensor) -> Tensor:
        """The loss () of a batch, whose gradients are in the parameters afterwards, in place of what was there."""
        for static, given in zip(self._batch, batch, strict=True):
            static.copy_(given)
        self._graph.replay()
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        return self._loss.clone()
