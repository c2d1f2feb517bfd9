from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import speed
import torch
from figures import read_rows
from performance_tables import speed_tables
from speed import STEPS, of_processor, take_turns
from torch import nn

CPU = torch.device("cpu")


def test_a_run_is_as_many_calls_as_fit_into_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that the functions turn on: the first call, which compiles, counts nowhere."""
    now, calls = 0.0, {"quick": 0, "slow": 0}
    monkeypatch.setattr(speed.time, "perf_counter", lambda: now)

    def function(name: str, seconds: float) -> Callable[[], None]:
        def call() -> None:
            nonlocal now
            now += seconds if calls[name] else 50.0
            calls[name] += 1

        return call

    times = take_turns({"quick": function("quick", 0.01), "slow": function("slow", 0.4)}, 3, CPU)
    assert times["quick"] == pytest.approx([10.0] * 3)
    assert times["slow"] == pytest.approx([400.0] * 3)
    assert calls == {"quick": 2 + 3 * STEPS, "slow": 2 + 3 * 2}


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    return speed.build("nano", 8, CPU)


@pytest.mark.parametrize("task", [task for task in speed.TASKS if task != "evaluation, all compiled"])  # of a GPU
def test_every_task_can_be_run(task: str, models: dict[str, nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """And where it gives pictures, they are as large as those that went in."""
    monkeypatch.setattr(speed, "STEPS", 4)
    monkeypatch.setattr(speed, "compile_for_training", lambda model: None)  # which takes minutes
    for name, function in speed.TASKS[task](models, 2, 8, CPU).items():
        out = function()
        if task.startswith("evaluation"):
            assert (out[0] if isinstance(out, list) else out).shape == (2, speed.CHANNELS, 8, 8), name


def row(machine: str, model: str, median: str, task: str = "evaluation") -> dict[str, str]:
    case = {"task": task, "preset": "tiny", "batch": "8", "latent": "32"}
    return {"machine": machine, "model": model, "median_ms": median, "least_ms": "1.0", "most_ms": "99.0", **case}


def test_tables_are_of_one_processor_and_of_its_newest_rows() -> None:
    rows = [
        row("4 cores arm64, no bfloat16", speed.OURS, "50.0"),
        row("4 cores arm64, no bfloat16", speed.OURS, "20.0"),
        row("2 cores x86_64, AMX", speed.OURS, "10.0"),
        row("2 cores x86_64, AMX", "peer", "15.0"),
        row("4 cores arm64, no bfloat16", "peer", "70.0"),
        row("8 cores x86_64, AMX", speed.OURS, "5.0"),
        row("NVIDIA H100", speed.OURS, "1.0"),
    ]
    without = of_processor(rows, amx=False)
    assert [found["machine"] for found in without] == ["4 cores arm64, no bfloat16"] * 3
    assert [found["machine"] for found in of_processor(rows, amx=True)] == ["8 cores x86_64, AMX"]
    assert "| 8 | 32 | 20.0 (1.0 to 99.0) | 70.0, **3.5 x** |" in speed_tables(without)["evaluation"]
    assert of_processor([], amx=True) == []


def test_new_rows_of_a_machine_take_the_place_of_its_old_ones(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    speed.replace_rows(path, [row("A", "ours", "1.0"), row("A", "peer", "2.0")])
    speed.replace_rows(path, [row("B", "ours", "3.0")])
    speed.replace_rows(path, [row("A", "ours", "4.0")])
    assert read_rows(path) == [row("B", "ours", "3.0"), row("A", "ours", "4.0")]
