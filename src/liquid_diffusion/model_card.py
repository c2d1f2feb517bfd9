"""The card of a model: what it is, what it was trained on, how it is loaded, what is known of it and what is not."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from liquid_diffusion import __version__
from liquid_diffusion.data.registry import DatasetFacts, find_facts
from liquid_diffusion.history import grids, last_step
from liquid_diffusion.model_index import without_path
from liquid_diffusion.pipeline import LiquidDiffusionPipeline
from liquid_diffusion.resolve import without_pattern

GRID = "samples.png"
_SETTINGS = (
    "model", "image_size", "codec", "steps", "batch_size", "gradient_accumulation", "lr", "optimizer",
    "warmup_steps", "cooldown", "weight_decay", "ema_decay", "label_dropout", "time_sampling", "time_shift",
    "flip", "precision", "seed",
)  # fmt: skip
_FIGURES = {
    "kd": "kernel distance",
    "fd": "Frechet distance",
    "precision": "precision",
    "recall": "recall",
}


def _hub_id(data: str, facts: DatasetFacts | None) -> str | None:
    """Where the data lie on the Hub, as far as their name tells."""
    if facts:
        return data.partition("@")[2] or facts.hub_id
    return data if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", data) and not Path(data).exists() else None


def _licence_id(facts: DatasetFacts | None) -> str | None:
    """The Hub's name of a Creative Commons licence, where the data are known to have one."""
    found = re.match(r"CC0-1\.0|CC-BY(-NC)?(-SA|-ND)?-\d\.\d", facts.licence if facts else "")
    return found[0].lower() if found else None


def _data(data: str, facts: DatasetFacts | None, hub_id: str | None) -> str:
    if hub_id:
        name = f"[{hub_id}](https://huggingface.co/datasets/{hub_id})"
    elif facts:
        name = f"the data set `{facts.name}`"
    else:
        place = without_pattern(data).name  # without the path, which is the trainer's own
        kind = "a parquet file" if place.endswith(".parquet") else "pictures from a folder"
        name = f"{kind} called `{place}`"
    licence = f"Licence of the pictures: {facts.licence}." if facts else "The licence of the pictures was not said."
    return f"Trained on {name}. {licence}"


def _figures(metrics: dict[str, Any]) -> list[str]:
    """What `liquid-diffusion evaluate` measured, as a table."""
    if "kd" not in metrics:
        return []
    real = metrics.get("real")
    rows = [f"| | samples |{' training pictures |' if real else ''}", f"|---|---|{'---|' if real else ''}"]
    for key, words in _FIGURES.items():
        cells = []
        for figures in (metrics, real):
            if figures and key in figures:
                error = (
                    f" ± {figures['kd_standard_error']:.4f}" if key == "kd" and "kd_standard_error" in figures else ""
                )
                cells.append(f"{figures[key]:.4g}{error}")
        if cells:
            rows.append(f"| {words} | {' | '.join(cells)} |")
    setting = metrics.get("samples", {})
    setting = setting | {name: without_path(setting[name]) for name in ("features", "reference") if name in setting}
    done = [
        f"{name} {setting[name]}" for name in ("n", "features", "reference", "solver", "steps", "guidance", "seed")
        if name in setting
    ]  # fmt: skip
    return ["## Figures", "", f"By `liquid-diffusion evaluate` ({', '.join(done)}):", "", *rows, ""]


def model_card(pipeline: LiquidDiffusionPipeline, run: Path, name: str) -> ModelCard:
    """The card of a run's model.

    Args:
        pipeline: the model.
        run: the run folder; what is not there (config.yaml, metrics.json, a grid) is left out of the card.
        name: Hub id or name under which it can be loaded.
    """
    settings: dict[str, Any] = {}
    metrics: dict[str, Any] = {}
    if (run / "config.yaml").is_file():
        settings = yaml.safe_load((run / "config.yaml").read_text())
    with contextlib.suppress(OSError, ValueError):  # not measured, or cut short
        metrics = json.loads((run / "metrics.json").read_text())
    if metrics.get("step") not in (None, last_step(run)):
        metrics = {}  # of the model as it was before it was trained further
    data = settings.get("data")
    facts = find_facts(data) if data else None
    hub_id = _hub_id(data, facts) if data else None
    head = ModelCardData(
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        license=_licence_id(facts),
        datasets=[hub_id] if hub_id else None,
        tags=["liquid-diffusion", "rectified-flow", "liquid-neural-network", "attention-free", "image-generation"],
    )
    names = pipeline.config["label_names"]
    millions = sum(p.numel() for p in pipeline.unet.parameters()) / 1e6
    place = "in the latents of an autoencoder, which is in this repository too" if pipeline.vae else "on pixels"
    height, width = pipeline.usual_shape
    pixels = f"{width} x {height}"
    wish = f", class_labels={json.dumps(names[0], ensure_ascii=False)}" if names else ""
    body = [
        f"# {name.rsplit('/', maxsplit=1)[-1]}",
        "",
        *([f"![Samples of the model, always from the same seeds]({GRID})", ""] if latest_grid(run) else []),
        f"Draws pictures of {pixels} pixels: a U-Net of liquid (closed-form continuous-depth) convolution blocks, "
        f"without attention, of {millions:.1f} M parameters, trained by rectified flow {place}. "
        f"Made with liquid-diffusion {__version__}.",
        "",
        *([f"Classes: {', '.join(names)}.", ""] if names else []),
        "## How to load it",
        "",
        "With diffusers alone, which runs the code in this repository:",
        "",
        "```python",
        "from diffusers import DiffusionPipeline",
        "",
        f'pipe = DiffusionPipeline.from_pretrained("{name}", trust_remote_code=True)',
        f"images = pipe(batch_size=4{wish}).images",
        "```",
        "",
        "With the package liquid-diffusion, which does not:",
        "",
        "```python",
        "from liquid_diffusion import LiquidDiffusionPipeline",
        "",
        f'pipe = LiquidDiffusionPipeline.from_pretrained("{name}")',
        "```",
        "",
        "or on the command line:",
        "",
        f"    liquid-diffusion sample {name} --n 16 --out grid.png",
        "",
    ]
    if data:
        body += ["## What it was trained on", "", _data(data, facts, hub_id), ""]
    body += _figures(metrics)
    if settings:
        shown = [(key, settings[key]) for key in _SETTINGS if key in settings]
        shown = [(key, without_path(value) if key == "codec" else value) for key, value in shown]
        body += ["## How it was trained", "", "| setting | value |", "|---|---|"]
        body += [*(f"| {key} | {value} |" for key, value in shown), ""]
    body += [
        "## Limits",
        "",
        f"It knows nothing but the kind of pictures it was trained on, at {pixels} pixels, and takes no text. It may "
        "draw copies of training pictures; `liquid-diffusion sample RUN --nearest true` shows the nearest ones. What "
        "may be done with its pictures depends on the licence of the data."
        + ("" if metrics else " Its quality was not measured."),
        "",
    ]
    return ModelCard(f"---\n{head}\n---\n" + "\n".join(body))


def latest_grid(run: Path) -> Path | None:
    """The newest grid of a run."""
    return next((file for _, file in grids(run)), None)
