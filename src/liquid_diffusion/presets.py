"""The four sizes of the model, and what a training run takes where nothing is said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from liquid_diffusion.config import RunConfig, TrainConfig, UNetConfig, UserError


def nano() -> UNetConfig:
    """For a CPU, quick starts and the edge: at most 6 M parameters."""
    return UNetConfig(widths=(64, 128, 160), depths=(1, 1, 1), ratio=3)


def tiny() -> UNetConfig:
    """23 M parameters."""
    return UNetConfig(widths=(64, 128, 256), depths=(2, 2, 4))


def small() -> UNetConfig:
    """69 M parameters."""
    return UNetConfig(widths=(96, 192, 384), depths=(2, 3, 6))


def base() -> UNetConfig:
    """154 M parameters."""
    return UNetConfig(widths=(128, 256, 512), depths=(2, 4, 8))


PRESETS: dict[str, Callable[[], UNetConfig]] = {"nano": nano, "tiny": tiny, "small": small, "base": base}


def preset(name: str) -> UNetConfig:
    """The shape of the model called `name`.

    Raises:
        UserError: there is none of that name.
    """
    if name not in PRESETS:
        raise UserError(f"There is no model {name!r}; choose from {', '.join(PRESETS)}.")
    return PRESETS[name]()


def resolve(config: TrainConfig, device: str) -> RunConfig:
    """A training run with everything decided that was left open, for a device type: cpu, mps or cuda.

    A GPU gets larger pictures and a larger model; so the default run takes minutes on either.
    """
    cpu = device == "cpu"
    emoji = config.data == "emoji"
    image_size = config.image_size or ((32 if cpu else 64) if emoji else (64 if cpu else 256))
    codec = config.codec or ("pixels" if image_size <= 64 else "sd-vae")
    model = config.model or ("nano" if cpu else "tiny")
    decided: dict[str, Any] = {
        "out": config.out or f"runs/{Path(config.data).expanduser().resolve().name}-{image_size}",
        "image_size": image_size,
        "codec": codec,
        "model": model,
        "steps": config.steps or ((2000 if cpu else 4000) if emoji else (4000 if cpu else 20000)),
        "batch_size": config.batch_size or (64 if codec == "pixels" else 16),
        # nano: mean loss of the last 200 of the quick start's 2,000 steps (`train --lr`, metrics.jsonl), one seed each:
        # 1e-3 .222, 2e-3 .207, 3e-3 .207. The larger ones have a usual rate for their size, not measured.
        "lr": config.lr or (2e-3 if model == "nano" else 3e-4),
        "flip": not emoji if config.flip is None else config.flip,
    }
    return RunConfig(**{**asdict(config), **decided})
