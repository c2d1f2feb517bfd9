"""A pipeline folder in the hands of somebody who has diffusers and not this package, and the other way round.

The stranger is a second virtual environment. It sees the libraries of the first one, but not the package: Python
reads no .pth file in a folder that a .pth file names, so that an editable installation is invisible there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from liquid_diffusion.codecs import AutoencoderCodec
from liquid_diffusion.errors import UserError
from liquid_diffusion.loading import load_pipeline
from liquid_diffusion.models.unet import LiquidUNet
from liquid_diffusion.pipeline import LiquidDiffusionPipeline
from liquid_diffusion.sampling import make_scheduler, seeded_generators

KINDS = ("pixels", "latents")

# Loads each folder, draws, saves it again as a stranger would, and loads that too.
STRANGER = """
import importlib.util, sys
from pathlib import Path
import numpy as np, torch
from diffusers import DiffusionPipeline, UniPCMultistepScheduler

assert importlib.util.find_spec("liquid_diffusion") is None
for folder in map(Path, sys.argv[1:]):
    for source in (folder, folder / "again"):
        pipe = DiffusionPipeline.from_pretrained(source, trust_remote_code=True)
        pipe.set_progress_bar_config(disable=True)
        generators = [torch.Generator().manual_seed(i) for i in range(2)]
        np.save(source / "pictures.npy", pipe(2, "dog", 3, 2.0, generators, output_type="np").images)
        if source == folder:
            pipe.save_pretrained(folder / "again")
            pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config)
            assert np.isfinite(pipe(1, output_type="np").images).all()
"""

FRIEND = """
import sys
from pathlib import Path
import numpy as np, torch
from liquid_diffusion import LiquidDiffusionPipeline

for folder in map(Path, sys.argv[1:]):
    pipe = LiquidDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    np.save(folder / "pictures.npy", pipe(2, "dog", 3, 2.0, generators, output_type="np").images)
assert not [name for name in sys.modules if name.startswith("diffusers_modules")]
"""


def make_pipeline(kind: str) -> LiquidDiffusionPipeline:
    vae = None
    if kind == "latents":
        vae = AutoencoderKL(
            block_out_channels=[8, 16], norm_num_groups=4,
            down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        )  # fmt: skip
    model = LiquidUNet(4 if vae else 12, 2, widths=(32, 64), depths=(1, 1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    state = AutoencoderCodec(vae, "somewhere").state() if vae else None
    pipeline = LiquidDiffusionPipeline(model, make_scheduler(), vae, state, ["cat", "dog"], image_size=16)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, np.ndarray]]:
    """For each kind of model its folder, and two pictures of the model that was saved there."""
    torch.manual_seed(0)
    found = {}
    for kind in KINDS:
        pipeline = make_pipeline(kind)
        folder = tmp_path_factory.mktemp(kind)
        pipeline.save_pretrained(folder)
        found[kind] = folder, pipeline(2, "dog", 3, 2.0, seeded_generators(0, 2), output_type="np").images
    return found


def run(python: Path | str, script: str, folders: list[Path], modules: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if python == sys.executable:  # the package as this process has it, installed or not
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [str(python), "-c", script, *map(str, folders)],
        check=False, capture_output=True, text=True, env={**environment, "HF_MODULES_CACHE": str(modules)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for warning in ("might require", "Expected types", "not expected"):
        assert warning not in done.stderr


def test_a_stranger_draws_the_same_pictures(saved: dict[str, tuple[Path, np.ndarray]], tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=False)
    library = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    (library / "first.pth").write_text(str(Path(diffusers.__file__).parents[1]) + "\n")
    folders = [folder for folder, _ in saved.values()]
    run(tmp_path / "venv" / "bin" / "python", STRANGER, folders, tmp_path / "modules")
    for folder, expected in saved.values():
        for source in (folder, folder / "again"):
            np.testing.assert_allclose(np.load(source / "pictures.npy"), expected, atol=1e-4)
        for name in ("pipeline.py", "unet/modeling_liquid_unet.py", "model_index.json"):
            assert (folder / "again" / name).read_text() == (folder / name).read_text()
        assert LiquidDiffusionPipeline.from_pretrained(folder / "again").config["image_size"] == 16


def test_a_fresh_process_with_the_package_draws_the_same(
    saved: dict[str, tuple[Path, np.ndarray]], tmp_path: Path
) -> None:
    run(sys.executable, FRIEND, [folder for folder, _ in saved.values()], tmp_path / "modules")
    for folder, expected in saved.values():
        np.testing.assert_allclose(np.load(folder / "pictures.npy"), expected, atol=1e-4)


def test_code_in_a_folder_is_never_run_by_the_package(tmp_path: Path) -> None:
    make_pipeline("pixels").save_pretrained(tmp_path / "theirs")
    trap = f"open({str(tmp_path / 'sprung')!r}, 'w')\n"
    for name in ("pipeline.py", "unet/modeling_liquid_unet.py"):
        (tmp_path / "theirs" / name).write_text(trap)
    assert load_pipeline(str(tmp_path / "theirs")).unet.__class__ is LiquidUNet
    LiquidDiffusionPipeline.from_pretrained(tmp_path / "theirs", trust_remote_code=True)
    (tmp_path / "theirs" / "None.py").write_text(trap)  # diffusers looks for one of this name where it has none
    with pytest.raises(ValueError, match="custom code"):
        LiquidDiffusionPipeline.from_pretrained(tmp_path / "theirs", trust_remote_code=True)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scheduler": ["this", "Scheduler"]}, "The scheduler of .* is no part of diffusers: Scheduler"),
        ({"vae": ["antigravity", "Vae"]}, "The vae of .* is no part of diffusers"),
        ({"_class_name": "StableDiffusionPipeline"}, "is no pipeline of liquid-diffusion, but a StableDiff"),
        ({"unet": ["diffusers", "UNet2DModel"]}, "is no pipeline of liquid-diffusion"),
    ],
)
def test_other_classes_are_refused_before_they_are_imported(
    changes: dict[str, object], words: str, tmp_path: Path
) -> None:
    make_pipeline("pixels").save_pretrained(tmp_path)
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), **changes}))
    with pytest.raises(UserError, match=words):
        load_pipeline(str(tmp_path))
    assert "antigravity" not in sys.modules


def test_weights_that_can_hold_code_are_refused(tmp_path: Path) -> None:
    make_pipeline("pixels").save_pretrained(tmp_path)
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save({}, weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(UserError, match="is damaged"):
        load_pipeline(str(tmp_path))
