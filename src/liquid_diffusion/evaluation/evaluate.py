"""What `liquid-diffusion evaluate` does: a run in; figures of its pictures, and of its memory, out."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers.utils.logging import disable_progress_bar
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from liquid_diffusion.class_names import ClassNames
from liquid_diffusion.config import EvaluateConfig
from liquid_diffusion.data.pictures import PictureDataset
from liquid_diffusion.data.sources import open_source
from liquid_diffusion.data.transforms import Shape, to_float, to_uint8
from liquid_diffusion.errors import UserError
from liquid_diffusion.evaluation.features import extract, make_features
from liquid_diffusion.evaluation.memorisation import WORST_PAIRS, Nearness, class_weights, draw_pairs
from liquid_diffusion.evaluation.metrics import LEAST_PICTURES, LinearClassifier, compare, nearest_rows
from liquid_diffusion.evaluation.nearest import nearest_places, pictures_at
from liquid_diffusion.evaluation.reference import CachedFeatures, RunPictures, labels_of, pictures_of_run, settings_of
from liquid_diffusion.evaluation.report import table
from liquid_diffusion.hardware import keep_freed_memory, process_state
from liquid_diffusion.history import last_step
from liquid_diffusion.loading import find_run, load_pipeline
from liquid_diffusion.pipeline import LiquidDiffusionPipeline, draw_in_batches
from liquid_diffusion.sampling import make_scheduler
from liquid_diffusion.writing import save_picture, write_whole, writing_to

_LARGEST_REFERENCE = 10_000  # pictures; the matrices of distances grow as its square
_ENOUGH_HELD_OUT = 1000  # for a median and a percentile of distances


def spread_labels(labels: Tensor, n: int, seed: int) -> Tensor:
    """n labels in the proportions of a reference set's (N,), in a random order.

    A set that is compared with another must ask for the same things: with each class equally often, a kernel distance
    would also measure how unequal the classes of the reference are.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return labels[order].repeat(-(-n // len(labels)))[:n]


def draw_samples(pipeline: LiquidDiffusionPipeline, labels: Tensor | None, config: EvaluateConfig) -> Tensor:
    """Pictures (n, 3, H, W) uint8 on the CPU, one for each label; picture i depends on seed + i and its label alone."""
    pipeline.scheduler = make_scheduler(config.solver)
    classes = None if labels is None else labels.tolist()
    how = {"num_inference_steps": config.steps, "guidance_scale": config.guidance}
    pictures: list[Tensor] = []
    with tqdm(total=config.n, desc="Sampling", unit="picture", leave=False) as bar:
        for images in draw_in_batches(pipeline, classes, config.n, config.batch_size, config.seed, **how):
            pictures += [to_uint8(image) for image in images]
            bar.update(len(images))
    return torch.stack(pictures)


def _thinned(dataset: PictureDataset, most: int = _LARGEST_REFERENCE) -> PictureDataset:
    """At most so many pictures, at equal distances over the set."""
    if len(dataset) <= most:
        return dataset
    chosen = [dataset.indices[i * len(dataset) // most] for i in range(most)]
    return PictureDataset(dataset.source, dataset.image_size, indices=chosen, crop=dataset.crop, shapes=dataset.shapes)


def _reference(name: str, known: RunPictures | None, shape: Shape, run: str) -> PictureDataset:
    if name not in ("val", "train", "all"):
        crop = known.train.crop if known else "center"
        return _thinned(PictureDataset(open_source(name), max(shape), crop=crop, shapes=[shape]))
    if known is None:
        raise UserError(
            f"{run} does not say what it was trained on: give real pictures by --reference, a folder or a data set."
        )
    if name == "val" and known.held_out is None:
        raise UserError(f"No pictures were held out of {run}: say --reference train, all, or another data set.")
    if name == "val" and known.held_out is not None:
        return _thinned(known.held_out)
    if name == "train" or known.held_out is None:
        return _thinned(known.train)
    everything = sorted(known.train.indices + known.held_out.indices)
    both = PictureDataset(known.train.source, max(shape), indices=everything, crop=known.train.crop, shapes=[shape])
    return _thinned(both)


def _memory(
    samples: Tensor, features: Tensor, labels: Tensor | None, known: RunPictures, cached: CachedFeatures
) -> tuple[dict[str, Any], Image.Image]:
    """How near samples come to what was trained on, and the nearest pairs.

    Args:
        samples, features: (n, 3, H, W) uint8 and (n, D).
        labels: (n,) int64, by the numbers of what was trained on; None where there are no such classes.
        known: what was trained on.
        cached: features of real pictures.
    """
    train, held_out = known.train, known.held_out
    trained = cached.of(train)
    if train.flip:
        trained = torch.cat([trained, cached.of(train, mirrored=True)])
    distances, index = nearest_rows(features, trained)
    weights = None
    if held_out is None:
        pixel, unseen, unseen_pixel, seen = nearest_places(samples, train)[0], None, None, 0
    else:
        held_out = _thinned(held_out, _ENOUGH_HELD_OUT)
        unseen = nearest_rows(cached.of(held_out), trained)[0]
        real = torch.stack([held_out.picture(i)["image"] for i in range(len(held_out))])
        together = nearest_places(torch.cat([samples, real]), train)[0]  # which reads the set once
        pixel, unseen_pixel = together.split([len(samples), len(real)])
        # Two files may be one picture at this size. What was trained on is not unseen, and a distance of 0 among so few
        # would be their first percentile, which no copy is under.
        new = unseen_pixel > 0
        seen = int((~new).sum())
        unseen, unseen_pixel = unseen[new], unseen_pixel[new]
        if labels is not None and new.any():
            weights = class_weights(labels_of(held_out)[new], labels)
    facts = {
        "training_pictures": len(train),
        "held_out_pictures": 0 if held_out is None else len(held_out),
        "held_out_seen": seen,
        "held_out_weighted_by_class": weights is not None,
        "feature_distance": asdict(Nearness.of(distances, unseen, weights)),
        "pixel_distance": asdict(Nearness.of(pixel, unseen_pixel, weights)),
    }
    worst = distances.argsort()[:WORST_PAIRS]
    originals = to_float(pictures_at(train, index[worst]))
    return facts, draw_pairs(to_float(samples[worst]), originals)


def _wanted_classes(pipeline: LiquidDiffusionPipeline, reference: PictureDataset) -> Tensor | None:
    """The classes (N,) of the pictures of a reference by the model's numbers; None where it does not know them all.

    By their names alone: classes that a table calls 0, 1, 2 are not the model's first ones.
    """
    known = ClassNames(pipeline.config["label_names"])
    numbers = [known.number(name) for name in reference.label_names]
    return None if None in numbers or not numbers else torch.tensor(numbers)[labels_of(reference)]


def measure(run: str | None, config: EvaluateConfig) -> tuple[dict[str, Any], Image.Image | None]:
    """Figures of a run as JSON-able facts, and the pairs of samples and training pictures that are nearest.

    Raises:
        UserError: the run, the reference or the features can't be had.
    """
    if config.n < LEAST_PICTURES:
        raise UserError(f"A comparison needs at least {LEAST_PICTURES} samples, not {config.n}.")
    disable_progress_bar()  # of the parts being loaded
    device = process_state().device
    keep_freed_memory()
    pipeline = load_pipeline(run).to(device)
    pipeline.set_progress_bar_config(disable=True)
    folder = find_run(run)
    shape, names = pipeline.usual_shape, pipeline.config["label_names"]
    extractor = make_features(config.features, device)
    known = pictures_of_run(folder, *shape)
    reference = _reference(config.reference, known, shape, folder)
    if len(reference) < LEAST_PICTURES:
        more = "; --reference train or all has more" if config.reference == "val" else ""
        raise UserError(f"A comparison needs at least {LEAST_PICTURES} real pictures, not {len(reference)}{more}.")
    cached = CachedFeatures(extractor, device)

    labels, wanted = None, _wanted_classes(pipeline, reference)
    if names:
        labels = spread_labels(torch.arange(len(names)) if wanted is None else wanted, config.n, config.seed)
    guidance = 1.0  # of a model without classes, whatever was asked for
    if names:
        guidance = pipeline.config["guidance"] if config.guidance is None else config.guidance
    samples = draw_samples(pipeline, labels, config)
    batches = tqdm(samples.split(32), desc="Features of samples", unit="batch", leave=False, delay=2)
    features = extract(extractor, batches, device)
    real = cached.of(reference)
    facts: dict[str, Any] = {
        "run": folder,
        "step": last_step(Path(folder).expanduser()),
        "samples": {name: value for name, value in asdict(config).items() if name != "out"} | {"guidance": guidance},
        "reference_pictures": len(reference),
        "classes_as_in_reference": wanted is not None if names else None,
        **compare(real, features),
    }
    if known is None:
        return facts, None
    if config.reference == "val":
        facts["real"] = compare(real, cached.of(_thinned(known.train)), facts["fd_pictures"])
    trained_labels = labels if known.train.label_names == names else None
    if trained_labels is not None:
        classifier = LinearClassifier(cached.of(known.train), labels_of(known.train))
        facts["class_agreement"] = classifier.accuracy(features, trained_labels)
        if known.held_out is not None:
            unseen = cached.of(known.held_out)
            facts["class_accuracy_held_out"] = classifier.accuracy(unseen, labels_of(known.held_out))
    facts["memorisation"], pairs = _memory(samples, features, trained_labels, known, cached)
    return facts, pairs


def _place(run: str | None, config: EvaluateConfig) -> Path:
    """Where the figures go: into the folder of a run, where the model card looks for them, or into this one."""
    if config.out is not None:
        return Path(config.out).expanduser()
    folder = settings_of(run).parent if run is not None and settings_of(run).is_file() else Path()
    return folder / "metrics.json"


def evaluate(run: str | None, config: EvaluateConfig, as_json: bool = False) -> str:
    """Measure a run, write the figures and beside them the picture of nearest pairs; says the figures.

    Raises:
        UserError: see `measure`; or the place can't be written to.
    """
    out = _place(run, config)
    with writing_to(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        fresh = not out.exists()
        out.open("a").close()  # to fail before the work and not after it
        if fresh:
            out.unlink()  # an empty file that is left behind would be taken for figures by the model card
    facts, pairs = measure(run, config)
    if pairs is not None:
        facts["nearest_pairs"] = str(out.with_name(f"{out.stem}-nearest.png"))
        save_picture(pairs, Path(facts["nearest_pairs"]))
    text = json.dumps(facts, indent=2)
    with writing_to(out):
        write_whole(out, text + "\n")
    return text if as_json else f"{table(facts)}\n\nWritten to {out}."
