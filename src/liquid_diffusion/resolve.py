"""What a training, an encoding or an estimate takes by default."""

from __future__ import annotations

import glob
import itertools
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from liquid_diffusion.config import EncodeConfig, EstimateConfig, RunConfig, TrainConfig
from liquid_diffusion.errors import UserError
from liquid_diffusion.presets import preset

CODECS = ("pixels", "sd-vae", "taesd")  # by name
FACTORS = {"pixels": 2, "sd-vae": 8}  # pixels a side for one latent, of those of which it is known before they are made
# nano saves 50 ms in each on two cores, where compiling takes 40 s; tiny, with the block of before, 60 ms on an H100,
# where it took 36
_STEPS_TO_COMPILE_FOR = 1000
# By model and optimiser, chosen on a split of the benchmark's pictures, one seed. nano by Muon, 2,000 steps: 4e-3 comes
# to a kernel distance of .362, 8e-3 to .340, at the same loss. tiny by Muon, 250 steps: 8e-3 has a loss of .369, 4e-3
# .398; the lower one leaves room for longer trainings and smaller batches, which nobody has measured. By AdamW 2e-3 was
# the best of three for both. Larger models have a usual rate for their size, not measured.
_LEARNING_RATES = {"nano": {"muon": 8e-3, "adamw": 2e-3}, "tiny": {"muon": 4e-3, "adamw": 2e-3}}
_DOWNSCALE = 4  # of every preset: each of its stages but the last one halves height and width


def check_size(image_size: int, codec: str, factor: int) -> int:
    """What the sides of pictures must be divisible by, for a codec of some factor and any preset.

    Raises:
        UserError: `image_size` is not.
    """
    multiple = factor * _DOWNSCALE
    if image_size % multiple:
        raise UserError(
            f"image_size {image_size} can't be divided by {multiple}, which the codec {codec} and the "
            f"model need; the next that can is {(image_size // multiple + 1) * multiple}."
        )
    return multiple


def resolve(config: TrainConfig, device: str) -> RunConfig:
    """A training run with everything decided that was left open, for a device type: cpu, mps or cuda.

    A GPU gets larger pictures and a larger model; so the default run takes minutes on either.

    Raises:
        UserError: there is no such model.
    """
    cpu = device == "cpu"
    emoji = config.data == "emoji"
    image_size = config.image_size or ((32 if cpu else 64) if emoji else (64 if cpu else 256))
    codec = place_of_codec(config.codec) if config.codec else _codec(image_size)
    model = config.model or ("nano" if cpu else "tiny")
    preset(model)
    # far better pictures of as many images (docs/ablations.md, Optimisers); not tried with the larger ones
    optimizer = config.optimizer or ("muon" if "muon" in _LEARNING_RATES.get(model, {}) else "adamw")
    steps = config.steps or ((2000 if cpu else 4000) if emoji else (4000 if cpu else 20000))
    decided: dict[str, Any] = {
        "data": _place(config.data),
        "out": config.out or f"runs/{_name(config.data)}-{image_size}",
        "image_size": image_size,
        "codec": codec,
        "model": model,
        "steps": steps,
        "batch_size": config.batch_size or _batch_size(codec),
        "lr": config.lr or _LEARNING_RATES.get(model, {}).get(optimizer, 3e-4),
        "optimizer": optimizer,
        # not for many shapes, each of which is compiled for itself
        "compile": device in ("cpu", "cuda") and steps >= _STEPS_TO_COMPILE_FOR and not config.buckets
        if config.compile is None
        else config.compile,
        "cache_latents": _cache(config, codec),
        "flip": _flip(config.data, config.flip),
    }
    return RunConfig(**{**asdict(config), **decided})


def _codec(image_size: int) -> str:
    return "pixels" if image_size <= 64 else "sd-vae"


def _batch_size(codec: str) -> int:
    return 64 if codec == "pixels" else 16


def _place(data: str) -> str:
    """A folder, file or pattern of files of this machine by its whole path, so that it is found from any folder."""
    path = Path(data).expanduser()
    return str(path.resolve()) if data != "emoji" and (path.exists() or glob.has_magic(data)) else data


def place_of_codec(codec: str) -> str:
    """An autoencoder's folder of this machine by its whole path; a name or a Hub id as it is."""
    path = Path(codec).expanduser()
    return str(path.resolve()) if codec not in CODECS and path.is_dir() else codec


def _cache(config: TrainConfig, codec: str) -> bool | str:
    if config.cache_latents is None:
        return codec != "pixels" and config.crop != "random" and not config.streaming
    if isinstance(config.cache_latents, str):
        return str(Path(config.cache_latents).expanduser().resolve())
    return config.cache_latents


def _flip(data: str, wanted: bool | None) -> bool:
    return data != "emoji" if wanted is None else wanted


def without_pattern(data: str) -> Path:
    """A folder or a file by its whole path; of a pattern of files the folder that it begins with."""
    path = Path(data).expanduser()
    if not path.exists():
        path = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
    return path.resolve()


def _name(data: str) -> str:
    path = without_pattern(data)
    return path.stem if path.suffix == ".parquet" else path.name


def resolve_encoding(config: EncodeConfig) -> EncodeConfig:
    """An encoding in which nothing is left open."""
    out = config.out or f"latents/{_name(config.data)}-{config.image_size}"
    data, codec, flip = _place(config.data), place_of_codec(config.codec), _flip(config.data, config.flip)
    return replace(config, data=data, codec=codec, out=out, flip=flip)


def resolve_estimate(config: EstimateConfig) -> EstimateConfig:
    """An estimate in which nothing is left open: of what `train` would do with the same options."""
    codec = config.codec or _codec(config.image_size)
    return replace(config, codec=codec, batch_size=config.batch_size or _batch_size(codec))
