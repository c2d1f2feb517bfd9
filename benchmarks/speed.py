"""Time of a training step and of sampling, ours beside its peers of equal parameters, interleaved in one run.

    python benchmarks/speed.py                       # tiny: batch 1 and 8, latents 32, 64, 128 (256, 512, 1024 px)
    python benchmarks/speed.py --preset nano --sizes 32 --batches 8
    python benchmarks/speed.py --plot                # only draw what the CSV holds

All models run in the same arithmetic (bfloat16 by autocast where the machine is fast in it) and in the memory layout
that suits them. Rows are appended to benchmarks/results/speed.csv; the figures are drawn from it.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from peers import EagerLiquidUNet, check_size, dit, unet2d
from torch import Tensor, nn

from liquid_diffusion.compile import compile_for_sampling
from liquid_diffusion.hardware import fastest_dtype, keep_freed_memory
from liquid_diffusion.models.unet import LiquidUNet
from liquid_diffusion.sampling import make_scheduler, solver_times

RESULTS = Path(__file__).parent / "results"
CHANNELS, CLASSES, STEPS = 4, 9, 25
COLUMNS = [
    "commit",
    "machine",
    "task",
    "preset",
    "model",
    "batch",
    "latent",
    "median_ms",
    "least_ms",
    "most_ms",
    "runs",
]
OURS = "LiquidUNet"


def build(name: str, size: int, device: torch.device) -> dict[str, nn.Module]:
    ours = LiquidUNet.from_preset(name, CHANNELS, CLASSES)
    count = sum(parameter.numel() for parameter in ours.parameters())
    peers = {
        "eager transcription": EagerLiquidUNet(name, CHANNELS, CLASSES),
        "UNet2DModel": unet2d(name, CHANNELS, CLASSES, size),
        "DiTTransformer2DModel": dit(name, CHANNELS, CLASSES, size),
    }
    for peer in peers.values():
        check_size(peer, count)
    models: dict[str, nn.Module] = {OURS: ours, **peers}
    return {
        key: model.to(device, memory_format=torch.preserve_format if "DiT" in key else torch.channels_last)
        for key, model in models.items()
    }


def take_turns(functions: dict[str, Callable[[], object]], runs: int, device: torch.device) -> dict[str, list[float]]:
    """Milliseconds of each run of each function, one after the other, after one that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for run in range(runs + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if run:
                times[name].append(1000 * (time.perf_counter() - start))
    return times


def batch_of(batch: int, size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(batch, CHANNELS, size, size, device=device).to(memory_format=torch.channels_last)
    return x, torch.rand(batch, device=device), torch.arange(batch, device=device) % CLASSES


def training_steps(models: dict[str, nn.Module], batch: int, size: int, device: torch.device) -> dict[str, Callable]:
    """Forward, backward and AdamW."""
    x, t, labels = batch_of(batch, size, device)
    dtype = fastest_dtype(device)

    def step_of(model: nn.Module) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

        def step() -> None:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                out = model(x, t, labels)
            loss = nn.functional.mse_loss((out if isinstance(out, Tensor) else out.sample).float(), x)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    return {name: step_of(model) for name, model in models.items()}


def samplings(models: dict[str, nn.Module], batch: int, size: int, device: torch.device) -> dict[str, Callable]:
    """One evaluation of the model; of ours as the sampler runs it."""
    x, _, labels = batch_of(batch, size, device)
    dtype = fastest_dtype(device)
    times = solver_times(make_scheduler(), STEPS, device)
    t = torch.full((batch,), times[3], device=device)
    ours = models[OURS]
    assert isinstance(ours, LiquidUNet)
    compiled = compile_for_sampling(ours, times, labels)

    def plain(model: nn.Module) -> Callable[[], None]:
        @torch.no_grad()
        def evaluate() -> None:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                model(x, t, labels)

        return evaluate

    functions: dict[str, Callable] = {name: plain(model) for name, model in models.items() if name != OURS}
    return {
        OURS: lambda: compiled(x, t),
        f"{OURS}, not compiled": plain(ours),
        **functions,
    }


def measure(preset: str, sizes: list[int], batches: list[int], runs: int) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    keep_freed_memory()
    machine = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"{torch.get_num_threads()} cores {platform.machine()}"
    )
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], check=True, capture_output=True, text=True)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "speed.csv"
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(COLUMNS)
        for size in sizes:
            models = build(preset, size, device)
            for batch in batches:
                for task, make in (("evaluation", samplings), ("training step", training_steps)):
                    if task == "training step" and (size > 64 or batch == 1):
                        continue  # minutes a step for the peers on a CPU, and nobody trains on one picture
                    times = take_turns(make(models, batch, size, device), runs, device)
                    for name, some in times.items():
                        middle = statistics.median(some)
                        row = [commit.stdout.strip(), machine, task, preset, name, batch, size]
                        writer.writerow([*row, f"{middle:.1f}", f"{min(some):.1f}", f"{max(some):.1f}", runs])
                        ratio = middle / statistics.median(times[OURS])
                        print(
                            f"{task:14} {preset} batch {batch} latent {size:3} {name:26}{middle:9.1f} ms {ratio:6.2f}",
                            flush=True,
                        )
                    file.flush()


def draw() -> None:
    """benchmarks/results/speed.png: time of an evaluation against pixels, with the fitted exponent."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    with (RESULTS / "speed.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["task"] == "evaluation"]
    batch = max((row["batch"] for row in rows), key=int)
    rows = [row for row in rows if row["batch"] == batch]
    latest = {(row["model"], int(row["latent"])): float(row["median_ms"]) for row in rows}
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for name in dict.fromkeys(row["model"] for row in rows):
        sizes = sorted(size for model, size in latest if model == name)
        pixels = [size**2 for size in sizes]
        times = [latest[name, size] for size in sizes]
        label = name
        if len(sizes) > 1:
            label += f", exponent {np.polyfit(np.log(pixels), np.log(times), 1)[0]:.2f}"
        axes.loglog(pixels, times, "o-", label=label)
    axes.set_xlabel("latent pixels")
    axes.set_ylabel(f"ms per evaluation, batch {batch}")
    axes.grid(which="both", alpha=0.2)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(RESULTS / "speed.png", dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--plot", action="store_true")
    arguments = parser.parse_args()
    if not arguments.plot:
        measure(arguments.preset, arguments.sizes, arguments.batches, arguments.runs)
    draw()


if __name__ == "__main__":
    main()
