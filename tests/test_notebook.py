"""The notebook as Colab runs it: every cell, in a fresh kernel, against the little Hub; a second time to go on."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import nbformat
import pytest
from diffusers import AutoencoderKL
from hub_sets import build
from little_hub import LittleHub
from nbclient import NotebookClient
from PIL import Image

from liquid_diffusion.data.registry import find_facts
from liquid_diffusion.loading import load_pipeline
from liquid_diffusion.notebook import overview

FILE = Path(__file__).parent.parent / "notebooks" / "LiquidDiffusion_Training.ipynb"


def test_it_is_committed_clean() -> None:
    """No outputs, no path of a machine but Colab's drive, and the parameters that the test below sets."""
    notebook = nbformat.read(FILE, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    text = FILE.read_text()
    assert set(re.findall(r"/(?:home|root|tmp|work|Users|content)\b[\w/]*", text)) == {
        "/content/drive", "/content/drive/MyDrive/liquid",
    }  # fmt: skip
    choices = json.loads(re.findall(r'^DATA = "afhq"  # @param (\[.*\])$', code[0].source, re.MULTILINE)[0])
    assert all(find_facts(name) is not None for name in choices if name != "own folder")


def execute(place: Path, **parameters: Any) -> list[Any]:
    """Run all with some parameters set, as papermill would; the code cells."""
    notebook = nbformat.read(FILE, as_version=4)
    lines = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    at = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
    assert all(f"{name} = " in notebook.cells[at].source for name in parameters)
    notebook.cells.insert(at + 1, nbformat.v4.new_code_cell(lines))
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(place)}}).execute()
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def said(cells: list[Any]) -> str:
    return "".join(output.get("text", "") for cell in cells for output in cell.outputs)


def pictures(cell: Any) -> int:
    return sum("image/png" in output.get("data", {}) for output in cell.outputs)


def test_run_all_and_run_all_again(little_hub: LittleHub, tmp_path: Path) -> None:
    facts = find_facts("afhq")
    assert facts is not None
    build(little_hub, facts)
    vae = AutoencoderKL(
        block_out_channels=[8, 16], norm_num_groups=4, down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
    )  # fmt: skip
    vae.save_pretrained(tmp_path / "vae")
    small = {
        "IMAGE_SIZE": 96, "MODEL": "nano", "BATCH_SIZE": 4, "GRID_EVERY": 1, "CODEC": str(tmp_path / "vae"),
    }  # fmt: skip
    cells = execute(tmp_path, **small, STEPS=1)
    words = said(cells)
    assert "no GPU: choose one" in words
    assert "GiB" in words
    train = next(cell for cell in cells if "TrainConfig(" in cell.source)
    assert pictures(train) == 1  # one display, drawn anew in place
    assert sum(pictures(cell) for cell in cells) == 3
    run = tmp_path / "liquid-diffusion" / "afhq-96-nano"
    assert (run / "latents").is_dir()
    written = {path: path.stat().st_mtime_ns for path in (run / "latents").rglob("*.safetensors")}
    assert written

    cells = execute(tmp_path, **small, STEPS=2, HUB_ID="somebody/afhq")
    assert "resumed from step 1" in said(cells)
    assert {path: path.stat().st_mtime_ns for path in (run / "latents").rglob("*.safetensors")} == written
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    assert load_pipeline("somebody/afhq").config["label_names"] == ["cat", "dog", "wild"]
    shutil.unpack_archive(run / "model.zip", tmp_path / "unpacked")
    assert load_pipeline(str(tmp_path / "unpacked")).config["image_size"] == 96


def test_the_overview_is_a_picture_of_loss_and_grid(tmp_path: Path) -> None:
    assert overview(tmp_path) is None
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {i}, "loss": {1 / i}}}\n' for i in range(1, 20)))
    alone = overview(tmp_path)
    (tmp_path / "samples").mkdir()
    Image.new("RGB", (64, 64), "#ff00ff").save(tmp_path / "samples" / "step-000010.png")
    both = overview(tmp_path)
    assert alone is not None
    assert both is not None
    (tmp_path / "both.png").write_bytes(both)
    (tmp_path / "alone.png").write_bytes(alone)
    magenta = [
        sum(count for count, colour in image.getcolors(2**20) or [] if colour == (255, 0, 255))
        for image in (Image.open(tmp_path / name).convert("RGB") for name in ("alone.png", "both.png"))
    ]
    assert magenta[0] == 0
    assert magenta[1] > 10_000


@pytest.mark.parametrize("name", ["matplotlib.figure", "matplotlib.image"])
def test_a_missing_extra_is_one_sentence(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(ValueError, match=r"pip install 'liquid-diffusion\[notebook\]'"):
        overview(tmp_path)
