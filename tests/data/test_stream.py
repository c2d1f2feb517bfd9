from __future__ import annotations

import io
import itertools
import json
import multiprocessing
import os
import random
import threading
import zipfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Features, Value
from datasets import Image as ImageFeature
from hub_sets import build, encoded, number_of, picture, write_parquet
from huggingface_hub import constants
from little_hub import LittleHub
from PIL import Image

from liquid_diffusion.data import ranged, stream
from liquid_diffusion.data.pictures import stable_hash
from liquid_diffusion.data.ranged import SourceLostError
from liquid_diffusion.data.registry import DATASETS, DatasetFacts
from liquid_diffusion.data.sources import BadPictureError, open_shards, open_source
from liquid_diffusion.data.split import is_held_out, split
from liquid_diffusion.data.stream import LANES, PictureStream
from liquid_diffusion.errors import UserError

# of a machine with one core, on which a test of two workers is as good as elsewhere
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
ON_HUB = [facts for facts in DATASETS if facts.hub_id]


def make(data: str, **how: Any) -> PictureStream:
    found = open_shards(data)
    assert found is not None
    return PictureStream(found, **{"image_size": 16, "seed": 1, **how})


def ids(batches: Iterator[Any], count: int) -> list[int]:
    """The numbers of the pictures in the next `count` batches."""
    return [number_of(image) for images, _, _ in itertools.islice(batches, count) for image in images]


def epochs_of(
    found: PictureStream, count: int, names: set[str] | None = None, place: tuple[int, int] = (0, 1)
) -> list[Counter[int]]:
    """The numbers of the pictures in the first `count` epochs, as lanes count them; bad ones go into `names`."""
    taken: list[Counter[int]] = [Counter() for _ in range(count)]
    batches = found.batches(LANES, 0, 0, *place)
    while min(epoch for epoch, _ in found.positions) < count:
        images, _, skipped = next(batches)
        for (epoch, _), image in zip(found.positions, images, strict=True):
            if epoch < count:
                taken[epoch][number_of(image)] += 1
        if names is not None:
            names.update(map(str, skipped))
    return taken


@pytest.fixture
def table(tmp_path: Path) -> str:
    """A folder of 3 parquet files with 60 pictures in row groups of 4."""
    for shard in range(3):
        rows = {"image": encoded(range(shard * 20, shard * 20 + 20), size=(2, 2)), "label": [shard] * 20}
        features = Features({"image": ImageFeature(), "label": ClassLabel(names=["a", "b", "c"])})
        write_parquet(tmp_path / f"table/{shard}.parquet", rows, features, group=4)
    return str(tmp_path / "table")


@pytest.mark.parametrize("facts", ON_HUB, ids=lambda facts: facts.name)
def test_each_data_set(little_hub: LittleHub, facts: DatasetFacts) -> None:
    """Every picture once in each epoch, with its label; the same ones held out as without streaming; no download."""
    expected = build(little_hub, facts)
    found = make(facts.name)
    assert found.label_names == list(facts.classes)
    assert epochs_of(found, 2) == [Counter(expected)] * 2
    if facts.classes:
        images, labels, _ = next(make(facts.name).batches(24, 0, 0))
        assert [number_of(image) % 3 for image in images] == labels.tolist()
    files = {r.path for r in little_hub.requests("*/resolve/*", "GET")}
    assert not any("/images/" in path for path in files)
    source = open_source(facts.name)
    train, held_out = split(source, 0.4)
    (streamed,) = epochs_of(make(facts.name, val_fraction=0.4), 1)
    assert streamed == Counter(number_of(np.asarray(source.read(i)[0]).transpose(2, 0, 1)) for i in train)
    assert held_out


