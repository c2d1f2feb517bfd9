from __future__ import annotations

import base64
import contextlib
import errno
import io
import json
import math
import os
import shutil
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import PIL.features
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from datasets import Image as ImageFeature
from hub_sets import encoded, picture
from little_hub import LittleHub
from PIL import Image, ImageFile

from liquid_diffusion.data.registry import DATASETS
from liquid_diffusion.data.sources import (
    BadPictureError,
    EmojiSource,
    FolderSource,
    decode,
    open_shards,
    open_source,
    same_place,
)
from liquid_diffusion.data.transforms import to_shape
from liquid_diffusion.errors import UserError

Capture = pytest.CaptureFixture[str]


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


def test_folder_without_classes(photos: Path, capsys: Capture) -> None:
    """Loose pictures beside the sub-folders: no classes, which is said. Only one sub-folder: no classes either."""
    shutil.copy(photos / "cat" / "01.png", photos / "loose.PNG")
    (photos / "notes.txt").write_text("no picture")
    source = open_source(str(photos))
    assert len(source) == 25
    assert source.label_names == []
    assert (
        "has no classes: 1 of its pictures, loose.PNG for one, lies beside the sub-folders" in capsys.readouterr().err
    )
    assert FolderSource(photos / "cat").label_names == []


def test_classes_below_a_folder_that_all_share(photos: Path, tmp_path: Path, capsys: Capture) -> None:
    """data/train/cat has the classes of train/cat; train and test beside each other are classes, and that is said."""
    (tmp_path / "data" / "all").mkdir(parents=True)
    shutil.copytree(photos, tmp_path / "data" / "all" / "train")
    source = open_source(str(tmp_path / "data"))
    assert source.label_names == ["cat", "dog"]
    assert [source.read(i)[1] for i in range(24)] == [open_source(str(photos)).read(i)[1] for i in range(24)]
    assert capsys.readouterr().err == ""
    for other in ("test", "val"):
        shutil.copytree(photos, tmp_path / "data" / "all" / other)
    assert open_source(str(tmp_path / "data")).label_names == ["test", "train", "val"]
    below = tmp_path / "data" / "all"
    remark = f"The classes of {below} are test, train, val; --data {below / 'train'} takes those to train on alone.\n"
    assert capsys.readouterr().err == remark
    shutil.copy(photos / "cat" / "01.png", below / "loose.png")
    assert open_source(str(tmp_path / "data")).label_names == []
    assert f"{below} has no classes: 1 of its pictures, loose.png for one, lies beside" in capsys.readouterr().err


