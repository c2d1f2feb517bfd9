"""Checkpoints that are either whole or not there."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from liquid_diffusion.errors import UserError

_MANIFEST = "manifest.json"


class CheckpointFolder:
    """RUN/checkpoints: folders step-000500 with the state of a run, the newest few of them.

    A checkpoint is written beside its place and renamed when it is whole; its manifest has the size of each file,
    so that one which was cut short later (a full disk, a broken copy) is noticed.

    Args:
        folder: RUN/checkpoints; made when the first one is written.
        keep: how many stay.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder = folder
        self.keep = keep

    def all(self) -> list[Path]:
        """All checkpoints, oldest first."""
        whole = [path for path in self.folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
        return sorted(whole, key=lambda path: int(path.name.removeprefix("step-")))

    def place(self, step: int) -> Path:
        """Where the files of a checkpoint are put while it is written."""
        return self.folder / f"step-{step:06d}.partial"

    def begin(self, step: int) -> None:
        """Make an empty folder at `place`; what was begun before and never finished goes."""
        self.abandon()
        self.place(step).mkdir(parents=True)

    def abandon(self) -> None:
        """Take away what was begun and never finished."""
        for leftover in self.folder.glob("*.partial"):
            shutil.rmtree(leftover, ignore_errors=True)

    def finish(self, step: int, facts: dict[str, Any]) -> Path:
        """Put what lies at `place` in its final place, with `facts` as JSON; the oldest ones over `keep` go."""
        partial, target = self.place(step), self.folder / f"step-{step:06d}"
        sizes = {str(f.relative_to(partial)): f.stat().st_size for f in sorted(partial.rglob("*")) if f.is_file()}
        manifest = {"step": step, "files": sizes, "facts": facts}
        (partial / _MANIFEST).write_text(json.dumps(manifest, indent=1))
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
        for old in self.all()[: -self.keep]:
            shutil.rmtree(old)
        return target

    def latest(self) -> tuple[Path, int, dict[str, Any]] | None:
        """The newest checkpoint, its step and its facts; None where there is none.

        Raises:
            UserError: it is not whole.
        """
        folders = self.all()
        if not folders:
            return None
        newest = folders[-1]
        try:
            manifest = json.loads((newest / _MANIFEST).read_text())
            for name, size in manifest["files"].items():
                found = (newest / name).stat().st_size
                if found != size:
                    raise ValueError(f"{name} has {found} of {size} bytes")
        except (OSError, ValueError, KeyError, TypeError) as error:
            before = f"resume from {folders[-2].name}" if len(folders) > 1 else "start anew"
            raise UserError(
                f"The checkpoint {newest} is cut short ({error}); delete this folder to {before}."
            ) from error
        return newest, manifest["step"], manifest["facts"]
