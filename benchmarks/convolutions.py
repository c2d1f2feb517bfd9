"""What a CPU trains in a way of ours, beside the library's own: the depthwise convolutions of
`liquid_diffusion.models.depthwise`, the 1x1 convolution of few pixels, which is a matrix product, and the sum of
pictures and what is the same for all of them.

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
from liquid_diffusion.models.layers import PointwiseConv, add_to_each

DEPTHWISE = [(64, 64, 16, 16), (64, 128, 8, 8), (8, 64, 32, 32), (8, 256, 8, 8), (8, 64, 64, 64)]
FINEST = [(64, 128, 16, 16), (8, 160, 32, 32), (8, 160, 64, 64)]  # of nano and tiny, where kernels are 3x3
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


def depthwise7(shape: tuple[int, int, int, int], dtype: torch.dtype) -> list[float]:
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


def depthwise3(shape: tuple[int, int, int, int], dtype: torch.dtype) -> list[float]:
    """A step, ours and the library's."""
    inputs = picture(shape, dtype), torch.randn(shape[1], 1, 3, 3, dtype=dtype).requires_grad_()
    library = step(lambda x, k: F.conv2d(x, k, padding=1, groups=x.shape[1]), *inputs)
    return milliseconds([step(depthwise_conv, *inputs), library])


def added(shape: tuple[int, int, int, int], dtype: torch.dtype) -> list[float]:
    """A step of adding a picture to each of a batch, ours and the library's."""
    inputs = picture(shape, dtype), picture((1, *shape[1:]), dtype)
    return milliseconds([step(add_to_each, *inputs), step(torch.add, *inputs)])


def pointwise(batch: int, channels: int, out: int, side: int, dtype: torch.dtype) -> list[float]:
    """A step, ours and the library's."""
    x, layer = picture((batch, channels, side, side), dtype), PointwiseConv(channels, out).to(dtype)
    return milliseconds([step(layer, x), step(lambda x: F.conv2d(x, layer.weight, layer.bias), x)])


def measure(dtype: torch.dtype) -> list[dict[str, str]]:
    """A row for each operation and each of its passes that was measured."""
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
        gradient, library_gradient, ours, library = depthwise7((batch, channels, height, height), dtype)
        note("depthwise 7x7", "weight gradient", (batch, channels, height), gradient, library_gradient)
        note("depthwise 7x7", "forward and backward", (batch, channels, height), ours, library)
    for shape in FINEST:
        note("depthwise 3x3", "forward and backward", shape[:3], *depthwise3(shape, dtype))
        note("one added to each", "forward and backward", shape[:3], *added(shape, dtype))
    for case in POINTWISE:
        note("1x1", "forward and backward", case, *pointwise(*case, dtype))
    return rows


def main() -> None:
    rows = [row for dtype in (torch.float32, torch.bfloat16) for row in measure(dtype)]
    replace_rows(RESULTS / "convolutions.csv", rows)


if __name__ == "__main__":
    main()
