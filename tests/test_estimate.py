from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from torch.profiler import ProfilerActivity, profile

from liquid_diffusion.cli import main
from liquid_diffusion.config import EncodeConfig, EstimateConfig, TrainConfig
from liquid_diffusion.errors import UserError
from liquid_diffusion.estimate import SD_VAE, _autoencoder_on_fakes, estimate, largest_batch, moments, shortage
from liquid_diffusion.models.unet import LiquidUNet
from liquid_diffusion.resolve import resolve

NANO = EstimateConfig(model="nano", image_size=64, batch_size=4, codec="pixels", num_classes=9)


def measured_peak(config: EstimateConfig) -> int:
    """Bytes that forward and backward hold at their peak, from the allocator's own events of a real step."""
    model = LiquidUNet.from_preset(config.model, 12 if config.codec == "pixels" else 4, config.num_classes)
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    channels, side = (12, config.image_size // 2) if config.codec == "pixels" else (4, config.image_size // 8)
    assert config.batch_size is not None
    x, t = torch.randn(config.batch_size, channels, side, side), torch.rand(config.batch_size)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=config.precision != "fp32"):
            prediction = model(x, t).sample
        (prediction.float() - x).square().mean().backward()

    return peak_of(step)


def peak_of(function: Callable[[], object]) -> int:
    """Bytes that a function holds at its peak, from the allocator's own events."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    held = peak = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


# With checkpointing and a batch of 4 gradients are most of it, and the estimate is a ninth too high.
@pytest.mark.parametrize(
    "changes",
    [{}, {"precision": "fp32"}, {"gradient_checkpointing": True, "batch_size": 16}, {"batch_size": 12}],
)
def test_activations_are_those_of_a_real_step(changes: dict[str, object]) -> None:
    config = replace(NANO, **changes)  # type: ignore[arg-type]
    found = estimate(config)
    step = sum(found.breakdown[kind] for kind in ("gradients", "activations", "temporary"))
    assert step == pytest.approx(measured_peak(config), rel=0.1)


def test_state_is_counted_by_hand() -> None:
    found = estimate(NANO)
    parameters = sum(p.numel() for p in LiquidUNet.from_preset("nano", 12, 9).parameters())
    assert found.parameters == parameters
    assert found.breakdown["weights"] == 4 * parameters
    assert found.breakdown["optimiser"] == 8 * parameters
    assert found.breakdown["averaged weights"] == 4 * parameters
    assert sum(found.breakdown.values()) == found.peak_bytes


def test_checkpointing_and_half_precision_save() -> None:
    plain = estimate(NANO).breakdown["activations"]
    assert estimate(replace(NANO, gradient_checkpointing=True)).breakdown["activations"] < 0.5 * plain
    assert estimate(replace(NANO, precision="fp32")).breakdown["activations"] > 1.3 * plain


def test_largest_batch_is_the_largest() -> None:
    """It fits, and one more does not."""
    gigabytes = 2.0
    batch = largest_batch(NANO, gigabytes)
    assert estimate(replace(NANO, batch_size=batch)).peak_bytes <= 0.9 * gigabytes * 2**30
    assert estimate(replace(NANO, batch_size=batch + 1)).peak_bytes > 0.9 * gigabytes * 2**30
    assert largest_batch(NANO, 0.01) == 0


def test_vae_is_counted() -> None:
    found = estimate(replace(NANO, codec="sd-vae", batch_size=1))
    assert found.breakdown["vae"] == 4 * 83_653_863


@pytest.fixture
def small_vae(monkeypatch: pytest.MonkeyPatch) -> Iterator[AutoencoderKL]:
    """An autoencoder of the SD-VAE's kind, but smaller, which the estimate then means too."""
    small = {**SD_VAE, "block_out_channels": [128, 32, 64, 64], "layers_per_block": 1, "norm_num_groups": 8}
    monkeypatch.setattr("liquid_diffusion.estimate.SD_VAE", small)
    for remembered in (_autoencoder_on_fakes, moments):
        remembered.cache_clear()
    yield AutoencoderKL(**small).eval().to(memory_format=torch.channels_last)  # as the codec has it
    for remembered in (_autoencoder_on_fakes, moments):
        remembered.cache_clear()


def test_with_cached_latents_the_autoencoder_is_gone_in_a_step(small_vae: AutoencoderKL) -> None:
    """The step is one on latents, held against a real one; what is spared is the autoencoder."""
    config = replace(NANO, codec="sd-vae", image_size=128, batch_size=16, cache_latents=True)
    held = moments(config)[1]["step"]
    assert "vae" not in held
    step = sum(held[kind] for kind in ("gradients", "activations", "temporary"))
    assert step == pytest.approx(measured_peak(config), rel=0.1)


