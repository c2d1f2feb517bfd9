"""Data sets of the Hub, and tables on the disk, by the library `datasets`; what goes wrong there, in words."""

from __future__ import annotations

import contextlib
import errno
import glob
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, load_dataset, load_dataset_builder, load_from_disk
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from httpx2 import HTTPError
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError

from liquid_diffusion.data.registry import find_facts
from liquid_diffusion.data.sources import is_picture
from liquid_diffusion.data.tables import holds_pictures
from liquid_diffusion.errors import UserError, first_line
from liquid_diffusion.hardware import process_state
from liquid_diffusion.patience import patiently

_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


@dataclass(frozen=True)
class HubFiles:
    """A data set of the Hub, found but not downloaded.

    Attributes:
        identifier: its id.
        builder: `datasets.DatasetBuilder` for the files that are to be read.
        split: name of the split to train on.
        files: addresses (hf://...) of the files of that split.
        unique: see `DatasetFacts`.
    """

    identifier: str
    builder: Any
    split: str
    files: list[str]
    unique: bool


def open_local_table(data: str) -> Any | None:
    """The `datasets.Dataset` in a folder of `save_to_disk`, in parquet files, or in a folder with metadata.

    Args:
        data: a path; for parquet also a pattern such as data/*.parquet, or a folder of such files.

    Returns:
        None where `data` is none of these.

    Raises:
        UserError: the files can't be read, or there is nothing in them.
    """
    path = Path(data).expanduser()
    with _in_words(data, here=True):
        if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
            return load_from_disk(str(path))
        if (path / "dataset_dict.json").is_file():
            splits = load_from_disk(str(path))
            if "train" not in splits:
                raise UserError(f"{data} has no split train, only {', '.join(splits)}; give the folder of one of them.")
            return splits["train"]
        if parquet := parquet_files(data):
            filled = [glob.escape(file) for file in parquet if pq.read_metadata(file).num_rows]
            if not filled:
                raise UserError(f"There are no rows in {data}.")
            return load_dataset("parquet", data_files=filled, split="train")  # which takes no empty file
        if path.is_dir() and any((path / name).is_file() for name in _METADATA):
            # all files by one pattern: from a folder alone `datasets` guesses splits, by the names of the pictures
            every = str(Path(glob.escape(str(path.absolute()))) / "**")
            try:
                return load_dataset("imagefolder", data_files={"train": [every]}, split="train")
            except IndexError as error:  # it looks at the first row of the metadata
                raise UserError(f"There are no rows in the metadata of {data}.") from error
    return None


def parquet_files(data: str) -> list[str]:
    """The parquet files on the disk that `data` means: itself, those in it if it is a folder, or that match it.

    A folder of pictures is none of parquet files because a table lies among them, but it is if that has pictures too: a
    data set's own folder may have some of them beside it to look at.
    """
    path = Path(data).expanduser()
    if path.is_file():
        return [str(path)] if path.suffix == ".parquet" else []
    if path.is_dir() and not any((path / name).is_file() for name in _METADATA):
        tables = sorted(str(file) for file in path.rglob("*.parquet") if file.is_file())
        if not tables or any(map(_is_of_pictures, tables)):
            return tables
        return [] if any(is_picture(file.relative_to(path)) for file in path.rglob("*")) else tables
    return sorted(glob.glob(str(path), recursive=True)) if path.suffix == ".parquet" else []  # noqa: PTH207  any root


def _is_of_pictures(file: str) -> bool:
    """Whether a parquet file has a column of pictures; a damaged one is taken for it, and will be told of."""
    try:
        return any(map(holds_pictures, Features.from_arrow_schema(pq.read_schema(file)).values()))
    except (OSError, pa.ArrowException):
        return True


