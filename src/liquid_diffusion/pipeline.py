"""The trained generator as a diffusers pipeline: model, scheduler, codec and class names in one folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DiffusionPipeline, ImagePipelineOutput, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub.errors import HFValidationError
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from liquid_diffusion.codecs import AutoencoderCodec, Codec, PixelCodec
from liquid_diffusion.compile import compile_for_sampling
from liquid_diffusion.config import GUIDANCE, UserError
from liquid_diffusion.data.transforms import to_pil
from liquid_diffusion.models.unet import LiquidUNet
from liquid_diffusion.sampling import SampleStep, sample_steps, solver_times


class LiquidDiffusionPipeline(DiffusionPipeline):
    """Pictures from a `LiquidUNet`.

    Args:
        unet: the velocity field.
        scheduler: any of diffusers' flow schedulers.
        vae: the autoencoder of the latents; None for a model of pixels.
        codec: `Codec.state` of the codec that the model was trained with; None for pixels as they are.
        label_names: names of the classes, None for an unconditional model.
        image_size: side of the square pictures it was trained on, or their height and width.
    """

    _optional_components = ["vae"]
    model_cpu_offload_seq = "unet->vae"
    unet: LiquidUNet
    scheduler: SchedulerMixin
    vae: AutoencoderKL | AutoencoderTiny | None

    def __init__(
        self,
        unet: LiquidUNet,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | AutoencoderTiny | None = None,
        codec: dict[str, Any] | None = None,
        label_names: list[str] | None = None,
        image_size: int | Sequence[int] = 32,
    ) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae)
        codec = dict(codec or PixelCodec().state())
        self.register_to_config(codec=codec, label_names=list(label_names or []), image_size=image_size)

    @property
    def codec(self) -> Codec:
        """The codec, made of the pipeline's own vae and configuration."""
        state = self.config["codec"]
        if self.vae is None:
            pixels = PixelCodec(state["factor"])
            pixels.set_statistics(state["mean"], state["std"])
            return pixels
        latents = AutoencoderCodec(self.vae, state["name"])
        latents.set_statistics(state["mean"], state["std"])
        return latents

    def labels(self, class_labels: Sequence[str | int] | str | int | None, batch_size: int) -> Tensor | None:
        """Class names or numbers as (batch_size,) int64; one stands for all, None takes all classes in turn.

        A string that is the name of a class is that class, also where the names are numbers.

        Raises:
            UserError: an unknown class, any class where the model has none, or a wrong number of them.
        """
        names: list[str] = self.config["label_names"]
        if not names:
            if class_labels is not None:
                raise UserError("This model has no classes.")
            return None
        if class_labels is None:
            class_labels = [i % len(names) for i in range(batch_size)]
        elif isinstance(class_labels, str | int):
            class_labels = [class_labels] * batch_size
        if len(class_labels) != batch_size:
            raise UserError(f"{len(class_labels)} classes were given for {batch_size} pictures.")
        lowered = [name.lower() for name in names]
        numbers = []
        for label in class_labels:
            text = str(label).strip().lower()
            if isinstance(label, str) and text in lowered:
                numbers.append(lowered.index(text))
            elif text.isdecimal() and int(text) < len(names):
                numbers.append(int(text))
            else:
                raise UserError(f"There is no class {label!r}; the model knows {', '.join(names)}.")
        return torch.tensor(numbers, device=self._execution_device)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        class_labels: Sequence[str | int] | str | int | None = None,
        num_inference_steps: int = 25,
        guidance_scale: float = GUIDANCE,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, int, dict[str, Tensor]], dict[str, Tensor] | None] | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> Any:
        """Draw pictures.

        Args:
            batch_size: how many.
            class_labels: names or numbers of classes, one for all or one for each; None takes all in turn.
            num_inference_steps: steps of the solver.
            guidance_scale: classifier-free guidance where there are classes; 1 is none.
            generator: one generator, or one for each picture: then a picture does not depend on the others.
            output_type: "pil"; "np" (B, H, W, 3) in [0, 1]; "pt" (B, 3, H, W) in [-1, 1]; or "latent".
            return_dict: False for a tuple.
            callback_on_step_end: called as callback(pipeline, index, timestep, {"latents", "x0"}) after each
                evaluation of the model.
            height, width: in pixels, divisible by the codec's factor times the model's; None is the trained size.

        Returns:
            `ImagePipelineOutput` with `images`, or a tuple of it.

        Raises:
            UserError: see `labels`; or a size that is not divisible.
        """
        labels = self.labels(class_labels, batch_size)
        x = self.noise(batch_size, generator, height, width)
        total = len(solver_times(self.scheduler, num_inference_steps))
        with self.progress_bar(total=total) as bar:
            for step in self.steps(x, labels, num_inference_steps, guidance_scale):
                x = step.x
                bar.update()
                if callback_on_step_end is not None:
                    callback_on_step_end(self, step.index, round(1000 * step.t), {"latents": x, "x0": step.x0})
        images = x if output_type == "latent" else self._output(self.codec.decode(x), output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def noise(
        self,
        batch_size: int,
        generator: torch.Generator | list[torch.Generator] | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> Tensor:
        """Where a path starts: standard normal (batch_size, C, height/factor, width/factor), on the model's device.

        Raises:
            UserError: the size is not divisible by what codec and model need.
        """
        codec = self.codec
        trained = self.config["image_size"]
        usual_height, usual_width = (trained, trained) if isinstance(trained, int) else trained
        size = [height or usual_height, width or usual_width]
        multiple = codec.factor * self.unet.downscale
        if any(side % multiple for side in size):
            raise UserError(f"Height and width must be divisible by {multiple}, not {size[0]} x {size[1]}.")
        shape = (batch_size, codec.channels, size[0] // codec.factor, size[1] // codec.factor)
        return randn_tensor(shape, generator=generator, device=self._execution_device)

    def steps(
        self,
        noise: Tensor,
        labels: Tensor | None = None,
        num_inference_steps: int = 25,
        guidance_scale: float = GUIDANCE,
    ) -> Iterator[SampleStep]:
        """The way from noise to data, one evaluation of the model at a time.

        Args:
            noise: (B, C, h, w), see `noise`.
            labels: (B,) int64 as `labels` makes them; None for the null label.
            num_inference_steps: steps of the solver.
            guidance_scale: classifier-free guidance where there are classes; 1 is none.

        Yields:
            A `SampleStep` for each evaluation; its `x` and `x0` are what `codec.decode` makes pictures of.
        """
        times = solver_times(self.scheduler, num_inference_steps, noise.device)
        dtype = None if self.unet.dtype == torch.float32 else self.unet.dtype
        velocity = compile_for_sampling(self.unet, times, labels, guidance_scale, dtype)
        return sample_steps(velocity, noise, self.scheduler, num_inference_steps)

    @staticmethod
    def _output(images: Tensor, output_type: str) -> list[Image.Image] | np.ndarray | Tensor:
        if output_type == "pt":
            return images
        if output_type == "np":
            return ((images + 1) / 2).permute(0, 2, 3, 1).cpu().numpy()
        if output_type == "pil":
            return to_pil(images)
        raise ValueError(f"output_type must be pil, np, pt or latent, not {output_type!r}")


def load_pipeline(run: str) -> LiquidDiffusionPipeline:
    """The pipeline of a run folder, of a pipeline folder or of a Hub id.

    Raises:
        UserError: there is none, or it is damaged.
    """
    folder = Path(run).expanduser()
    if folder.is_dir():
        pipeline = folder / "pipeline" if (folder / "pipeline").is_dir() else folder
        if not (pipeline / "model_index.json").is_file():
            raise UserError(f"{run} has no trained model yet: it is no run folder, or its first checkpoint is to come.")
        source = str(pipeline)
    elif folder.is_absolute() or run.startswith((".", "~")) or run.count("/") != 1:
        raise UserError(f"There is no run {run!r}; train one with `liquid-diffusion train --out {run}`.")
    else:
        source = run
    try:
        return LiquidDiffusionPipeline.from_pretrained(source)
    except (OSError, SafetensorError, HFValidationError) as error:
        if folder.is_dir():
            raise UserError(f"The model in {run} is damaged: {error}") from error
        raise UserError(
            f"There is no run folder {run!r}, and no model of that id on the Hub, or no network to reach it."
        ) from error