def test_shuffled_differently_in_each_epoch(table: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_WINDOW", 8)
    found = make(table)
    first, second = ids(found.batches(60, 0, 0), 1), ids(found.batches(60, 1, 0), 1)
    assert sorted(first) == sorted(second) == list(range(60))
    assert first != second
    assert set(first[::LANES]) != set(second[::LANES])  # a lane's span is another one
    assert ids(make(table, seed=2).batches(60, 0, 0), 1) != first
    # a lane's window mixes its chunks, and a batch the files
    assert any(abs(a - b) > 4 for a, b in itertools.pairwise(first[::LANES]))
    assert len({number // 20 for number in first[:8]}) == 3


@pytest.mark.parametrize("workers", [1, 2, 3, 9])
def test_the_number_of_workers_changes_nothing(table: str, workers: int) -> None:
    assert ids(make(table).batches(7, 0, workers), 20) == ids(make(table).batches(7, 0, 0), 20)


@pytest.mark.parametrize(("workers", "then"), [(0, 0), (2, 2), (2, 0)])
def test_going_on_takes_the_very_next_picture(table: str, workers: int, then: int) -> None:
    """Stopped after any number of batches, also in the middle of a window and over the end of an epoch."""
    whole = [ids(iter([batch]), 1) for batch in itertools.islice(make(table, val_fraction=0.2).batches(5, 0, 0), 30)]
    for stop in (1, 4, 11, 23) if workers == 0 else (11,):
        begun = make(table, val_fraction=0.2)
        list(itertools.islice(begun.batches(5, 0, workers), stop))
        gone_on = make(table, val_fraction=0.2)
        gone_on.load_state(json.loads(json.dumps(begun.state())))
        assert ids(gone_on.batches(5, stop, then), 30 - stop) == list(itertools.chain(*whole[stop:]))


def test_files_that_changed_are_not_gone_on_with(table: str, tmp_path: Path) -> None:
    """As many pictures as before, in other row groups: positions would mean other pictures."""
    state = make(table).state()
    rows = {"image": encoded(range(20), size=(2, 2)), "label": [0] * 20}
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["a", "b", "c"])})
    write_parquet(tmp_path / "table/0.parquet", rows, features, group=5)
    assert len(make(table)) == 60
    with pytest.raises(UserError, match="have changed since"):
        make(table).load_state(state)


def test_processes_divide_the_pictures(table: str) -> None:
    first, second = (epochs_of(make(table), 2, place=(rank, 2)) for rank in range(2))
    assert [a + b for a, b in zip(first, second, strict=True)] == [Counter(range(60))] * 2
    assert 26 <= first[0].total() <= 34


def test_mirrored_in_half_of_the_epochs(tmp_path: Path) -> None:
    """Pictures that are dark on the left."""
    halves = np.full((8, 8, 3), 200, np.uint8)
    halves[:, :4] = 0
    file = io.BytesIO()
    Image.fromarray(halves).save(file, "PNG")
    rows = {"image": [{"bytes": file.getvalue(), "path": None}] * 8}
    write_parquet(tmp_path / "t/x.parquet", rows, Features({"image": ImageFeature()}))
    runs = []
    for _ in range(2):
        batches = make(str(tmp_path / "t"), flip=True).batches(8, 0, 0)
        runs.append([bool(image[0, 8, 0] > 100) for images, _, _ in itertools.islice(batches, 20) for image in images])
    assert 50 < sum(runs[0]) < 110
    assert runs[0] == runs[1]


def tiny_bitmap(number: int) -> bytes:
    """The smallest picture that is quick to make: one pixel."""
    header = b"BM" + (58).to_bytes(4, "little") + bytes(4) + (54).to_bytes(4, "little") + (40).to_bytes(4, "little")
    header += (1).to_bytes(4, "little") * 2 + (1).to_bytes(2, "little") + (24).to_bytes(2, "little") + bytes(24)
    return header + number.to_bytes(3, "little") + b"\0"


def first_epoch(found: PictureStream, lane: int) -> list[int]:
    """The places in the set of the pictures of a lane, in the order in which its windows have them."""
    order = []
    for i, window in enumerate(found._windows(lane, LANES, 0)):
        rows = [found._firsts[number] + row for number, low, high in window for row in range(low, high)]
        random.Random(stable_hash(found.seed, 5, 0, lane, i)).shuffle(rows)
        order += rows
    return order


