"""Training on latents that were encoded once: the files of `encode`, mapped into memory."""

from __future__ import annotations

import bisect
import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

from liquid_diffusion.codecs import AutoencoderCodec, Codec
from liquid_diffusion.config import RunConfig
from liquid_diffusion.data.encode import PIXELS_NEED_NO_CACHE, bad_pictures, read_manifest, settings
from liquid_diffusion.data.pictures import IN_MEMORY_BYTES, Item, is_mirrored
from liquid_diffusion.data.ranged import SourceLostError
from liquid_diffusion.data.sources import same_setting
from liquid_diffusion.data.transforms import Shape
from liquid_diffusion.errors import UserError


class LatentDataset(Dataset[Item]):
    """The posteriors in a folder that `encode` wrote, asked for as (epoch, index).

    An item's image is (2, C, h, w) float16, mean and standard deviation of a picture's raw latents or of its mirror
    image's; (1, C, h, w) where the autoencoder is deterministic. Nothing is decoded and nothing is copied before it
    is asked for.

    Args:
        folder: what `encode` wrote.
        run: the training they are for; it decides what they must have been encoded with, and the mirroring, which is
            that of `PictureDataset`.
        codec: the autoencoder of the training.

    Raises:
        UserError: there are no latents, not all of them, or others than wanted.
    """

    def __init__(self, folder: Path, run: RunConfig, codec: Codec) -> None:
        if not isinstance(codec, AutoencoderCodec):
            raise UserError(PIXELS_NEED_NO_CACHE)
        manifest = read_manifest(folder)
        if manifest is None or "shards" not in manifest:
            what = f"The latents in {folder} are incomplete" if manifest else f"There are no latents in {folder}"
            raise UserError(f"{what}; write them with `liquid-diffusion encode --out {folder}`.")
        own = run.cache_latents is True
        again = "choose another --out, or delete that folder" if own else "change one of them, or encode again"
        self._mend = "the same command encodes it again" if own else "run `liquid-diffusion encode` again"
        for name, value in settings(run, codec).items():
            found = manifest["settings"].get(name)
            unused = name == "flip" and found  # the mirror images
            if not unused and not same_setting(name, found, value):
                what = f"with {name} {found}, but the training has {value}"
                if name == "codec_sha256":
                    what = f"by another autoencoder of the same name, {run.codec}"
                raise UserError(f"The latents in {folder} were encoded {what}; {again}.")
        self.folder = folder
        self.seed = run.seed
        self.flip = run.flip
        self.skipped = bad_pictures(manifest["unreadable"])
        self.held_out: int = manifest["held_out"]
        self.total: int = manifest["source_pictures"]
        self.listing: str | None = manifest.get("source_listing")
        self.label_names: list[str] = manifest["label_names"]
        self._statistics: dict[str, list[float]] = manifest["statistics"]
        self._shards: list[dict[str, Any]] = manifest["shards"]
        self._starts = [0, *itertools.accumulate(shard["pictures"] for shard in self._shards)]
        self._mapped: dict[int, dict[str, Tensor]] = {}
        for shard in self._shards:
            if not (folder / shard["file"]).is_file():
                raise UserError(f"{folder / shard['file']} is missing; {self._mend}.")

    def __getstate__(self) -> dict[str, Any]:
        """For a worker that is no copy of this process: it maps the files itself instead of getting their content."""
        return {**self.__dict__, "_mapped": {}}

    @property
    def in_memory(self) -> bool:
        """Whether the files are so small that the system keeps them in memory once they were read."""
        return sum((self.folder / shard["file"]).stat().st_size for shard in self._shards) <= IN_MEMORY_BYTES

    @property
    def groups(self) -> list[tuple[Shape, list[int]]]:
        """The pictures of each shape by their numbers in this set."""
        groups: dict[Shape, list[int]] = {}
        for shard, start in zip(self._shards, self._starts, strict=False):
            numbers = groups.setdefault((shard["height"], shard["width"]), [])
            numbers.extend(range(start, start + shard["pictures"]))
        return list(groups.items())

    @property
    def classes_met(self) -> set[int]:
        """The classes that have a picture in this set."""
        met: set[int] = set()
        for number in range(len(self._shards)):
            with self._opened(number) as file:
                met.update(file.get_tensor("label").tolist())
        return met

    @property
    def usual_shape(self) -> Shape:
        """The shape of most pictures."""
        return max(self.groups, key=lambda group: len(group[1]))[0]

    def __len__(self) -> int:
        return self._starts[-1]

    @contextlib.contextmanager
    def _opened(self, number: int) -> Iterator[safe_open]:
        path = self.folder / self._shards[number]["file"]
        try:
            with safe_open(path, "pt") as file:
                yield file
        except (OSError, SafetensorError) as error:
            raise SourceLostError(f"{path} is damaged; {self._mend}.") from error

    def _shard(self, number: int) -> dict[str, Tensor]:
        """Its tensors, mapped: a page of the file is read when a number on it is."""
        if number not in self._mapped:
            with self._opened(number) as file:
                self._mapped[number] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return self._mapped[number]

    def __getitem__(self, key: tuple[int, int]) -> Item:
        epoch, index = key
        number = bisect.bisect_right(self._starts, index) - 1
        shard, place = self._shard(number), index - self._starts[number]
        ending = "_flipped" if is_mirrored(self.flip, self.seed, epoch, index) else ""
        names = (f"mean{ending}", f"std{ending}")
        image = torch.stack([shard[name][place] for name in names if name in shard])
        return {"image": image, "label": int(shard["label"][place]), "skipped": []}

    def fit_codec(self, codec: Codec, count: int, batch_size: int) -> None:
        """Give a codec the statistics of all latents, which were measured when they were encoded."""
        del count, batch_size
        codec.set_statistics(self._statistics["mean"], self._statistics["std"])

    def to_latents(self, posteriors: Tensor, codec: Codec, generator: torch.Generator) -> Tensor:
        """What the model is trained on, (B, C, h, w), for a batch of this set: a fresh draw from each posterior."""
        assert isinstance(codec, AutoencoderCodec)
        mean, *std = posteriors.float().unbind(1)
        return codec.draw(mean, std[0] if std else None, generator)
