"""RUN: what lies in a run's folder beside its checkpoints, and whose folder it is."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

import yaml
from filelock import BaseFileLock
from PIL import Image
from tqdm import tqdm

from liquid_diffusion.config import RunConfig
from liquid_diffusion.data.sources import BadPicture
from liquid_diffusion.errors import UserError
from liquid_diffusion.pipeline import LiquidDiffusionPipeline
from liquid_diffusion.writing import LOCK, claim, save_picture, write_whole, writing_to


class RunFolder:
    """A folder that belongs to one run.

    Args:
        path: it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._skipped: set[BadPicture] = set()
        self._read = 0  # bytes of skipped.jsonl that are known
        self._told = 0  # pictures that were told of
        self._lock: BaseFileLock | None = None

    @property
    def config_file(self) -> Path:
        """RUN/config.yaml, with everything decided."""
        return self.path / "config.yaml"

    def check(self, data: Path) -> None:
        """Look whether the folder may be used; nothing is written.

        Args:
            data: the folder of pictures, if it is one.

        Raises:
            UserError: it holds something else than a run, or lies among the pictures.
        """
        if data.is_dir() and self.path.resolve().is_relative_to(data.resolve()):
            raise UserError(f"The run folder {self.path} would lie among the pictures; choose another --out.")
        begun = {LOCK, f"{self.config_file.name}.partial"}  # of a process that was killed as it began
        if not self.path.is_dir() or begun.issuperset(path.name for path in self.path.iterdir()):
            return
        try:
            settings = yaml.safe_load(self.config_file.read_text())
        except (OSError, ValueError, yaml.YAMLError):
            settings = None
        names = {field.name for field in fields(RunConfig)}
        if not isinstance(settings, dict) or not names & set(settings):
            raise UserError(f"{self.path} holds something else than a run; choose another --out.")
        if unknown := sorted(map(str, set(settings) - names)):
            raise UserError(f"{self.config_file} has an option that is not known here: {unknown[0]}.")

    def claim(self) -> None:
        """Keep other trainings out of a run that is there already, until it is released.

        Raises:
            UserError: another one is in it.
        """
        if self.config_file.is_file():
            with contextlib.suppress(OSError):  # a finished run may be looked at where nothing can be written
                self._lock = claim(self.path)

    def release(self) -> None:
        """Let others in again."""
        self._lock = None

    def begin(self, config: RunConfig) -> None:
        """Make the folder, if it is not there, keep others out of it, and write the configuration.

        Raises:
            UserError: it can't be written to, or another training is in it.
        """
        with writing_to(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = claim(self.path)
            write_whole(self.config_file, yaml.safe_dump(asdict(config), sort_keys=False))

    def note_skipped(self, skipped: Sequence[BadPicture], pictures: int) -> None:
        """Name pictures that can't be read in RUN/skipped.jsonl, each once, and say how many of `pictures` they are.

        It is said at the first, and each time that they are twice as many.

        Args:
            skipped: may be known already.
            pictures: how many there are, these included.

        Raises:
            UserError: the disk is full.
        """
        if self._skipped.issuperset(skipped):
            return
        path = self.path / "skipped.jsonl"
        with writing_to(path):
            self._read_skipped(path)
            new = [bad for bad in dict.fromkeys(skipped) if bad not in self._skipped]
            if new:
                with path.open("a") as file:
                    for name, reason in new:
                        file.write(json.dumps({"picture": name, "reason": reason}) + "\n")
        self._skipped.update(new)
        if not new or len(self._skipped) < 2 * self._told:  # thousands of bad pictures are told of a dozen times
            return
        self._told = len(self._skipped)
        warning = " That is more than 5 %: look at your data." if len(self._skipped) > 0.05 * pictures else ""
        name = str(new[0]).encode(errors="backslashreplace").decode()  # of a file that is not named in UTF-8
        tqdm.write(f"Skipped {self._told} picture{'s' * (self._told > 1)} that can't be read, e.g. {name}.{warning}")

    def _read_skipped(self, path: Path) -> None:
        """What has come to the file: of this run before it was stopped, or of other processes, which meet them too."""
        if not path.is_file():
            return
        with path.open("rb") as file:
            file.seek(self._read)
            added = file.read()
        whole = added[: added.rfind(b"\n") + 1]  # another process may be writing the last line
        self._read += len(whole)
        for line in whole.splitlines():
            with contextlib.suppress(ValueError, KeyError):  # cut short as a process was killed
                known = json.loads(line)
                self._skipped.add(BadPicture(known["picture"], known["reason"]))

    def save_samples(self, sheet: Image.Image, step: int) -> Path:
        """RUN/samples/step-000500.png."""
        path = self.path / "samples" / f"step-{step:06d}.png"
        with writing_to(path):
            path.parent.mkdir(exist_ok=True)
        save_picture(sheet, path)
        return path

    def save_pipeline(self, pipeline: LiquidDiffusionPipeline) -> None:
        """RUN/pipeline, written aside and then put in place of the one before."""
        folder = self.path / "pipeline"
        partial, old = folder.with_name("pipeline.partial"), folder.with_name("pipeline.old")
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            pipeline.save_pretrained(str(partial))
            if folder.exists():
                os.replace(folder, old)
            os.replace(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)  # a disk that is full needs its place
        shutil.rmtree(old, ignore_errors=True)
