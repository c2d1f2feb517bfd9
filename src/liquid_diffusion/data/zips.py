"""Zips of pictures, read by their own directory: as shards of a stream, or one picture at a time."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from PIL import Image

from liquid_diffusion.data.ranged import RangedFile, short_address
from liquid_diffusion.data.shards import FILES_OF_A_CHUNK, Chunk, Rows
from liquid_diffusion.data.sources import BadPictureError, classes_of, decode, is_picture
from liquid_diffusion.data.transforms import Shape
from liquid_diffusion.errors import UserError


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
        unique: leave out copies: what has the length and the CRC-32 of another.

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
            Chunk(file, number, first, min(FILES_OF_A_CHUNK, len(entries) - first))
            for file, entries in enumerate(self._entries)
            for number, first in enumerate(range(0, len(entries), FILES_OF_A_CHUNK))
        ]

    @staticmethod
    def _list(address: str) -> list[_Entry]:
        try:
            with RangedFile(address) as file, zipfile.ZipFile(file) as archive:
                infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
                stops = [info.header_offset for info in infos[1:]] + [archive.start_dir]
        except (zipfile.BadZipFile, OSError) as error:
            raise UserError(f"{short_address(address)} is damaged: {error}") from error
        return [
            _Entry(info.filename, info.header_offset, stop, info)
            for info, stop in zip(infos, stops, strict=True)
            if is_picture(PurePosixPath(info.filename))
        ]

    def name(self, chunk: Chunk, index: int) -> str:
        return f"{short_address(self._addresses[chunk.file])}, {self._entries[chunk.file][chunk.first + index].path}"

    def read(self, chunk: Chunk) -> Rows:
        span = slice(chunk.first, chunk.first + chunk.rows)
        entries = self._entries[chunk.file][span]
        with RangedFile(self._addresses[chunk.file]) as file:
            file.seek(entries[0].start)
            data = file.read(entries[-1].stop - entries[0].start)
        return _ZipRows(data, entries, self._labels[chunk.file][span])


class ZipSource:
    """Zips on the disk as a `Source`, which reads one picture when asked for it.

    Args:
        paths, origin, unique: see `ZipShards`.
    """

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
            raise BadPictureError(error, self.name(index)) from error

    def content(self, index: int) -> bytes:
        return self._row(index)[0]

    def read(self, index: int, shape: Shape | None = None) -> tuple[Image.Image, int]:
        content, label = self._row(index)
        return decode(content, self.name(index), shape), label
