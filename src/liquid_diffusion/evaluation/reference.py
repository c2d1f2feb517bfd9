"""The real pictures that generated ones are compared with, and their features, which are kept by content."""

from __future__ import annotations

import hashlib
import itertools
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from liquid_diffusion.data.parallel import map_in_threads
from liquid_diffusion.data.pictures import PictureDataset
from liquid_diffusion.data.sources import open_source
from liquid_diffusion.data.split import split
from liquid_diffusion.errors import UserError
from liquid_diffusion.evaluation.features import FeatureExtractor, extract

_BLOCK = 256  # pictures whose features lie in one file
_BATCH = 32  # pictures of which features are computed at once


@dataclass(frozen=True)
class RunPictures:
    """What a run was trained on, and what was held out of it (None where nothing was)."""

    train: PictureDataset
    held_out: PictureDataset | None


def settings_of(run: str | Path) -> Path:
    """Where a run folder says what it was trained on."""
    return Path(run).expanduser() / "config.yaml"


def pictures_of_run(run: str | Path, height: int, width: int) -> RunPictures | None:
    """The pictures of a run folder in one shape; None where the folder does not say what it was trained on.

    Raises:
        UserError: the data can't be had any more.
    """
    settings = settings_of(run)
    if not settings.is_file():
        return None
    try:
        config = yaml.safe_load(settings.read_text())
        data, flip, seed, val_fraction = (config[name] for name in ("data", "flip", "seed", "val_fraction"))
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise UserError(f"{settings} does not say what the run was trained on: it is damaged ({error}).") from error
    try:
        source = open_source(data, config.get("image_column"), config.get("label_column"))
    except UserError as error:
        raise UserError(f"{error} If the pictures were moved, say where they are in {settings}.") from error
    crop = "pad" if config.get("crop") == "pad" else "center"  # random crops have no one picture to be held against
    chosen, held_out = split(source, val_fraction)

    def pictures(indices: list[int]) -> PictureDataset:
        return PictureDataset(source, max(height, width), flip, seed, indices, crop, shapes=[(height, width)])

    return RunPictures(pictures(chosen), pictures(held_out) if held_out else None)


def labels_of(dataset: PictureDataset) -> Tensor:
    """(N,) int64."""
    return torch.tensor([picture["label"] for picture in map_in_threads(dataset.picture, range(len(dataset)))])


def cache_folder() -> Path:
    """Where features of real pictures are kept: liquid-diffusion/features in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "liquid-diffusion" / "features"


class CachedFeatures:
    """Features of real pictures, computed once.

    They are kept in blocks of 256 pictures under a digest of the pixels and of the extractor's weights: nothing old is
    ever taken for new, and work that was cut short goes on after the last whole block.

    Args:
        extractor: computes them.
        device: where.
        folder: where they are kept.
    """

    def __init__(self, extractor: FeatureExtractor, device: torch.device, folder: Path | None = None) -> None:
        self.extractor, self.device = extractor, device
        self.folder = folder or cache_folder()
        self._identity = extractor.identity()
        self._told = False  # that they can't be kept

    def of(self, dataset: PictureDataset, mirrored: bool = False) -> Tensor:
        """Features (N, D) of the pictures of a set, or of their mirror images."""
        blocks = []
        bar = tqdm(total=len(dataset), desc="Features of real pictures", unit="picture", leave=False, delay=2)
        with bar:
            for pictures in _blocks(dataset):
                blocks.append(self._of_block(pictures.flip(-1) if mirrored else pictures))
                bar.update(len(pictures))
        return torch.cat(blocks)

    def _of_block(self, pictures: Tensor) -> Tensor:
        content = pictures.contiguous().numpy().tobytes()
        digest = hashlib.blake2b(f"{self._identity} {tuple(pictures.shape)}".encode() + content, digest_size=16)
        path = self.folder / f"{digest.hexdigest()}.safetensors"
        try:
            return load_file(path)["features"]
        except (OSError, SafetensorError, KeyError):
            pass  # not there, or cut short
        features = extract(self.extractor, pictures.split(_BATCH), self.device)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{os.getpid()}")
            save_file({"features": features}, partial)
            os.replace(partial, path)
        except (OSError, SafetensorError) as error:
            if not self._told:
                words = f"Features can't be kept in {self.folder} ({error}), so they are computed each time."
                tqdm.write(words, sys.stderr)
            self._told = True
        return features


def _blocks(dataset: PictureDataset) -> Iterator[Tensor]:
    pictures = map_in_threads(dataset.picture, range(len(dataset)))
    while block := list(itertools.islice(pictures, _BLOCK)):
        yield torch.stack([picture["image"] for picture in block])
