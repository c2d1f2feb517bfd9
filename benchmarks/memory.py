"""What training takes of a GPU's memory, estimated without one: presets at 256 and 512 px, with and without cache.

    python benchmarks/memory.py

It writes benchmarks/results/memory.csv and, beside what benchmarks/gpu.py measured on a card, memory-beside-gpu.csv, of
which benchmarks/performance_tables.py makes tables of the docs.
"""

from __future__ import annotations

import csv
from pathlib import Path

from figures import Row, read_rows

from liquid_diffusion.config import EstimateConfig
from liquid_diffusion.estimate import estimate, moments

RESULTS = Path(__file__).parent / "results"
PRESETS, SIZES, BATCH = ("tiny", "small", "base"), (256, 512), 8
STATE = ("weights", "optimiser", "averaged weights", "vae")


def row(model: str, size: int, cached: bool, checkpointing: bool) -> dict[str, object]:
    config = EstimateConfig(model, size, BATCH, cache_latents=cached, gradient_checkpointing=checkpointing)
    found = estimate(config)
    state = sum(found.breakdown.get(kind, 0) for kind in STATE)
    return {
        "model": model,
        "image_size": size,
        "batch_size": BATCH,
        "precision": config.precision,
        "cache_latents": cached,
        "gradient_checkpointing": checkpointing,
        "peak_gb": f"{found.peak_bytes / 1e9:.2f}",
        "state_gb": f"{state / 1e9:.2f}",
        "peak_is": next((kind for kind in ("encoding a batch", "decoding a grid") if kind in found.breakdown), "step"),
    }


def beside_the_gpu(measured: Row) -> dict[str, object]:
    """Estimate and measurement of a training in its moments, GB; of other arithmetic than bf16 the step alone, because
    the card encodes in bfloat16 whatever the training's, where an older one that float16 is for could not."""
    config = EstimateConfig(
        measured["model"],
        int(measured["image_size"]),
        int(measured["batch_size"]),
        measured["codec"],
        precision=measured["precision"],
        gradient_checkpointing=measured["gradient_checkpointing"] == "True",
        ema_on_cpu=measured["ema_on_cpu"] == "True",
    )
    found: dict[str, object] = {}
    for moment, held in moments(config)[1].items():
        if moment == "step" or config.precision == "bf16":
            found[f"{moment}_estimated"] = f"{sum(held.values()) / 1e9:.2f}"
            found[f"{moment}_measured"] = f"{int(measured[f'{moment}_bytes']) / 1e9:.2f}"
    facts = ("gpu", "model", "image_size", "batch_size", "precision", "gradient_checkpointing", "ema_on_cpu")
    return {name: measured[name] for name in facts} | found


def main() -> None:
    rows = [
        row(model, size, cached, checkpointing)
        for cached, checkpointing in ((True, False), (True, True), (False, False))
        for size in SIZES
        for model in PRESETS
    ]
    beside = [beside_the_gpu(measured) for measured in read_rows(RESULTS / "gpu-memory.csv")]
    for name, lines in (("memory.csv", rows), ("memory-beside-gpu.csv", beside)):
        if not lines:  # no card was measured with this model yet
            continue
        with (RESULTS / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(lines)
        print((RESULTS / name).read_text())


if __name__ == "__main__":
    main()
