"""The convolutions that a CPU trains in a way of ours, beside the library's own: the 7x7 depthwise one of
`liquid_diffusion.models.depthwise`, and the 1x1 one of few pixels, which is a matrix product.

Interleaved in one run, median of 15, milliseconds; it writes benchmarks/results/convolutions.csv:

    python benchmarks/convolutions.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from figures import RESULTS
from speed import machine, replace_rows
from torch import Tensor

from liquid_diffusion.models.depthwise import _weight_gradient, _weight_gradient_in_strips, depthwise_conv
from liquid_diffusion.models.layers import PointwiseConv

DEPTHWISE = [(64, 64, 16, 16), (64, 128, 8, 8), (8, 64, 32, 32), (8, 256, 8, 8), (8, 64, 64, 64)]
# batch, channels in and out, side: heads at the coarsest stage of nano, tiny, small and base, and at the next of tiny
POINTWISE = [(64, 128, 320, 4), (8, 256, 640, 8), (8, 448, 1152, 8), (8, 576, 1472, 8), (8, 160, 384, 16)]


def milliseconds(functions: list[Callable[[], object]], repeats: int = 15) -> list[float]:
    """The median time of each function, taking turns."""
    times: list[list[float]] = [[] for _ in functions]
    for repeat in range(repeats + 2):
        for i, function in enumerate(functions):
            start = time.perf_counter()
            function()
            if repeat > 1:
                times[i].append(1000 * (time.perf_counter() - start))
    return [statistics.median(some) for some in times]


def step(convolve: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], object]:
    """Forward and backward pass; the gradients of the result are no copies of one number, which a library may spare."""
    grad = torch.randn_like(convolve(*inputs))
    return lambda: convolve(*inputs).backward(grad)


def picture(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()


def depthwise(shape: tuple[int, int, int, int], dtype: torch.dtype) -> list[float]:
    """Weight gradient, ours and the library's, and a step, ours and the library's."""
    x, kernel = picture(shape, dtype), torch.randn(shape[1], 1, 7, 7, dtype=dtype).requires_grad_()
    grad, plain = torch.randn_like(x), x.detach()
    return milliseconds(
        [
            lambda: _weight_gradient_in_strips(grad, plain),
            lambda: _weight_gradient(grad, plain, 7, 7),
            step(depthwise_conv, x, kernel),
            step(lambda x, k: F.conv2d(x, k, padding=3, groups=x.shape[1]), x, kernel),
        ]
    )


def pointwise(batch: int, channels: int, out: int, side: int, dtype: torch.dtype) -> list[float]:
    """A step, ours and the library's."""
    x, layer = picture((batch, channels, side, side), dtype), PointwiseConv(channels, out).to(dtype)
    return milliseconds([step(layer, x), step(lambda x: F.conv2d(x, layer.weight, layer.bias), x)])


def measure(dtype: torch.dtype) -> list[dict[str, str]]:
    """A row for each convolution and each of its passes that was measured."""
    rows = []

    def note(kind: str, passes: str, shape: tuple[int, ...], ours: float, library: float) -> None:
        batch, channels, *out, side = shape
        rows.append(
            {
                "machine": machine(torch.device("cpu")),
                "dtype": str(dtype).removeprefix("torch."),
                "convolution": kind,
                "passes": passes,
                "shape": f"{batch} x {channels} x {side} x {side}" + "".join(f" to {some}" for some in out),
                "ours_ms": f"{ours:.2f}",
                "library_ms": f"{library:.2f}",
            }
        )
        print(*rows[-1].values(), sep="  ", flush=True)

    for batch, channels, height, _ in DEPTHWISE:
        gradient, library_gradient, ours, library = depthwise((batch, channels, height, height), dtype)
        note("depthwise 7x7", "weight gradient", (batch, channels, height), gradient, library_gradient)
        note("depthwise 7x7", "forward and backward", (batch, channels, height), ours, library)
    for case in POINTWISE:
        note("1x1", "forward and backward", case, *pointwise(*case, dtype))
    return rows


def main() -> None:
    rows = [row for dtype in (torch.float32, torch.bfloat16) for row in measure(dtype)]
    replace_rows(RESULTS / "convolutions.csv", rows)


if __name__ == "__main__":
    main()
