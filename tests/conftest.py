from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
import tempfile

from little_hub import LittleHub, reserve_port

# Before anything is imported that reads them: the suite means the CPU, whatever the machine has, and a Hub that nobody
# answers for but the fixture `little_hub`, so that "no network" is tested everywhere and nothing is ever downloaded.
_PORT = reserve_port()
atexit.register(_PORT.close)
os.environ["ACCELERATE_USE_CPU"] = "true"
os.environ["OMP_NUM_THREADS"] = "1"  # the cores are divided among the processes of the suite
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{_PORT.getsockname()[1]}"
os.environ["HF_HOME"] = tempfile.mkdtemp()
os.environ["HF_HUB_DISABLE_XET"] = "1"  # a protocol of its own, which the little Hub does not speak
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
# A script's background job is started deaf to Ctrl-C, and so would be the commands that the suite starts and stops.
signal.signal(signal.SIGINT, signal.default_int_handler)

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from liquid_diffusion.codecs import AutoencoderCodec
from liquid_diffusion.config import TrainConfig
from liquid_diffusion.models.unet import LiquidUNet
from liquid_diffusion.pipeline import LiquidDiffusionPipeline
from liquid_diffusion.sampling import make_scheduler


@pytest.fixture(autouse=True)
def _same_draws() -> None:
    torch.manual_seed(0)


@pytest.fixture
def exact_codec(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autoencoders in float32, also on a machine that is fast in bfloat16."""
    monkeypatch.setattr("liquid_diffusion.codecs.fastest_dtype", lambda device: torch.float32)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of 24 pictures in two classes, of different sizes: each a coloured disc on noise."""
    folder = tmp_path / "photos"
    draws = np.random.default_rng(0)
    for i in range(24):
        side = 40 + i
        pixels = draws.integers(0, 60, (side, side + 8, 3), dtype=np.uint8)
        y, x = np.mgrid[:side, : side + 8]
        pixels[(y - side / 2) ** 2 + (x - side / 2) ** 2 < (side / 4) ** 2] = draws.integers(100, 255, 3)
        path = folder / ("cat" if i % 2 else "dog") / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return folder


@pytest.fixture
def quick(tmp_path: Path) -> Callable[..., TrainConfig]:
    """Makes configurations of runs that take seconds: emoji of 16 px, batches of 8."""

    def make(**changes: Any) -> TrainConfig:
        settings: dict[str, Any] = {
            "out": str(tmp_path / "run"),
            "image_size": 16,
            "model": "nano",
            "batch_size": 8,
            "steps": 4,
            "precision": "fp32",
            "warmup_steps": 2,
        }
        return TrainConfig(**{**settings, **changes})

    return make


@pytest.fixture
def little_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LittleHub]:
    """A Hub that HF_ENDPOINT leads to, empty, with somebody logged in, and empty caches; processes that are started
    from here have them too.
    """
    import datasets.config
    from huggingface_hub import HfFileSystem, close_session, constants

    close_session()  # it has connections to the Hub of the test before
    HfFileSystem.clear_instance_cache()  # it remembers the folders of the test before
    for module, name in ((constants, "HF_HUB_CACHE"), (datasets.config, "HF_DATASETS_CACHE")):
        monkeypatch.setattr(module, name, str(tmp_path / name.lower()))
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.setenv("HF_TOKEN", "hf_anything")
    with LittleHub(tmp_path / "hub") as hub:
        yield hub


@pytest.fixture(scope="session")
def sd_vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exact architecture of the SD-VAE with random weights, saved in half precision to spare the disk.

    `(hub.repo("stabilityai", "models") / "sd-vae-ft-mse").symlink_to(sd_vae_folder)` serves it.
    """
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=[128, 256, 512, 512],
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        latent_channels=4,
        layers_per_block=2,
        norm_num_groups=32,
        sample_size=256,
    )
    folder = tmp_path_factory.mktemp("sd-vae-ft-mse")
    vae.half().save_pretrained(folder)
    return folder


@pytest.fixture
def make_pipeline() -> Callable[..., LiquidDiffusionPipeline]:
    """Makes pipelines of tiny models, with or without classes and an autoencoder."""

    def build(classes: int = 2, with_vae: bool = False, image_size: int | list[int] = 16) -> LiquidDiffusionPipeline:
        """A tiny model of random weights, which no longer predicts zero."""
        vae = None
        if with_vae:
            vae = AutoencoderKL(
                block_out_channels=[8, 16], norm_num_groups=4,
                down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
            )  # fmt: skip
        model = LiquidUNet(4 if vae else 12, classes, widths=(32, 64), depths=(1, 1))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)
        codec = AutoencoderCodec(vae, "somewhere").state() if vae else None
        names = ["cat", "dog"][:classes]
        return LiquidDiffusionPipeline(model, make_scheduler(), vae, codec, names, image_size)

    return build


@pytest.fixture
def vae(tmp_path: Path) -> Path:
    """The folder of a small autoencoder of factor 2."""
    AutoencoderKL(
        block_out_channels=[8, 16], norm_num_groups=4,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
    ).save_pretrained(tmp_path / "vae")  # fmt: skip
    return tmp_path / "vae"


@pytest.fixture
def telling_shards() -> str:
    """Begins a script for `on_two_processes`: shards of two pictures, and who writes each is printed."""
    return r"""
import os, sys
import liquid_diffusion.data.encode as module
module._SHARD = 2
write = module.save_file
def note(tensors, path, metadata):
    sys.stdout.write(f"rank {os.environ['RANK']} writes {path.name}\n")  # as one piece, into the same pipe
    write(tensors, path, metadata)
module.save_file = note
"""


@pytest.fixture
def on_two_processes(tmp_path: Path) -> Callable[..., str]:
    """Runs a script under torch's launcher as two processes of the CPU; it returns what they print, or fails."""

    # Past the interpreter's own end: a thread of gloo may still hold the last gathered tensor, and where it drops it
    # then, the process aborts.
    leave = "import os, sys\nsys.stdout.flush()\nos._exit(0)\n"

    def launch(script: str, *arguments: object) -> str:
        path = tmp_path / "two.py"
        path.write_text(f"{script}\n{leave}")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        done = subprocess.run(
            [*command, str(path), *map(str, arguments)], check=False, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return launch
