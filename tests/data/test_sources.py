from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from liquid_diffusion.config import UserError
from liquid_diffusion.data.registry import DATASETS
from liquid_diffusion.data.sources import BadPictureError, EmojiSource, FolderSource, open_source


def test_emoji() -> None:
    source = open_source("emoji")
    assert isinstance(source, EmojiSource)
    assert len(source) == DATASETS[0].pictures
    assert len(source.label_names) == 9
    index = next(i for i in range(len(source)) if source.name(i).endswith("1f600.png"))  # grinning face
    image, label = source.read(index)
    assert image.size == (72, 72)
    assert source.label_names[label] == "Smileys & Emotion"
    assert image.getpixel((0, 0)) == (255, 255, 255)  # transparent corners on white
    red, green, blue = image.getpixel((36, 20))  # type: ignore[misc]
    assert red > green > 180 > blue  # a yellow face
    skin_tones = [i for i in range(len(source)) if "1f3fb" in source.name(i)]
    assert not skin_tones


def test_folder_with_classes(photos: Path) -> None:
    source = open_source(str(photos))
    assert source.label_names == ["cat", "dog"]
    assert len(source) == 24
    for i in range(24):
        image, label = source.read(i)
        assert image.mode == "RGB"
        assert source.label_names[label] in source.name(i)


def test_folder_without_classes(photos: Path) -> None:
    """Loose pictures beside the sub-folders: no classes. Only one sub-folder: no classes either."""
    shutil.copy(photos / "cat" / "01.png", photos / "loose.PNG")
    (photos / "notes.txt").write_text("no picture")
    source = open_source(str(photos))
    assert len(source) == 25
    assert source.label_names == []
    assert FolderSource(photos / "cat").label_names == []


def test_table(photos: Path, tmp_path: Path) -> None:
    """A `datasets` table on the disk: the columns are found by their types, a broken picture is only itself broken."""
    paths = sorted(photos.rglob("*.png"))
    rows = {
        "caption": [path.stem for path in paths],
        "picture": [{"bytes": path.read_bytes(), "path": None} for path in paths],
        "kind": [path.parent.name == "dog" for path in paths],
    }
    rows["picture"][3]["bytes"] = b"nonsense"  # type: ignore[index]
    features = Features(
        {"caption": Value("string"), "picture": ImageFeature(), "kind": ClassLabel(names=["cat", "dog"])}
    )
    Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "table")
    source = open_source(str(tmp_path / "table"))
    assert source.label_names == ["cat", "dog"]
    for i in (0, 23):
        image, label = source.read(i)
        with Image.open(paths[i]) as original:
            assert np.array_equal(np.asarray(image), np.asarray(original))
        assert source.label_names[label] == paths[i].parent.name
    with pytest.raises(BadPictureError, match="row 3"):
        source.read(3)


def test_table_without_pictures(tmp_path: Path) -> None:
    Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "table")
    with pytest.raises(UserError, match="no column of pictures, only text"):
        open_source(str(tmp_path / "table"))


@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_a_bad_picture_is_named(photos: Path, damage: str) -> None:
    path = photos / "cat" / "01.png"
    data = {"truncated": path.read_bytes()[:200], "empty": b"", "text": b"no picture"}[damage]
    path.write_bytes(data)
    with pytest.raises(BadPictureError, match=r"cat.01\.png"):
        open_source(str(photos)).read(0)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "PNG", "GIF", "TIFF", "AVIF", "BMP"])
def test_no_damage_is_more_than_a_bad_picture(tmp_path: Path, kind: str) -> None:
    """Bytes changed at random, the EXIF's too: the picture is read, or it is bad; nothing else is ever raised."""
    draws = np.random.default_rng(0)
    exif = Image.Exif()
    exif[274] = 6
    path = tmp_path / f"x.{kind.lower()}"
    Image.fromarray(draws.integers(0, 255, (24, 24, 3), dtype=np.uint8)).save(path, kind, exif=exif)
    good = path.read_bytes()
    for _ in range(60):
        data = bytearray(good)
        for place in draws.integers(0, min(len(data), 400), 6):
            data[place] = draws.integers(0, 256)
        path.write_bytes(bytes(data))
        with contextlib.suppress(BadPictureError):
            assert FolderSource(tmp_path).read(0)[0].mode == "RGB"


def test_a_bomb_is_named(photos: Path) -> None:
    Image.new("1", (20000, 20000)).save(photos / "cat" / "01.png")
    with pytest.raises(BadPictureError, match=r"cat.01\.png: .*decompression bomb"):
        open_source(str(photos)).read(0)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("./nowhere", "no folder './nowhere'"),
        ("/nowhere/at/all", "no folder '/nowhere/at/all'"),
        ("emojis", "no data set and no folder 'emojis'"),
        ("photos/", "no data set and no folder 'photos/'"),
        ("my photos/cats", "no data set and no folder 'my photos/cats'"),
    ],
)
def test_unknown_sources(data: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        open_source(data)


def test_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "text.txt").touch()
    with pytest.raises(UserError, match="no pictures in"):
        open_source(str(tmp_path))
