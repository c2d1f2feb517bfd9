"""What training takes of a GPU's memory, estimated without one: presets at 256 and 512 px, with and without cache.

    python benchmarks/memory.py

It writes benchmarks/results/memory.csv, of which benchmarks/performance_tables.py makes the table of the docs.
"""

from __future__ import annotations

import csv
from pathlib import Path

from liquid_diffusion.config import EstimateConfig
from liquid_diffusion.estimate import estimate

RESULT = Path(__file__).parent / "results" / "memory.csv"
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


def main() -> None:
    rows = [
        row(model, size, cached, checkpointing)
        for cached, checkpointing in ((True, False), (True, True), (False, False))
        for size in SIZES
        for model in PRESETS
    ]
    with RESULT.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(RESULT.read_text())


if __name__ == "__main__":
    main()
