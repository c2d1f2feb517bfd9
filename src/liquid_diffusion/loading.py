"""The pipeline that a person means by RUN: of a run folder, a pipeline folder, the Hub, or this package."""

from __future__ import annotations

import shlex
from importlib import resources
from pathlib import Path

from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from safetensors import SafetensorError
from torch import nn

from liquid_diffusion.errors import UserError
from liquid_diffusion.model_index import INDEX
from liquid_diffusion.patience import patiently
from liquid_diffusion.pipeline import LiquidDiffusionPipeline

# The model that comes with the package: what RUN means where it is left out.
SHIPPED = Path(str(resources.files("liquid_diffusion"))) / "shipped" / "nano-emoji"


def find_run(run: str | Path | None) -> str:
    """What a person means by RUN: what was said, or, where nothing was, the folder of the model in this package.

    Raises:
        UserError: nothing was said, and this package has no model.
    """
    if run is not None:
        return str(run)
    if not (SHIPPED / INDEX).is_file():
        raise UserError("There is no model in this installation: say RUN, e.g. after `liquid-diffusion train`.")
    return str(SHIPPED)


def load_pipeline(run: str | Path | None) -> LiquidDiffusionPipeline:
    """The pipeline of a run folder, of a pipeline folder or of a Hub id; of None, that of the model in this package.

    Its weights are float32, whatever they are kept in: the sampler takes the dtype that the device is fast in, once.

    Raises:
        UserError: there is none, or it is damaged.
    """
    run = find_run(run)
    folder = Path(run).expanduser()
    if folder.is_dir():
        # the second one is there alone where a run was killed while it put a new one in its place
        inside = (folder / name for name in ("pipeline", "pipeline.old"))
        pipeline = next((place for place in inside if place.is_dir()), folder)
        if not (pipeline / INDEX).is_file():
            raise UserError(f"{run} has no trained model yet: it is no run folder, or its first checkpoint is to come.")
        source = str(pipeline)
    elif folder.is_absolute() or run.startswith((".", "~")) or run.count("/") != 1:
        raise UserError(f"There is no run {run!r}; train one with `liquid-diffusion train --out {shlex.quote(run)}`.")
    else:
        source = run
    try:
        with patiently():
            loaded = LiquidDiffusionPipeline.from_pretrained(source)
    except RepositoryNotFoundError as error:  # of a private one the Hub says the same
        raise UserError(
            f"There is no run folder {run!r}, and no model of that id on the Hub that you may see; if it is private, "
            "log in by `hf auth login` or set HF_TOKEN."
        ) from error
    except UserError:
        raise
    except (OSError, ValueError, SafetensorError, HFValidationError) as error:
        if folder.is_dir():
            raise UserError(f"The model in {run} is damaged: {error}") from error
        raise UserError(
            f"There is no run folder {run!r}, and no model of that id on the Hub, or no network to reach it."
        ) from error
    for part in loaded.components.values():
        if isinstance(part, nn.Module):
            part.float()  # and not pipeline.to(float32), which warns of modules that would have to stay in float32
    return loaded
