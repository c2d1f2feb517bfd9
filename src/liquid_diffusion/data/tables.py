"""Tables of pictures: which columns hold what, and rows of a Hugging Face `datasets.Dataset` as a source."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import fsspec
from PIL import Image

from liquid_diffusion.data.sources import BadPictureError, decode
from liquid_diffusion.data.transforms import Shape
from liquid_diffusion.errors import UserError


class Columns:
    """The columns of pictures and labels of a table, found by their types or said by a person.

    Args:
        features: `datasets.Features` of the table.
        origin: what the table is called.
        image: name of the column of pictures; the first that is one where nothing is said.
        label: name of the column of labels, of any single values; the first `ClassLabel` where nothing is said.
        values: gives all values of a column, asked for where the labels are no `ClassLabel`.

    Attributes:
        image: name of the column of pictures.
        label: name of the column of labels, None where there are no classes.
        label_names: names of the classes.

    Raises:
        UserError: there is no such column, none that holds pictures, or none of labels that could be classes.
    """

    def __init__(
        self,
        features: Any,
        origin: str,
        image: str | None,
        label: str | None,
        values: Callable[[str], Iterable[Any]],
    ) -> None:
        from datasets import ClassLabel, Value

        for name in (image, label):
            if name is not None and name not in features:
                raise UserError(f"{origin} has no column {name!r}, only {', '.join(features)}.")
        images = [name for name in features if holds_pictures(features[name])]
        if image is None and not images:
            raise UserError(f"{origin} has no column of pictures, only {', '.join(features)}.")
        if image is not None and image not in images:
            raise UserError(f"The column {image!r} of {origin} holds no pictures.")
        labels = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
        self.origin = origin
        self.image = image or images[0]
        self.label = label or (labels[0] if labels else None)
        self.label_names: list[str] = []
        self._numbers: dict[Any, int] = {}
        if self.label in labels:
            self.label_names = list(features[self.label].names)
            self._numbers = {number: number for number in range(len(self.label_names))}
        elif self.label is not None:
            if not isinstance(features[self.label], Value):
                raise UserError(f"The column {self.label!r} of {origin} holds no single values and can't be a label.")
            distinct = sorted({value for value in values(self.label) if not _is_missing(value)})
            self.label_names = [str(value) for value in distinct]
            self._numbers = {value: number for number, value in enumerate(distinct)}

    def number(self, value: Any) -> int | None:
        """The number of a label's class; None for a missing one, as -1 of `ClassLabel` is. Without classes it is 0."""
        return self._numbers.get(value) if self.label else 0


def _is_missing(value: Any) -> bool:
    """Whether a label is none: empty, or the NaN that stands for it in a column of numbers."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def holds_pictures(feature: Any) -> bool:
    """Whether a column is one of pictures: as such, or of encoded ones that were stored without saying so."""
    from datasets import Image as ImageFeature
    from datasets import Value

    encoded = isinstance(feature, dict) and set(feature) == {"bytes", "path"}
    return isinstance(feature, ImageFeature) or encoded or feature in (Value("binary"), Value("large_binary"))


def _read_file(path: str) -> bytes:
    """A file that a table names: a path, or one into an archive (zip://...::...)."""
    if "::" not in path:
        return Path(path).read_bytes()
    with fsspec.open(path, "rb") as file:
        content: bytes = file.read()
    return content


class TableSource:
    """Rows of a Hugging Face `datasets.Dataset`.

    Args:
        table: the data set.
        origin: what it is called in messages.
        image_column, label_column: see `Columns`.

    Raises:
        UserError: no column holds pictures, or one that was asked for is not there.
    """

    def __init__(
        self,
        table: Any,
        origin: str,
        image_column: str | None = None,
        label_column: str | None = None,
    ) -> None:
        from datasets import Image as ImageFeature

        self.origin = origin
        self._columns = Columns(table.features, origin, image_column, label_column, table.unique)
        self.label_names = self._columns.label_names
        wanted = [name for name in (self._columns.image, self._columns.label) if name is not None]
        # undecoded, so that one bad picture is an error of that picture and not of the table
        self._table = table.select_columns(wanted).cast_column(self._columns.image, ImageFeature(decode=False))

    def __len__(self) -> int:
        return len(self._table)

    def name(self, index: int) -> str:
        return f"{self.origin}, row {index}"

    def _row(self, index: int) -> tuple[bytes, int]:
        row = self._table[index]
        try:
            picture = row[self._columns.image]
            content = picture["bytes"] if picture["bytes"] is not None else _read_file(picture["path"])
        except (OSError, TypeError) as error:  # an empty cell is None
            raise BadPictureError(error, self.name(index)) from error
        label = self._columns.number(row.get(self._columns.label))
        if label is None:
            raise BadPictureError("it has no label", self.name(index))
        return content, label

    def content(self, index: int) -> bytes:
        return self._row(index)[0]

    def read(self, index: int, shape: Shape | None = None) -> tuple[Image.Image, int]:
        content, label = self._row(index)
        return decode(content, self.name(index), shape), label
