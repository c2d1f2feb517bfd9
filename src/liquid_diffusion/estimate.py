"""What a training will need of memory, told before anything is started and without a GPU.

One training step is run on fake tensors, which have shapes and no data, under PyTorch's memory tracker: the numbers
come from the code that trains, not from a formula about it.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary
from tqdm import tqdm

from liquid_diffusion.config import EstimateConfig, RunConfig, encoded_at_once
from liquid_diffusion.flow import flow_loss
from liquid_diffusion.models.unet import LiquidUNet
from liquid_diffusion.resolve import FACTORS, check_size, resolve_estimate

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Of a card's memory, what the CUDA context and the allocator's gaps leave.
_USABLE = 0.9
# Bytes that cuBLAS and cuDNN take for themselves: trainings on an H100 had 80 to 180 MB more than their tensors
# (benchmarks/results/gpu-memory.csv).
_WORKSPACES = 96 * 2**20
_LEAST_SHOWN = 0.005 * 2**30  # bytes; gradients, say, are nearly none while the forward pass still holds all
# stabilityai/sd-vae-ft-mse
SD_VAE: dict[str, Any] = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
}


@dataclass(frozen=True)
class Estimate:
    """Memory of one training step.

    Attributes:
        parameters: of the model.
        peak_bytes: the most that is held at once.
        breakdown: bytes by what they are for at that moment; they sum up to `peak_bytes`.
    """

    parameters: int
    peak_bytes: int
    breakdown: dict[str, int]


class _NormsAsOnCuda(TorchFunctionMode):
    """Group norms as autocast has them computed on a GPU: in float32, of a copy whose channels come first."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.group_norm:
            return func(*args, **(kwargs or {}))
        wide = args[0].float()  # is held while the norm is computed of the copy
        return func(wide.clone(), *args[1:], **(kwargs or {}))


class _PeakTracker(MemTracker):
    """MemTracker for the peak of everything alone; to keep each module's took three quarters of an estimate's time."""

    def _update_peak_stats(self, *state: Any) -> None:
        of_modules, self.memory_tracking = self.memory_tracking, WeakIdKeyDictionary()
        super()._update_peak_stats(*state)
        self.memory_tracking = of_modules


def _peak(tracker: MemTracker) -> dict[str, int]:
    """Bytes by kind at the moment of the peak, over all devices."""
    total: dict[str, int] = {}
    for kinds in tracker.get_tracker_snapshot("peak").values():
        for kind, size in kinds.items():
            name = getattr(kind, "value", str(kind))
            total[name] = total.get(name, 0) + int(size)
    return total


@contextlib.contextmanager
def _autocast(dtype: torch.dtype) -> Iterator[None]:
    """A GPU's autocast to a dtype, for fake tensors of a CPU."""
    if dtype == torch.float32:
        yield
        return
    with torch.autocast("cpu", dtype), _NormsAsOnCuda():
        yield


@functools.lru_cache
def _train_on_fakes(config: EstimateConfig, batch: int, channels: int, side: int) -> tuple[int, dict[str, int]]:
    """Parameters of the model, and what forward and backward of a batch hold at their peak."""
    dtype = _DTYPES[config.precision]
    model = LiquidUNet.from_preset(config.model, channels, config.num_classes)
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    x = torch.randn(batch, channels, side, side)
    t = torch.rand(batch)
    tracker = _PeakTracker()
    tracker.track_external(model)
    with tracker:
        with _autocast(dtype):
            prediction = model(x, t).sample
        flow_loss(prediction, x).backward()
    return sum(parameter.numel() for parameter in model.parameters()), _peak(tracker)


