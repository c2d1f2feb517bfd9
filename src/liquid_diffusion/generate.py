"""What `liquid-diffusion sample` does: a run and a wish in, pictures out."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers.utils.logging import disable_progress_bar
from PIL import Image
from torch import Tensor

from liquid_diffusion.config import SampleConfig
from liquid_diffusion.data.pictures import PictureDataset
from liquid_diffusion.data.transforms import to_pil
from liquid_diffusion.errors import UserError
from liquid_diffusion.evaluation.memorisation import draw_pairs
from liquid_diffusion.evaluation.nearest import nearest_pictures
from liquid_diffusion.evaluation.reference import pictures_of_run
from liquid_diffusion.grid import draw_grid
from liquid_diffusion.hardware import keep_freed_memory, process_state
from liquid_diffusion.loading import find_run, load_pipeline
from liquid_diffusion.pipeline import LiquidDiffusionPipeline, draw_in_batches
from liquid_diffusion.sampling import make_scheduler
from liquid_diffusion.writing import save_picture, writing_to

_GRID_ENDINGS = (".png", ".jpg", ".jpeg", ".webp")  # of --out; all else is a folder


def draw_pictures(pipeline: LiquidDiffusionPipeline, config: SampleConfig) -> Iterator[Tensor]:
    """Batches of pictures (B, 3, H, W) in [-1, 1] on the CPU, n in all; picture i depends on seed + i and its class."""
    pipeline.scheduler = make_scheduler(config.solver)
    labels = pipeline.labels(config.label, config.n)
    how = {"num_inference_steps": config.steps, "guidance_scale": config.guidance, "output_type": "pt"}
    batches = draw_in_batches(
        pipeline,
        None if labels is None else labels.tolist(),
        config.n,
        config.batch_size,
        config.seed,
        height=config.height,
        width=config.width,
        **how,
    )
    return (2 * images.cpu() - 1 for images in batches)


def _training_pictures(run: str, pipeline: LiquidDiffusionPipeline, config: SampleConfig) -> PictureDataset:
    height, width = pipeline.usual_shape
    known = pictures_of_run(run, config.height or height, config.width or width)
    if known is None:
        raise UserError(f"{run} does not say what it was trained on: the nearest pictures need a run folder.")
    return known.train


def _beside_nearest(pictures: Tensor, trained: PictureDataset) -> tuple[Image.Image, str]:
    """Rows of samples, each over the row of their nearest training pictures, and the distances in words."""
    nearest, distances = nearest_pictures(pictures, trained)
    words = (
        f"Root mean square distance to the nearest training picture (of pixels in [-1, 1]): "
        f"median {distances.median():.3f}, least {distances.min():.3f}."
    )
    return draw_pairs(pictures, nearest), words


def generate(run: str | None, config: SampleConfig) -> str:
    """Draw pictures with a run and write them to `config.out`; says in words where they are.

    Raises:
        UserError: the run, the class or the place is wrong.
    """
    out = Path(config.out).expanduser()
    grid = out.suffix.lower() in _GRID_ENDINGS
    if config.nearest and not grid:
        raise UserError(f"The nearest pictures come as one grid: give --out a name that ends in .png, not {out}.")
    disable_progress_bar()  # of the parts being loaded; the one of the sampling stays
    keep_freed_memory()
    pipeline = load_pipeline(run).to(process_state().device)
    pipeline.set_progress_bar_config(desc="Sampling", leave=False)
    trained = _training_pictures(find_run(run), pipeline, config) if config.nearest else None  # before it draws
    with writing_to(out):
        (out.parent if grid else out).mkdir(parents=True, exist_ok=True)
    batches = draw_pictures(pipeline, config)
    words = ""
    if trained is not None:
        sheet, words = _beside_nearest(torch.cat(list(batches)), trained)
    elif grid:
        sheet = draw_grid(to_pil(torch.cat(list(batches))), columns=max(1, round(config.n**0.5)))
    if grid:
        save_picture(sheet, out)
    else:  # as they come: thousands of them need not be in memory together
        pictures = itertools.chain.from_iterable(map(to_pil, batches))
        for seed, picture in enumerate(pictures, config.seed):
            save_picture(picture, out / f"{seed:06d}.png")
    return f"{config.n} picture{'s' if config.n > 1 else ''}: {out}. {words}".rstrip()
