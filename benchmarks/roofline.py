"""What a step computes and moves, against what the machine can compute and move.

    python benchmarks/roofline.py            # counts, ceilings and times, to benchmarks/results/roofline.csv

FLOPs are PyTorch's own count (convolutions and matrix products), but for the gradients of convolutions in groups.
Bytes are what every operator reads and writes, as if nothing stayed in a cache between two of them: the part of a
step that is not a product is bound by them. Ceilings are measured on the machine: a product of large bfloat16
matrices, and an addition of two tensors of the size that the model's finest stage has. oneDNN's own operators are not
in that count: the products of a compiled model are those of the model that it was made from. A training step is
counted and timed without torch.compile, whose fused operators can't be counted.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from figures import RESULTS, Row
from speed import OURS, build, machine, replace_rows, samplings, take_turns, training_steps
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from liquid_diffusion.hardware import keep_freed_memory

CPU = torch.device("cpu")
COLUMNS = [
    *("machine", "task", "model", "latent", "gflop", "gigabytes", "operators"),
    *("compute_ms", "memory_ms", "measured_ms"),
]


class ByteCounter(TorchDispatchMode):
    """Bytes that operators read and write, without those that only give a tensor another view."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.is_view or "empty" in func.__name__:
            return result
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        written = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in read + written)
        self.operators += 1
        return result


def median_seconds(function: Callable[[], object], runs: int = 9) -> float:
    """Of a function, after one call that is not counted."""
    function()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def ceilings(latent: int, batch: int) -> tuple[float, float]:
    """FLOP/s of a bfloat16 product, and bytes/s of an addition of tensors as large as those of the finest stage."""
    matrix = torch.randn(4096, 4096, dtype=torch.bfloat16)
    compute = 2 * 4096**3 / median_seconds(lambda: matrix @ matrix)
    tensor = torch.randn(batch * 64 * latent**2).to(torch.bfloat16)
    other = torch.randn_like(tensor)
    bandwidth = 3 * 2 * len(tensor) / median_seconds(lambda: tensor.add_(other), 99)
    return compute, bandwidth


def convolution_backward_flops(
    gradient: Sequence[int], x: Sequence[int], weight: Sequence[int], *rest: Any, out_shape: Any = None
) -> int:
    """Each gradient that is asked for takes as many as the forward pass.

    PyTorch's own formula takes the gradient of a weight in groups for that of a full one: of a depthwise convolution of
    160 channels it counts 160 times as many.
    """
    del x, out_shape
    wanted = rest[-1][:2]  # of input, weight
    return 2 * math.prod(gradient) * math.prod(weight[1:]) * sum(wanted)


def count(function: Callable[[], object]) -> tuple[int, int, int]:
    """FLOPs, bytes and operators of a call."""
    formulas = {torch.ops.aten.convolution_backward: convolution_backward_flops}
    with FlopCounterMode(display=False, custom_mapping=formulas) as flops:
        function()
    with ByteCounter() as traffic:
        function()
    return flops.get_total_flops(), traffic.bytes, traffic.operators


def main() -> None:
    keep_freed_memory()
    rows: list[Row] = []
    for latent in (32, 64, 128):
        models = build("tiny", latent, CPU)
        compute, bandwidth = ceilings(latent, 8)
        print(f"{latent}: {compute / 1e12:.2f} TFLOP/s, {bandwidth / 1e9:.1f} GB/s")
        for task, make in (("evaluation", samplings), ("training step", training_steps)):
            if task == "training step" and latent > 64:
                continue
            functions = make(models, 8, latent, CPU)
            times = take_turns(functions, 5, CPU)
            ours = OURS if task == "evaluation" else f"{OURS}, not compiled"
            for name in (ours, "eager transcription", "UNet2DModel", "DiTTransformer2DModel"):
                flops, moved, operators = count(functions[name])
                if task == "evaluation" and name == OURS:
                    flops = count(functions[f"{OURS}, not compiled"])[0]
                counts = [f"{flops / 1e9:.1f}", f"{moved / 1e9:.2f}", str(operators)]
                limits = [1e3 * flops / compute, 1e3 * moved / bandwidth, statistics.median(times[name])]
                found = [machine(CPU), task, name, str(latent), *counts, *(f"{limit:.1f}" for limit in limits)]
                rows.append(dict(zip(COLUMNS, found, strict=True)))
                print(*found[1:], flush=True)
    replace_rows(RESULTS / "roofline.csv", rows)


if __name__ == "__main__":
    main()
