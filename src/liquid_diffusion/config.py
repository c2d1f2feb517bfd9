"""What a person can set, as frozen dataclasses. Standard library only, so that `--help` answers at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from numbers import Integral, Real
from os import PathLike, fspath
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from liquid_diffusion.errors import UserError

SOLVERS = ("unipc", "euler", "heun", "dpm++")
STEPS = 25  # of a solver, by default
SOLVER = "unipc"  # by default: nearer to converged at 25 steps than Euler, for the same 25 evaluations
GUIDANCE = 3.0  # by default: nearer to real pictures than 2, and classes as clear as theirs
_GUIDANCE_HELP = (
    f"classifier-free guidance where there are classes; 1 is none (default: {GUIDANCE:g}, or 1 if it was trained with "
    "--label-dropout 0)"
)


@dataclass(frozen=True)
class UNetConfig:
    """Shape of a `LiquidUNet`, see there."""

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    decoder_depths: tuple[int, ...] | None = None
    ratio: float = 1.3
    condition_channels: int | None = None


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


KINDS: dict[type, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def _plain(value: Any) -> Any:
    """A path as text, numpy's number as Python's: what a YAML file can hold."""
    if isinstance(value, PathLike):
        return fspath(value)
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else value


def _check_values(config: object) -> None:
    """Each value is of its option's kind, or one of the few that it can have; the command line sees to that itself.

    But for values that are left empty in a YAML file, which it passes on.
    """
    for name, hint in get_type_hints(type(config)).items():
        kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
        value = _plain(getattr(config, name))
        object.__setattr__(config, name, value)  # of a frozen dataclass
        if value is None and type(None) in kinds:
            continue
        if choices and value not in choices:
            raise UserError(f"{name} must be one of {', '.join(choices)}, not {value!r}.")
        if value is None:
            raise UserError(f"{name} is empty: give it a value, or leave it out.")
        words = [words for kind, words in KINDS.items() if kind in kinds]
        if words and not (type(value) in kinds or (type(value) is int and float in kinds)):
            raise UserError(f"{name} must be {' or '.join(words)}, not {value!r}.")


def _check_val_fraction(value: float) -> None:
    if not 0 <= value < 1:
        raise UserError(f"val_fraction must be at least 0 and under 1, not {value}.")


@dataclass(frozen=True)
class TrainConfig:
    """A training run. What is None is chosen by the machine and the data, see `resolve.resolve`."""

    data: str = _option("emoji", "a name that `datasets` lists, a Hub id, a folder, or parquet files")
    out: str | None = _option(None, "run folder; one with checkpoints is resumed (default: runs/DATA-SIZE)")
    image_size: int | None = _option(None, "side of the square pictures (default: by data and machine)")
    model: str | None = _option(None, "nano, tiny, small or base (default: nano on a CPU, else tiny)")
    codec: str | None = _option(
        None,
        "pixels, sd-vae, taesd, or Hub id (with /FOLDER or without) or folder of an autoencoder (default: pixels up to "
        "64, then sd-vae)",
    )
    steps: int | None = _option(None, "optimiser steps (default: by data and machine)")
    batch_size: int | None = _option(None, "pictures of an optimiser step on each device (default: by image size)")
    lr: float | None = _option(None, "learning rate after the warm-up (default: by model)")
    warmup_steps: int = _option(100, "steps in which the learning rate rises from zero")
    cooldown: float = _option(0.4, "last part of the steps, in which the learning rate falls to zero as a cosine")
    optimizer: Literal["adamw", "muon"] | None = _option(
        None,
        "adamw, or muon: Muon for the convolutions that mix channels, AdamW for all else (default: muon for nano and "
        "tiny)",
    )
    weight_decay: float = _option(0.01, "decoupled weight decay")
    max_grad_norm: float = _option(1.0, "gradients are clipped to this norm")
    gradient_accumulation: int = _option(1, "parts in which a batch is computed, to save memory")
    gradient_checkpointing: bool = _option(False, "compute activations twice, to save memory")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = _option(
        "auto", "arithmetic; auto: the fastest that the machine has"
    )
    compile: bool | None = _option(
        None,
        "compile the blocks before the first step, which takes half a minute, and record the steps of a GPU (default: "
        "yes on a CPU or CUDA, if it pays)",
    )
    ema_decay: float = _option(0.999, "decay of the averaged weights, reached after its own warm-up")
    ema_on_cpu: bool = _option(False, "keep the averaged weights in the computer's memory, to save the card's")
    label_dropout: float = _option(0.1, "share of labels hidden in training, which makes guidance possible")
    time_sampling: Literal["logit-normal", "uniform"] = _option("logit-normal", "distribution of the training times")
    time_shift: float = _option(1.0, "above 1 trains nearer to noise: better after few steps, worse after many")
    crop: Literal["center", "random", "pad"] = _option(
        "center", "center; random: 0.8 to 1 of the largest crop, from anywhere; or pad: the whole picture on white"
    )
    buckets: bool = _option(False, "keep aspect ratios up to 1:2: a few shapes of about image_size^2 pixels")
    cache_latents: bool | str | None = _option(
        None,
        "train on latents encoded once: true keeps them in RUN/latents; or a folder written by encode (default: true "
        "with an autoencoder, but for random crops and streams)",
    )
    val_fraction: float = _option(0.05, "share of the pictures held out: never trained on, for evaluation")
    image_column: str | None = _option(None, "column of the pictures in a table (default: by the columns' types)")
    label_column: str | None = _option(None, "column of the labels in a table, of any type (default: a ClassLabel)")
    streaming: bool = _option(False, "read the pictures of a Hub data set where they lie, without downloading it")
    flip: bool | None = _option(None, "mirror half of the pictures (default: yes, but for emoji)")
    workers: int = _option(2, "processes that read pictures, where they do not fit in memory")
    seed: int = _option(0, "seed of every random draw")
    checkpoint_every: int = _option(500, "steps between checkpoints")
    sample_every: int = _option(500, "steps between grids of samples")
    log_every: int = _option(10, "steps between lines of metrics.jsonl")
    push_to_hub: str | None = _option(None, "OWNER/NAME on the Hub, to which the trained model is pushed at the end")
    hub_private: bool = _option(False, "a new repository on the Hub is private")

    def __post_init__(self) -> None:
        _check_values(self)
        _check_at_least_one(self, "image_size", "steps", "batch_size", "gradient_accumulation")
        _check_at_least_one(self, "checkpoint_every", "sample_every", "log_every")
        for name in ("cooldown", "label_dropout", "ema_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} must lie between 0 and 1, not {getattr(self, name)}.")
        _check_val_fraction(self.val_fraction)
        if self.cache_latents and self.crop == "random":
            raise UserError("A random crop differs each time and can't be cached; take --crop center or pad.")
        if self.streaming and (self.cache_latents or self.buckets):
            raise UserError("A stream is read as it comes: leave out --streaming, or --cache-latents and --buckets.")
        if (self.lr is not None and self.lr <= 0) or self.max_grad_norm <= 0 or self.time_shift <= 0:
            raise UserError("lr, max_grad_norm and time_shift must be above 0.")
        _check_seed(self.seed)
        if self.workers < 0 or self.warmup_steps < 0 or self.weight_decay < 0:
            raise UserError("workers, warmup_steps and weight_decay can't be below 0.")
        if self.batch_size is not None and self.batch_size % self.gradient_accumulation:
            raise UserError(
                f"batch_size {self.batch_size} can't be computed in {self.gradient_accumulation} equal parts."
            )


@dataclass(frozen=True)
class RunConfig(TrainConfig):
    """A training run in which nothing is left open; made by `resolve.resolve`."""

    out: str = ""
    image_size: int = 0
    model: str = ""
    codec: str = ""
    steps: int = 0
    batch_size: int = 0
    lr: float = 0.0
    optimizer: Literal["adamw", "muon"] = "adamw"
    compile: bool = False
    cache_latents: bool | str = False
    flip: bool = False


def _check_at_least_one(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"{name} must be at least 1, not {value}.")


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 2**32:
        raise UserError(f"A seed must lie between 0 and 2^32 - 1, not {seed}.")


def _check_sampling(config: SampleConfig | EvaluateConfig) -> None:
    _check_at_least_one(config, "n", "steps", "batch_size")
    if config.solver not in SOLVERS:
        raise UserError(f"There is no solver {config.solver!r}; choose from {', '.join(SOLVERS)}.")
    _check_seed(config.seed)


@dataclass(frozen=True)
class EncodeConfig:
    """Latents that are encoded once. What is None is chosen by the data, see `resolve.resolve_encoding`."""

    data: str = _option("emoji", "as for train --data")
    out: str | None = _option(None, "folder; what was begun there is resumed (default: latents/DATA-SIZE)")
    image_size: int = _option(256, "side of the square pictures")
    codec: str = _option("sd-vae", "sd-vae, taesd, or Hub id (with /FOLDER or without) or folder of an autoencoder")
    crop: Literal["center", "pad"] = _option("center", "center, or pad: the whole picture on white")
    buckets: bool = _option(False, "keep aspect ratios up to 1:2: a few shapes of about image_size^2 pixels")
    image_column: str | None = _option(None, "column of the pictures in a table (default: by the columns' types)")
    label_column: str | None = _option(None, "column of the labels in a table, of any type (default: a ClassLabel)")
    flip: bool | None = _option(None, "the mirror images too (default: yes, but for emoji)")
    val_fraction: float = _option(0.05, "share of the pictures held out: they are not encoded")
    batch_size: int = _option(8, "pictures encoded at once")
    workers: int = _option(2, "processes that read pictures")

    def __post_init__(self) -> None:
        _check_values(self)
        _check_at_least_one(self, "image_size", "batch_size")
        if self.workers < 0:
            raise UserError("workers can't be below 0.")
        _check_val_fraction(self.val_fraction)


def encoded_at_once(computed_at_once: int) -> int:
    """Pictures that a training encodes at once before it begins: fewer where a step computes fewer, to save memory."""
    return min(EncodeConfig.batch_size, computed_at_once)


@dataclass(frozen=True)
class SampleConfig:
    """Sampling from a run."""

    n: int = _option(16, "number of pictures")
    steps: int = _option(STEPS, "steps of the solver")
    solver: str = _option(SOLVER, ", ".join(SOLVERS))
    label: str | None = _option(None, "class, by name or number (default: all in turn)")
    guidance: float | None = _option(None, _GUIDANCE_HELP)
    seed: int = _option(0, "picture i has the seed SEED + i")
    batch_size: int = _option(64, "pictures computed at once; it does not change them")
    height: int | None = _option(None, "in pixels (default: as it was trained)")
    width: int | None = _option(None, "in pixels (default: as it was trained)")
    out: str = _option("samples.png", "a name that ends in .png, .jpg or .webp is one grid, anything else a folder")
    nearest: bool = _option(False, "put the nearest training picture beside each sample, so that a copy is seen")

    def __post_init__(self) -> None:
        _check_values(self)
        _check_sampling(self)
        _check_at_least_one(self, "height", "width")


@dataclass(frozen=True)
class EvaluateConfig:
    """An evaluation of a run, sampled as `sample` does by default."""

    n: int = _option(1000, "number of samples")
    reference: str = _option("val", "real pictures: val (held out of the run), train, all, or another data set")
    features: str = _option("lite0", "lite0, inception, dinov2, or the folder of a DINOv2")
    steps: int = _option(STEPS, "steps of the solver")
    solver: str = _option(SOLVER, ", ".join(SOLVERS))
    guidance: float | None = _option(None, _GUIDANCE_HELP)
    seed: int = _option(0, "sample i has the seed SEED + i")
    batch_size: int = _option(64, "samples computed at once; it does not change them")
    out: str | None = _option(
        None,
        "the figures, beside which come the pairs nearest to training pictures (default: metrics.json, in a run's own "
        "folder)",
    )

    def __post_init__(self) -> None:
        _check_values(self)
        _check_sampling(self)


@dataclass(frozen=True)
class EstimateConfig:
    """A training whose memory is asked for."""

    model: str = _option("tiny", "nano, tiny, small or base")
    image_size: int = _option(256, "side of the square pictures")
    batch_size: int | None = _option(None, "pictures of an optimiser step (default: as for train)")
    codec: str | None = _option(None, "pixels or sd-vae (default: as for train)")
    cache_latents: bool = _option(True, "train on cached latents: the autoencoder is needed for grids only")
    num_classes: int = _option(0, "number of classes")
    precision: Literal["bf16", "fp16", "fp32"] = _option("bf16", "arithmetic of the device")
    gradient_checkpointing: bool = _option(False, "compute activations twice, to save memory")
    ema_on_cpu: bool = _option(False, "averaged weights in the computer's memory")
    gpu_memory: float | None = _option(None, "GiB of a card: tells the largest batch that fits")

    def __post_init__(self) -> None:
        _check_values(self)
        _check_at_least_one(self, "image_size", "batch_size")
        if self.num_classes < 0:
            raise UserError(f"num_classes must be at least 0, not {self.num_classes}.")
        if self.codec not in (None, "pixels", "sd-vae"):
            raise UserError(f"An estimate knows the codecs pixels and sd-vae, not {self.codec!r}.")
        if self.gpu_memory is not None and self.gpu_memory <= 0:
            raise UserError(f"gpu_memory must be above 0, not {self.gpu_memory}.")


@dataclass(frozen=True)
class ShowConfig:
    """A grid of the pictures of a data set, as a model would be fed with them."""

    out: str = _option("grid.png", "the grid of `show`, a picture file")
    image_size: int | None = _option(None, "side of the square pictures; what train would take")
    crop: Literal["center", "random", "pad"] = _option("center", "as for train")
    buckets: bool = _option(False, "as for train; each picture is shown on a grey square")
    flip: bool | None = _option(None, "as for train")
    image_column: str | None = _option(None, "as for train")
    label_column: str | None = _option(None, "as for train")
    streaming: bool = _option(False, "as for train")
    seed: int = _option(0, "of the order, the crops and the mirroring")

    def __post_init__(self) -> None:
        _check_values(self)
        _check_at_least_one(self, "image_size")
        _check_seed(self.seed)


@dataclass(frozen=True)
class ExportConfig:
    """A trained model for other programs."""

    to: Literal["diffusers", "onnx", "hub"] = _option("diffusers", "diffusers, onnx or hub")
    out: str = _option("exported", "a new or empty folder; for hub OWNER/NAME")
    private: bool = _option(False, "a new repository on the Hub is private")

    def __post_init__(self) -> None:
        _check_values(self)


@dataclass(frozen=True)
class DemoConfig:
    """A web page of a trained model."""

    host: str = _option("127.0.0.1", "address to listen on; 0.0.0.0 lets other machines in")
    port: int = _option(7860, "port to listen on")

    def __post_init__(self) -> None:
        _check_values(self)
        if not 0 < self.port < 2**16:
            raise UserError(f"port must lie between 1 and 65535, not {self.port}.")
