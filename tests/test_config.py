from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from liquid_diffusion.config import EncodeConfig, EstimateConfig, ExportConfig, SampleConfig, ShowConfig, TrainConfig
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
        (TrainConfig, {"steps": "5"}, "steps must be a whole number, not '5'"),
        (TrainConfig, {"steps": 1.5}, "steps must be a whole number, not 1.5"),
        (TrainConfig, {"batch_size": True}, "batch_size must be a whole number, not True"),
        (TrainConfig, {"lr": "fast"}, "lr must be a number, not 'fast'"),
        (TrainConfig, {"compile": 1}, "compile must be true or false, not 1"),
        (TrainConfig, {"cache_latents": 3}, "cache_latents must be true or false or text, not 3"),
        (SampleConfig, {"label": 3}, "label must be text, not 3"),
    ],
)
def test_a_value_that_there_is_not(config: type, options: dict[str, Any], words: str) -> None:
    """Of the dataclasses themselves, which no parser stands before; what may be left open may be None."""
    config()
    with pytest.raises(UserError, match=words):
        config(**options)


def test_paths_and_numbers_of_numpy() -> None:
    """They become what a YAML file can hold; a whole number is a number."""
    given: dict[str, Any] = {"out": Path("runs/a"), "codec": Path("vae"), "steps": np.int64(5), "lr": np.float32(0.5)}
    config = TrainConfig(**given, cooldown=1)
    assert (config.out, config.codec, config.cooldown) == ("runs/a", "vae", 1)
    assert yaml.safe_load(yaml.safe_dump(asdict(config))) == asdict(config)
    assert (type(config.steps), type(config.lr)) == (int, float)


def test_what_may_be_left_open() -> None:
    assert TrainConfig(optimizer=None).optimizer is None
