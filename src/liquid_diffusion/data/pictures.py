"""From a source to batches: sized pictures, mirrored or not, in an order that a number alone determines."""

from __future__ import annotations

import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TypedDict

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from liquid_diffusion.codecs import Codec
from liquid_diffusion.data.parallel import map_pictures
from liquid_diffusion.data.ranged import SourceLostError
from liquid_diffusion.data.shapes import nearest_shape, size_of
from liquid_diffusion.data.sources import BadPicture, BadPictureError, Source, listing_of
from liquid_diffusion.data.transforms import Shape, to_float, to_shape, to_uint8
from liquid_diffusion.errors import UserError

# A set whose sized pictures take less memory than this is decoded once, before training.
IN_MEMORY_BYTES = 512 * 2**20
_STAND_INS = 1000  # that are tried for a picture that can't be read

# What is drawn from a seed, so that each draw has numbers of its own, see `stable_hash`: the order of an epoch, which
# pictures are mirrored, crops, the shapes of batches; of a stream its chunks and the rows of a window; stand-ins. With
# other numbers a run would not resume with the pictures that were to come.
ORDER, MIRROR, CROP, SHAPES, CHUNKS, WINDOW, STAND_IN = range(7)


class Item(TypedDict):
    """One picture: (3, H, W) uint8 (or its latents' posterior), its label, and the bad ones met on the way to it."""

    image: Tensor
    label: int
    skipped: list[BadPicture]


class PictureFeed(ABC):
    """Pictures that a codec encodes while the model is trained, wherever they are read from."""

    @abstractmethod
    def spread(self, count: int, batch_size: int) -> Iterator[Tensor]:
        """Up to `count` pictures from all over the set, whose order may mean something.

        Yields:
            (B, 3, H, W) uint8, at most `batch_size` at once and of one shape.
        """

    def fit_codec(self, codec: Codec, count: int, batch_size: int) -> None:
        """Let a codec measure its statistics on `count` pictures, of which `batch_size` are encoded at once."""
        codec.fit(to_float(images) for images in self.spread(count, batch_size))

    def to_latents(self, images: Tensor, codec: Codec, generator: torch.Generator) -> Tensor:
        """What the model is trained on, (B, C, h, w), for a batch of this set, which lies on the codec's device."""
        return codec.encode(to_float(images), generator)