def test_a_grid_may_be_the_peak(small_vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the batch is small; held against a real decoding."""
    monkeypatch.setattr(EncodeConfig, "batch_size", 1)  # else the encoding is, see below
    config = replace(NANO, codec="sd-vae", image_size=256, batch_size=1, cache_latents=True, precision="fp32")
    found = estimate(config)
    with torch.no_grad():
        measured = peak_of(lambda: small_vae.decode(torch.randn(1, 4, 32, 32)))
    assert found.breakdown["decoding a grid"] == pytest.approx(measured, rel=0.1)
    assert found.breakdown["vae"] == 4 * sum(parameter.numel() for parameter in small_vae.parameters())
    assert largest_batch(config, found.peak_bytes / 2**30) == 0  # a tenth of a card is not for tensors


def test_the_encoding_before_a_training_may_be_the_peak(small_vae: AutoencoderKL) -> None:
    """Of eight pictures at most, or as many as a step has; held against a real one. There is no model yet."""
    config = replace(NANO, codec="sd-vae", image_size=256, batch_size=8, cache_latents=True, precision="fp32")
    found = estimate(config)
    with torch.no_grad():
        measured = peak_of(lambda: small_vae.encode(torch.randn(8, 3, 256, 256)))
        of_two = peak_of(lambda: small_vae.encode(torch.randn(2, 3, 256, 256)))
    few, many = (moments(replace(config, batch_size=n))[1]["encoding"]["encoding a batch"] for n in (2, 9))
    assert few == pytest.approx(of_two, rel=0.1)
    assert many == found.breakdown["encoding a batch"]
    assert set(found.breakdown) == {"vae", "encoding a batch", "workspaces"}
    assert found.breakdown["encoding a batch"] == pytest.approx(measured, rel=0.1)


with (Path(__file__).parents[1] / "benchmarks/results/former/gpu-memory.csv").open() as _file:
    MEASURED = [row for row in csv.DictReader(_file) if row["precision"] == "bf16"]


@pytest.mark.parametrize("row", MEASURED, ids=lambda row: f"{row['model']}-{row['image_size']}")
def test_a_gpu_took_what_was_estimated(row: dict[str, str]) -> None:
    """Within 10 %, while pictures were encoded; in the other moments the model was the one of before."""
    config = EstimateConfig(
        row["model"], int(row["image_size"]), int(row["batch_size"]), row["codec"],
        gradient_checkpointing=row["gradient_checkpointing"] == "True", ema_on_cpu=row["ema_on_cpu"] == "True",
    )  # fmt: skip
    assert sum(moments(config)[1]["encoding"].values()) == pytest.approx(int(row["encoding_bytes"]), rel=0.1)


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["estimate", "--model", "nano", "--image-size", "32", "--codec", "pixels"]
    assert main([*arguments, "--json", "--gpu-memory", "1"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert set(answer) == {"peak_bytes", "parameters", "breakdown", "largest_batch"}
    assert main(arguments) == 0
    assert "GiB" in capsys.readouterr().out
    assert main(["estimate", "--image-size", "100"]) == 2
    said = capsys.readouterr().err
    assert "image_size 100 can't be divided by 32" in said
    assert "the next that can is 128" in said
    with pytest.raises(UserError, match="gpu_memory must be above 0"):
        EstimateConfig(gpu_memory=0)


@pytest.mark.parametrize("image_size", [64, 256])
def test_where_nothing_is_said_it_is_of_what_train_would_do(image_size: int) -> None:
    run = resolve(TrainConfig(image_size=image_size, model="nano"), "cuda")
    said = EstimateConfig(model="nano", image_size=image_size, codec=run.codec, batch_size=run.batch_size)
    assert estimate(EstimateConfig(model="nano", image_size=image_size)) == estimate(said)


def test_shortage_is_told_with_the_batch_that_fits() -> None:
    config = EstimateConfig(model="nano", image_size=32, codec="pixels", batch_size=64)
    needed = estimate(config).peak_bytes
    assert shortage(config, 2 * needed) is None
    warning = shortage(config, needed)  # a tenth is kept free
    assert warning is not None
    batch = int(re.search(r"--batch-size (\d+)", warning)[1])  # type: ignore[index]
    assert 48 < batch < 64
    assert estimate(replace(config, batch_size=batch)).peak_bytes <= 0.9 * needed
    assert "not even one picture" in (shortage(config, 2**20) or "")
    assert f"--batch-size {4 * batch} would" in (shortage(config, needed, parts=4) or "")


def test_averages_in_the_computers_memory_spare_the_card() -> None:
    config = EstimateConfig(model="nano", image_size=32, codec="pixels")
    spared = estimate(config).peak_bytes - estimate(replace(config, ema_on_cpu=True)).peak_bytes
    assert spared == 4 * sum(p.numel() for p in LiquidUNet.from_preset("nano", 12).parameters())
