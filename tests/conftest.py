from __future__ import annotations

import os
import tempfile

# Before anything is imported that reads them: the suite means the CPU, whatever the machine has, and a Hub that nobody
# answers for, so that a test of "no network" tests that everywhere and nothing is ever downloaded.
os.environ["ACCELERATE_USE_CPU"] = "true"
os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"
os.environ["HF_HOME"] = tempfile.mkdtemp()

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from liquid_diffusion.config import TrainConfig


@pytest.fixture(autouse=True)
def _same_draws() -> None:
    torch.manual_seed(0)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of 24 pictures in two classes, of different sizes: each a coloured disc on noise."""
    folder = tmp_path / "photos"
    draws = np.random.default_rng(0)
    for i in range(24):
        side = 40 + i
        pixels = draws.integers(0, 60, (side, side + 8, 3), dtype=np.uint8)
        y, x = np.mgrid[:side, : side + 8]
        pixels[(y - side / 2) ** 2 + (x - side / 2) ** 2 < (side / 4) ** 2] = draws.integers(100, 255, 3)
        path = folder / ("cat" if i % 2 else "dog") / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return folder


@pytest.fixture
def quick(tmp_path: Path) -> Callable[..., TrainConfig]:
    """Makes configurations of runs that take seconds: emoji of 16 px, batches of 8."""

    def make(**changes: Any) -> TrainConfig:
        settings: dict[str, Any] = {
            "out": str(tmp_path / "run"),
            "image_size": 16,
            "model": "nano",
            "batch_size": 8,
            "steps": 4,
            "precision": "fp32",
            "warmup_steps": 2,
        }
        return TrainConfig(**{**settings, **changes})

    return make
