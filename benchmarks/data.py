"""How fast pictures of 256 px come to a training step, from where they may lie, and how long the step waits for them.

    python benchmarks/data.py                  # writes benchmarks/results/data.csv
    python benchmarks/data.py --pictures 64 --steps 5 --runs 1

Each source is read by the trainer itself, once with a step that does nothing (pictures a second, the median of some
runs taken in turns) and once with the real one of `tiny` at batch 8 (the share of its time that is waiting). Pictures
are 400 px JPEGs made here; sets count as too large for memory, as real ones are. The autoencoder has the SD-VAE's
latents but few channels: it stands for one that costs nothing, beside which the reading has to be fast.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter

RESULT = Path(__file__).parent / "results" / "data.csv"
BATCH, SKIPPED = 8, 8  # the first batches find no workers running yet, or lie ready from the run before


def jpeg(number: int) -> bytes:
    """A picture with the spectrum of a photograph, about: noise at several scales."""
    draws = np.random.default_rng(number)
    image = Image.fromarray(draws.integers(0, 255, (13, 13, 3), dtype=np.uint8)).resize((400, 400), Image.BICUBIC)
    fine = Image.fromarray(draws.integers(0, 255, (400, 400, 3), dtype=np.uint8)).filter(ImageFilter.GaussianBlur(2))
    file = io.BytesIO()
    Image.blend(image, fine, 0.2).save(file, "JPEG", quality=90)
    return file.getvalue()


def prepare(folder: Path, count: int) -> None:
    """The same pictures as files and as a parquet file, and a small autoencoder of the SD-VAE's shape."""
    from datasets import Dataset, Features
    from datasets import Image as ImageFeature
    from diffusers import AutoencoderKL

    (folder / "pictures").mkdir()
    pictures = [jpeg(i) for i in range(count)]
    for i, content in enumerate(pictures):
        (folder / "pictures" / f"{i:05d}.jpg").write_bytes(content)
    rows = {"image": [{"bytes": content, "path": None} for content in pictures]}
    table = Dataset.from_dict(rows, Features({"image": ImageFeature()}))
    (folder / "hub" / "datasets" / "bench" / "pictures" / "data").mkdir(parents=True)
    table.to_parquet(
        str(folder / "hub" / "datasets" / "bench" / "pictures" / "data" / "train-00000-of-00001.parquet"),
        batch_size=100,
    )
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=[8, 8, 8, 8], norm_num_groups=4, latent_channels=4, layers_per_block=1,
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
    ).save_pretrained(folder / "vae")  # fmt: skip


def reader(folder: Path, name: str, changes: dict[str, object]) -> Callable[[int, bool], tuple[float, float]]:
    """A function of (steps, whether they train) that tells pictures a second and the share of time spent waiting."""
    from liquid_diffusion.config import TrainConfig
    from liquid_diffusion.training.trainer import Trainer

    settings = {"image_size": 256, "model": "tiny", "batch_size": BATCH, "codec": str(folder / "vae"), "steps": 10**6}
    settings |= {"cache_latents": False}
    trainer = Trainer(TrainConfig(out=str(folder / "runs" / name), **{**settings, **changes}))  # type: ignore[arg-type]
    train_step = trainer.train_step
    nothing, training, in_step = torch.zeros(()), False, 0.0

    def timed(*batch: torch.Tensor) -> torch.Tensor:
        nonlocal in_step
        start = time.perf_counter()
        loss = train_step(*batch) if training else nothing
        in_step += time.perf_counter() - start
        return loss

    trainer.train_step = timed  # type: ignore[method-assign]
    batches = trainer.steps()  # one for all runs: the blocks are compiled when it begins

    def read(steps: int, train: bool) -> tuple[float, float]:
        nonlocal training, in_step
        training = train
        for _ in range(SKIPPED):
            next(batches)
        in_step, start = 0.0, time.perf_counter()
        for _ in range(steps):
            next(batches)
        took = time.perf_counter() - start
        return steps * BATCH / took, 1 - in_step / took

    return read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=1000, help="in each source")
    parser.add_argument("--steps", type=int, default=40, help="batches of each measurement")
    parser.add_argument("--runs", type=int, default=5, help="of which the median of pictures a second is taken")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from little_hub import LittleHub, reserve_port

    port = reserve_port()  # the clients read these when they are imported, so that is done later
    os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{port.getsockname()[1]}"
    os.environ["HF_HUB_DISABLE_XET"] = "1"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["HF_HOME"] = str(folder / "cache")
        from speed import machine, replace_rows

        from liquid_diffusion.data import latents, pictures

        pictures.IN_MEMORY_BYTES = latents.IN_MEMORY_BYTES = 0
        prepare(folder, arguments.pictures)
        parquet = folder / "hub" / "datasets" / "bench" / "pictures" / "data" / "train-00000-of-00001.parquet"
        with LittleHub(folder / "hub"):
            sources = {
                "folder": {"data": str(folder / "pictures")},
                "parquet": {"data": str(parquet)},
                "stream": {"data": "bench/pictures", "streaming": True},
                "cached latents": {"data": str(folder / "pictures"), "cache_latents": True},
            }
            readers = {name: reader(folder, name, changes) for name, changes in sources.items()}
            speeds: dict[str, list[float]] = {name: [] for name in readers}
            for _ in range(arguments.runs):
                for name, read in readers.items():
                    speeds[name].append(read(arguments.steps, False)[0])
            rows = [
                {
                    "machine": machine(torch.device("cpu")),
                    "source": name,
                    "pictures_per_second": f"{statistics.median(speeds[name]):.0f}",
                    "least": f"{min(speeds[name]):.0f}",
                    "most": f"{max(speeds[name]):.0f}",
                    "waiting_share": f"{read(arguments.steps, True)[1]:.4f}",
                }
                for name, read in readers.items()
            ]
    replace_rows(arguments.out, rows)
    print(arguments.out.read_text())


if __name__ == "__main__":
    main()
