"""Where the time of a training step goes, before and after: the eager transcription of our formulas, and the model.

Not compiled, because the fused operators of a compiled model have no names that tell anything.

python benchmarks/profile_step.py        # tiny, batch 8, 32 x 32 latents; to results/profile.csv or profile-gpu.csv
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import torch
from speed import OURS, build, training_steps
from torch.profiler import ProfilerActivity, profile

from liquid_diffusion.hardware import keep_freed_memory

RESULTS = Path(__file__).parent / "results"
STEPS, SHOWN = 5, 12


def operators(step: Callable[[], object], device: torch.device) -> list[tuple[str, float, float]]:
    """Operators of a step, by their own milliseconds and calls, the most expensive first."""
    cuda = device.type == "cuda"
    for _ in range(2):
        step()
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        for _ in range(STEPS):
            step()
    found = [
        (event.key, (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1000 / STEPS, event.count)
        for event in profiler.key_averages()
    ]
    return sorted(((name, ms, calls / STEPS) for name, ms, calls in found), key=lambda row: -row[1])


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    keep_freed_memory()
    steps = training_steps(build("tiny", 32, device), 8, 32, device)
    file_name, digits = ("profile-gpu.csv", 3) if device.type == "cuda" else ("profile.csv", 1)
    rows: list[list[str]] = []
    for name, step in (("eager transcription", "eager transcription"), (OURS, f"{OURS}, not compiled")):
        found = operators(steps[step], device)
        rest = found[SHOWN:]
        found = [*found[:SHOWN], ("all others", sum(row[1] for row in rest), sum(row[2] for row in rest))]
        rows += [[name, operator, f"{ms:.{digits}f}", f"{calls:.0f}"] for operator, ms, calls in found]
    for row in rows:
        print(f"{row[0]:22}{row[1]:60}{row[2]:>8} ms{row[3]:>8}")
    with (RESULTS / file_name).open("w", newline="") as file:
        csv.writer(file).writerows([["model", "operator", "ms", "calls"], *rows])


if __name__ == "__main__":
    main()
