"""Small image generators without attention: liquid (CfC) convolution blocks trained by rectified flow.

The public names are imported when they are first used, so that the command line's help answers at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from liquid_diffusion.config import SampleConfig, TrainConfig
    from liquid_diffusion.errors import UserError
    from liquid_diffusion.loading import load_pipeline
    from liquid_diffusion.models.liquid import LiquidBlock, cfc_gate, liquid_relaxation
    from liquid_diffusion.models.unet import LiquidUNet
    from liquid_diffusion.pipeline import LiquidDiffusionPipeline
    from liquid_diffusion.training.trainer import Trainer

_HOMES = {
    "LiquidBlock": "models.liquid",
    "LiquidDiffusionPipeline": "pipeline",
    "LiquidUNet": "models.unet",
    "SampleConfig": "config",
    "TrainConfig": "config",
    "Trainer": "training.trainer",
    "UserError": "errors",
    "cfc_gate": "models.liquid",
    "liquid_relaxation": "models.liquid",
    "load_pipeline": "loading",
}

__all__ = [
    "LiquidBlock",
    "LiquidDiffusionPipeline",
    "LiquidUNet",
    "SampleConfig",
    "TrainConfig",
    "Trainer",
    "UserError",
    "__version__",
    "cfc_gate",
    "liquid_relaxation",
    "load_pipeline",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
