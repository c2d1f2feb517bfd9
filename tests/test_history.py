from __future__ import annotations

import json
from pathlib import Path

import pytest

from liquid_diffusion.history import grids, last_step, loss_curve


def test_of_many_grids_some_are_shown_with_the_first_and_the_last(tmp_path: Path) -> None:
    assert grids(tmp_path) == []
    (tmp_path / "samples").mkdir()
    for step in range(500, 50_001, 500):
        (tmp_path / "samples" / f"step-{step:06d}.png").touch()
    (tmp_path / "samples" / "step-x.png").touch()
    (tmp_path / "samples" / "step-1000000.png").touch()  # sorted as a number, not as a name
    found = grids(tmp_path, most=11)
    steps = [step for step, _ in found]
    assert (steps[0], steps[-1], len(steps)) == (1_000_000, 500, 11)
    assert steps == sorted(set(steps), reverse=True)
    assert all(file.name == f"step-{step:06d}.png" for step, file in found)


def test_the_last_step_is_that_of_the_weights_that_were_saved(tmp_path: Path) -> None:
    assert last_step(tmp_path) is None
    (tmp_path / "metrics.jsonl").write_text('{"step": 500, "loss": 0.5}\n{"step": 740, "loss": 0.4}\n')
    assert last_step(tmp_path) == 740  # all that is known
    for name in ("step-000000", "step-000500", "step-001000.partial"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert last_step(tmp_path) == 500


def test_the_loss_is_the_mean_of_neighbouring_lines(tmp_path: Path) -> None:
    assert loss_curve(tmp_path) == []
    lines = [json.dumps({"step": 10 * (i + 1), "loss": float(i), "lr": 1e-3}) for i in range(100)]
    lines[50] = json.dumps({"step": 510, "kernel_distance": 0.4})  # no loss in it
    text = "\n".join([*lines, '{"step": 1010, "lo'])
    (tmp_path / "metrics.jsonl").write_text(text)
    curve = loss_curve(tmp_path, points=20)
    assert len(curve) == 20
    assert curve[0] == (50.0, 2.0)  # the mean of 0, 1, 2, 3, 4
    assert curve[-1][0] == 1000
    weights = [5] * 19 + [4]
    mean = sum(w * loss for w, (_, loss) in zip(weights, curve, strict=True)) / 99
    assert mean == pytest.approx((sum(range(100)) - 50) / 99)
