"""Files on a disk that may be full: said in words, and never half of a file in the place of a whole one."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import BaseFileLock, FileLock, Timeout
from safetensors import SafetensorError

from liquid_diffusion.errors import UserError, first_line

if TYPE_CHECKING:  # `datasets` lists without it
    from PIL import Image

LOCK = ".lock"  # in a folder that a process has claimed, and has not any more where none holds it


@contextlib.contextmanager
def writing_to(place: Path) -> Iterator[None]:
    """Errors of a disk that is full, or must not be written to, in words.

    Raises:
        UserError: it can't be written to.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{place} can't be written to: {error.strerror or first_line(error)}.") from error
    except SafetensorError as error:
        raise UserError(f"{place} can't be written to: {first_line(error)}.") from error
    except RuntimeError as error:  # torch.save has no other
        if not any(name in str(error) for name in ("PytorchStreamWriter", "inline_container")):
            raise
        raise UserError(f"{place} can't be written to: the disk may be full ({first_line(error)}).") from error


def claim(folder: Path) -> BaseFileLock:
    """A folder for this process alone, as long as it keeps what is returned; it may claim it again.

    Where the file system has no locks nobody is kept out.

    Raises:
        UserError: another process has it.
        OSError: the folder can't be written to.
    """
    lock = FileLock(folder / LOCK, is_singleton=True, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(
            f"Another process, perhaps a notebook, trains or encodes in {folder}: end it, or choose another folder."
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise
    return lock


def write_whole(path: Path, text: str) -> None:
    """Write a text aside and put it in the place of the one before."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_text(text)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a picture aside, in the format that its name ends in, and put it in the place of the one before.

    Raises:
        UserError: there is no such format, it takes no picture as large, or the place can't be written to.
    """
    partial = path.parent / f".partial-{path.name}"  # hidden: no grid, and no picture of a folder
    with writing_to(path):
        try:
            picture.save(partial)
            os.replace(partial, path)
        except ValueError as error:
            raise UserError(f"{path} can't be written: {first_line(error)}.") from error
        finally:
            partial.unlink(missing_ok=True)
