from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from liquid_diffusion.config import TrainConfig
from liquid_diffusion.data import pictures
from liquid_diffusion.data.feed import describe
from liquid_diffusion.data.pictures import (
    BucketedBatches,
    PictureDataset,
    ShuffledBatches,
    collate,
    is_mirrored,
    stable_hash,
)
from liquid_diffusion.data.sources import open_source
from liquid_diffusion.errors import UserError
from liquid_diffusion.resolve import resolve


def take(batches: ShuffledBatches | BucketedBatches, count: int) -> list[list[tuple[int, int]]]:
    return list(itertools.islice(iter(batches), count))


def test_every_picture_once_in_each_epoch() -> None:
    flat = list(itertools.chain(*take(ShuffledBatches(10, 4, seed=1), 10)))
    for epoch in range(4):
        assert sorted(index for e, index in flat if e == epoch) == list(range(10))
    orders = [[index for e, index in flat if e == epoch] for epoch in range(4)]
    assert len({tuple(order) for order in orders}) == 4


def test_batches_are_functions_of_seed_and_number() -> None:
    all_at_once = take(ShuffledBatches(10, 4, seed=1), 9)
    assert take(ShuffledBatches(10, 4, seed=1, start=5), 4) == all_at_once[5:]
    assert take(ShuffledBatches(10, 4, seed=2), 9) != all_at_once


def test_processes_share_a_batch() -> None:
    whole = take(ShuffledBatches(10, 4, seed=1), 6)
    parts = [take(ShuffledBatches(10, 4, seed=1, rank=rank, world=2), 6) for rank in range(2)]
    for batch, first, second in zip(whole, *parts, strict=True):
        assert sorted(batch) == sorted(first + second)


GROUPS = [[0, 3, 5, 7, 9, 10, 11], [1, 2], [4, 6, 8]]


def test_batches_of_one_group_each_in_their_proportions() -> None:
    """After as many batches as pictures each group had its exact share, and each picture as many turns as the batch."""
    batches = take(BucketedBatches(GROUPS, 4, seed=1), 24)
    for batch in batches:
        assert len(batch) == 4
        assert sum({index for _, index in batch} <= set(group) for group in GROUPS) == 1
    for half in (batches[:12], batches[12:]):
        assert [sum(batch[0][1] in group for batch in half) for group in GROUPS] == [7, 2, 3]
        turns = [index for batch in half for _, index in batch]
        assert all(turns.count(index) == 4 for index in range(12))
    for group in GROUPS:  # and within an epoch of its group, once
        taken = [key for batch in batches for key in batch if key[1] in group]
        assert len(set(taken)) == len(taken)
    assert [batch[0][1] for batch in batches[:12]] != [batch[0][1] for batch in batches[12:]]


def test_bucketed_batches_are_functions_of_seed_and_number() -> None:
    whole = take(BucketedBatches(GROUPS, 4, seed=1), 30)
    for start in (0, 5, 12, 17, 25):
        assert take(BucketedBatches(GROUPS, 4, seed=1, start=start), 5) == whole[start : start + 5]
    assert take(BucketedBatches(GROUPS, 4, seed=2), 30) != whole
    parts = [take(BucketedBatches(GROUPS, 4, seed=1, rank=rank, world=2), 30) for rank in range(2)]
    assert [sorted(first + second) for first, second in zip(*parts, strict=True)] == [sorted(b) for b in whole]
    one = take(BucketedBatches([list(range(10))], 4, seed=1, start=3), 5)
    assert one == take(ShuffledBatches(10, 4, seed=1, start=3), 5)


