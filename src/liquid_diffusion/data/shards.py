"""Pictures that are read where they lie, a chunk at a time: row groups of parquet files, runs of single files.

Nothing is downloaded whole. A chunk is found by its byte range, so reading one costs the same wherever it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from liquid_diffusion.data.ranged import RangedFile, SourceLostError, short_address
from liquid_diffusion.data.sources import BadPictureError, classes_of
from liquid_diffusion.data.tables import Columns
from liquid_diffusion.errors import UserError

FILES_OF_A_CHUNK = 128  # where pictures are files


class Rows(Protocol):
    """The pictures of a chunk."""

    def row(self, index: int) -> tuple[bytes, int]:
        """The encoded picture and its label.

        Raises:
            BadPictureError: there is none.
        """


@dataclass(frozen=True)
class Chunk:
    """Some consecutive pictures of a file: its number among the files, the chunk's in it, its first row, how many."""

    file: int
    number: int
    first: int
    rows: int


class Shards(Protocol):
    """Files of pictures in chunks.

    Attributes:
        origin: what they are called in messages.
        label_names: names of the classes, empty where there are none.
        chunks: all of them, in the order of the files.
    """

    origin: str
    label_names: list[str]
    chunks: list[Chunk]

    def name(self, chunk: Chunk, index: int) -> str:
        """Picture `index` of a chunk in words a person can find it by."""

    def read(self, chunk: Chunk) -> Rows:
        """The pictures of a chunk.

        Raises:
            SourceLostError: they can't be had any more.
            BadPictureError: what is there is damaged.
        """


class _ParquetRows:
    def __init__(self, table: Any, columns: Columns) -> None:
        self._images = table.column(columns.image)
        self._labels = table.column(columns.label) if columns.label else None
        self._columns = columns

    def row(self, index: int) -> tuple[bytes, int]:
        cell = self._images[index].as_py()
        content = cell["bytes"] if isinstance(cell, dict) else cell
        if content is None:
            raise BadPictureError("there is nothing")
        label = self._columns.number(self._labels[index].as_py() if self._labels is not None else None)
        if label is None:
            raise BadPictureError("it has no label")
        return content, label


class ParquetShards:
    """Parquet files; a chunk is a row group.

    Args:
        addresses: of the files.
        origin: what they are called.
        image_column, label_column: see `Columns`.
        features: `datasets.Features`, where they are known from elsewhere than from the files.

    Raises:
        UserError: a file is damaged or gone, or there is no column of pictures.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        origin: str,
        image_column: str | None = None,
        label_column: str | None = None,
        features: Any = None,
    ) -> None:
        from datasets import Features

        self.origin = origin
        self._addresses = list(addresses)
        with ThreadPoolExecutor(8) as pool:
            self._footers = list(pool.map(self._footer, self._addresses))
        features = features or Features.from_arrow_schema(self._footers[0].schema.to_arrow_schema())
        self._columns = Columns(features, origin, image_column, label_column, self._values)
        self.label_names = self._columns.label_names
        self.chunks = []
        for file, footer in enumerate(self._footers):
            first = 0
            for group in range(footer.num_row_groups):
                rows = footer.row_group(group).num_rows
                self.chunks.append(Chunk(file, group, first, rows))
                first += rows

    @staticmethod
    def _footer(address: str) -> Any:
        try:
            with RangedFile(address) as file:
                return pq.read_metadata(file)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{short_address(address)} is damaged: {error}") from error

    def _values(self, column: str) -> list[Any]:
        found = []
        for address, footer in zip(self._addresses, self._footers, strict=True):
            with RangedFile(address) as file:
                found += pq.ParquetFile(file, metadata=footer).read([column], use_threads=False)[column].to_pylist()
        return found

    def name(self, chunk: Chunk, index: int) -> str:
        return f"{short_address(self._addresses[chunk.file])}, row {chunk.first + index}"

    def read(self, chunk: Chunk) -> Rows:
        wanted = [name for name in (self._columns.image, self._columns.label) if name is not None]
        try:
            with RangedFile(self._addresses[chunk.file]) as file:
                parquet = pq.ParquetFile(file, metadata=self._footers[chunk.file])
                return _ParquetRows(parquet.read_row_group(chunk.number, wanted, use_threads=False), self._columns)
        except SourceLostError:
            raise
        except (pa.ArrowException, OSError) as error:
            raise BadPictureError(f"the row group is damaged: {error}") from error


class _LooseRows:
    def __init__(self, addresses: Sequence[str], labels: Sequence[int]) -> None:
        self._addresses, self._labels = addresses, labels

    def row(self, index: int) -> tuple[bytes, int]:
        with RangedFile(self._addresses[index]) as file:
            return file.read(), self._labels[index]


class LooseShards:
    """Pictures that are files of their own; where each lies in a folder of its class, these are the labels.

    Args:
        addresses: of the pictures.
        origin: what they are called.
    """

    def __init__(self, addresses: Sequence[str], origin: str) -> None:
        self.origin = origin
        self._addresses = list(addresses)
        # the folder that a picture lies in, as imagefolder has it: above it are splits and the repository
        self.label_names, self._labels = classes_of([PurePosixPath(address).parts[-2:] for address in addresses])
        count = len(self._addresses)
        firsts = range(0, count, FILES_OF_A_CHUNK)
        self.chunks = [Chunk(0, i, first, min(FILES_OF_A_CHUNK, count - first)) for i, first in enumerate(firsts)]

    def name(self, chunk: Chunk, index: int) -> str:
        return short_address(self._addresses[chunk.first + index])

    def read(self, chunk: Chunk) -> Rows:
        span = slice(chunk.first, chunk.first + chunk.rows)
        return _LooseRows(self._addresses[span], self._labels[span])
