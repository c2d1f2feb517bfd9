"""The 7x7 depthwise convolution of `liquid_diffusion.models.depthwise` beside the library's own, forward and backward.

Interleaved in one run, median of 15, milliseconds: python benchmarks/depthwise.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from liquid_diffusion.models.depthwise import _weight_gradient, _weight_gradient_in_strips, depthwise_conv

SHAPES = [(64, 64, 16, 16), (64, 128, 8, 8), (8, 64, 32, 32), (8, 256, 8, 8), (8, 64, 64, 64)]


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


def step(convolve: Callable[..., torch.Tensor], x: torch.Tensor, kernel: torch.Tensor) -> Callable[[], object]:
    return lambda: convolve(x, kernel).sum().backward()


def main() -> None:
    print(f"{'shape':22}{'dtype':10}{'weight gradient: ours':>24}{'library':>10}{'step: ours':>14}{'library':>10}")
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(shape, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()
            kernel = torch.randn(shape[1], 1, 7, 7, dtype=dtype).requires_grad_()
            grad, plain = torch.randn_like(x), x.detach()
            ours, library, our_step, library_step = milliseconds(
                [
                    lambda grad=grad, plain=plain: _weight_gradient_in_strips(grad, plain),
                    lambda grad=grad, plain=plain: _weight_gradient(grad, plain, 7),
                    step(depthwise_conv, x, kernel),
                    step(lambda x, k: F.conv2d(x, k, padding=3, groups=x.shape[1]), x, kernel),
                ]
            )
            name = str(dtype).removeprefix("torch.")
            print(f"{shape!s:22}{name:10}{ours:24.2f}{library:10.2f}{our_step:14.2f}{library_step:10.2f}")


if __name__ == "__main__":
    main()