@pytest.mark.parametrize("in_memory", [True, False])
def test_pictures_get_the_nearest_shape(in_memory: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bad picture is left out by its header, or replaced in the shape that its batch has."""
    for i, size in enumerate([(40, 40), (80, 40), (30, 60), (44, 40), (61, 30)]):
        Image.effect_noise(size, 50).convert("RGB").save(tmp_path / f"{i}.png")
    (tmp_path / "5.png").write_bytes(b"no picture")
    cut = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(cut[: len(cut) // 2])
    if not in_memory:
        monkeypatch.setattr(pictures, "IN_MEMORY_BYTES", 0)
    dataset = PictureDataset(open_source(str(tmp_path)), 32, shapes=[(40, 24), (32, 32), (24, 40)])
    shapes = [tuple(dataset[0, i]["image"].shape[1:]) for i in range(len(dataset))]
    assert "5.png" in " ".join(map(str, dataset.skipped))
    if in_memory:
        assert dataset.groups == [((40, 24), [1]), ((32, 32), [0, 2]), ((24, 40), [3])]
        assert dataset.usual_shape == (32, 32)
        assert len(dataset.skipped) == 2
    else:
        assert dataset.groups == [((40, 24), [2]), ((32, 32), [0, 3]), ((24, 40), [1, 4])]
        assert "1.png" in dataset.picture(1)["skipped"][0].name
    for shape, indices in dataset.groups:
        assert all(shapes[i] == shape for i in indices)
    assert sorted(len(batch) for batch in dataset.spread(10, 1)) == [1] * len(dataset)


def test_random_crops_differ_between_epochs_and_come_again(photos: Path) -> None:
    dataset = PictureDataset(open_source(str(photos)), 32, seed=3, crop="random")
    assert not dataset.in_memory
    first, second, again = (dataset[epoch, 5]["image"] for epoch in (0, 1, 0))
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    middle = PictureDataset(open_source(str(photos)), 32).picture(5)["image"]
    assert torch.equal(dataset.picture(5)["image"], middle)


def test_flips_are_half_and_differ_between_epochs(photos: Path) -> None:
    dataset = PictureDataset(open_source(str(photos)), 32, flip=True, seed=3)
    flips = 0
    for epoch, index in itertools.product(range(20), range(24)):
        plain, seen = dataset.picture(index)["image"], dataset[epoch, index]["image"]
        assert torch.equal(seen, plain) or torch.equal(seen, plain.flip(-1))
        flips += not torch.equal(seen, plain)
    assert 200 < flips < 280
    never = PictureDataset(open_source(str(photos)), 32)
    assert all(torch.equal(dataset.picture(i)["image"], never[0, i]["image"]) for i in range(24))  # it is as it was
    again = PictureDataset(open_source(str(photos)), 32, flip=True, seed=3)
    assert all(torch.equal(dataset[e, 5]["image"], again[e, 5]["image"]) for e in range(20))


def test_a_class_without_a_picture_to_train_on_is_told(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where all of its few pictures are held out; nobody knows where the pictures are not read before."""
    source = open_source(str(photos))
    dogs = [i for i in range(len(source)) if "dog" in source.name(i)]
    run = resolve(TrainConfig(data=str(photos), image_size=16), "cpu")
    feed = PictureDataset(source, 16, indices=dogs)
    assert feed.classes_met == {1}
    assert (
        describe(feed, run, 12)
        == "12 pictures in 2 classes (cat, dog; no picture to train on: cat) of 16 px (12 more held out)"
    )
    monkeypatch.setattr(pictures, "IN_MEMORY_BYTES", 0)
    unread = PictureDataset(source, 16, indices=dogs)
    assert unread.classes_met is None
    assert describe(unread, run, 12) == "12 pictures in 2 classes (cat, dog) of 16 px (12 more held out)"


def test_spread_takes_equal_distances(photos: Path) -> None:
    dataset = PictureDataset(open_source(str(photos)), 32)
    batches = list(dataset.spread(6, 4))
    assert [len(batch) for batch in batches] == [4, 2]
    expected = torch.stack([dataset.picture(i)["image"] for i in (0, 4, 8, 12, 16, 20)])
    assert torch.equal(torch.cat(batches), expected)
    assert sum(len(batch) for batch in dataset.spread(100, 16)) == 24


@pytest.mark.parametrize("in_memory", [True, False])
def test_bad_pictures_are_skipped_and_named(photos: Path, in_memory: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    (photos / "dog" / "00.png").write_bytes(b"")
    if not in_memory:
        monkeypatch.setattr(pictures, "IN_MEMORY_BYTES", 0)
    dataset = PictureDataset(open_source(str(photos)), 32)
    assert dataset.in_memory == in_memory
    items = [dataset[0, i] for i in range(len(dataset))]
    images, labels, skipped = collate(items)
    named = dataset.skipped + skipped
    assert len(named) == 1
    assert named[0].name == str(photos / "dog" / "00.png")
    assert images.shape == (len(dataset), 3, 32, 32)
    if in_memory:
        assert labels.tolist() == [0] * 12 + [1] * 11
    else:
        assert len(dataset) == 24
        standing_in = [i for i in range(24) if i != 12 and torch.equal(items[i]["image"], items[12]["image"])]
        assert [labels[i] for i in standing_in] == [labels[12]]  # one of the others, with its own label


def test_no_picture_stands_in_for_a_whole_run_of_bad_ones(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All dogs can't be read: each cat has its share of their places, others in each epoch, the same each time."""
    for path in (photos / "dog").iterdir():
        path.write_bytes(b"")
    monkeypatch.setattr(pictures, "IN_MEMORY_BYTES", 0)
    dataset, again = (PictureDataset(open_source(str(photos)), 8, seed=3) for _ in range(2))
    cats = [dataset[0, i]["image"] for i in range(12)]

    def stands_in(found: PictureDataset, epoch: int, index: int) -> int:
        image = found[epoch, index]["image"]
        return next(i for i, cat in enumerate(cats) if torch.equal(cat, image))

    places = list(itertools.product(range(20), range(12, 24)))
    taken = [stands_in(dataset, *place) for place in places]
    counts = Counter(taken)
    assert len(counts) == 12
    assert max(counts.values()) <= 38  # of 240, 20 each: four standard deviations more
    assert len({tuple(taken[epoch * 12 : epoch * 12 + 12]) for epoch in range(20)}) == 20
    assert [stands_in(again, *place) for place in places[:24]] == taken[:24]
    monkeypatch.setattr(pictures, "_STAND_INS", 0)
    with pytest.raises(UserError, match="Not one of the 1 pictures can be read"):
        _ = dataset[0, 12]


def test_draws_are_those_that_former_runs_made() -> None:
    """Their numbers in `stable_hash` are written into every run that is to be resumed."""
    assert (pictures.ORDER, pictures.MIRROR, pictures.CROP) == (0, 1, 2)
    assert (pictures.SHAPES, pictures.CHUNKS, pictures.WINDOW) == (3, 4, 5)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(stable_hash(1, 0, 0))).tolist()
    assert [index for _, index in take(ShuffledBatches(10, 10, seed=1), 1)[0]] == order
    mirrored = [stable_hash(3, 1, epoch, 5) % 2 == 1 for epoch in range(20)]
    assert [is_mirrored(True, 3, epoch, 5) for epoch in range(20)] == mirrored
    assert stable_hash(3, 1, 0, 5) == 8784222661510220614


@pytest.mark.parametrize("in_memory", [True, False])
def test_nothing_readable(photos: Path, in_memory: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in photos.rglob("*.png"):
        path.write_bytes(b"")
    if not in_memory:
        monkeypatch.setattr(pictures, "IN_MEMORY_BYTES", 0)
    with pytest.raises(UserError, match="Not one of the 24 pictures"):
        _ = PictureDataset(open_source(str(photos)), 32)[0, 0]
