"""Training on pictures that are read where they lie, in an order that can be taken up anywhere.

The order of an epoch is a function of the seed: the chunks are shuffled and laid end to end, the rows are cut into as
many equal spans as there are lanes, and each lane walks along its span by windows of whole chunks, whose pictures are
shuffled. Where a lane is, is two numbers: its epoch and the rows it has passed. Nothing else has to be saved, and to go
on, the chunks of one window of each lane are read, however far it has come.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from liquid_diffusion.data.parallel import leave_ending_to_main_process
from liquid_diffusion.data.pictures import CHUNKS, CROP, WINDOW, PictureFeed, is_mirrored, stable_hash
from liquid_diffusion.data.ranged import SourceLostError
from liquid_diffusion.data.shards import Chunk, Rows, Shards
from liquid_diffusion.data.sources import BadPicture, BadPictureError, decode
from liquid_diffusion.data.split import is_held_out
from liquid_diffusion.data.transforms import Shape, to_shape, to_uint8
from liquid_diffusion.errors import UserError

# Lanes of a process: the places of the stream that one batch is taken from, and the most workers it can have.
LANES = 4
_WINDOW = 512  # rows that a lane shuffles, at least; chunks are taken whole
_FRUITLESS = 10_000  # rows without a picture after which there is none

Position = tuple[int, int]  # epoch of a lane, rows it has passed in it
_Item = tuple[Tensor, int, list[BadPicture]]  # a picture, its label, and the bad ones on the way to it
_Span = list[tuple[int, int, int]]  # chunks by their number, the first row of each that is meant, and the one after


class _Part(TypedDict):
    """What one worker gives to a batch: pictures (n, 3, H, W), their places in it, where its lanes are afterwards."""

    places: list[int]
    images: Tensor
    labels: list[int]
    skipped: list[BadPicture]
    positions: dict[int, Position]
    error: str | None


class _Reader:
    """The chunks that lanes need now, and those they will need next, which a thread reads meanwhile."""

    def __init__(self, shards: Shards) -> None:
        self._shards = shards
        self.forget()

    def forget(self) -> None:
        self._wanted: dict[int, set[int]] = {}
        self._chunks: dict[int, Future[Rows | BadPictureError]] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._process = 0

    def __getstate__(self) -> dict[str, Any]:
        return {"shards": self._shards}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["shards"])  # type: ignore[misc]

    def want(self, lane: int, numbers: Sequence[int]) -> None:
        """Begin to read these chunks for a lane; those that no lane wants any more are dropped."""
        if self._process != os.getpid():  # what its parent was reading never comes to a forked worker
            self._pool, self._process, self._chunks = ThreadPoolExecutor(1), os.getpid(), {}
        assert self._pool is not None
        self._wanted[lane] = set(numbers)
        still = set().union(*self._wanted.values())
        self._chunks = {number: chunk for number, chunk in self._chunks.items() if number in still}
        for number in numbers:
            if number not in self._chunks:
                self._chunks[number] = self._pool.submit(self._read, self._shards.chunks[number])

    def _read(self, chunk: Chunk) -> Rows | BadPictureError:
        for _ in range(2):  # what was damaged on the way is whole the second time
            try:
                return self._shards.read(chunk)
            except BadPictureError as error:
                failure = error
        return failure

    def row(self, number: int, index: int) -> tuple[bytes, int]:
        """A picture of a chunk that is wanted, and its label."""
        rows = self._chunks[number].result()
        try:
            if isinstance(rows, BadPictureError):
                raise rows
            return rows.row(index)
        except BadPictureError as error:
            raise BadPictureError(error, self._shards.name(self._shards.chunks[number], index)) from error


class PictureStream(PictureFeed):
    """Square pictures of shards, in batches.

    In each epoch of a lane every picture of its span is taken once; the spans of all lanes together are the whole set.
    Held out pictures and those that can't be read are passed over; the latter are named.

    Args:
        shards: where the pictures are.
        image_size: side in pixels.
        flip, crop: see `PictureDataset`.
        seed: of the order, the mirroring and the crops.
        val_fraction: share of pictures held out, see `is_held_out`.

    Attributes:
        positions: where each lane of this process is, after the batches that were given out.
    """

    listing: str | None = None  # `state` tells whether the files changed

    def __init__(
        self,
        shards: Shards,
        image_size: int,
        flip: bool = False,
        seed: int = 0,
        val_fraction: float = 0.0,
        crop: str = "center",
    ) -> None:
        self.shards = shards
        self.image_size = image_size
        self.flip = flip
        self.seed = seed
        self.val_fraction = val_fraction
        self.crop = crop
        self.label_names = list(shards.label_names)
        self.skipped: list[BadPicture] = []  # none is known before it is met
        self._firsts = list(itertools.accumulate((chunk.rows for chunk in shards.chunks), initial=0))
        self.positions: list[Position] = [(0, 0)] * LANES
        self._reader = _Reader(shards)

    def __len__(self) -> int:
        """Pictures, with those that are held out: which ones these are is known only when they are read."""
        return self._firsts[-1]

    @property
    def total(self) -> int:
        """The same."""
        return len(self)

    @property
    def usual_shape(self) -> Shape:
        """The shape of all pictures."""
        return self.image_size, self.image_size

    # ---- going on

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs to go on with the very next picture, JSON-able."""
        return {"chunks": self._layout(), "positions": self.positions}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a `state`.

        Raises:
            UserError: the files are laid out in another way than they were, so that positions mean other pictures.
        """
        if state["chunks"] != self._layout():
            raise UserError(
                f"The files of {self.shards.origin} have changed since the training was stopped; choose another --out "
                "to train on what is there now."
            )
        self.positions = [(epoch, passed) for epoch, passed in state["positions"]]

    def _layout(self) -> str:
        return hashlib.sha256(repr(self.shards.chunks).encode()).hexdigest()

    # ---- the order

    def _windows(self, lane: int, lanes: int, epoch: int) -> Iterator[_Span]:
        """The span of one of `lanes` lanes in an epoch, window by window.

        It is another one in each epoch: a lane whose rows can't be used does not meet the same ones for ever.
        """
        order = list(range(len(self.shards.chunks)))
        random.Random(stable_hash(self.seed, CHUNKS, epoch)).shuffle(order)
        place = (lane + epoch) % lanes
        first, stop = (len(self) * border // lanes for border in (place, place + 1))
        window: _Span = []
        start = 0
        for number in order:
            rows = self.shards.chunks[number].rows
            low, high = max(first - start, 0), min(stop - start, rows)
            start += rows
            if low < high:
                window.append((number, low, high))
            if sum(high - low for _, low, high in window) >= _WINDOW:
                yield window
                window = []
        if window:
            yield window

    def _walk(self, lane: int, lanes: int, position: Position, ahead: bool = True) -> Iterator[tuple[_Item, Position]]:
        """The pictures of one of `lanes` lanes from a position on, without end, each with the position after it.

        Args:
            ahead: read the next window while this one is used.
        """
        if len(self) < lanes:
            raise UserError(f"{self.shards.origin} has {len(self)} pictures, too few to stream; leave --streaming out.")
        epoch, passed = position
        skipped: list[BadPicture] = []
        fruitless = 0
        while True:
            windows = list(self._windows(lane, lanes, epoch))
            start = 0
            for i, window in enumerate(windows):
                rows = [(number, row) for number, low, high in window for row in range(low, high)]
                start, begun = start + len(rows), start
                if passed >= start:
                    continue
                following = windows[i + 1] if i + 1 < len(windows) else next(self._windows(lane, lanes, epoch + 1))
                self._reader.want(lane, [number for number, _, _ in window])
                random.Random(stable_hash(self.seed, WINDOW, epoch, lane, i)).shuffle(rows)
                for taken, (number, row) in enumerate(rows[passed - begun :]):
                    if taken == 1 and ahead:  # not before every lane has asked for what it needs at once
                        self._reader.want(lane, [number for number, _, _ in (*window, *following)])
                    passed += 1
                    fruitless += 1
                    try:
                        item = self._item(epoch, number, row)
                    except BadPictureError as error:
                        skipped.append(error.picture)
                        item = None
                    if item is not None:
                        yield (*item, skipped), (epoch, passed)
                        skipped, fruitless = [], 0
                    elif fruitless == _FRUITLESS:
                        first = f"; the first: {skipped[0]}" if skipped else ": all are held out"
                        met = min(fruitless, len(self))
                        raise UserError(f"Not one of {met} pictures of {self.shards.origin} can be used{first}.")
            epoch, passed = epoch + 1, 0

    def _item(self, epoch: int, number: int, row: int) -> tuple[Tensor, int] | None:
        """A picture (3, H, W) uint8 and its label; None where it is held out."""
        content, label = self._reader.row(number, row)
        if is_held_out(content, self.val_fraction):
            return None
        index = self._firsts[number] + row
        image = decode(content, self.shards.name(self.shards.chunks[number], row), self.usual_shape)
        draws = random.Random(stable_hash(self.seed, CROP, epoch, index))
        pixels = to_uint8(to_shape(image, self.usual_shape, self.crop, draws))
        return (pixels.flip(-1) if is_mirrored(self.flip, self.seed, epoch, index) else pixels), label

    # ---- batches

    def spread(self, count: int, batch_size: int) -> Iterator[Tensor]:
        """See `PictureFeed.spread`: from the beginnings of the first process's lanes, the same in every process."""
        count = min(count, max(1, round(len(self) * (1 - self.val_fraction))))
        walks = [self._walk(lane, LANES, (0, 0), ahead=False) for lane in range(LANES)]
        images = (next(walks[i % LANES])[0][0] for i in range(count))
        while batch := list(itertools.islice(images, batch_size)):
            yield torch.stack(batch)

    def batches(
        self, batch_size: int, start: int, workers: int, rank: int = 0, world: int = 1
    ) -> Iterator[tuple[Tensor, Tensor, list[BadPicture]]]:
        """Batches from where the lanes are, without end.

        The pictures of all lanes take turns, so a batch has some of each. Workers divide the lanes among themselves;
        what comes does not depend on their number.

        Args:
            batch_size: pictures of a batch of this process.
            start: number of the first batch.
            workers: processes that read, at most one for each lane; 0 reads here.
            rank, world: this process among others, each of which has lanes of its own.

        Yields:
            images (B, 3, H, W) uint8, labels (B,) int64, and the pictures that can't be read.

        Raises:
            UserError: the pictures can't be had any more.
        """
        jobs = min(workers, LANES)
        loader = DataLoader(
            _Parts(self, batch_size, start, rank, world),
            batch_size=None,
            num_workers=jobs,
            worker_init_fn=leave_ending_to_main_process,
        )
        parts = iter(loader)
        if jobs:
            self._reader.forget()  # the workers have them now
        while True:
            batch: list[_Part] = [next(parts) for _ in range(max(1, jobs))]
            for part in batch:
                if part["error"] is not None:
                    raise SourceLostError(part["error"])
            order = torch.tensor([place for part in batch for place in part["places"]]).argsort()
            for part in batch:
                for lane, position in part["positions"].items():
                    self.positions[lane] = position
            labels = torch.tensor([label for part in batch for label in part["labels"]])
            skipped = [bad for part in batch for bad in part["skipped"]]
            yield torch.cat([part["images"] for part in batch])[order], labels[order], skipped

    def parts(self, batch_size: int, start: int, rank: int, world: int, job: int, jobs: int) -> Iterator[_Part]:
        """What one of `jobs` workers of a process gives to each batch from `start` on."""
        walks = {
            lane: self._walk(rank * LANES + lane, world * LANES, self.positions[lane])
            for lane in range(job, LANES, jobs)
        }
        for number in itertools.count(start):
            part: _Part = {
                "places": [place for place in range(batch_size) if (number * batch_size + place) % LANES in walks],
                "images": torch.empty(0, 3, *self.usual_shape, dtype=torch.uint8),
                "labels": [],
                "skipped": [],
                "positions": {},
                "error": None,
            }
            images = []
            try:
                for place in part["places"]:
                    lane = (number * batch_size + place) % LANES
                    (image, label, skipped), part["positions"][lane] = next(walks[lane])
                    images.append(image)
                    part["labels"].append(label)
                    part["skipped"] += skipped
            except UserError as error:  # a worker's error would reach the other side with its traceback as its text
                part["error"] = str(error)
            if images:
                part["images"] = torch.stack(images)
            yield part


class _Parts(IterableDataset[_Part]):
    """`PictureStream.parts` of the worker in which it is."""

    def __init__(self, stream: PictureStream, batch_size: int, start: int, rank: int, world: int) -> None:
        self.stream, self.batches = stream, (batch_size, start, rank, world)

    def __iter__(self) -> Iterator[_Part]:
        worker = get_worker_info()
        job, jobs = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        return self.stream.parts(*self.batches, job, jobs)
