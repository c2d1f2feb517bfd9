"""Latents encoded once: every picture's posterior, and its mirror image's, in files that training maps into memory.

    DIR/manifest.json                           what was encoded, and how; it has `shards` when all is done
        shard-00000-of-00247.safetensors        the posteriors of some consecutive pictures of one shape

A shard is written aside and renamed, and encoded anew from its first picture where it is missing. Which pictures are
computed together depends on the plan alone, so the files are the same however often the encoding was stopped, and
whatever number of processes shared it.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from liquid_diffusion.codecs import AutoencoderCodec, Codec, make_codec
from liquid_diffusion.config import EncodeConfig, RunConfig, TrainConfig, encoded_at_once
from liquid_diffusion.data.parallel import errors_of_workers, leave_ending_to_main_process
from liquid_diffusion.data.pictures import choose_shapes
from liquid_diffusion.data.shapes import bucket_shapes
from liquid_diffusion.data.sources import BadPicture, BadPictureError, Source, listing_of, open_source, same_setting
from liquid_diffusion.data.split import split
from liquid_diffusion.data.transforms import Shape, to_float, to_shape, to_uint8
from liquid_diffusion.errors import UserError
from liquid_diffusion.hardware import at_most_cores, process_state
from liquid_diffusion.resolve import FACTORS, check_size, resolve_encoding
from liquid_diffusion.writing import LOCK, claim, write_whole, writing_to

MANIFEST = "manifest.json"
PIXELS_NEED_NO_CACHE = "The codec pixels costs nothing, there is nothing to cache: train without --cache-latents."
_SHARD = 64  # pictures: what is computed again after an interruption, at most


@dataclass(frozen=True)
class _Shard:
    """Some pictures of one shape, by their numbers in the source, and the file they go to."""

    file: str
    shape: Shape
    indices: tuple[int, ...]


def settings(config: EncodeConfig | RunConfig, codec: AutoencoderCodec) -> dict[str, Any]:
    """What decides about the latents, JSON-able: two encodings with equal settings can stand for each other."""
    names = ("data", "image_size", "codec", "crop", "buckets", "flip", "val_fraction", "image_column", "label_column")
    return {name: getattr(config, name) for name in names} | {"codec_sha256": codec.fingerprint()}


def encoding_of(run: RunConfig, folder: Path) -> EncodeConfig:
    """The encoding whose latents a training is done on."""
    names = {field.name for field in fields(EncodeConfig)} - {"out", "batch_size"}
    batch_size = encoded_at_once(run.batch_size // run.gradient_accumulation)
    return EncodeConfig(**{name: getattr(run, name) for name in names}, out=str(folder), batch_size=batch_size)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest in a folder; None where there is none.

    Raises:
        UserError: it is damaged, or the folder holds something else.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["format"] != 1:
            raise ValueError(f"format {manifest['format']}")
    except (FileNotFoundError, NotADirectoryError):
        begun = {LOCK, f"{MANIFEST}.partial"}
        if folder.is_dir() and not begun.issuperset(path.name for path in folder.iterdir()):
            raise UserError(f"{folder} holds something else than latents; choose another folder.") from None
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"The latents in {folder} are damaged ({error}); delete the folder and encode again."
        ) from error
    return manifest


def _facts(path: Path) -> dict[str, Any] | None:
    """What a finished shard tells of itself; None where it is missing or cut short."""
    try:
        with safe_open(path, "pt") as file:
            return json.loads(file.metadata()["facts"])
    except (OSError, SafetensorError):
        return None


def is_whole(folder: Path) -> bool:
    """Whether an encoding in a folder came to its end, and its files are still there.

    Raises:
        UserError: see `read_manifest`.
    """
    manifest = read_manifest(folder)
    if manifest is None or "shards" not in manifest:
        return False
    return all(_facts(folder / shard["file"]) is not None for shard in manifest["shards"])


class _Batches(Dataset[tuple[Tensor, Tensor, list[BadPicture]]]):
    """Pictures (B, 3, H, W) uint8, labels (B,) int64 and those that can't be read, by shape and number."""

    def __init__(self, source: Source, crop: str) -> None:
        self.source = source
        self.crop = crop

    def __getitem__(self, key: tuple[Shape, tuple[int, ...]]) -> tuple[Tensor, Tensor, list[BadPicture]]:
        shape, indices = key
        images, labels, skipped = [torch.empty(0, 3, *shape, dtype=torch.uint8)], [], []
        for index in indices:
            try:
                image, label = self.source.read(index, shape)
            except BadPictureError as error:
                skipped.append(error.picture)
            else:
                images.append(to_uint8(to_shape(image, shape, self.crop))[None])
                labels.append(label)
        return torch.cat(images), torch.tensor(labels, dtype=torch.int64), skipped