@functools.lru_cache
def _autoencoder_on_fakes(encoding: bool, batch: int, side: int, bf16: bool) -> tuple[int, int]:
    """Bytes of the SD-VAE, and what it holds beside them while it encodes or decodes pictures."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        vae = AutoencoderKL(**SD_VAE)
        weights = sum(parameter.numel() * 4 for parameter in vae.parameters())
        given = torch.randn(batch, 3, side, side) if encoding else torch.randn(batch, 4, side // 8, side // 8)
        tracker = _PeakTracker()
        # as the codec computes: in bfloat16 where a device has it, else in float32
        with tracker, torch.no_grad(), _autocast(torch.bfloat16 if bf16 else torch.float32):
            vae.encode(given) if encoding else vae.decode(given)
    return weights, sum(size for kind, size in _peak(tracker).items() if kind in ("Activation", "Temp"))


@functools.lru_cache
def moments(config: EstimateConfig) -> tuple[int, dict[str, dict[str, int]]]:
    """Parameters of the model, and bytes by kind when they may be most: in a step, drawing a grid, encoding a batch.

    Raises:
        UserError: as for `estimate`.
    """
    config = resolve_estimate(config)
    assert config.codec is not None
    assert config.batch_size is not None
    factor, channels = FACTORS[config.codec], 12 if config.codec == "pixels" else 4
    check_size(config.image_size, config.codec, factor)
    on_device = replace(config, cache_latents=False, ema_on_cpu=False, gpu_memory=None)  # what does not matter here
    with FakeTensorMode(allow_non_fake_inputs=True):
        parameters, peak = _train_on_fakes(on_device, config.batch_size, channels, config.image_size // factor)
    state = {
        "weights": 4 * parameters,
        "optimiser": 8 * parameters,  # two moments of the fused AdamW; Muon keeps one for its part
        "averaged weights": 0 if config.ema_on_cpu else 4 * parameters,
    }
    step = {
        "gradients": peak.get("Gradient", 0),
        "activations": peak.get("Activation", 0),
        "temporary": peak.get("Temp", 0) + peak.get("Other", 0) + peak.get("Buffer", 0),
    }
    state["workspaces"] = _WORKSPACES
    if config.codec == "pixels":
        return parameters, {"step": {**state, **step}}
    bf16 = config.precision == "bf16"
    vae, decoding = _autoencoder_on_fakes(False, 1, config.image_size, bf16)  # a grid is decoded picture by picture
    grid = {**state, "vae": vae, "decoding a grid": decoding}
    if config.cache_latents:
        _, encoding = _autoencoder_on_fakes(True, encoded_at_once(config.batch_size), config.image_size, bf16)
        # all is encoded before there is a model
        first = {"vae": vae, "encoding a batch": encoding, "workspaces": _WORKSPACES}
        return parameters, {"step": {**state, **step}, "grid": grid, "encoding": first}
    _, encoding = _autoencoder_on_fakes(True, config.batch_size, config.image_size, bf16)
    return parameters, {
        "step": {**state, "vae": vae, **step},
        "grid": grid,
        "encoding": {**state, "vae": vae, "encoding a batch": encoding},
    }


def estimate(config: EstimateConfig) -> Estimate:
    """The memory of training as `config` says, on a device that computes in its precision.

    Raises:
        UserError: the size is not divisible by what codec and model need, or there is no such model.
    """
    parameters, held = moments(config)
    breakdown = max(held.values(), key=lambda moment: sum(moment.values()))
    return Estimate(parameters, sum(breakdown.values()), dict(breakdown))


def largest_batch(config: EstimateConfig, gigabytes: float) -> int:
    """The largest batch whose training fits a card of some GiB; 0 where not even one picture does."""
    room = _USABLE * gigabytes * 2**30

    bar = tqdm(desc="Looking for the largest batch", unit="", bar_format="{desc}{postfix}", leave=False)

    def held(batch: int) -> int:
        bar.set_postfix_str(f"trying {batch}")
        return max(sum(moment.values()) for moment in moments(replace(config, batch_size=batch))[1].values())

    with bar:
        if held(1) > room:
            return 0
        fits, too_large = 1, 16
        while held(too_large) <= room:
            rise = (held(too_large) - held(fits)) / (too_large - fits)
            further = int((room - held(too_large)) / rise) + 1 if rise else too_large
            fits, too_large = too_large, too_large + further
        # The peak is the greatest of what is held at several moments, each linear in the batch: convex, so that a
        # chord leads to a batch that fits.
        while too_large - fits > 1:
            chord = (room - held(fits)) / (held(too_large) - held(fits))
            batch = min(max(fits + int(chord * (too_large - fits)), fits + 1), too_large - 1)
            if held(batch) <= room:
                fits = batch
            else:
                too_large = batch
        return fits


def shortage(config: EstimateConfig, free_bytes: int, parts: int = 1) -> str | None:
    """A warning in words where a training needs more than what is free on a card, or None.

    Args:
        config: the training; its batch is what is computed at once.
        free_bytes: on the card.
        parts: in which a step computes its batch, one after the other.
    """
    needed = estimate(config).peak_bytes
    if needed <= _USABLE * free_bytes:
        return None
    free = free_bytes / 2**30
    batch = largest_batch(config, free)
    way_out = f"--batch-size {batch * parts} would" if batch else "not even one picture at a time would"
    return (
        f"This training needs about {needed / 2**30:.1f} GiB and {free:.1f} are free: {way_out}. Other ways: "
        "--gradient-accumulation, --gradient-checkpointing true, --ema-on-cpu true."
    )


def shortage_of_run(run: RunConfig, num_classes: int, mixed_precision: str, free_bytes: int) -> str | None:
    """See `shortage`, for a run; None also where its codec is none that an estimate knows.

    Args:
        run: the training.
        num_classes: of its data.
        mixed_precision: no, bf16 or fp16, as accelerate names it.
        free_bytes: on the card.
    """
    if run.codec not in ("pixels", "sd-vae"):
        return None
    config = EstimateConfig(
        model=run.model,
        image_size=run.image_size,
        batch_size=run.batch_size // run.gradient_accumulation,
        codec=run.codec,
        num_classes=num_classes,
        precision="fp32" if mixed_precision == "no" else mixed_precision,  # type: ignore[arg-type]  # one of the three
        gradient_checkpointing=run.gradient_checkpointing,
        ema_on_cpu=run.ema_on_cpu,
        cache_latents=bool(run.cache_latents),
    )
    return shortage(config, free_bytes, run.gradient_accumulation)


def report(config: EstimateConfig, as_json: bool = False) -> str:
    """The estimate in words, or as JSON with peak_bytes, parameters and breakdown."""
    config = resolve_estimate(config)
    found = estimate(config)
    batch = None if config.gpu_memory is None else largest_batch(config, config.gpu_memory)
    if as_json:
        answer = asdict(found) if batch is None else {**asdict(found), "largest_batch": batch}
        return json.dumps(answer, indent=2)
    lines = [
        f"{config.model}, {found.parameters / 1e6:.1f} M parameters, {config.image_size} px ({config.codec}), "
        f"batch {config.batch_size}, {config.precision}: {found.peak_bytes / 2**30:.2f} GiB",
        "of which at the moment when it is most",
        *(f"  {name:18}{size / 2**30:6.2f}" for name, size in found.breakdown.items() if size >= _LEAST_SHOWN),
    ]
    if batch is not None:
        card = f"a card of {config.gpu_memory:g} GiB"
        lines.append(f"The largest batch for {card}: {batch}." if batch else f"Not one picture fits {card}.")
    return "\n".join(lines)
