from __future__ import annotations

from pathlib import Path

import pytest

from liquid_diffusion.config import UserError
from liquid_diffusion.training.checkpoint import CheckpointFolder


def write(folder: Path) -> None:
    (folder / "weights.bin").write_bytes(b"x" * 100)


def test_the_newest_few_stay(tmp_path: Path) -> None:
    checkpoints = CheckpointFolder(tmp_path / "checkpoints", keep=2)
    assert checkpoints.latest() is None
    for step in (5, 10, 15):
        checkpoints.save(step, write, {"step was": step})
    assert [path.name for path in checkpoints.all()] == ["step-000010", "step-000015"]
    assert checkpoints.latest() == (tmp_path / "checkpoints" / "step-000015", 15, {"step was": 15})


def test_one_that_was_never_finished_does_not_count(tmp_path: Path) -> None:
    checkpoints = CheckpointFolder(tmp_path)
    checkpoints.save(5, write, {})

    def fail(folder: Path) -> None:
        write(folder)
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="disk is full"):
        checkpoints.save(10, fail, {})
    latest = checkpoints.latest()
    assert latest is not None
    assert latest[1] == 5
    assert checkpoints.save(10, write, {}).name == "step-000010"


@pytest.mark.parametrize("damage", ["short", "missing", "manifest"])
def test_one_that_was_cut_short_is_refused(tmp_path: Path, damage: str) -> None:
    checkpoints = CheckpointFolder(tmp_path)
    checkpoints.save(5, write, {})
    newest = checkpoints.save(10, write, {})
    if damage == "short":
        (newest / "weights.bin").write_bytes(b"x" * 99)
    elif damage == "missing":
        (newest / "weights.bin").unlink()
    else:
        (newest / "manifest.json").write_text('{"step": 10')
    with pytest.raises(UserError, match=r"step-000010 is cut short .* delete this folder to go on from step-000005"):
        checkpoints.latest()
