"""The four sizes of the model."""

from __future__ import annotations

from collections.abc import Callable

from liquid_diffusion.config import UNetConfig
from liquid_diffusion.errors import UserError


def nano() -> UNetConfig:
    """For a CPU, quick starts and the edge: at most 6 M parameters.

    A fifth of them is applied to pixels; the others see time and label, once for a picture.
    """
    return UNetConfig(widths=(128, 128, 128), depths=(0, 1, 1), decoder_depths=(2, 1, 1), condition_channels=640)


def tiny() -> UNetConfig:
    """23 M parameters."""
    return UNetConfig(widths=(160, 160, 256), depths=(0, 1, 4), decoder_depths=(2, 1, 4), condition_channels=864)


def small() -> UNetConfig:
    """68 M parameters."""
    return UNetConfig(widths=(224, 256, 448), depths=(0, 2, 6), decoder_depths=(2, 2, 6), condition_channels=992)


def base() -> UNetConfig:
    """155 M parameters."""
    return UNetConfig(widths=(320, 384, 576), depths=(0, 2, 8), decoder_depths=(2, 2, 8), condition_channels=1456)


PRESETS: dict[str, Callable[[], UNetConfig]] = {"nano": nano, "tiny": tiny, "small": small, "base": base}


def preset(name: str) -> UNetConfig:
    """The shape of the model called `name`.

    Raises:
        UserError: there is none of that name.
    """
    if name not in PRESETS:
        raise UserError(f"There is no model {name!r}; choose from {', '.join(PRESETS)}.")
    return PRESETS[name]()
