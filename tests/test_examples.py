"""LiquidUNet in other people's code: the example as it is run, and its model in the hands of diffusers' schedulers."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from PIL import Image

from liquid_diffusion import LiquidUNet

LOOP = Path(__file__).parents[1] / "examples" / "train_loop.py"
FLOW: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 1.0}


@pytest.fixture(scope="module")
def loop() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_loop", LOOP)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train(out: Path, *launcher: str) -> None:
    command = [sys.executable, *launcher, str(LOOP), "--steps", "2", "--batch-size", "4", "--size", "16"]
    done = subprocess.run([*command, "--out", str(out)], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with Image.open(out / "samples.png") as grid:
        assert grid.size == (4 * 16, 9 * 16)
    head = LiquidUNet.from_pretrained(out).head.weight  # it starts at zero
    assert head.isfinite().all()
    assert head.abs().max() > 1e-4


def test_with_python(tmp_path: Path, loop: ModuleType) -> None:
    train(tmp_path)
    model = LiquidUNet.from_pretrained(tmp_path).eval()
    with torch.no_grad():  # two steps leave a field that hardly differs from a constant
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    labels = torch.tensor([0, 8])

    def draw(scheduler: SchedulerMixin, steps: int) -> torch.Tensor:
        pictures: torch.Tensor = loop.sample(model, scheduler, labels, 16, steps)
        return pictures

    exact = draw(FlowMatchHeunDiscreteScheduler(), 40)
    moved = (exact - torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))).square().mean().sqrt()
    schedulers = (
        FlowMatchEulerDiscreteScheduler(), FlowMatchHeunDiscreteScheduler(), UniPCMultistepScheduler(**FLOW),
        DPMSolverMultistepScheduler(**FLOW),
    )  # fmt: skip
    for scheduler in schedulers:
        error = (draw(scheduler, 20) - exact).square().mean().sqrt()
        assert error < 0.05 * moved, type(scheduler)


def test_with_accelerate_launch(tmp_path: Path) -> None:
    train(tmp_path, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1")