def test_going_on_costs_the_same_everywhere(little_hub: LittleHub) -> None:
    """At sample 1,000 and at 100,000: the same number of requests and of bytes, and the right pictures."""
    folder = little_hub.repo("some/many")
    features = Features({"image": ImageFeature(), "id": Value("int64")})
    for shard in range(4):
        numbers = range(shard * 30_000, (shard + 1) * 30_000)
        rows = {"image": [{"bytes": tiny_bitmap(n), "path": None} for n in numbers], "id": list(numbers)}
        write_parquet(folder / f"{shard}.parquet", rows, features, group=500)
    costs = []
    for sample in (1_000, 100_000):
        found = make("some/many", image_size=1)
        found.positions = [(0, sample // LANES)] * LANES
        little_hub.log.clear()
        taken = ids(found.batches(40, sample // 40, 0), 5)
        lanes = [first_epoch(found, lane)[sample // LANES :][: 200 // LANES] for lane in range(LANES)]
        assert taken == list(itertools.chain.from_iterable(zip(*lanes, strict=True)))
        for chunk in found._reader._chunks.values():
            chunk.result()  # what is read ahead counts too
        log = little_hub.requests("*.parquet", "GET")
        costs.append((len(log), sum(r.sent for r in log)))
    (requests, sent), (later_requests, later_sent) = costs
    assert abs(later_requests - requests) <= 0.2 * requests
    assert abs(later_sent - sent) <= 0.2 * sent
    assert sent < 0.12 * sum(path.stat().st_size for path in folder.glob("*.parquet"))


# ---- faults


@pytest.fixture
def hub_table(little_hub: LittleHub, monkeypatch: pytest.MonkeyPatch) -> LittleHub:
    """24 pictures in two shards of 4 row groups, read from a Hub by a client that waits for no more than a second."""
    for shard in range(2):
        numbers = range(shard * 12, shard * 12 + 12)
        rows = {"image": encoded(numbers)}
        path = little_hub.repo("some/table") / f"train-{shard:05d}-of-00002.parquet"
        write_parquet(path, rows, Features({"image": ImageFeature()}), group=3)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
    monkeypatch.setattr(ranged, "_PAUSES", (0.1, 0.1))
    monkeypatch.setattr(stream, "_WINDOW", 3)
    return little_hub


FAULTS: dict[str, dict[str, Any]] = {
    "burst of 504": {"status": 504, "times": 2},
    "too many requests": {"status": 429, "retry_after": 1, "times": 1},
    "cut in mid-shard": {"cut": 40, "times": 2},
    "stall": {"stall": 1.5, "times": 1},
    "damaged on the way": {"damage": (4, b"\xff" * 60), "times": 1},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_loses_no_picture_and_takes_none_twice(hub_table: LittleHub, fault: str) -> None:
    found = make("some/table")
    hub_table.fail("*.parquet", skip=3, **FAULTS[fault])
    hub_table.log.clear()
    taken = ids(found.batches(6, 0, 0), 8)
    assert Counter(taken[:24]) == Counter(taken[24:]) == Counter(range(24))
    assert not any(fault.times for fault in hub_table._faults)  # it happened
    assert taken == ids(make("some/table").batches(6, 0, 2), 8)


def test_a_shard_with_wrong_bytes_is_named_and_left_out(hub_table: LittleHub) -> None:
    """One row group is damaged for good: its pictures are named, all others come once in each epoch."""
    path = hub_table.repo("some/table") / "train-00000-of-00002.parquet"
    place = pq.read_metadata(path).row_group(1).column(0).data_page_offset
    hub_table.fail("*00000-of-00002.parquet", damage=(place, b"\xff" * 40), times=None)
    names: set[str] = set()
    assert epochs_of(make("some/table"), 2, names) == [Counter(n for n in range(24) if n not in (3, 4, 5))] * 2
    assert len(names) == 3
    assert all("train-00000-of-00002.parquet, row" in name and "damaged" in name for name in names)


def test_wrong_bytes_in_a_zip_are_told_by_its_checksum(little_hub: LittleHub) -> None:
    """A bitmap decodes whatever its pixels are; also without streaming."""
    path = little_hub.repo("some/bitmaps") / "all.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for n in range(8):
            archive.writestr(f"{n}.bmp", tiny_bitmap(n))
    content = bytearray(path.read_bytes())
    content[content.index(tiny_bitmap(5)) + 54] ^= 255
    path.write_bytes(content)
    names: set[str] = set()
    good = Counter(n for n in range(8) if n != 5)
    assert epochs_of(make("some/bitmaps", image_size=1), 1, names) == [good]
    assert names == {"some/bitmaps/all.zip, 5.bmp: its checksum is wrong"}
    with pytest.raises(BadPictureError, match="its checksum is wrong"):
        open_source("some/bitmaps").read(5)


def test_a_bad_picture_is_named_and_passed_over(tmp_path: Path) -> None:
    rows = {"image": encoded(range(12))}
    rows["image"][5] = {"bytes": b"nonsense", "path": None}
    rows["image"][6] = {"bytes": None, "path": None}
    rows["image"][7] = {"bytes": picture(7)[:40], "path": None}
    write_parquet(tmp_path / "t/x.parquet", rows, Features({"image": ImageFeature()}))
    names: set[str] = set()
    good = Counter(n for n in range(12) if n not in (5, 6, 7))
    assert epochs_of(make(str(tmp_path / "t")), 2, names) == [good] * 2
    assert {name.split("x.parquet, ")[1].split(":")[0] for name in names} == {"row 5", "row 6", "row 7"}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_source_that_is_gone_ends_clearly_and_can_be_gone_on_with(hub_table: LittleHub, workers: int) -> None:
    whole = ids(make("some/table").batches(4, 0, 0), 12)
    found = make("some/table")
    batches = found.batches(4, 0, workers)
    taken = ids(batches, 3)
    hub_table.fail("*.parquet", status=404, times=None)
    with pytest.raises(SourceLostError, match=r"can't be read any more .*404"):  # noqa: PT012  until it is noticed
        for batch in batches:
            taken += ids(iter([batch]), 1)
    hub_table.heal()
    again = make("some/table")
    again.load_state(found.state())
    assert taken + ids(again.batches(4, len(taken) // 4, workers), 12 - len(taken) // 4) == whole


def test_nothing_can_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_FRUITLESS", 50)
    rows = {"image": [{"bytes": b"x", "path": None}] * 8}
    write_parquet(tmp_path / "t/x.parquet", rows, Features({"image": ImageFeature()}))
    with pytest.raises(UserError, match=r"Not one of 8 pictures .* the first: .*row"):
        next(make(str(tmp_path / "t")).batches(2, 0, 1))
    write_parquet(tmp_path / "few/x.parquet", {"image": encoded(range(3))}, Features({"image": ImageFeature()}))
    with pytest.raises(UserError, match="3 pictures, too few to stream"):
        next(make(str(tmp_path / "few")).spread(1, 1))


def test_a_part_of_a_set_may_have_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that one lane has in its first epoch: it goes on with what another had."""
    monkeypatch.setattr(stream, "_FRUITLESS", 50)
    rows = {"image": [*([{"bytes": b"x", "path": None}] * 10), *encoded(range(10, 40))]}
    write_parquet(tmp_path / "t/x.parquet", rows, Features({"image": ImageFeature()}))
    assert set(ids(make(str(tmp_path / "t")).batches(4, 0, 0), 40)) == set(range(10, 40))


def test_what_can_be_streamed(little_hub: LittleHub, photos: Path) -> None:
    assert open_shards("emoji") is None
    assert open_shards(str(photos)) is None
    folder = little_hub.repo("some/loose")
    for n in range(12):
        path = folder / "train" / "ab"[n % 2] / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(n))
    found = make("some/loose")
    assert found.label_names == ["a", "b"]
    images, labels, _ = next(found.batches(12, 0, 0))
    assert [number_of(image) % 2 for image in images] == labels.tolist()
    assert sorted(map(number_of, images)) == list(range(12))
    (little_hub.repo("some/lines") / "train.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match=r"consists of \.csv files"):
        open_shards("some/lines")
    pq.write_table(pa.table({"a": [1]}), little_hub.repo("some/numbers") / "train.parquet")
    with pytest.raises(UserError, match="no column of pictures, only a"):
        open_shards("some/numbers")


def test_sides_are_those_of_the_content(table: str) -> None:
    (taken,) = epochs_of(make(table, val_fraction=0.3), 1)
    assert set(taken) == {n for n in range(60) if not is_held_out(picture(n, (2, 2)), 0.3)}


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_worker_reads_itself_what_its_parent_was_reading(table: str) -> None:
    """A read that a thread of the parent has not finished never ends in a worker, which has no such thread."""
    found = open_shards(table)
    assert found is not None
    reader = stream._Reader(found)
    begun = threading.Event()
    pool = ThreadPoolExecutor(1)
    pool.submit(begun.wait)  # the only thread of the parent is busy
    reader._pool, reader._process = pool, os.getpid()
    reader.want(0, [0])
    assert not reader._chunks[0].done()

    def read() -> None:
        reader.want(0, [0])
        reader.row(0, 0)

    worker = multiprocessing.get_context("fork").Process(target=read)
    worker.start()
    worker.join(30)
    ended = worker.exitcode
    worker.kill()
    begun.set()
    assert ended == 0


def test_what_is_needed_at_once_is_read_first(table: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = make(table)
    monkeypatch.setattr(stream, "_WINDOW", 1)
    asked: list[int] = []
    want = found._reader.want

    def noted(lane: int, numbers: list[int]) -> None:
        asked.append(len(numbers))
        want(lane, numbers)

    monkeypatch.setattr(found._reader, "want", noted)
    next(found.batches(LANES, 0, 0))
    assert asked == [1] * LANES
