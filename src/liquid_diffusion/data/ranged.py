"""Files of which only parts are read, here or on the Hub, by somebody patient."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Callable
from typing import Any

from fsspec.core import url_to_fs
from httpx2 import HTTPError
from huggingface_hub.errors import HfHubHTTPError

from liquid_diffusion.errors import UserError, first_line

# Seconds between attempts, after those of huggingface_hub: five within half a minute, which heed Retry-After.
_PAUSES = (15.0, 60.0, 180.0)
_FINAL = frozenset((400, 401, 403, 404, 410, 451))
_PIECE = 16 * 2**20  # bytes of one request: what is asked for again when a connection is cut


class SourceLostError(UserError):
    """What is read from is gone, or was away for too long."""


def short_address(address: str) -> str:
    """An address as a person would say it: the data set's id and the path in it, without the revision."""
    return re.sub(r"^hf://datasets/([^@]+)@[^/]+/", r"\1/", address)


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
                final = isinstance(error, FileNotFoundError | IsADirectoryError | PermissionError)
                if pause is None or status in _FINAL or final:
                    raise SourceLostError(
                        f"{short_address(self.address)} can't be read any more ({first_line(error)}); "
                        "the same command goes on when it is there again."
                    ) from error
                time.sleep(pause)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()
