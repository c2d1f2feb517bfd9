"""The trained generator as a diffusers pipeline: model, scheduler, codec and class names in one folder."""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DiffusionPipeline,
    ImagePipelineOutput,
    ModelMixin,
    SchedulerMixin,
)
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import snapshot_download
from PIL import Image
from torch import Tensor

from liquid_diffusion.class_names import ClassNames
from liquid_diffusion.codecs import AutoencoderCodec, Codec, PixelCodec
from liquid_diffusion.compile import can_be_compiled, compile_for_sampling
from liquid_diffusion.config import GUIDANCE, STEPS
from liquid_diffusion.data.transforms import to_pil
from liquid_diffusion.errors import UserError
from liquid_diffusion.model_index import INDEX, complete, with_own_classes
from liquid_diffusion.sampling import (
    SampleStep,
    Velocity,
    for_flow,
    guide,
    sample_steps,
    seeded_generators,
    solver_times,
)

if TYPE_CHECKING:  # the class is named, not imported, so that a bundle of the pipeline has no second one
    from liquid_diffusion.models.unet import LiquidUNet

_OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def _whole_number(name: str, value: Any) -> int:
    """A number of Python's or numpy's.

    Raises:
        UserError: it is none, not whole, or under 1.
    """
    with contextlib.suppress(TypeError):
        if not isinstance(value, bool) and operator.index(value) >= 1:
            return operator.index(value)
    raise UserError(f"{name} must be a whole number of at least 1, not {value!r}.")


def _as_python(class_labels: Any) -> Any:
    """Classes that came as an array or a tensor, as numbers."""
    return class_labels.tolist() if isinstance(class_labels, Tensor | np.ndarray | np.generic) else class_labels