def find_on_hub(data: str) -> HubFiles:
    """The data set that a name, an id or NAME@ID means; its size and licence are printed.

    Raises:
        UserError: the Hub does not know it or can't be reached, or it has nothing to read.
    """
    facts = find_facts(data)
    identifier = data.rsplit("@", maxsplit=1)[-1] if facts is None or "@" in data else facts.hub_id or data
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", identifier) or identifier.startswith("."):
        if Path(data).expanduser().is_file():
            raise UserError(f"{data} is one file: give the folder that holds the pictures, or parquet files.")
        raise UserError(
            f"There is no data set and no folder {data!r}; `liquid-diffusion datasets` lists what is known."
        )
    if facts is not None:
        say(f"{identifier}: {facts.pictures:,} pictures, {facts.files}; licence: {facts.licence}.")
    with _in_words(identifier):
        builder = load_dataset_builder(identifier, data_files=facts.data_files if facts else None)
        splits = list(builder.config.data_files or {})
        if "train" not in splits and len(splits) != 1:
            raise UserError(f"{identifier} has no split called train, but {', '.join(splits) or 'no files'}.")
        split = "train" if "train" in splits else splits[0]
        if facts is None:
            card = HfApi().dataset_info(identifier).card_data
            licence = (card.get("license") if card else None) or "none stated"
            say(f"{identifier}: {len(builder.config.data_files[split])} files; licence: {licence}.")
    files = [str(file) for file in builder.config.data_files[split]]
    return HubFiles(identifier, builder, split, files, facts is not None and facts.unique)


def say(facts: str) -> None:
    """Tell a person, beside what the command itself says; of several processes once."""
    if process_state().is_main_process:
        print(facts, file=sys.stderr)


def download_files(found: HubFiles) -> list[str]:
    """Paths of the files of a data set, out of the cache if they are there.

    Raises:
        UserError: the Hub can't be reached.
    """
    prefix = re.compile(r"hf://datasets/[^/]+/[^@]+@([^/]+)/(.+)")
    paths = []
    with _in_words(found.identifier):
        for address in found.files:
            place = prefix.fullmatch(address)
            assert place, address
            revision, name = place.groups()
            paths.append(hf_hub_download(found.identifier, name, repo_type="dataset", revision=revision))
    return paths


def download_table(found: HubFiles) -> Any:
    """The `datasets.Dataset` of a data set, out of the cache if it is there.

    Raises:
        UserError: the Hub can't be reached, or the files are damaged.
    """
    with _in_words(found.identifier):
        found.builder.download_and_prepare()
        return found.builder.as_dataset(split=found.split)


def _is_of_this_disk(error: BaseException) -> bool:
    """Whether it is full, or something on it may not be read or written; `datasets` has a text alone for the first."""
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
    return isinstance(error, OSError) and (error.errno in numbers or "disk space" in str(error))


@contextlib.contextmanager
def _in_words(data: str, here: bool = False) -> Iterator[None]:
    """What goes wrong within it becomes a `UserError`; of what lies on this machine, or on the Hub."""
    try:
        with patiently():
            yield
    except UserError:
        raise
    except DatasetNotFoundError as error:
        raise UserError(
            f"The data set {data!r} is not a folder here, and the Hub does not know it or can't be reached; "
            "check the name, the network, and `hf auth login` for a private one."
        ) from error
    except (DatasetGenerationError, pa.ArrowException) as error:
        cause = error.__cause__ or error
        if _is_of_this_disk(cause):
            raise UserError(f"The data set {data!r} can't be prepared here: {first_line(cause)}") from error
        if isinstance(cause, HfHubHTTPError | HTTPError | ConnectionError):
            raise UserError(f"The Hub can't be reached for {data!r} any more: {first_line(cause)}") from error
        raise UserError(f"The files of {data!r} are damaged: {first_line(cause)}") from error
    except (ValueError, RuntimeError) as error:  # no such id, no train split, or a set that wants to run its own code
        raise UserError(f"The data set {data!r} can't be opened: {first_line(error)}") from error
    except (OSError, HTTPError) as error:
        reason = first_line(error)
        if _is_of_this_disk(error):
            raise UserError(f"The data set {data!r} can't be prepared here: {reason}") from error
        if here:
            raise UserError(f"The files of {data!r} can't be read: {reason}") from error
        why = "" if reason.startswith("Couldn't reach") else f" ({reason})"  # which would be said twice
        raise UserError(
            f"The Hub can't be reached for {data!r}{why}; check the network, or train on a folder."
        ) from error