def test_a_folder_with_metadata_whose_pictures_are_called_as_splits_are(tmp_path: Path) -> None:
    folder = tmp_path / "meta [1]"
    folder.mkdir()
    names = ["train 1.png", "steam-train-2.png", "flight test.png", "eval.png", "a.png"]
    for i, name in enumerate(names):
        Image.new("RGB", (8, 8), (20 * i, 0, 0)).save(folder / name)
    lines = [json.dumps({"file_name": name, "kind": "ab"[i % 2]}) for i, name in enumerate(names)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    source = open_source(str(folder), label_column="kind")
    assert source.label_names == ["a", "b"]
    found = [source.read(i) for i in range(len(source))]
    seen = {(image.getpixel((0, 0))[0] // 20, label) for image, label in found}  # type: ignore[index]
    assert seen == {(i, i % 2) for i in range(5)}


def test_a_label_that_is_no_number_is_missing(tmp_path: Path) -> None:
    content = {"image": encoded(range(4)), "age": [1.0, math.nan, 2.0, math.nan]}
    features = Features({"image": ImageFeature(), "age": Value("float32")})
    Dataset.from_dict(content, features=features).save_to_disk(tmp_path / "table")
    source = open_source(str(tmp_path / "table"), label_column="age")
    assert source.label_names == ["1.0", "2.0"]
    assert source.read(2)[1] == 1
    with pytest.raises(BadPictureError, match="it has no label"):
        source.read(1)


def test_pictures_of_200_million_pixels_are_read() -> None:
    """As phones take them; decoded at an eighth."""
    stored = io.BytesIO()
    Image.new("L", (16320, 12240), 99).save(stored, "JPEG")
    image = decode(stored.getvalue(), "photo", (64, 64))
    assert image.size == (2040, 1530)
    assert image.getpixel((5, 5)) == (99, 99, 99)


def test_what_is_hidden_is_no_picture(photos: Path) -> None:
    """What macOS, Jupyter and editors leave beside pictures, which would else be classes of their own."""
    for path in ("__MACOSX/cat/01.png", ".ipynb_checkpoints/01.png", "cat/._01.png", "dog/.trash/01.png"):
        (photos / path).parent.mkdir(exist_ok=True, parents=True)
        shutil.copy(photos / "cat" / "01.png", photos / path)
    source = open_source(str(photos))
    assert (len(source), source.label_names) == (24, ["cat", "dog"])
    hidden = photos.rename(photos.parent / ".photos")  # what lies above does not count
    assert len(open_source(str(hidden))) == 24


def test_a_folder_that_can_not_be_read_is_named(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not vanish; but for those that a system keeps for itself. Nor may a file be out of reach."""
    scandir, locked = os.scandir, {"dog"}

    def guarded(path: str) -> object:
        if Path(path).name in locked:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)  # root may read everything
    with pytest.raises(UserError, match=r"photos.dog can't be read \(Permission denied\); make it readable"):
        FolderSource(photos)
    locked = {"lost+found", ".Trash-0"}
    for name in locked:
        (photos / name).mkdir()
    assert len(FolderSource(photos)) == 24

    def refuse(path: Path) -> bool:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "is_file", refuse)
    with pytest.raises(UserError, match=r"\.png can't be read \(Permission denied\)"):
        FolderSource(photos)


@pytest.mark.parametrize("kind", ["zip", "png"])
@pytest.mark.parametrize("columns", [{"image_column": "kind"}, {"label_column": "kind"}])
def test_zips_and_loose_pictures_are_streamed_without_columns(
    little_hub: LittleHub, kind: str, columns: dict[str, str]
) -> None:
    folder = little_hub.repo("some/pictures")
    if kind == "zip":
        with zipfile.ZipFile(folder / "all.zip", "w") as archive:
            archive.writestr("1.png", picture(1))
    else:
        (folder / "1.png").write_bytes(picture(1))
    assert open_shards("some/pictures") is not None
    with pytest.raises(UserError, match=rf"consists of \.{kind} files, which have no column 'kind' when they are"):
        open_shards("some/pictures", **columns)
    with pytest.raises(UserError, match="no column 'kind'"):
        open_source("some/pictures", **columns)  # which may have columns, where it is a table


def test_a_folder_goes_before_a_name(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`flowers` is a data set of the Hub; `emoji` is what is taken where nothing is said."""
    for name in ("flowers", "emoji"):
        shutil.copytree(photos, photos.parent / name)
    monkeypatch.chdir(photos.parent)
    assert len(open_source("flowers")) == 24
    assert open_shards("flowers") is None
    assert len(open_source("emoji")) > 1000
    assert len(open_source("./emoji")) == 24


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


def test_saved_splits_and_columns_where_there_are_none(photos: Path, tmp_path: Path) -> None:
    content = {"image": [{"bytes": path.read_bytes(), "path": None} for path in sorted(photos.rglob("*.png"))]}
    table = Dataset.from_dict(content, features=Features({"image": ImageFeature()}))
    DatasetDict({"train": table, "test": table.select(range(3))}).save_to_disk(tmp_path / "both")
    assert len(open_source(str(tmp_path / "both"))) == 24
    assert len(open_source(str(tmp_path / "both" / "test"))) == 3
    DatasetDict({"test": table}).save_to_disk(tmp_path / "one")
    with pytest.raises(UserError, match="no split train, only test"):
        open_source(str(tmp_path / "one"))
    for data in ("emoji", str(photos)):
        with pytest.raises(UserError, match="is no table and has no column 'kind'"):
            open_source(data, label_column="kind")


def test_labels_that_are_no_single_values(photos: Path, tmp_path: Path) -> None:
    content = {"image": [str(photos / "cat" / "01.png")], "tags": [["small", "black"]]}
    features = Features({"image": ImageFeature(), "tags": List(Value("string"))})
    Dataset.from_dict(content, features=features).save_to_disk(tmp_path / "table")
    with pytest.raises(UserError, match=r"column 'tags' of .* holds no single values"):
        open_source(str(tmp_path / "table"), label_column="tags")


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


def test_a_bomb_is_named_before_it_is_decoded(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """20,000 x 20,000 in a few bytes: refused by its header, nothing is allocated, from a folder and from a table."""
    bomb = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")):
        bomb += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    (photos / "cat" / "01.png").write_bytes(bomb)

    def never(*_: object) -> None:
        raise AssertionError("it was decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", never)
    with pytest.raises(BadPictureError, match=r"cat.01\.png: .*decompression bomb"):
        open_source(str(photos)).read(0)
    with pytest.raises(BadPictureError, match=r"row 7: .*decompression bomb"):
        decode(bomb, "row 7")


def stored(kind: str, colour: object = (200, 30, 90), mode: str = "RGB", **options: object) -> bytes:
    file = io.BytesIO()
    Image.new(mode, (24, 16), colour).save(file, kind, **options)  # type: ignore[arg-type]
    return file.getvalue()


def turned() -> bytes:
    """Stored upright, red at the left; its EXIF says that it has to be turned clockwise: red at the top."""
    exif = Image.Exif()
    exif[274] = 6
    image = Image.new("RGB", (16, 24), (200, 30, 90))
    image.paste("white", (8, 0, 16, 24))
    file = io.BytesIO()
    image.save(file, "JPEG", exif=exif, quality=95)
    return file.getvalue()


def animated(kind: str) -> bytes:
    blue = Image.new("RGB", (24, 16), "blue")
    return stored(kind, save_all=True, append_images=[blue], duration=100, lossless=True)


# The same picture as a phone stores it (HEVC), made by pillow-heif, which can write it; the package only reads.
HEIC = base64.b85decode(
    "0000SW^{RQXk}?*00000ZE0pPXk}?*ZE0a<0004eZDn*}000000000XXk=`10000000000aA{+700000000000000000000B57=IV*mgE07O6l"
    "0RRC200001pa1~?00000001=r001LtX>Mi!000000RR916=`l}WdZ;I000310BCk&F#rGn01j|zbZr0t000010002|X>f9I0002oX>en20001W"
    "Xm(>m0RwOV0058x000009`FGC{rLC*01pFT0096PKmiN^|NjGU00093kN^M!000939=ZZRVE_RDDMA4O18@KU0|1Z!00RI30{|YNAb|yz>aLpR"
    ";31&EfB*mtfB*mk0EA)y0RRR>0l{;@i2wiq6Ju{|a&BX6cmM$a4FCp!0000KX>)L8000000000$0000$0000eV{Bn?0000O000010000G00001"
    "|NsBk00002|NsBc000020000GaA|mH000000|*ER0000OX>e^}0000000001009Mo0s{qv0000zZDe6|0000nC;_hqG8RWPi6HR5r%(NMpV@xN"
    "HnUqNt`YiU$K<z=k)HHldl*vXJai!RoKv~YfB"
)

PICTURES = {
    "grey.png": (stored("PNG", 77, "L"), (77, 77, 77)),
    "palette.png": (stored("PNG", 3, "P"), None),
    "alpha.png": (stored("PNG", (200, 30, 90, 0), "RGBA"), (255, 255, 255)),
    "grey-alpha.png": (stored("PNG", (77, 0), "LA"), (255, 255, 255)),
    "deep.png": (stored("PNG", 257 * 51, "I;16"), (51, 51, 51)),
    "print.jpg": (stored("JPEG", (0, 255, 255, 0), "CMYK"), (255, 0, 0)),
    "photo.jpeg": (stored("JPEG", quality=95), (200, 30, 90)),
    "turned.jpg": (turned(), (200, 30, 90)),
    "web.webp": (stored("WEBP", lossless=True), (200, 30, 90)),
    "moving.webp": (animated("WEBP"), (200, 30, 90)),
    "moving.gif": (animated("GIF"), (200, 30, 90)),
    "moving.png": (animated("PNG"), (200, 30, 90)),
    "phone.HEIC": (HEIC, (200, 30, 90)),
    "scan.tiff": (stored("TIFF"), (200, 30, 90)),
    "bits.bmp": (stored("BMP"), (200, 30, 90)),
    "really-a-png.jpg": (stored("PNG"), (200, 30, 90)),
    **({"new.avif": (stored("AVIF", quality=95), (200, 30, 90))} if PIL.features.check("avif") else {}),
}


@pytest.mark.parametrize("name", PICTURES)
def test_every_kind_of_picture(tmp_path: Path, name: str) -> None:
    """From a file, whatever its ending, and from the bytes in a table: RGB, upright, the first frame, on white."""
    content, colour = PICTURES[name]
    (tmp_path / name).write_bytes(content)
    for image in (FolderSource(tmp_path).read(0)[0], decode(content, name)):
        assert image.mode == "RGB"
        assert image.size == (24, 16)
        if colour is not None:
            assert image.getpixel((2, 2)) == pytest.approx(colour, abs=4)
    with pytest.raises(BadPictureError, match=name):
        decode(content[: len(content) // 3], name)


def test_a_large_jpeg_is_decoded_no_larger_than_it_has_to_be() -> None:
    """What a model is fed with is hardly another: half a level of 255 in the mean, in a picture with fine detail."""
    draws = np.random.default_rng(0)
    parts = [Image.fromarray(draws.integers(0, 256, (n, n, 3), np.uint8)).resize((1600, 1200)) for n in (4, 20, 400)]
    file = io.BytesIO()
    Image.blend(Image.blend(parts[0], parts[1], 0.5), parts[2], 0.2).save(file, "JPEG", quality=92)
    whole, small = decode(file.getvalue(), "x"), decode(file.getvalue(), "x", (64, 48))
    assert (whole.size, small.size) == ((1600, 1200), (200, 150))
    assert decode(file.getvalue(), "x", (400, 400)).size == whole.size  # half of it would be less than twice
    expected, found = (np.asarray(to_shape(image, (64, 48)), dtype=float) for image in (whole, small))
    assert np.abs(expected - found).mean() < 0.5


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


def test_folders_may_be_links(photos: Path, tmp_path: Path) -> None:
    """Classes that are links are classes; one that leads back to where it lies is not followed round and round."""
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in ("cat", "dog"):
        (linked / name).symlink_to(photos / name)
    (linked / "again").symlink_to(linked)
    (linked / "other dogs").symlink_to(photos / "dog")
    (photos / "cat" / "round").symlink_to(linked)  # from there back to the cats, and so on
    source = FolderSource(linked)
    assert source.label_names == ["cat", "dog", "other dogs"]
    assert len(source) == 24 + 12
    assert not [path for path in source.paths if "round" in path.parts]


def test_parquet_of_any_name_and_beside_folders_that_are_called_so(tmp_path: Path) -> None:
    content = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(content, "PNG")
    table = Dataset.from_dict({"image": [{"bytes": content.getvalue(), "path": None}] * 3})
    folder = tmp_path / "my [2] photos"
    table.to_parquet(folder / "part [1].parquet")
    (folder / "spark.parquet").mkdir()
    for data in (folder, folder / "part [1].parquet"):
        assert len(open_source(str(data), image_column="image")) == 3


def test_where_pictures_may_have_been_moved(tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    (here / "a.parquet").touch()
    gone, there = str(tmp_path / "gone"), str(tmp_path / "there")
    assert same_place(gone, gone)
    assert same_place(gone, str(here))  # a folder that was renamed
    assert not same_place(gone, there)  # no folder: nothing of it is counted
    assert same_place(f"{gone}/a.parquet", f"{here}/a.parquet")
    assert not same_place(str(here), there)
    assert not same_place(f"{here}/*.parquet", str(tmp_path))  # the pattern's files are still there
    assert not same_place("emoji", str(here))
