"""From a source to batches: sized pictures, mirrored or not, in an order that a number alone determines."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import TypedDict

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from tqdm import tqdm

from liquid_diffusion.config import UserError
from liquid_diffusion.data.sources import BadPictureError, Source
from liquid_diffusion.data.transforms import resize_and_crop, to_uint8

# A set whose sized pictures take less memory than this is decoded once, before training.
_IN_MEMORY_BYTES = 512 * 2**20


class Item(TypedDict):
    """One picture: (3, H, W) uint8, its label, and the bad ones that were met on the way to it."""

    image: Tensor
    label: int
    skipped: list[str]


class PictureDataset(Dataset[Item]):
    """Square pictures of a source, asked for as (epoch, index).

    A picture that can't be read is replaced by the next one and named in `Item.skipped`. A set that fits in memory is
    decoded when this is made; its bad pictures are left out and named in `skipped`.

    Args:
        source: where they come from.
        image_size: side in pixels.
        flip: mirror a picture in half of the epochs, drawn from (seed, epoch, index).
        seed: see `flip`.
        indices: numbers of the pictures in the source that this set consists of; all where nothing is said.

    Raises:
        UserError: not one picture can be read.
    """

    def __init__(
        self,
        source: Source,
        image_size: int,
        flip: bool = False,
        seed: int = 0,
        indices: Sequence[int] | None = None,
    ) -> None:
        self.source = source
        self.image_size = image_size
        self.flip = flip
        self.seed = seed
        self.skipped: list[str] = []
        self.indices = list(range(len(source)) if indices is None else indices)
        self._decoded: list[tuple[Tensor, int]] | None = None
        if len(self.indices) * 3 * image_size**2 <= _IN_MEMORY_BYTES:
            self._decode_all()

    @property
    def label_names(self) -> list[str]:
        return list(self.source.label_names)

    @property
    def in_memory(self) -> bool:
        """Whether all pictures are decoded already."""
        return self._decoded is not None

    def __len__(self) -> int:
        return len(self.indices)

    def _read(self, index: int) -> tuple[Tensor, int]:
        image, label = self.source.read(index)
        return to_uint8(resize_and_crop(image, self.image_size)), label

    def _decode_all(self) -> None:
        decoded, good = [], []
        for index in tqdm(self.indices, desc="Reading pictures", unit="", leave=False, delay=2):
            try:
                decoded.append(self._read(index))
                good.append(index)
            except BadPictureError as error:
                self.skipped.append(str(error))
        if not good:
            raise UserError(f"Not one of the {len(self.indices)} pictures can be read; the first: {self.skipped[0]}.")
        self._decoded, self.indices = decoded, good

    def picture(self, index: int) -> Item:
        """Picture `index`, never mirrored, or the first readable one after it."""
        if self._decoded is not None:
            image, label = self._decoded[index]
            return {"image": image, "label": label, "skipped": []}
        skipped: list[str] = []
        for step in range(len(self)):
            try:
                image, label = self._read(self.indices[(index + step) % len(self)])
                return {"image": image, "label": label, "skipped": skipped}
            except BadPictureError as error:
                skipped.append(str(error))
        raise UserError(f"Not one of the {len(self)} pictures can be read; the first: {skipped[0]}.")

    def spread(self, count: int, batch_size: int) -> Iterator[Tensor]:
        """`count` pictures at equal distances over the whole set, whose order may mean something.

        Yields:
            (B, 3, H, W) uint8, at most `batch_size` at once.
        """
        count = min(count, len(self))
        chosen = [i * len(self) // count for i in range(count)]
        for start in range(0, count, batch_size):
            yield torch.stack([self.picture(i)["image"] for i in chosen[start : start + batch_size]])

    def __getitem__(self, key: tuple[int, int]) -> Item:
        epoch, index = key
        item = self.picture(index)
        if self.flip and _hash(self.seed, 1, epoch, index) % 2:
            item["image"] = item["image"].flip(-1)
        return item


def _hash(*numbers: int) -> int:
    """63 bits of some numbers, the same in every process."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class ShuffledBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) without end, each epoch a new permutation.

    Batch k is a function of (seed, k) alone: going on after an interruption needs no more than the number of the
    next batch. A batch may reach over the end of an epoch, so that every picture is taken once in each.

    Args:
        size: pictures in the set.
        batch_size: pictures of a batch, over all processes.
        seed: of the permutations.
        start: number of the first batch.
        rank, world: this process takes every `world`-th picture of a batch, from `rank`.
    """

    def __init__(self, size: int, batch_size: int, seed: int, start: int = 0, rank: int = 0, world: int = 1) -> None:
        self.size, self.batch_size, self.seed, self.start = size, batch_size, seed, start
        self.rank, self.world = rank, world

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = -1, torch.empty(0)
        first = self.start * self.batch_size
        while True:
            batch = []
            for position in range(first, first + self.batch_size):
                if position // self.size != epoch:
                    epoch = position // self.size
                    order = torch.randperm(
                        self.size, generator=torch.Generator().manual_seed(_hash(self.seed, 0, epoch))
                    )
                batch.append((epoch, int(order[position % self.size])))
            first += self.batch_size
            yield batch[self.rank :: self.world]


def collate(items: list[Item]) -> tuple[Tensor, Tensor, list[str]]:
    """Items -> images (B, 3, H, W) uint8, labels (B,) int64, all skipped names."""
    images = torch.stack([item["image"] for item in items])
    labels = torch.tensor([item["label"] for item in items])
    return images, labels, [name for item in items for name in item["skipped"]]