class LiquidDiffusionPipeline(DiffusionPipeline):
    """Pictures from a `LiquidUNet`.

    `save_pretrained` and `push_to_hub` write the code beside the weights, so that
    ``DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`` loads it where this package is not.

    Args:
        unet: the velocity field, a `LiquidUNet`.
        scheduler: any of diffusers' flow schedulers.
        vae: the autoencoder of the latents; None for a model of pixels.
        codec: `Codec.state` of the codec that the model was trained with; None for pixels in [-1, 1], squares of them
            where the model has more than 3 channels.
        label_names: names of the classes, in their order or by their numbers; None for the numbers themselves.
        image_size: side of the square pictures it was trained on, or their height and width.
        guidance: classifier-free guidance by default; 1 for a model that never saw the null label.

    Raises:
        UserError: parts that don't belong together: channels of model and codec, classes and their names.
    """

    _optional_components = ["vae"]
    _callback_tensor_inputs = ["latents", "x0"]
    model_cpu_offload_seq = "unet->vae"
    unet: LiquidUNet
    scheduler: SchedulerMixin
    vae: AutoencoderKL | AutoencoderTiny | None

    def __init__(
        self,
        unet: ModelMixin,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | AutoencoderTiny | None = None,
        codec: dict[str, Any] | None = None,
        label_names: list[str] | dict[str, str] | None = None,
        image_size: int | Sequence[int] = 32,
        guidance: float = GUIDANCE,
    ) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae)
        channels, classes = unet.config["in_channels"], unet.config["num_classes"]
        if codec is None and vae is not None:
            raise UserError("Give `codec` beside `vae`: the state of the codec that the model was trained with.")
        codec = dict(codec or PixelCodec.for_channels(channels).state())
        if vae is None and "factor" not in codec:
            raise UserError(f"The codec {codec['name']} needs its autoencoder, `vae`.")
        if isinstance(label_names, dict):
            label_names = [label_names[str(i)] for i in range(len(label_names))]
        names = list(label_names or map(str, range(classes)))
        if len(names) != classes:
            raise UserError(f"{len(names)} names of classes were given for a model that has {classes}.")
        self.register_to_config(codec=codec, label_names=names, image_size=image_size, guidance=guidance)
        if self.codec.channels != channels:
            raise UserError(f"The codec has {self.codec.channels} channels and the model {channels}.")
        self._interrupt = False

    # ---- saving and loading

    def save_config(self, save_directory: str, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write model_index.json, and the code that a program without this package needs."""
        super().save_config(save_directory)
        unet = getattr(self.unet, "_orig_mod", self.unet)  # of a compiled one, as diffusers saves it
        complete(Path(save_directory), type(self), type(unet), self.config["label_names"])

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> LiquidDiffusionPipeline:
        """A pipeline folder or Hub id, with the classes of this package: no code that lies there is run or fetched.

        Args:
            pretrained_model_name_or_path: a folder of `save_pretrained`, or a Hub id.
            kwargs: as of diffusers' `DiffusionPipeline.from_pretrained`.

        Raises:
            UserError: it is no pipeline of this package, or one that another version of it has saved.
        """
        source = str(pretrained_model_name_or_path)
        if source.startswith("~"):
            source = str(Path(source).expanduser())
        if "__bundle__" not in vars(cls):  # the class in a bundle knows no model's class, and is loaded with trust
            if Path(source).is_dir():
                if not (Path(source) / INDEX).is_file():
                    within = Path(source) / "pipeline"  # of a run
                    hint = f" Take {within}." if (within / INDEX).is_file() else ""
                    raise UserError(f"{source} is no pipeline: it has no {INDEX}.{hint}")
            elif source.startswith((".", "/")) or source.count("/") > 1:  # what no id of the Hub is
                raise UserError(f"There is no folder {source}.")
            else:
                of_the_hub = ("revision", "token", "cache_dir", "force_download", "local_files_only")
                wanted = {name: kwargs.pop(name) for name in of_the_hub if name in kwargs}
                # what it is first: the weights of another kind of model may be many gigabytes
                folder = snapshot_download(source, allow_patterns=INDEX, **wanted)
                if not (Path(folder) / INDEX).is_file():
                    raise UserError(f"{source} is no pipeline: it has no {INDEX}.")
                with_own_classes(cls._dict_from_json_file(Path(folder) / INDEX), cls.__name__, source)
                source = snapshot_download(source, allow_patterns=["*.json", "*.safetensors"], **wanted)
            kwargs = {"use_safetensors": True, **kwargs, "trust_remote_code": False}
        return super().from_pretrained(source, **kwargs)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> LiquidDiffusionPipeline:
        """A pipeline of the same parts and settings, as diffusers' `DiffusionPipeline.from_pipe`.

        Args:
            pipeline: whose parts are shared.
            kwargs: parts and settings that are others.
        """
        # diffusers compares the class of each part with what `__init__` says, which can't name a bundle's model
        return super().from_pipe(pipeline, **{"unet": pipeline.components["unet"], **kwargs})

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: str, **kwargs: Any) -> Any:
        """model_index.json with the classes of this package in place of those of the code beside it.

        Raises:
            UserError: it is no pipeline of this package, or names classes that are not diffusers'.
        """
        index = super().load_config(pretrained_model_name_or_path, **kwargs)
        return (
            index if "__bundle__" in vars(cls) else with_own_classes(index, cls.__name__, pretrained_model_name_or_path)
        )

    # ---- parts

    def enable_vae_slicing(self) -> None:
        """Encode picture by picture too, to save memory; decoding always does. Nothing to do for pixels."""
        if self.vae is not None:
            self.vae.enable_slicing()

    def disable_vae_slicing(self) -> None:
        """Encode whole batches again."""
        if self.vae is not None:
            self.vae.disable_slicing()

    def enable_vae_tiling(self) -> None:
        """Decode large pictures in overlapping tiles, to save memory. Nothing to do for pixels."""
        if self.vae is not None:
            self.vae.enable_tiling()

    def disable_vae_tiling(self) -> None:
        """Decode whole pictures again."""
        if self.vae is not None:
            self.vae.disable_tiling()

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

    @property
    def usual_shape(self) -> tuple[int, int]:
        """Height and width of the pictures by default: those it was trained on, or most of them."""
        trained = self.config["image_size"]
        return (trained, trained) if isinstance(trained, int) else (trained[0], trained[1])

    def labels(self, class_labels: Sequence[str | int] | Tensor | str | int | None, batch_size: int) -> Tensor | None:
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
        class_labels = _as_python(class_labels)
        if class_labels is None:
            class_labels = [i % len(names) for i in range(batch_size)]
        elif isinstance(class_labels, str | int):
            class_labels = [class_labels] * batch_size
        if len(class_labels) != batch_size:
            raise UserError(f"{len(class_labels)} classes were given for {batch_size} pictures.")
        known, numbers = ClassNames(names), []
        for label in class_labels:
            number = known.number_or_own(label)
            if number is None:
                raise UserError(f"There is no class {label!r}; the model knows {', '.join(names)}.")
            numbers.append(number)
        return torch.tensor(numbers, device=self._execution_device)

    def _check(
        self,
        batch_size: int,
        guidance_scale: float | None,
        generator: torch.Generator | list[torch.Generator] | None,
        output_type: str,
        callback_inputs: Sequence[str],
    ) -> None:
        """What can be said before the work begins, and is not said by `labels`, `noise` and the scheduler."""
        if guidance_scale is not None and not math.isfinite(guidance_scale):
            raise UserError(f"guidance_scale must be a number, not {guidance_scale}.")
        if isinstance(generator, list) and len(generator) != batch_size:
            raise UserError(f"{len(generator)} generators were given for {batch_size} pictures.")
        if output_type not in _OUTPUT_TYPES:
            raise UserError(f"output_type must be {', '.join(_OUTPUT_TYPES[:-1])} or latent, not {output_type!r}.")
        for name in callback_inputs:
            if name not in self._callback_tensor_inputs:
                raise UserError(f"A callback can see {' and '.join(self._callback_tensor_inputs)}, not {name!r}.")

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        class_labels: Sequence[str | int] | Tensor | str | int | None = None,
        num_inference_steps: int = STEPS,
        guidance_scale: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, int, dict[str, Tensor]], dict[str, Tensor] | None] | None = None,
        height: int | None = None,
        width: int | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents", "x0"),
    ) -> Any:
        """Draw pictures.

        Args:
            batch_size: how many; None for as many as there are classes in a list of them, else one.
            class_labels: names or numbers of classes, one for all or one for each; None takes all in turn.
            num_inference_steps: steps of the solver.
            guidance_scale: classifier-free guidance where there are classes; 1 is none, None the model's own.
            generator: one generator, or one for each picture: then a picture does not depend on the others.
            output_type: "pil"; "np" (B, H, W, 3) or "pt" (B, 3, H, W), both in [0, 1]; or "latent", the last state
                (B, C, height/factor, width/factor), of which ``pipeline.codec.decode`` makes pictures.
            return_dict: False for a tuple.
            callback_on_step_end: called as callback(pipeline, index, timestep, tensors) after each evaluation of the
                model, with timesteps from 1000, noise, to 0. "latents" in what it returns take the place of the state;
                ``pipeline._interrupt = True`` makes this step the last.
            height, width: in pixels, divisible by the codec's factor times the model's; None is the trained size.
            callback_on_step_end_tensor_inputs: which tensors it sees, of "latents", the state, and "x0", the data
                that the step predicted.

        Returns:
            `ImagePipelineOutput` with `images`, or a tuple of it.

        Raises:
            UserError: an argument that can't be, in one sentence; see also `labels` and `sampling.for_flow`.
        """
        class_labels = _as_python(class_labels)
        if batch_size is None:
            batch_size = 1 if class_labels is None or isinstance(class_labels, str | int) else len(class_labels)
        batch_size = _whole_number("batch_size", batch_size)
        num_inference_steps = _whole_number("num_inference_steps", num_inference_steps)
        self._check(batch_size, guidance_scale, generator, output_type, callback_on_step_end_tensor_inputs)
        labels = self.labels(class_labels, batch_size)
        x = self.noise(batch_size, generator, height, width)
        total = len(self._times(num_inference_steps, "cpu"))
        walk = self.steps(x, labels, num_inference_steps, guidance_scale, generator)
        self._interrupt, replaced = False, None
        with self.progress_bar(total=total) as bar:
            for _ in range(total):
                step = walk.send(replaced)
                x = step.x
                bar.update()
                if callback_on_step_end is not None:
                    tensors = {"latents": x, "x0": step.x0}
                    seen = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    returned = callback_on_step_end(self, step.index, round(1000 * step.t), seen)
                    replaced = (returned or {}).get("latents")
                    x = x if replaced is None else replaced
                if self._interrupt:
                    break
        images = x if output_type == "latent" else self._output(self.codec.decode(x), output_type)
        self.maybe_free_model_hooks()
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
        usual_height, usual_width = self.usual_shape
        size = [
            usual_height if height is None else _whole_number("height", height),
            usual_width if width is None else _whole_number("width", width),
        ]
        multiple = codec.factor * self.unet.downscale
        if any(side % multiple for side in size):
            raise UserError(f"Height and width must be divisible by {multiple}, not {size[0]} x {size[1]}.")
        shape = (batch_size, codec.channels, size[0] // codec.factor, size[1] // codec.factor)
        return randn_tensor(shape, generator=generator, device=self._execution_device)

    def steps(
        self,
        noise: Tensor,
        labels: Tensor | None = None,
        num_inference_steps: int = STEPS,
        guidance_scale: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> Generator[SampleStep, Tensor | None, None]:
        """The way from noise to data, one evaluation of the model at a time.

        Args:
            noise: (B, C, h, w), see `noise`.
            labels: (B,) int64 as `labels` makes them; None for the null label.
            num_inference_steps: steps of the solver.
            guidance_scale: classifier-free guidance where there are classes; 1 is none, None the model's own.
            generator: one, or one for each picture, of a scheduler that draws on the way.

        Yields:
            A `SampleStep` for each evaluation; its `x` and `x0` are what `codec.decode` makes pictures of. What is
            sent back, if anything, takes the place of `x`.
        """
        times = self._times(num_inference_steps, noise.device)
        scale = self.config["guidance"] if guidance_scale is None else guidance_scale
        velocity = self._velocity(times, labels, scale)
        return sample_steps(velocity, noise, self.scheduler, num_inference_steps, generator)

    def _times(self, steps: int, device: torch.device | str) -> list[float]:
        """When the solver will ask; one that does not integrate flows is set right first."""
        self.scheduler = for_flow(self.scheduler)
        return solver_times(self.scheduler, steps, device)

    def _velocity(self, times: list[float], labels: Tensor | None, guidance: float) -> Velocity:
        if not can_be_compiled(self.unet):

            def unet(x: Tensor, *condition: Tensor) -> Any:
                return self.unet(x.to(self.unet.dtype), *condition)

            return guide(unet, labels, self.unet.config["num_classes"], guidance)
        dtype = None if self.unet.dtype == torch.float32 else self.unet.dtype
        return compile_for_sampling(self.unet, times, labels, guidance, dtype)

    @staticmethod
    def _output(images: Tensor, output_type: str) -> list[Image.Image] | np.ndarray | Tensor:
        """Decoded pictures (B, 3, H, W) in [-1, 1] as the caller wants them."""
        if output_type == "pil":
            return to_pil(images)
        images = (images + 1) / 2
        return images if output_type == "pt" else images.permute(0, 2, 3, 1).cpu().numpy()


def draw_in_batches(
    pipeline: LiquidDiffusionPipeline,
    labels: Sequence[int] | None,
    count: int,
    batch_size: int,
    seed: int = 0,
    **options: Any,
) -> Iterator[Any]:
    """Draw pictures, `batch_size` at once, which does not change them: picture i has the seed `seed` + i.

    Args:
        pipeline: draws them.
        labels: class of each; None where there are no classes.
        count: number of pictures.
        batch_size: of a call.
        seed: of the first picture.
        options: others of the pipeline's call.

    Yields:
        The images of each call.
    """
    for start in range(0, count, batch_size):
        stop = min(start + batch_size, count)
        some = None if labels is None else labels[start:stop]
        yield pipeline(stop - start, some, generator=seeded_generators(seed + start, stop - start), **options).images
