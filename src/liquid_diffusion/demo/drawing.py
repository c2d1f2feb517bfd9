"""What the web demo draws: pictures step by step, one path through time, a morph between two seeds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from liquid_diffusion.config import SampleConfig
from liquid_diffusion.data.transforms import to_pil
from liquid_diffusion.errors import UserError
from liquid_diffusion.pipeline import LiquidDiffusionPipeline
from liquid_diffusion.sampling import make_scheduler, seeded_generators

MOST_STEPS = 100
MOST_GUIDANCE = 20.0
MOST_PICTURES = 64
_MOST_PIXELS = 2**20  # of all pictures of one request together: 16 of 256 px
_PREVIEWS_THROUGH_A_VAE = 5  # decoding takes longer than the step; the last picture counts among them

View = Literal["state", "prediction"]


@dataclass(frozen=True)
class Frame:
    """Pictures after some evaluation: `index` from 0, of `total`, with the velocity taken at the time `t`."""

    index: int
    total: int
    t: float
    pictures: list[Image.Image]

    @property
    def last(self) -> bool:
        """Whether these are the finished pictures."""
        return self.index == self.total - 1


@dataclass(frozen=True)
class PathPoint:
    """One picture at the time `t` of its path: its state there, and the data that the model predicts from it."""

    t: float
    state: Image.Image
    prediction: Image.Image


def most_pictures(pipeline: LiquidDiffusionPipeline) -> int:
    """How many pictures one request may ask for, by their size.

    Raises:
        UserError: even one picture is too large to be drawn in a browser's request.
    """
    height, width = pipeline.usual_shape
    if height * width > _MOST_PIXELS:
        raise UserError(
            f"The demo draws pictures up to {math.isqrt(_MOST_PIXELS)} px, and this model's have {width} x {height}; "
            "use `sample`."
        )
    return min(MOST_PICTURES, _MOST_PIXELS // (height * width))


def check(pipeline: LiquidDiffusionPipeline, config: SampleConfig) -> None:
    """See that a request keeps within what the demo allows.

    Raises:
        UserError: it asks for too much, or for what does not exist.
    """
    most = most_pictures(pipeline)
    if config.n > most:
        raise UserError(f"At most {most} pictures of this size can be drawn at once, not {config.n}.")
    if config.steps > MOST_STEPS:
        raise UserError(f"At most {MOST_STEPS} steps can be taken, not {config.steps}.")
    if config.guidance is not None and not 0 <= config.guidance <= MOST_GUIDANCE:  # a NaN is refused too
        raise UserError(f"The guidance must lie between 0 and {MOST_GUIDANCE:g}, not {config.guidance:g}.")


def draw(pipeline: LiquidDiffusionPipeline, config: SampleConfig, view: View = "state") -> Iterator[Frame]:
    """Draw pictures and look at them on the way; picture i depends on its seed, `config.seed` + i, alone.

    Args:
        pipeline: its scheduler is replaced by the one of `config.solver`.
        config: `n`, `steps`, `solver`, `label`, `guidance` and `seed` count.
        view: what is seen before the end: the state of the path, or the data predicted from it.

    Yields:
        A frame for each evaluation, or for some of them where a large autoencoder has to decode each; the last one
        has the pictures that `liquid-diffusion sample` draws.

    Raises:
        UserError: see `check`.
    """
    check(pipeline, config)
    pipeline.scheduler = make_scheduler(config.solver)
    labels = pipeline.labels(config.label, config.n)
    noise = pipeline.noise(config.n, seeded_generators(config.seed, config.n))
    codec = pipeline.codec
    for step in pipeline.steps(noise, labels, config.steps, config.guidance):
        every = 1 if pipeline.vae is None else math.ceil(step.total / _PREVIEWS_THROUGH_A_VAE)
        last = step.index == step.total - 1
        if last or (step.index + 1) % every == 0:
            latents = step.x if last or view == "state" else step.x0
            yield Frame(step.index, step.total, step.t, to_pil(codec.decode(latents)))


def path(pipeline: LiquidDiffusionPipeline, config: SampleConfig, columns: int = 8) -> list[PathPoint]:
    """The path of the picture with the seed `config.seed`, from noise to data.

    Args:
        pipeline: its scheduler is replaced by the one of `config.solver`.
        config: as for `draw`; `n` does not count.
        columns: at most so many points, spread over the path; the first is noise at t = 1, the last the picture.

    Raises:
        UserError: see `check`.
    """
    config = replace(config, n=1)
    check(pipeline, config)
    pipeline.scheduler = make_scheduler(config.solver)
    state = pipeline.noise(1, seeded_generators(config.seed, 1))
    times, states, predictions = [], [], []
    for step in pipeline.steps(state, pipeline.labels(config.label, 1), config.steps, config.guidance):
        times.append(step.t)
        states.append(state)
        predictions.append(step.x0)
        state = step.x
    count = min(columns - 1, len(times))
    chosen = [round(i * (len(times) - 1) / max(1, count - 1)) for i in range(count)]
    seen = [states[i] for i in chosen] + [state]
    foreseen = [predictions[i] for i in chosen] + [state]
    pictures = to_pil(pipeline.codec.decode(torch.cat(seen + foreseen)))
    half = len(seen)
    return [PathPoint(t, pictures[i], pictures[half + i]) for i, t in enumerate([*(times[i] for i in chosen), 0.0])]


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Spherical interpolation between two noises of one shape; share 0 is a, 1 is b.

    ``sin((1 - s) w) / sin(w) a + sin(s w) / sin(w) b`` with w the angle between them (Shoemake, SIGGRAPH 1985).
    Gaussian noise lies near a sphere, which a straight line between two points of it leaves.
    """
    one, other = (noise.flatten().cpu().double() for noise in (a, b))  # MPS has no float64
    cosine = torch.nn.functional.cosine_similarity(one, other, dim=0)
    angle = math.acos(max(-1.0, min(1.0, cosine.item())))
    if math.sin(angle) < 1e-6:  # the same direction: any way between them is straight
        return torch.lerp(a, b, share)
    return (math.sin((1 - share) * angle) * a + math.sin(share * angle) * b) / math.sin(angle)


def morph(pipeline: LiquidDiffusionPipeline, config: SampleConfig, other_seed: int, frames: int) -> list[Image.Image]:
    """Pictures on the way from one seed to another, all of one class.

    Args:
        pipeline: its scheduler is replaced by the one of `config.solver`.
        config: as for `draw`; `n` does not count, and no label means the first class.
        other_seed: where the way ends; it begins at `config.seed`.
        frames: number of pictures, the two ends included.

    Raises:
        UserError: see `check`; or fewer than two frames.
    """
    if frames < 2:
        raise UserError(f"A morph needs at least 2 pictures, not {frames}.")
    config = replace(config, n=frames)
    for seed in (config.seed, other_seed):
        check(pipeline, replace(config, seed=seed))
    pipeline.scheduler = make_scheduler(config.solver)
    one = pipeline.labels(config.label, 1)
    start, end = (pipeline.noise(1, seeded_generators(seed, 1)) for seed in (config.seed, other_seed))
    noise = torch.cat([slerp(start, end, i / (frames - 1)) for i in range(frames)])
    labels = None if one is None else one.expand(frames)
    for step in pipeline.steps(noise, labels, config.steps, config.guidance):
        latents = step.x
    return to_pil(pipeline.codec.decode(latents))
