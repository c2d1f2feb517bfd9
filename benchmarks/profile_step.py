"""Where the time of a training step goes, before and after: the eager transcription of our formulas, and the model.

Not compiled, because the fused operators of a compiled model have no names that tell anything.

python benchmarks/profile_step.py        # tiny, batch 8, 32 x 32 latents; to results/profile.csv
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from figures import RESULTS, Row
from speed import OURS, build, machine, replace_rows, training_steps
from torch.profiler import ProfilerActivity, profile

from liquid_diffusion.hardware import keep_freed_memory

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
    digits = 3 if device.type == "cuda" else 1
    rows: list[Row] = []
    for name, step in (("eager transcription", "eager transcription"), (OURS, f"{OURS}, not compiled")):
        found = operators(steps[step], device)
        rest = found[SHOWN:]
        found = [*found[:SHOWN], ("all others", sum(row[1] for row in rest), sum(row[2] for row in rest))]
        for operator, ms, calls in found:
            what = {"machine": machine(device), "model": name, "operator": operator}
            rows.append(what | {"ms": f"{ms:.{digits}f}", "calls": f"{calls:.0f}"})
            print(f"{name:22}{operator:60}{ms:8.{digits}f} ms{calls:8.0f}")
    replace_rows(RESULTS / "profile.csv", rows)


if __name__ == "__main__":
    main()
