from __future__ import annotations

from typing import Any

import pytest

from liquid_diffusion.config import EncodeConfig, EstimateConfig, ExportConfig, ShowConfig, TrainConfig
from liquid_diffusion.errors import UserError


@pytest.mark.parametrize(
    ("config", "options", "words"),
    [
        (TrainConfig, {"crop": "centre"}, "crop must be one of center, random, pad, not 'centre'"),
        (TrainConfig, {"optimizer": "Muon"}, "optimizer must be one of adamw, muon, not 'Muon'"),
        (TrainConfig, {"time_sampling": "normal"}, "time_sampling must be one of logit-normal, uniform"),
        (TrainConfig, {"precision": None}, "precision must be one of auto, fp32, bf16, fp16, not None"),
        (TrainConfig, {"warmup_steps": None}, "warmup_steps is empty: give it a value, or leave it out"),
        (TrainConfig, {"data": None}, "data is empty"),
        (EncodeConfig, {"crop": "random"}, "crop must be one of center, pad"),
        (EstimateConfig, {"precision": "fp8"}, "precision must be one of bf16, fp16, fp32"),
        (ShowConfig, {"crop": "middle"}, "crop must be one of"),
        (ExportConfig, {"to": "onx"}, "to must be one of diffusers, onnx, hub"),
    ],
)
def test_a_value_that_there_is_not(config: type, options: dict[str, Any], words: str) -> None:
    """Of the dataclasses themselves, which no parser stands before; what may be left open may be None."""
    config()
    with pytest.raises(UserError, match=words):
        config(**options)


def test_what_may_be_left_open() -> None:
    assert TrainConfig(optimizer=None).optimizer is None
