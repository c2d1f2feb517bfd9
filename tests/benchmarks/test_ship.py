"""A model inside the package: put there by `ship.py`, and meant where RUN is left out."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import ship
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from liquid_diffusion import loading as home
from liquid_diffusion.cli import main
from liquid_diffusion.loading import load_pipeline
from liquid_diffusion.models.unet import LiquidUNet
from liquid_diffusion.pipeline import LiquidDiffusionPipeline
from liquid_diffusion.sampling import make_scheduler

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def run(photos: Path, tmp_path: Path) -> Path:
    """A run folder with random weights."""
    model = LiquidUNet(12, 2, widths=(32, 64), depths=(1, 1), ratio=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    folder = tmp_path / "run"
    LiquidDiffusionPipeline(model, make_scheduler(), label_names=["cat", "dog"], image_size=16).save_pretrained(
        folder / "pipeline"
    )
    settings = {
        "data": str(photos), "out": "/home/me/run", "image_size": 16, "model": "nano", "val_fraction": 0.3,
        "flip": False, "seed": 0, "steps": 2, "batch_size": 8, "lr": 0.002,
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder


def test_run_left_out_is_the_packaged_model(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    shipped = tmp_path / "shipped" / "nano-emoji"
    for module in (home, ship):
        monkeypatch.setattr(module, "SHIPPED", shipped)
    monkeypatch.setattr(ship, "PAIRS", tmp_path / "pairs.png")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for command in ("sample", "evaluate", "export"):
        assert main([command]) == 2
        assert "There is no model in this installation: say RUN" in capsys.readouterr().err

    monkeypatch.setattr(sys, "argv", ["ship.py", str(run), "--n", "8"])
    ship.main()
    weights = load_file(shipped / "unet" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float16}
    assert not list(shipped.rglob("*.py"))
    assert "/home/me" not in (shipped / "config.yaml").read_text()
    facts = json.loads((shipped / "metrics.json").read_text())
    text = (shipped / "README.md").read_text()
    assert str(tmp_path) not in text + json.dumps({**facts, "samples": None})
    assert f"{facts['kd']:.4f}" in text
    assert "CC-BY-4.0" in text

    loaded = load_pipeline(None).unet
    assert loaded.dtype == torch.float32
    for name, value in loaded.state_dict().items():
        torch.testing.assert_close(value, weights[name].float(), atol=0, rtol=0)
    capsys.readouterr()
    assert main(["sample", "--n", "4", "--steps", "2"]) == 0
    with Image.open("samples.png") as grid:
        assert grid.size == (2 * 66 - 2, 2 * 66 - 2)
    assert main(["sample", "--n", "2", "--steps", "2", "--nearest", "true", "--out", "nearest.png"]) == 0
    assert "nearest training picture" in capsys.readouterr().out


def test_too_large_a_model_is_not_shipped(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ship, "LARGEST", 1000)
    with pytest.raises(SystemExit, match=r"more than 0\."):
        ship.write_model(str(run), tmp_path / "shipped")


@pytest.mark.skipif(not (home.SHIPPED / "model_index.json").is_file(), reason="no model is in the package yet")
def test_the_model_in_the_package_is_small_and_whole(tmp_path: Path) -> None:
    files = [path for path in home.SHIPPED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= ship.LARGEST
    assert {"README.md", "config.yaml", "metrics.json", "model_index.json"} <= {path.name for path in files}
    assert not [path for path in files if path.suffix == ".py"]
    assert main(["sample", "--n", "9", "--steps", "2", "--out", str(tmp_path / "grid.png")]) == 0
