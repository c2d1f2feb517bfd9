"""Between pictures and what the model sees.

A codec owns its scaling: pictures (B, 3, H, W) in [-1, 1] on one side, latents (B, C, H/factor, W/factor) of about
zero mean and unit variance in each channel on the other.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import re
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from torch import Tensor, nn

from liquid_diffusion.errors import UserError, first_line, is_out_of_memory
from liquid_diffusion.hardware import fastest_dtype
from liquid_diffusion.patience import patiently

HUB_NAMES = {"sd-vae": "stabilityai/sd-vae-ft-mse", "taesd": "madebyollin/taesd"}


class Codec(Protocol):
    """What every codec does; `encode` and `decode` keep no gradient."""

    factor: int
    channels: int

    def fit(self, batches: Iterable[Tensor]) -> None:
        """Measure mean and standard deviation of each channel on pictures (B, 3, H, W) in [-1, 1]."""

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, channels, H/factor, W/factor)."""

    def decode(self, latents: Tensor) -> Tensor:
        """(B, channels, h, w) -> (B, 3, h*factor, w*factor) in [-1, 1]."""

    def on(self, device: torch.device) -> contextlib.AbstractContextManager[None]:
        """Within it the codec's weights, if it has any, are on `device`; afterwards where they were."""

    def set_statistics(self, mean: list[float], std: list[float]) -> None:
        """Take mean and standard deviation of each channel as they were measured before."""

    def state(self) -> dict[str, Any]:
        """What `make_codec` needs to make the same codec again, JSON-able."""


class _Normalised:
    """Mean and standard deviation of each raw channel."""

    mean: Tensor
    std: Tensor

    def set_statistics(self, mean: list[float], std: list[float]) -> None:
        self.mean, self.std = torch.tensor(mean), torch.tensor(std)

    def _measure(self, raw: Iterable[Tensor]) -> None:
        """Over all pixels of all raw latents (B, C, h, w); one pass, in float64."""
        count, total, squares = 0, torch.zeros(()), torch.zeros(())
        for latents in raw:
            z = latents.cpu().double()  # MPS has no float64
            count += z.numel() // z.shape[1]
            total = total + z.sum((0, 2, 3))
            squares = squares + z.square().sum((0, 2, 3))
        if not count:
            raise ValueError("no pictures to measure the codec on")
        mean = total / count
        std = (squares / count - mean.square()).clamp_min(0).sqrt().clamp_min(1e-3)
        self.set_statistics(mean.tolist(), std.tolist())

    def _normalise(self, z: Tensor) -> Tensor:
        mean, std = self._statistics(z)
        return (z - mean) / std

    def _denormalise(self, z: Tensor) -> Tensor:
        mean, std = self._statistics(z)
        return z * std + mean

    def _statistics(self, z: Tensor) -> tuple[Tensor, Tensor]:
        if self.mean.device != z.device:  # once, so that a training step does not wait for a copy to the GPU
            self.mean, self.std = self.mean.to(z.device), self.std.to(z.device)
        mean, std = (values.to(z.dtype)[None, :, None, None] for values in (self.mean, self.std))
        return mean, std