class PictureDataset(PictureFeed, Dataset[Item]):
    """Pictures of a source in one shape or a few, asked for as (epoch, index).

    A picture that can't be read is replaced by another, drawn from (seed, epoch, index), and named in `Item.skipped`. A
    set that fits in memory is decoded when this is made; its bad pictures are left out and named in `skipped`.

    Args:
        source: where they come from.
        image_size: side of the square pictures, in pixels.
        flip: mirror a picture in half of the epochs, drawn from (seed, epoch, index).
        seed: see `flip` and `crop`.
        indices: numbers of the pictures in the source that this set consists of; all where nothing is said.
        crop: center, random or pad, see `to_shape`; random crops are drawn from (seed, epoch, index).
        shapes: heights and widths in place of the square; of several each picture gets that of the nearest aspect
            ratio, for which the headers of all pictures are read.

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
        crop: str = "center",
        shapes: Sequence[Shape] | None = None,
    ) -> None:
        self.source = source
        self.image_size = image_size
        self.flip = flip
        self.seed = seed
        self.crop = crop
        self.shapes = list(shapes or [(image_size, image_size)])
        self.skipped: list[BadPicture] = []
        self.indices = list(range(len(source)) if indices is None else indices)
        self._shape_of = [0] * len(self.indices)
        self._decoded: list[tuple[Tensor, int]] | None = None
        if len(self.shapes) > 1:
            chosen, self.skipped = choose_shapes(source, self.indices, self.shapes)
            self._keep(chosen)
        if crop != "random" and len(self.indices) * 3 * image_size**2 <= IN_MEMORY_BYTES:
            self._decode_all()

    @property
    def label_names(self) -> list[str]:
        return list(self.source.label_names)

    @property
    def classes_met(self) -> set[int] | None:
        """The classes that have a picture in this set; None where that would take reading all of them."""
        return None if self._decoded is None else {label for _, label in self._decoded}

    @property
    def total(self) -> int:
        """Pictures in the source, those held out and the bad ones included."""
        return len(self.source)

    @cached_property
    def listing(self) -> str | None:
        """See `listing_of`."""
        return listing_of(self.source)

    @property
    def in_memory(self) -> bool:
        """Whether all pictures are decoded already."""
        return self._decoded is not None

    @property
    def groups(self) -> list[tuple[Shape, list[int]]]:
        """The pictures of each shape by their numbers in this set; the shapes that no picture has are left out."""
        groups: list[tuple[Shape, list[int]]] = [(shape, []) for shape in self.shapes]
        for index, shape in enumerate(self._shape_of):
            groups[shape][1].append(index)
        return [group for group in groups if group[1]]

    @property
    def usual_shape(self) -> Shape:
        """The shape of most pictures."""
        return max(self.groups, key=lambda group: len(group[1]))[0]

    def __len__(self) -> int:
        return len(self.indices)

    def _read(self, index: int, shape: int, draws: random.Random | None = None) -> tuple[Tensor, int]:
        image, label = self.source.read(index, self.shapes[shape])
        return to_uint8(to_shape(image, self.shapes[shape], self.crop, draws)), label

    def _keep(self, good: list[tuple[int, int]]) -> None:
        """Let the set consist of these pictures of the source, with these shapes."""
        if not good:
            raise UserError(f"Not one of the {len(self.indices)} pictures can be read; the first: {self.skipped[0]}.")
        self.indices, self._shape_of = [index for index, _ in good], [shape for _, shape in good]

    def _decode_all(self) -> None:
        def read(key: tuple[int, int]) -> tuple[Tensor, int] | BadPictureError:
            try:
                return self._read(*key)
            except BadPictureError as error:
                return error

        decoded, good = [], []
        keys = list(zip(self.indices, self._shape_of, strict=True))
        for key, found in zip(keys, map_pictures(read, keys, "Reading pictures"), strict=True):
            if isinstance(found, BadPictureError):
                self.skipped.append(found.picture)
            else:
                decoded.append(found)
                good.append(key)
        self._keep(good)
        self._decoded = decoded

    def _candidates(self, index: int, epoch: int) -> Iterator[int]:
        """A picture, and those that stand in for it one after the other; from all over the set, whatever is bad."""
        yield index
        draws = random.Random(stable_hash(self.seed, STAND_IN, epoch, index))
        others = draws.sample(range(len(self)), min(_STAND_INS, len(self)))
        yield from (other for other in others if other != index)

    def picture(self, index: int, epoch: int | None = None) -> Item:
        """Picture `index`, never mirrored, or one that stands in for it, in the shape that `index` has.

        Args:
            index: number in this set.
            epoch: whose random crop and stand-in it is; without it the crop is from the middle.
        """
        if self._decoded is not None:
            image, label = self._decoded[index]
            return {"image": image, "label": label, "skipped": []}
        skipped: list[BadPicture] = []
        draws = None if epoch is None else random.Random(stable_hash(self.seed, CROP, epoch, index))
        for candidate in self._candidates(index, epoch or 0):
            try:
                image, label = self._read(self.indices[candidate], self._shape_of[index], draws)
                return {"image": image, "label": label, "skipped": skipped}
            except BadPictureError as error:
                skipped.append(error.picture)
        raise SourceLostError(f"Not one of the {len(skipped)} pictures can be read; the first: {skipped[0]}.")

    def spread(self, count: int, batch_size: int) -> Iterator[Tensor]:
        """See `PictureFeed.spread`: `count` pictures at equal distances, or all if there are fewer."""
        count = min(count, len(self))
        spread = {i * len(self) // count for i in range(count)}
        for _, indices in self.groups:
            chosen = [i for i in indices if i in spread]
            for start in range(0, len(chosen), batch_size):
                yield torch.stack([self.picture(i)["image"] for i in chosen[start : start + batch_size]])

    def __getitem__(self, key: tuple[int, int]) -> Item:
        epoch, index = key
        item = self.picture(index, epoch)
        if is_mirrored(self.flip, self.seed, epoch, index):
            item["image"] = item["image"].flip(-1)
        return item


def choose_shapes(
    source: Source, indices: Sequence[int], shapes: Sequence[Shape]
) -> tuple[list[tuple[int, int]], list[BadPicture]]:
    """The shape that suits each picture best, by the headers of the files.

    Returns:
        (number in the source, number of the shape) of each picture whose header can be read; the others.
    """

    def shape_of(index: int) -> int | BadPicture:
        try:
            return nearest_shape(size_of(source.content(index)), shapes)
        except BadPictureError as error:
            return error.picture
        except Exception as error:  # a decoder may raise anything: struct.error, RuntimeError, ...
            return BadPicture(source.name(index), str(error))

    good, skipped = [], []
    for index, found in zip(indices, map_pictures(shape_of, indices, "Reading sizes"), strict=True):
        if isinstance(found, BadPicture):
            skipped.append(found)
        else:
            good.append((index, found))
    return good, skipped


def is_mirrored(flip: bool, seed: int, epoch: int, index: int) -> bool:
    """Whether picture `index` is mirrored in an epoch, where pictures are mirrored at all."""
    return flip and stable_hash(seed, MIRROR, epoch, index) % 2 == 1


def stable_hash(*numbers: int) -> int:
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
                        self.size, generator=torch.Generator().manual_seed(stable_hash(self.seed, ORDER, epoch))
                    )
                batch.append((epoch, int(order[position % self.size])))
            first += self.batch_size
            yield batch[self.rank :: self.world]


class BucketedBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) without end, each from one group of pictures, which have one shape.

    Batch k comes from the group of the k-th picture in a shuffled order of all, so each group has its share of the
    batches; within a group, pictures come as in `ShuffledBatches`, each once in an epoch of its group. All is a
    function of (seed, k). One group alone is `ShuffledBatches` itself.

    Args:
        groups: numbers of the pictures of each shape.
        batch_size, seed, start, rank, world: see `ShuffledBatches`.
    """

    def __init__(
        self, groups: Sequence[Sequence[int]], batch_size: int, seed: int, start: int = 0, rank: int = 0, world: int = 1
    ) -> None:
        self.groups, self.batch_size, self.seed, self.start = groups, batch_size, seed, start
        self.rank, self.world = rank, world
        self._group_of = torch.cat([torch.full((len(group),), i) for i, group in enumerate(groups)])

    def _order(self, round_: int) -> list[int]:
        """The groups of as many batches as there are pictures."""
        generator = torch.Generator().manual_seed(stable_hash(self.seed, SHAPES, round_))
        return self._group_of[torch.randperm(len(self._group_of), generator=generator)].tolist()

    def _stream(self, group: int, start: int) -> Iterator[list[tuple[int, int]]]:
        indices = self.groups[group]
        for batch in ShuffledBatches(len(indices), self.batch_size, self.seed, start, self.rank, self.world):
            yield [(epoch, indices[position]) for epoch, position in batch]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        round_, place = divmod(self.start, len(self._group_of))
        order = self._order(round_)
        done = [round_ * len(group) + order[:place].count(i) for i, group in enumerate(self.groups)]
        streams = [self._stream(group, start) for group, start in enumerate(done)]
        while True:
            for group in order[place:]:
                yield next(streams[group])
            round_, place = round_ + 1, 0
            order = self._order(round_)


def collate(items: list[Item]) -> tuple[Tensor, Tensor, list[BadPicture]]:
    """Items -> images (B, 3, H, W) uint8, labels (B,) int64, all that were skipped."""
    images = torch.stack([item["image"] for item in items])
    labels = torch.tensor([item["label"] for item in items])
    return images, labels, [bad for item in items for bad in item["skipped"]]
