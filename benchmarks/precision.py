"""What bfloat16 gains over float32 on this machine: training steps and evaluations of ours, and the SD-VAE's decoder.

    python benchmarks/precision.py

Taken in turns in one run. The rows of a machine, told apart by the instructions that its processor has for bfloat16,
replace those of before in benchmarks/results/precision.csv.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from diffusers import AutoencoderKL
from figures import RESULTS, Row
from speed import CHANNELS, CLASSES, batch_of, machine, replace_rows, schedule, take_turns

from liquid_diffusion.compile import compile_for_sampling
from liquid_diffusion.estimate import SD_VAE
from liquid_diffusion.hardware import keep_freed_memory
from liquid_diffusion.models.unet import LiquidUNet

PRECISION = RESULTS / "precision.csv"
CASES = [("nano", 8, 16), ("tiny", 1, 32), ("tiny", 8, 32), ("tiny", 8, 64)]  # preset, batch, latent
RUNS = 7
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Versions = dict[str, Callable[[], object]]  # of one computation, by the name of the dtype


def evaluations(model: LiquidUNet, batch: int, size: int) -> Versions:
    x, _, labels = batch_of(batch, size, model.device)
    times = schedule(model.device)
    t = torch.full((batch,), times[3])
    compiled = {name: compile_for_sampling(model, times, labels[0], dtype=dtype) for name, dtype in DTYPES.items()}
    return {name: lambda velocity=velocity: velocity(x, t) for name, velocity in compiled.items()}


def training_steps(model: LiquidUNet, batch: int, size: int) -> Versions:
    """Forward and backward pass, not compiled."""
    x, t, labels = batch_of(batch, size, model.device)

    def step(dtype: torch.dtype) -> None:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            v = model(x, t, labels).sample
        v.float().square().mean().backward()
        model.zero_grad(set_to_none=True)

    return {name: lambda dtype=dtype: step(dtype) for name, dtype in DTYPES.items()}


def decodings() -> Versions:
    """The decoder of the SD-VAE, of random weights, for a picture of 256 px."""
    vae = AutoencoderKL(**SD_VAE).eval().to(memory_format=torch.channels_last)
    z = torch.randn(1, CHANNELS, 32, 32)

    @torch.no_grad()
    def decode(dtype: torch.dtype) -> None:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            vae.decode(z)

    return {name: lambda dtype=dtype: decode(dtype) for name, dtype in DTYPES.items()}


def main() -> None:
    keep_freed_memory()
    functions: dict[str, Versions] = {}
    for preset, batch, size in CASES:
        model = LiquidUNet.from_preset(preset, CHANNELS, CLASSES).to(memory_format=torch.channels_last)
        functions[f"training step, {preset}, batch {batch}, latent {size}"] = training_steps(model, batch, size)
        functions[f"evaluation, {preset}, batch {batch}, latent {size}"] = evaluations(model, batch, size)
    functions["SD-VAE's decoder, 256 px"] = decodings()
    here = machine(torch.device("cpu"))
    rows: list[Row] = []
    for what, versions in functions.items():
        times = take_turns(versions, RUNS, torch.device("cpu"))
        ratios = [slow / fast for slow, fast in zip(times["float32"], times["bfloat16"], strict=True)]
        medians = {f"{name}_ms": f"{statistics.median(some):.1f}" for name, some in times.items()}
        spread = {"least_ratio": f"{min(ratios):.2f}", "most_ratio": f"{max(ratios):.2f}"}
        rows.append({"machine": here, "what": what, **medians, **spread, "runs": str(RUNS)})
        print(what, medians, spread, flush=True)
    replace_rows(PRECISION, rows)


if __name__ == "__main__":
    main()
