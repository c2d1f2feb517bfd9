"""Pictures that are read where they lie, a chunk at a time: row groups of parquet files, entries of zips, loose files.

Nothing is downloaded whole. A chunk is found by its byte range, so reading one costs the same wherever it is.
"""

from __future__ import annotations

import io
import struct
import time
import zipfile
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs
from httpx2 import HTTPError
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image

from liquid_diffusion.config import UserError
from liquid_diffusion.data.sources import PICTURE_ENDINGS, BadPictureError, classes_of
from liquid_diffusion.data.tables import Columns, decode

# Seconds between attempts, after those of huggingface_hub: five within half a minute, which heed Retry-After.
_PAUSES = (15.0, 60.0, 180.0)
_FINAL = frozenset((400, 401, 403, 404, 410, 451))
_PIECE = 16 * 2**20  # bytes of one request: what is asked for again when a connection is cut
_ENTRIES = 128  # files of a chunk


class SourceLostError(UserError):
    """What is read from is gone, or was away for too long."""


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


class RangedFile(io.RawIOBase):
    """A file, here or on the Hub, of which only what is read is fetched; faults on the way are waited for.

    Args:
        address: a path, or hf://...

    Raises:
        SourceLostError: when opened or read, there is no such file (any more) or nobody answers for minutes.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        files, path = url_to_fs(address)
        self._file = self._patiently(lambda: files.open(path, "rb", cache_type="none"))
        self._place = 0
        self.size: int = self._file.size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + (0, self._place, self.size)[whence]
        return self._place

    def read(self, size: int | None = -1) -> bytes:
        stop = self.size if size is None or size < 0 else min(self._place + size, self.size)
        pieces = []
        while self._place < stop:
            piece = self._patiently(lambda: self._fetch(min(stop - self._place, _PIECE)))
            pieces.append(piece)
            self._place += len(piece)
        return b"".join(pieces)

    def _fetch(self, size: int) -> bytes:
        self._file.seek(self._place)
        piece: bytes = self._file.read(size)
        if len(piece) != size:
            raise OSError(f"{len(piece)} of {size} bytes came")
        return piece

    def _patiently(self, act: Callable[[], Any]) -> Any:
        pauses = iter(_PAUSES)
        while True:
            try:
                return act()
            except (OSError, HTTPError) as error:
                status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
                pause = next(pauses, None)
                if pause is None or status in _FINAL or isinstance(error, FileNotFoundError):
                    reason = str(error).strip().splitlines() or [type(error).__name__]
                    raise SourceLostError(
                        f"{self.address} can't be read any more ({reason[0]}); the same command goes on when it is "
                        "there again."
                    ) from error
                time.sleep(pause)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


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
            raise UserError(f"{address} is damaged: {error}") from error

    def _values(self, column: str) -> list[Any]:
        found = []
        for address, footer in zip(self._addresses, self._footers, strict=True):
            with RangedFile(address) as file:
                found += pq.ParquetFile(file, metadata=footer).read([column], use_threads=False)[column].to_pylist()
        return found

    def name(self, chunk: Chunk, index: int) -> str:
        return f"{self._addresses[chunk.file]}, row {chunk.first + index}"

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


@dataclass(frozen=True)
class _Entry:
    """A picture in a zip: its path, where its header starts, where the next thing starts, and what the zip says."""

    path: str
    start: int
    stop: int
    info: zipfile.ZipInfo

    def unpack(self, data: bytes) -> bytes:
        """The picture, from the bytes between `start` and `stop`."""
        lengths = struct.unpack("<HH", data[26:30])  # of the name and the extra field, after which the content starts
        packed = data[30 + sum(lengths) :][: self.info.compress_size]
        try:
            content = packed if self.info.compress_type == zipfile.ZIP_STORED else zlib.decompress(packed, -15)
        except zlib.error as error:
            raise BadPictureError(str(error)) from error
        if zlib.crc32(content) != self.info.CRC:
            raise BadPictureError("its checksum is wrong")
        return content


class _ZipRows:
    def __init__(self, data: bytes, entries: Sequence[_Entry], labels: Sequence[int]) -> None:
        self._data, self._entries, self._labels = data, entries, labels

    def row(self, index: int) -> tuple[bytes, int]:
        entry, start = self._entries[index], self._entries[0].start
        return entry.unpack(self._data[entry.start - start : entry.stop - start]), self._labels[index]


class ZipShards:
    """Zips of pictures, whose sub-folders become classes as those of a folder do; a chunk is a run of entries.

    Args:
        addresses: of the files.
        origin: what they are called.
        unique: leave out copies, which have the same length and checksum.

    Raises:
        UserError: a file is damaged or gone, or there are no pictures in it.
    """

    def __init__(self, addresses: Sequence[str], origin: str, unique: bool = False) -> None:
        self.origin = origin
        self._addresses = list(addresses)
        self._entries = [self._list(address) for address in self._addresses]
        if unique:
            first = {(e.info.CRC, e.info.file_size): e for entries in reversed(self._entries) for e in entries[::-1]}
            kept = set(map(id, first.values()))
            self._entries = [[entry for entry in entries if id(entry) in kept] for entries in self._entries]
        paths = [PurePosixPath(entry.path).parts for entries in self._entries for entry in entries]
        if not paths:
            raise UserError(f"There are no pictures in {origin}.")
        self.label_names, labels = classes_of(paths)
        self._labels, start = [], 0
        for entries in self._entries:
            self._labels.append(labels[start : start + len(entries)])
            start += len(entries)
        self.chunks = [
            Chunk(file, number, first, min(_ENTRIES, len(entries) - first))
            for file, entries in enumerate(self._entries)
            for number, first in enumerate(range(0, len(entries), _ENTRIES))
        ]

    @staticmethod
    def _list(address: str) -> list[_Entry]:
        try:
            with RangedFile(address) as file, zipfile.ZipFile(file) as archive:
                infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
                stops = [info.header_offset for info in infos[1:]] + [archive.start_dir]
        except (zipfile.BadZipFile, OSError) as error:
            raise UserError(f"{address} is damaged: {error}") from error
        return [
            _Entry(info.filename, info.header_offset, stop, info)
            for info, stop in zip(infos, stops, strict=True)
            if PurePosixPath(info.filename).suffix.lower() in PICTURE_ENDINGS
            and not info.filename.startswith("__MACOSX/")
        ]

    def name(self, chunk: Chunk, index: int) -> str:
        return f"{self._addresses[chunk.file]}, {self._entries[chunk.file][chunk.first + index].path}"

    def read(self, chunk: Chunk) -> Rows:
        span = slice(chunk.first, chunk.first + chunk.rows)
        entries = self._entries[chunk.file][span]
        with RangedFile(self._addresses[chunk.file]) as file:
            file.seek(entries[0].start)
            data = file.read(entries[-1].stop - entries[0].start)
        return _ZipRows(data, entries, self._labels[chunk.file][span])


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
        firsts = range(0, count, _ENTRIES)
        self.chunks = [Chunk(0, i, first, min(_ENTRIES, count - first)) for i, first in enumerate(firsts)]

    def name(self, chunk: Chunk, index: int) -> str:
        return self._addresses[chunk.first + index]

    def read(self, chunk: Chunk) -> Rows:
        span = slice(chunk.first, chunk.first + chunk.rows)
        return _LooseRows(self._addresses[span], self._labels[span])


class ZipSource:
    """Zips on the disk as a `Source`, which reads one picture when asked for it.

    Args:
        paths, origin, unique: see `ZipShards`.
    """

    unique = False  # left out already

    def __init__(self, paths: Sequence[str], origin: str, unique: bool) -> None:
        self._shards = ZipShards(paths, origin, unique)
        chunks = self._shards.chunks
        self._rows = [
            Chunk(chunk.file, chunk.number, chunk.first + i, 1) for chunk in chunks for i in range(chunk.rows)
        ]
        self.label_names = self._shards.label_names

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, index: int) -> str:
        return self._shards.name(self._rows[index], 0)

    def _row(self, index: int) -> tuple[bytes, int]:
        try:
            return self._shards.read(self._rows[index]).row(0)
        except BadPictureError as error:
            raise BadPictureError(f"{self.name(index)}: {error}") from error

    def content(self, index: int) -> bytes:
        return self._row(index)[0]

    def read(self, index: int) -> tuple[Image.Image, int]:
        content, label = self._row(index)
        return decode(content, self.name(index)), label
