from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from liquid_diffusion.config import UserError
from liquid_diffusion.data import pictures
from liquid_diffusion.data.pictures import PictureDataset, ShuffledBatches, collate
from liquid_diffusion.data.sources import open_source


def take(batches: ShuffledBatches, count: int) -> list[list[tuple[int, int]]]:
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


def test_flips_are_half_and_differ_between_epochs(photos: Path) -> None:
    dataset = PictureDataset(open_source(str(photos)), 32, flip=True, seed=3)
    flips = 0
    for epoch, index in itertools.product(range(20), range(24)):
        plain, seen = dataset.picture(index)["image"], dataset[epoch, index]["image"]
        assert torch.equal(seen, plain) or torch.equal(seen, plain.flip(-1))
        flips += not torch.equal(seen, plain)
    assert 200 < flips < 280
    assert torch.equal(dataset.picture(0)["image"], dataset.picture(0)["image"])
    again = PictureDataset(open_source(str(photos)), 32, flip=True, seed=3)
    assert all(torch.equal(dataset[e, 5]["image"], again[e, 5]["image"]) for e in range(20))


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
        monkeypatch.setattr(pictures, "_IN_MEMORY_BYTES", 0)
    dataset = PictureDataset(open_source(str(photos)), 32)
    assert dataset.in_memory == in_memory
    items = [dataset[0, i] for i in range(len(dataset))]
    images, labels, skipped = collate(items)
    named = dataset.skipped + skipped
    assert len(named) == 1
    assert "00.png" in named[0]
    assert images.shape == (len(dataset), 3, 32, 32)
    assert labels.tolist() == [0] * 12 + [1] * (len(dataset) - 12)
    if in_memory:
        assert len(dataset) == 23
    else:
        assert len(dataset) == 24
        assert torch.equal(items[12]["image"], items[13]["image"])  # the next one stands in


@pytest.mark.parametrize("in_memory", [True, False])
def test_nothing_readable(photos: Path, in_memory: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in photos.rglob("*.png"):
        path.write_bytes(b"")
    if not in_memory:
        monkeypatch.setattr(pictures, "_IN_MEMORY_BYTES", 0)
    with pytest.raises(UserError, match="Not one of the 24 pictures"):
        _ = PictureDataset(open_source(str(photos)), 32)[0, 0]