class Encoding:
    """An encoding, new or resumed; of several processes each has one, and they share the work.

    Making one does all that can fail because of what a person said; nothing is written.

    Args:
        config: what to encode and where to, as `resolve.resolve_encoding` gives it.
        codec: the autoencoder that `config.codec` names.
        state: this process among others; its device computes.

    Raises:
        UserError: the data can't be had, the pixel codec is meant, the size can't be divided, the disk is too small,
            or the folder holds other latents.
    """

    def __init__(self, config: EncodeConfig, codec: Codec, state: PartialState) -> None:
        if not isinstance(codec, AutoencoderCodec):
            raise UserError(PIXELS_NEED_NO_CACHE)
        multiple = check_size(config.image_size, config.codec, codec.factor)
        self.config, self.codec, self.state = config, codec, state
        self.folder = Path(config.out or "").expanduser()
        self.source = open_source(config.data, config.image_column, config.label_column)
        chosen, held_out = split(self.source, config.val_fraction)
        square = (config.image_size, config.image_size)
        shapes = bucket_shapes(config.image_size, multiple) if config.buckets else [square]
        numbered = [(index, 0) for index in chosen]
        self._unreadable: list[BadPicture] = []
        if config.buckets:
            numbered, self._unreadable = choose_shapes(self.source, chosen, shapes)
        self._plan: dict[str, Any] = {
            "format": 1,
            "settings": settings(config, codec),
            "batch_size": config.batch_size,  # other batches would round differently
            "pictures": len(numbered),
            "held_out": len(held_out),
            "source_pictures": len(self.source),
            "source_listing": listing_of(self.source),
            "label_names": self.source.label_names,
        }
        self._shards = list(self._cut(numbered, shapes))
        self._done = {shard.file for shard in self._shards if _facts(self.folder / shard.file) is not None}
        self._check_folder()
        free = shutil.disk_usage(_nearest_existing(self.folder)).free
        if self.bytes_to_write > free:
            raise UserError(
                f"The latents of {config.data} take {_amount(self.bytes_to_write)} more, but {self.folder} has "
                f"{_amount(free)} free; choose a folder on a larger disk by --out."
            )

    def _cut(self, numbered: list[tuple[int, int]], shapes: list[Shape]) -> Iterator[_Shard]:
        parts: list[tuple[Shape, tuple[int, ...]]] = []
        for number, shape in enumerate(shapes):
            indices = [index for index, chosen in numbered if chosen == number]
            parts += [(shape, tuple(indices[i : i + _SHARD])) for i in range(0, len(indices), _SHARD)]
        for number, (shape, part) in enumerate(parts):
            yield _Shard(f"shard-{number:05d}-of-{len(parts):05d}.safetensors", shape, part)

    def _check_folder(self) -> None:
        found = read_manifest(self.folder)
        if found is None:
            return
        before, now = ({**plan["settings"], **plan, "settings": None} for plan in (found, self._plan))
        if found.get("source_listing") is None:  # of a version that did not tell
            del now["source_listing"]
        if not self._done:  # nothing was rounded yet: the memory may have been too small for the batch of before
            del now["batch_size"]
        for name, value in now.items():
            if not same_setting(name, before.get(name), value):
                what = f"with {name} {before.get(name)}, not {value}"
                if name == "source_listing":
                    what = f"of {self.config.data} as it was before files were renamed, or moved between classes"
                elif name == "codec_sha256":
                    what = f"by another autoencoder of the same name, {self.config.codec}"
                raise UserError(f"{self.folder} holds latents {what}; choose another folder, or delete this one.")

    @property
    def bytes_to_write(self) -> int:
        """What the missing shards will take, within a thousandth."""
        missing = [shard for shard in self._shards if shard.file not in self._done]
        values = (2 if self.codec.is_random else 1) * (2 if self.config.flip else 1) * self.codec.channels  # of a place
        places = sum(
            len(shard.indices) * math.prod(side // self.codec.factor for side in shard.shape) for shard in missing
        )
        return 2 * values * places + 8 * sum(len(shard.indices) for shard in missing)

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return len(self._done) == len(self._shards) and is_whole(self.folder)

    def summary(self) -> str:
        """What is about to be encoded, in one line."""
        free = shutil.disk_usage(_nearest_existing(self.folder)).free
        start = f", going on after {len(self._done)} of {len(self._shards)} shards" if self._done else ""
        return (
            f"Encoding {self._plan['pictures']} pictures of {self.config.image_size} px "
            f"({self._plan['held_out']} held out) by {self.config.codec} to {self.folder}: "
            f"{_amount(self.bytes_to_write)} of disk, {_amount(free)} free{start}"
        )

    def run(self) -> None:
        """Encode what is missing, with a progress bar.

        Raises:
            UserError: the folder can't be written to, another process does, or the autoencoder gives no numbers.
        """
        if self.finished:
            return
        if self.state.is_main_process:
            with writing_to(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                self._lock = claim(self.folder)
                self._write(self._plan)
        self.state.wait_for_everyone()
        with self.codec.on(self.state.device), errors_of_workers():
            self._encode_missing()
        self.state.wait_for_everyone()
        if self.state.is_main_process:
            with writing_to(self.folder):
                self._write(self._finished_manifest())
        self.state.wait_for_everyone()

    def _encode_missing(self) -> None:
        state = self.state
        mine = self._shards[state.process_index :: state.num_processes]
        missing = [shard for shard in mine if shard.file not in self._done]
        step = self.config.batch_size
        keys = [
            (shard.shape, shard.indices[i : i + step]) for shard in missing for i in range(0, len(shard.indices), step)
        ]
        loader = DataLoader(
            _Batches(self.source, self.config.crop),
            sampler=keys,
            batch_size=None,
            num_workers=at_most_cores(self.config.workers),
            worker_init_fn=leave_ending_to_main_process,
        )
        batches = iter(loader)
        share = f" (part 1 of {state.num_processes})" if state.num_processes > 1 else ""
        with tqdm(
            total=sum(len(shard.indices) for shard in mine),
            initial=sum(len(shard.indices) for shard in mine if shard.file in self._done),
            desc=f"Encoding{share}",
            unit="picture",
            disable=not state.is_main_process,
        ) as bar:
            for shard in missing:
                parts, skipped = [], []
                for start in range(0, len(shard.indices), step):
                    images, labels, bad = next(batches)
                    parts.append({**self._posteriors(images), "label": labels})
                    skipped += bad
                    bar.update(len(shard.indices[start : start + step]))
                tensors = {name: torch.cat([part[name] for part in parts]).contiguous() for name in parts[0]}
                facts = {"pictures": len(tensors["label"]), "unreadable": skipped, "sums": _sums(tensors)}
                partial = self.folder / f"{shard.file}.partial"
                with writing_to(self.folder):
                    save_file(tensors, partial, {"facts": json.dumps(facts)})
                    os.replace(partial, self.folder / shard.file)

    def _posteriors(self, images: Tensor) -> dict[str, Tensor]:
        pictures = to_float(images)
        found: dict[str, Tensor] = {}
        for ending, seen in (("", pictures), ("_flipped", pictures.flip(-1)))[: 2 if self.config.flip else 1]:
            mean, std = self.codec.posterior(seen) if len(seen) else self._none(seen)
            for name, values in ((f"mean{ending}", mean), (f"std{ending}", std)):
                if values is not None:
                    # half: off by 5e-4 of a value at most, where training rounds to bfloat16 next
                    found[name] = values.half().cpu()
                    if not found[name].isfinite().all():
                        raise UserError(f"The codec {self.config.codec} gives latents that are no numbers.")
        return found

    def _none(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """The posteriors of no pictures."""
        empty = torch.empty(0, self.codec.channels, *(side // self.codec.factor for side in images.shape[-2:]))
        return empty, empty if self.codec.is_random else None

    def _write(self, manifest: dict[str, Any]) -> None:
        write_whole(self.folder / MANIFEST, json.dumps(manifest, indent=1))

    def _finished_manifest(self) -> dict[str, Any]:
        shards, unreadable, sums = [], list(self._unreadable), []
        for shard in self._shards:
            facts = _facts(self.folder / shard.file)
            if facts is None:
                raise UserError(f"{self.folder / shard.file} was deleted meanwhile; give the same command again.")
            unreadable += bad_pictures(facts["unreadable"])
            sums.append(facts["sums"])
            if facts["pictures"]:
                height, width = shard.shape
                shards.append({"file": shard.file, "pictures": facts["pictures"], "height": height, "width": width})
        if not shards:
            raise UserError(f"Not one of the {len(self.source)} pictures can be read; the first: {unreadable[0]}.")
        count, total, squares = (np.sum([part[i] for part in sums], axis=0) for i in range(3))
        mean = total / count
        std = np.sqrt(np.maximum(squares / count - mean**2, 1e-6))
        statistics = {"mean": mean.tolist(), "std": std.tolist()}
        return {**self._plan, "unreadable": unreadable, "statistics": statistics, "shards": shards}


def bad_pictures(stored: list[Any]) -> list[BadPicture]:
    """The pictures that a manifest or a shard says can't be read; older ones have "NAME: REASON" for each."""
    return [BadPicture(*(bad.split(": ", 1) if isinstance(bad, str) else bad)) for bad in stored]


def _sums(tensors: dict[str, Tensor]) -> tuple[int, list[float], list[float]]:
    """Number of values in a channel, and the sums over them of a drawn latent and of its square, as expected."""
    axes = (0, 2, 3)
    count, total, squares = 0, np.zeros(1), np.zeros(1)
    for name, values in tensors.items():
        if name == "label":
            continue
        numbers = values.double().numpy()
        squares = squares + np.square(numbers).sum(axes)  # E[z^2] = mean^2 + std^2
        if name.startswith("mean"):
            count += numbers[:, 0].size
            total = total + numbers.sum(axes)
    return count, total.tolist(), squares.tolist()


def _amount(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _nearest_existing(path: Path) -> Path:
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def encode(config: EncodeConfig) -> None:
    """Encode a data set, or resume that; of several processes the first says what is done and where it is.

    Raises:
        UserError: see `Encoding`.
    """
    state = process_state()
    asked, config = config, resolve_encoding(config)
    if config.codec in FACTORS:  # before an autoencoder is loaded, which may have to be downloaded
        check_size(config.image_size, config.codec, FACTORS[config.codec])
    encoding = Encoding(config, make_codec(config.codec), state)
    if not encoding.finished:
        state.print(encoding.summary())
    encoding.run()
    command = ["liquid-diffusion", "train", "--data", config.data, "--image-size", str(config.image_size)]
    command += ["--codec", config.codec]
    for name in ("crop", "buckets", "flip", "val_fraction", "image_column", "label_column"):
        value = getattr(asked, name)
        if value != getattr(TrainConfig, name):
            command += [f"--{name.replace('_', '-')}", str(value).lower() if isinstance(value, bool) else str(value)]
    command += ["--cache-latents", str(config.out)]
    state.print(f"Done: {config.out}. Train on it: {shlex.join(command)}")
