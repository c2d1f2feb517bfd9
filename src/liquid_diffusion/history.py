"""What a run folder has to tell of its training: the grids, and the loss."""

from __future__ import annotations

import json
import math
from pathlib import Path

_MOST_GRIDS = 24


def grids(run: Path, most: int = _MOST_GRIDS) -> list[tuple[int, Path]]:
    """(step, file) of the run's grids of samples, the newest first; of many, `most` spread evenly over the steps."""
    files = {}
    for file in (run / "samples").glob("step-*.png"):
        number = file.stem.removeprefix("step-")
        if number.isdecimal():
            files[int(number)] = file
    steps = sorted(files, reverse=True)
    if len(steps) > most:
        steps = [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]
    return [(step, files[step]) for step in steps]


def last_step(run: Path) -> int | None:
    """The step of the weights that a run saved last, by its newest checkpoint.

    Where there is none, as somebody needed its place, the last one that RUN/metrics.jsonl tells of; else None.
    """
    names = [folder.name.removeprefix("step-") for folder in (run / "checkpoints").glob("step-*")]
    if saved := [int(name) for name in names if name.isdecimal()]:
        return max(saved)
    curve = loss_curve(run)
    return int(curve[-1][0]) if curve else None


def loss_curve(run: Path, points: int = 200) -> list[tuple[float, float]]:
    """(step, loss) of RUN/metrics.jsonl, each the mean of neighbouring lines so that at most `points` are left."""
    file = run / "metrics.jsonl"
    if not file.is_file():
        return []
    values = []
    for line in file.read_text().splitlines():
        try:
            entry = json.loads(line)
            step, loss = float(entry["step"]), float(entry["loss"])
        except (ValueError, KeyError, TypeError):
            continue  # another kind of line, or the last one of a run that is being written
        if math.isfinite(loss):
            values.append((step, loss))
    size = max(1, math.ceil(len(values) / points))
    parts = [values[i : i + size] for i in range(0, len(values), size)]
    return [(part[-1][0], sum(loss for _, loss in part) / len(part)) for part in parts]
