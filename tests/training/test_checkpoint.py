from __future__ import annotations

from pathlib import Path

import pytest

from liquid_diffusion.errors import UserError
from liquid_diffusion.training.checkpoint import CheckpointFolder


def save(checkpoints: CheckpointFolder, step: int, **facts: int) -> Path:
    checkpoints.begin(step)
    (checkpoints.place(step) / "weights.bin").write_bytes(b"x" * 100)
    return checkpoints.finish(step, facts)


def test_the_newest_few_stay(tmp_path: Path) -> None:
    checkpoints = CheckpointFolder(tmp_path / "checkpoints", keep=2)
    assert checkpoints.latest() is None
    for step in (5, 10, 15):
        save(checkpoints, step, loss=step)
    assert [path.name for path in checkpoints.all()] == ["step-000010", "step-000015"]
    assert checkpoints.latest() == (tmp_path / "checkpoints" / "step-000015", 15, {"loss": 15})


def test_a_million_steps_come_after_less(tmp_path: Path) -> None:
    checkpoints = CheckpointFolder(tmp_path, keep=2)
    for step in (999_500, 1_000_000, 1_000_500):
        save(checkpoints, step)
    assert [path.name for path in checkpoints.all()] == ["step-1000000", "step-1000500"]


def test_one_that_was_never_finished_does_not_count(tmp_path: Path) -> None:
    checkpoints = CheckpointFolder(tmp_path)
    save(checkpoints, 5)
    checkpoints.begin(10)  # and then the machine was switched off
    (checkpoints.place(10) / "weights.bin").write_bytes(b"x")
    latest = checkpoints.latest()
    assert latest is not None
    assert latest[1] == 5
    assert save(checkpoints, 10).name == "step-000010"
    assert (tmp_path / "step-000010" / "weights.bin").stat().st_size == 100


@pytest.mark.parametrize("damage", ["short", "missing", "manifest"])
def test_one_that_was_cut_short_is_refused(tmp_path: Path, damage: str) -> None:
    checkpoints = CheckpointFolder(tmp_path)
    save(checkpoints, 5)
    newest = save(checkpoints, 10)
    if damage == "short":
        (newest / "weights.bin").write_bytes(b"x" * 99)
    elif damage == "missing":
        (newest / "weights.bin").unlink()
    else:
        (newest / "manifest.json").write_text('{"step": 10')
    with pytest.raises(UserError, match=r"step-000010 is cut short .* delete this folder to resume from step-000005"):
        checkpoints.latest()


def test_what_was_never_finished_goes_and_copies_of_people_stay(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    (tmp_path / "step-000001.partial").mkdir()
    (tmp_path / "step-000002 2").mkdir()  # a copy, as Finder names it
    folder.begin(3)
    folder.finish(3, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002 2", "step-000003"]
    (tmp_path / "step-000003" / "manifest.json").write_text("[]")
    with pytest.raises(UserError, match="cut short"):
        folder.latest()
