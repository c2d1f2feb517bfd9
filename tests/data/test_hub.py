from __future__ import annotations

import errno
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from datasets.exceptions import DatasetGenerationError
from hub_sets import build, encoded, number_of, picture, write_parquet
from little_hub import LittleHub
from PIL import Image

from liquid_diffusion.data.hub import _in_words, open_local_table
from liquid_diffusion.data.registry import DATASETS, DatasetFacts, describe, find_facts
from liquid_diffusion.data.sources import BadPictureError, Source, open_source
from liquid_diffusion.data.split import split
from liquid_diffusion.errors import UserError

ON_HUB = [facts for facts in DATASETS if facts.hub_id]
Capture = pytest.CaptureFixture[str]


def numbers(source: Source, indices: list[int]) -> list[int]:
    return [number_of(np.asarray(source.read(i)[0]).transpose(2, 0, 1)) for i in indices]


@pytest.mark.parametrize("facts", ON_HUB, ids=lambda facts: facts.name)
def test_each_data_set(little_hub: LittleHub, facts: DatasetFacts, capsys: Capture) -> None:
    expected = build(little_hub, facts)
    source = open_source(facts.name)
    told = capsys.readouterr().err
    assert facts.licence in told
    assert f"{facts.pictures:,} pictures" in told
    assert source.label_names == list(facts.classes)
    train, held_out = split(source, 0.0)
    assert held_out == []
    assert sorted(numbers(source, train)) == expected  # each once, anime-faces too
    for index in train[:7]:
        image, label = source.read(index)
        if facts.classes:
            assert label == number_of(np.asarray(image).transpose(2, 0, 1)) % 3
    sides = split(source, 0.3)
    assert Counter(numbers(source, sides[0]) + numbers(source, sides[1])) == Counter(expected)


def test_short_names_ids_and_copies(little_hub: LittleHub) -> None:
    facts = find_facts("anime-faces")
    assert facts is not None
    build(little_hub, facts)
    (little_hub.root / "datasets" / "huggan").rename(little_hub.root / "datasets" / "me")
    for data in ("anime-faces", "huggan/anime-faces"):
        with pytest.raises(UserError, match="Hub does not know it"):
            open_source(data)
    copy = open_source("anime-faces@me/anime-faces")
    assert len(split(copy, 0.0)[0]) == 20
    assert len(open_source("me/anime-faces")) > 20  # as any other data set: nothing is known of it


def test_the_table_of_data_sets() -> None:
    text = describe()
    for facts in DATASETS:
        line = next(line for line in text.splitlines() if line.startswith(facts.name + " "))
        assert facts.licence in line
        assert f"{facts.pictures:,}" in line
    assert max(len(line) for line in text.splitlines()) < 180
    stored = json.loads(describe(as_json=True))
    assert {facts["name"]: facts["captions"] for facts in stored} == {
        facts.name: "text" if facts.name in ("pokemon", "cartoon") else None for facts in DATASETS
    }