class PixelCodec(_Normalised):
    """Space to depth: squares of `factor` x `factor` pixels become channels. No weights, nothing is lost.

    Args:
        factor: side of the squares.
    """

    def __init__(self, factor: int = 2) -> None:
        self.factor = factor
        self.channels = 3 * factor**2
        self.set_statistics([0.0] * self.channels, [1.0] * self.channels)

    @classmethod
    def for_channels(cls, channels: int) -> PixelCodec:
        """The codec of a model with so many channels, three for each pixel of a square.

        Raises:
            UserError: it is no model of pixels.
        """
        factor = math.isqrt(channels // 3)
        if channels != 3 * factor**2:
            raise UserError(f"A model of {channels} channels is none of pixels: give it an autoencoder and its codec.")
        return cls(factor)

    def fit(self, batches: Iterable[Tensor]) -> None:
        self._measure(F.pixel_unshuffle(images, self.factor) for images in batches)

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        del generator  # nothing here is drawn
        return self._normalise(F.pixel_unshuffle(images, self.factor))

    def decode(self, latents: Tensor) -> Tensor:
        return F.pixel_shuffle(self._denormalise(latents), self.factor).clamp(-1, 1)

    def on(self, device: torch.device) -> contextlib.AbstractContextManager[None]:
        del device  # no weights
        return contextlib.nullcontext()

    def state(self) -> dict[str, Any]:
        return {"name": "pixels", "factor": self.factor, "mean": self.mean.tolist(), "std": self.std.tolist()}


class AutoencoderCodec(_Normalised):
    """A frozen diffusers autoencoder. Its latents are normalised in each channel by what the data measures.

    Args:
        vae: the autoencoder; it is put in eval mode and never gets a gradient.
        name: the Hub id or folder it came from.
    """

    def __init__(self, vae: AutoencoderKL | AutoencoderTiny, name: str) -> None:
        self.vae = vae.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.name = name
        self.channels = vae.config["latent_channels"]
        widths = vae.config["block_out_channels" if isinstance(vae, AutoencoderKL) else "encoder_block_out_channels"]
        self.factor = 2 ** (len(widths) - 1)
        self.is_random = isinstance(vae, AutoencoderKL)  # else a picture has one latent and no posterior
        self.set_statistics([0.0] * self.channels, [1.0] * self.channels)

    def _arithmetic(self, device: torch.device) -> torch.autocast:
        """bfloat16 where a device is fast in it, else the weights' own; not float16, in which the SD-VAE overflows.

        On a CPU with AMX tiles a picture of 256 px takes a fifth of the time (one core: 2.6 s in place of 14.3 to
        decode, 1.2 in place of 7.1 to encode). With random weights the error is 2 % of a picture's standard deviation.
        """
        wanted = self.vae.dtype == torch.float32 and fastest_dtype(device) == torch.bfloat16
        return torch.autocast(device.type, torch.bfloat16, enabled=wanted)

    @contextlib.contextmanager
    def _wide_enough(self) -> Iterator[None]:
        """Within it float16 weights whose activations would overflow are float32, as the autoencoder asks for.

        Not where diffusers or accelerate have the weights in their own hands: elsewhere, or in other dtypes.
        """
        half = all(weight.dtype == torch.float16 for weight in self.vae.parameters())
        managed = self.vae.device.type == "meta" or any(hasattr(p, "_diffusers_hook") for p in self.vae.modules())
        if not half or managed or not self.vae.config.get("force_upcast"):
            yield
            return
        nn.Module.to(self.vae, torch.float32)  # not by its own method, which warns of what it is not asked for
        try:
            yield
        finally:
            nn.Module.to(self.vae, torch.float16)

    @torch.no_grad()
    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and standard deviation of the raw latents of pictures (B, 3, H, W) in [-1, 1].

        Returns:
            (B, channels, H/factor, W/factor) each, float32, on the autoencoder's device; no standard deviation where
            the autoencoder is deterministic.
        """
        with self._wide_enough():
            images = images.to(self.vae.device, self.vae.dtype)
            with self._arithmetic(images.device):
                encoded = self.vae.encode(images)
        if self.is_random:
            return encoded.latent_dist.mean.float(), encoded.latent_dist.std.float()
        return encoded.latents.float(), None

    def draw(self, mean: Tensor, std: Tensor | None, generator: torch.Generator | None = None) -> Tensor:
        """Normalised latents drawn from posteriors, as `posterior` gives them: ``mean + std * noise``."""
        return self._normalise(self._sample(mean, std, generator))

    @staticmethod
    def _sample(mean: Tensor, std: Tensor | None, generator: torch.Generator | None) -> Tensor:
        if std is None:
            return mean
        return mean + std * randn_tensor(tuple(mean.shape), generator, mean.device, mean.dtype)

    def fit(self, batches: Iterable[Tensor]) -> None:
        generator = torch.Generator(self.vae.device).manual_seed(0)
        self._measure(self._sample(*self.posterior(images), generator) for images in batches)

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return self.draw(*self.posterior(images), generator)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        hook = getattr(self.vae, "_hf_hook", None)  # of an offloaded one: it computes elsewhere than it lies
        device = self.vae.device if hook is None else hook.execution_device
        z = self._denormalise(latents.float()).to(device)
        slicing, tiling = self.vae.use_slicing, self.vae.use_tiling
        self.vae.enable_slicing()  # a grid of 72 pictures at once would take 13 GB at 256 px
        try:
            with self._wide_enough(), self._arithmetic(z.device):
                z = z.to(self.vae.dtype)
                images = self._decode(z)
                if images is None:  # not even one picture fits: slower, in tiles
                    torch.cuda.empty_cache()
                    self.vae.enable_tiling()
                    images = self.vae.decode(z).sample
        finally:
            # encoding takes whole batches and pictures, if nobody wants otherwise
            self.vae.use_slicing, self.vae.use_tiling = slicing, tiling
        return images.float().clamp(-1, 1)

    def _decode(self, z: Tensor) -> Tensor | None:
        """None when the memory is full; the failed try's own memory is free again when this has returned."""
        try:
            return self.vae.decode(z).sample
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return None

    def state(self) -> dict[str, Any]:
        return {"name": self.name, "mean": self.mean.tolist(), "std": self.std.tolist()}

    def fingerprint(self) -> str:
        """SHA-256 of the weights with their names: what tells this autoencoder from another of the same name."""
        digest = hashlib.sha256()
        for name, value in sorted(self.vae.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    @contextlib.contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        before = self.vae.device
        self.vae.to(device)
        try:
            yield
        finally:
            self.vae.to(before)


def _hub_place(name: str) -> tuple[str, str | None]:
    """A folder of this machine or the id of a repository of the Hub, and the folder within the latter, if any."""
    within = None if Path(name).is_dir() else re.fullmatch(r"(\w[\w.-]*/[\w.-]+)/(.+)", name)
    return (within[1], within[2]) if within else (name, None)


def load_vae(name: str) -> AutoencoderKL | AutoencoderTiny:
    """The autoencoder `sd-vae`, `taesd`, or of a folder, a Hub id, or a folder of its repository (OWNER/NAME/vae), in
    float32.

    Raises:
        UserError: it can't be had, or is neither an `AutoencoderKL` nor an `AutoencoderTiny`.
    """
    source, subfolder = _hub_place(HUB_NAMES.get(name, name))
    classes: dict[str, type[AutoencoderKL] | type[AutoencoderTiny]]
    classes = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}
    try:
        with patiently(), warnings.catch_warnings():
            # diffusers passes an argument that the client of the Hub does not want any more
            warnings.filterwarnings("ignore", "The `local_dir_use_symlinks` argument")
            kind = AutoencoderKL.load_config(source, subfolder=subfolder).get("_class_name")
            if kind not in classes:
                raise UserError(f"The codec {name!r} is a {kind}; only AutoencoderKL and AutoencoderTiny are known.")
            return classes[kind].from_pretrained(
                source, subfolder=subfolder, torch_dtype=torch.float32, use_safetensors=True
            )
    except (OSError, SafetensorError, HFValidationError) as error:
        if Path(source).is_dir():
            raise UserError(f"The codec in {name} is damaged, or has no safetensors: {first_line(error)}") from error
        raise UserError(
            f"The codec {name!r} can't be had: it is no folder here, and the Hub does not know it or can't be reached. "
            "Check the name and the network; --codec pixels needs no autoencoder."
        ) from error


def make_codec(name: str, factor: int = 2, mean: list[float] | None = None, std: list[float] | None = None) -> Codec:
    """A codec by name, with statistics if it was fitted before: the inverse of `Codec.state`.

    Args:
        name: pixels, sd-vae, taesd, or the Hub id or folder of an autoencoder.
        factor: side of the squares of `pixels`.
        mean, std: of each raw channel.
    """
    codec = PixelCodec(factor) if name == "pixels" else AutoencoderCodec(load_vae(name), name)
    if mean is not None and std is not None:
        codec.set_statistics(mean, std)
    return codec