def test_licence_of_any_data_set_is_shown_before_anything_is_downloaded(
    little_hub: LittleHub, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = little_hub.repo("some/pictures")
    (folder / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    write_parquet(folder / "data/train.parquet", {"image": encoded(range(4))}, Features({"image": ImageFeature()}))
    little_hub.fail("*.parquet", status=404, times=None)
    with pytest.raises(UserError):
        open_source("some/pictures")
    assert "licence: cc-by-4.0" in capsys.readouterr().err


def test_columns_of_any_name_and_type(little_hub: LittleHub) -> None:
    """Pictures as bare bytes, labels as words or numbers: found, or said by a person."""
    features = Features({"id": Value("int64"), "photo": Value("binary"), "kind": Value("string")})
    rows = {"id": [7, 9, 7, 8], "photo": [picture(n) for n in range(4)], "kind": ["b", "a", "b", None]}
    path = little_hub.repo("some/rows") / "train.parquet"
    pq.write_table(pa.table(rows, schema=pa.schema(features.arrow_schema.remove_metadata())), path)
    assert open_source("some/rows").label_names == []
    by_kind = open_source("some/rows", label_column="kind")
    assert by_kind.label_names == ["a", "b"]
    assert [by_kind.read(i)[1] for i in range(3)] == [1, 0, 1]
    with pytest.raises(BadPictureError, match="row 3: it has no label"):
        by_kind.read(3)
    by_id = open_source("some/rows", "photo", "id")
    assert by_id.label_names == ["7", "8", "9"]
    assert [by_id.read(i)[1] for i in range(4)] == [0, 2, 0, 1]
    for image, label, words in (
        ("picture", None, "no column 'picture', only id, photo, kind"),
        (None, "class", "no column 'class'"),
        ("kind", None, "column 'kind' of some/rows holds no pictures"),
    ):
        with pytest.raises(UserError, match=words):
            open_source("some/rows", image, label)


def test_parquet_on_the_disk(tmp_path: Path) -> None:
    """One file, a folder of them, a pattern: in all, the same rows in the order of the names."""
    for i in range(2):
        rows = {"image": encoded(range(i * 3, i * 3 + 3))}
        write_parquet(tmp_path / f"data/{i}.parquet", rows, Features({"image": ImageFeature()}))
    assert numbers(open_source(str(tmp_path / "data/1.parquet")), [0, 1, 2]) == [3, 4, 5]
    for data in (tmp_path / "data", tmp_path / "data/*.parquet", tmp_path / "**/*.parquet"):
        assert numbers(open_source(str(data)), list(range(6))) == list(range(6))
    write_parquet(tmp_path / "data/0.parquet", {"image": encoded([])}, Features({"image": ImageFeature()}))
    assert numbers(open_source(str(tmp_path / "data")), [0, 1, 2]) == [3, 4, 5]
    with pytest.raises(UserError, match=r"There are no rows in .*0\.parquet"):
        open_source(str(tmp_path / "data/0.parquet"))
    (tmp_path / "data/1.parquet").write_bytes(b"PAR1 this is none PAR1")
    with pytest.raises(UserError, match="are damaged"):
        open_source(str(tmp_path / "data"))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "'some/rows' can't be prepared here: .*No space left"),
        (OSError("Not enough disk space. Needed: 2 GiB"), "'some/rows' can't be prepared here: Not enough disk space"),
        (ConnectionError("Couldn't reach it"), "The Hub can't be reached for 'some/rows'"),
    ],
    ids=str,
)
def test_a_full_disk_is_not_the_networks_fault(error: OSError, words: str) -> None:
    """As `datasets` raises them: while it looks for room, and out of the writing of its tables."""
    with pytest.raises(UserError, match=words), _in_words("some/rows"):
        raise error
    with pytest.raises(UserError, match=words), _in_words("some/rows"):
        raise DatasetGenerationError("An error occurred while generating the dataset") from error


def test_what_lies_here_is_not_the_networks_fault(tmp_path: Path) -> None:
    Dataset.from_dict({"image": encoded([0])}).save_to_disk(tmp_path / "set")
    next((tmp_path / "set").glob("*.arrow")).unlink()
    with pytest.raises(UserError, match=r"The files of '.*set' can't be read: "):
        open_source(str(tmp_path / "set"))


def test_a_table_among_pictures(tmp_path: Path) -> None:
    """One of numbers is nothing to train on; one of pictures goes before what lies beside it to look at."""
    for n in (0, 1, 2):
        (tmp_path / f"{n}.png").write_bytes(picture(n))
    (tmp_path / "sub").mkdir()
    write_parquet(tmp_path / "sub/likes.parquet", {"likes": [1, 2]}, Features({"likes": Value("int64")}))
    assert sorted(numbers(open_source(str(tmp_path)), [0, 1, 2])) == [0, 1, 2]
    write_parquet(tmp_path / "sub/x.parquet", {"image": encoded([7, 8])}, Features({"image": ImageFeature()}))
    (tmp_path / "sub/likes.parquet").unlink()
    assert numbers(open_source(str(tmp_path)), [0, 1]) == [7, 8]


def test_a_folder_with_metadata(tmp_path: Path) -> None:
    lines = []
    for n in range(4):
        (tmp_path / f"{n}.png").write_bytes(picture(n))
        lines.append(json.dumps({"file_name": f"{n}.png", "text": f"number {n}", "kind": "ab"[n % 2]}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    source = open_source(str(tmp_path), label_column="kind")
    assert source.label_names == ["a", "b"]
    for i in range(4):
        image, label = source.read(i)
        assert number_of(np.asarray(image).transpose(2, 0, 1)) % 2 == label
    with pytest.raises(UserError, match="no column 'class', only image, text, kind"):
        open_source(str(tmp_path), label_column="class")


@pytest.mark.parametrize(("name", "text"), [("metadata.jsonl", ""), ("metadata.csv", "file_name,label\n")])
def test_metadata_without_rows(name: str, text: str, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match="no rows in the metadata"):
        open_local_table(str(tmp_path))


def test_damaged_files_of_the_hub(little_hub: LittleHub) -> None:
    (little_hub.repo("some/rows") / "train.parquet").write_bytes(b"PAR1 this is none PAR1")
    with pytest.raises(UserError, match=r"(?s)some/rows.*(damaged|can't be opened)"):
        open_source("some/rows")
