"""What only a GPU can tell of the package's promises; its speed and quality are measured by speed.py and quality.py.

    python benchmarks/gpu.py            # all checks; to benchmarks/results/gpu-checks.csv and gpu-memory.csv
    python benchmarks/gpu.py --checks memory

- equality: the sampler, recorded as a CUDA graph, beside the model itself, in float32 and without TF32;
- precision: training steps in bf16 and fp16, as they are and compiled and recorded: finite losses and weights, a loss
  that falls, and the same one either way;
- memory: the most that a training takes in its three moments, which benchmarks/memory.py sets beside the estimate;
- kernels: convolutions of the block's shapes in the layouts and calls that could serve them.
"""

from __future__ import annotations

import argparse
import csv
import gc
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from figures import read_rows
from PIL import Image
from torch import Tensor
from triton.testing import do_bench

from liquid_diffusion.compile import compile_for_sampling
from liquid_diffusion.config import TrainConfig
from liquid_diffusion.estimate import SD_VAE
from liquid_diffusion.models.unet import LiquidUNet
from liquid_diffusion.presets import PRESETS
from liquid_diffusion.sampling import guide, make_scheduler, solver_times
from liquid_diffusion.training.trainer import Trainer

RESULTS = Path(__file__).parent / "results"
DEVICE = torch.device("cuda")
CLASSES, PICTURES = 9, 64
DEPTHWISE = [(8, 64, 32, 32), (8, 128, 16, 16), (8, 256, 8, 8), (64, 64, 32, 32), (64, 256, 8, 8), (8, 64, 128, 128)]
CHECK_COLUMNS = ["gpu", "check", "case", "figure", "value"]
MEMORY_COLUMNS = [
    *("gpu", "model", "image_size", "batch_size", "codec", "precision", "gradient_checkpointing", "ema_on_cpu"),
    *("encoding_bytes", "step_bytes", "grid_bytes"),
]
Finding = tuple[str, str, float]  # case, figure, value


def equality() -> Iterator[Finding]:
    """The largest |recorded - model| / |model| over three times of a schedule, each asked for three times."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    times = solver_times(make_scheduler(), 25)
    for preset in PRESETS:
        model = with_random_weights(preset)
        each = torch.arange(4, device=DEVICE)
        for case, labels, guidance in (("no label", None, 1.0), ("one class", each[0], 1.0), ("guided", each, 2.0)):
            sampler = compile_for_sampling(model, times, labels, guidance, torch.float32)
            wanted = None if labels is None else labels.expand(4)
            reference = guide(model, wanted, CLASSES, guidance)
            worst = 0.0
            for t in (times[0], times[9], times[-1]) * 3:
                x, at = torch.randn(4, 4, 32, 32, device=DEVICE), torch.full((4,), t, device=DEVICE)
                with torch.no_grad():
                    true = reference(x, at)
                worst = max(worst, float((sampler(x, at) - true).norm() / true.norm()))
            yield f"{preset}, {case}", "relative error", worst


def with_random_weights(preset: str) -> LiquidUNet:
    """A model none of whose parts is the identity, as a new one's blocks are."""
    torch.manual_seed(0)
    model = LiquidUNet.from_preset(preset, 4, CLASSES).to(DEVICE, memory_format=torch.channels_last).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and not parameter.any():
                parameter.normal_(std=0.02)
    return model


def training(folder: Path, **options: Any) -> Trainer:
    """A run of 30 steps on some pictures, which writes nothing unless it is asked to."""
    given = {"data": str(folder / "pictures"), "out": str(folder / f"run-{len(list(folder.iterdir()))}")}
    config = TrainConfig(**given, steps=30, warmup_steps=5, val_fraction=0.0, workers=0, flip=False)
    return Trainer(replace(config, **options))


def precision(folder: Path) -> Iterator[Finding]:
    """Losses of the first and the last five of 30 steps, and whether all weights are finite after them."""
    cases = [(preset, kind, False) for preset in PRESETS for kind in ("bf16", "fp16")]
    for preset, kind, compiled in [*cases, ("tiny", "bf16", True), ("tiny", "fp16", True)]:
        trainer = training(folder, model=preset, image_size=64, precision=kind, compile=compiled, lr=1e-3)
        losses = torch.stack([result.loss for result in trainer.steps()])
        case = f"{preset}, {kind}{', compiled' if compiled else ''}"
        yield case, "first losses", float(losses[:5].mean())
        yield case, "last losses", float(losses[-5:].mean())
        yield case, "finite", float(all(parameter.isfinite().all() for parameter in trainer.model.parameters()))


def peak_of(action: Callable[[], Any]) -> tuple[Any, int]:
    """What an action returns, and the most bytes that tensors took of the GPU meanwhile."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    result = action()
    torch.cuda.synchronize()
    return result, torch.cuda.max_memory_allocated()


def memory(folder: Path) -> Iterator[dict[str, Any]]:
    """Of trainings with cached latents of 8 pictures a step, and of one on pixels."""
    torch.manual_seed(0)
    AutoencoderKL(**SD_VAE).save_pretrained(folder / "vae")
    usual = {"image_size": 256, "batch_size": 8, "precision": "bf16", "codec": str(folder / "vae")}
    cases: list[dict[str, Any]] = [
        {"model": model, "image_size": size} for size in (256, 512) for model in ("tiny", "small", "base")
    ]
    cases += [{"model": "tiny", "precision": "fp16"}, {"model": "tiny", "precision": "fp32"}]
    cases += [{"model": "small", "image_size": 512, "gradient_checkpointing": True}]
    cases += [{"model": "base", "ema_on_cpu": True}, {"model": "tiny", "batch_size": 32}]
    cases += [{"model": "tiny", "image_size": 64, "batch_size": 64, "codec": "pixels"}]
    for case in cases:
        options = {**usual, **case}
        trainer, encoding = peak_of(lambda options=options: training(folder, compile=False, steps=10, **options))
        _, step = peak_of(lambda trainer=trainer: list(trainer.steps()))
        _, grid = peak_of(trainer.draw_samples)
        codec = "pixels" if options["codec"] == "pixels" else "sd-vae"
        peaks = {"encoding_bytes": encoding, "step_bytes": step, "grid_bytes": grid}
        yield {"gradient_checkpointing": False, "ema_on_cpu": False} | options | {"codec": codec} | peaks
        del trainer


def kernels() -> Iterator[Finding]:
    """Milliseconds of convolutions in bfloat16, each forward and each gradient for itself."""
    for shape in DEPTHWISE:
        for layout in (torch.channels_last, torch.contiguous_format):
            x = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16).contiguous(memory_format=layout)
            grad, kernel = torch.randn_like(x), torch.randn(shape[1], 1, 7, 7, device=DEVICE, dtype=torch.bfloat16)

            def backward(mask: list[bool], x: Tensor = x, grad: Tensor = grad, kernel: Tensor = kernel) -> object:
                geometry = ([1, 1], [3, 3], [1, 1], False, [0, 0], kernel.shape[0])
                return torch.ops.aten.convolution_backward(grad, x, kernel, None, *geometry, mask)

            case = f"depthwise 7x7 {'x'.join(map(str, shape))} {str(layout).removeprefix('torch.')}"
            yield case, "forward ms", median(lambda x=x, k=kernel: F.conv2d(x, k, padding=3, groups=x.shape[1]))
            yield case, "input gradient ms", median(lambda b=backward: b([True, False, False]))
            yield case, "weight gradient ms", median(lambda b=backward: b([False, True, False]))
            yield case, "addition ms", median(lambda x=x, grad=grad: x + grad)
        x = x.contiguous(memory_format=torch.channels_last)
        weight = torch.randn(4 * shape[1], shape[1], device=DEVICE, dtype=torch.bfloat16)
        bias = torch.randn(4 * shape[1], device=DEVICE, dtype=torch.bfloat16)
        case = f"1x1 {'x'.join(map(str, shape))} to {4 * shape[1]}"
        flat = x.permute(0, 2, 3, 1)
        yield case, "convolution ms", median(lambda x=x, w=weight[..., None, None], b=bias: F.conv2d(x, w, b))
        yield case, "linear ms", median(lambda x=flat, w=weight, b=bias: F.linear(x, w, b))
        for call, apply, given in (
            ("convolution", F.conv2d, (x, weight[..., None, None], bias)),
            ("linear", F.linear, (flat, weight, bias)),
        ):
            leaves = [tensor.detach().requires_grad_() for tensor in given]
            out = apply(*leaves)
            grad = torch.randn_like(out)
            yield (
                case,
                f"{call} gradients ms",
                median(
                    lambda out=out, leaves=leaves, grad=grad: torch.autograd.grad(out, leaves, grad, retain_graph=True)
                ),
            )


def median(function: Callable[[], object]) -> float:
    return float(do_bench(function, warmup=5, rep=20, return_mode="median"))


def write(name: str, columns: list[str], rows: list[dict[str, Any]]) -> None:
    with (RESULTS / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            rounded = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()}
            writer.writerow({"gpu": torch.cuda.get_device_name(), **rounded})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ["equality", "precision", "memory", "kernels"]
    parser.add_argument("--checks", nargs="+", choices=known, default=known)
    wanted = parser.parse_args().checks
    RESULTS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "pictures").mkdir()
        for i in range(PICTURES):
            noise = torch.randint(256, (8, 8, 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
            Image.fromarray(noise.numpy()).resize((512, 512)).save(folder / "pictures" / f"{i}.png")
        checks: list[dict[str, Any]] = []
        finders: dict[str, Callable[[], Iterator[Finding]]] = {
            "equality": equality,
            "precision": lambda: precision(folder),
            "kernels": kernels,
        }
        for check, find in finders.items():
            for case, figure, value in find() if check in wanted else ():
                checks.append({"check": check, "case": case, "figure": figure, "value": value})
                print(f"{check:10}{case:50}{figure:24}{value:.4g}", flush=True)
        if checks:
            kept = [row for row in read_rows(RESULTS / "gpu-checks.csv") if row["check"] not in wanted]
            write("gpu-checks.csv", CHECK_COLUMNS, [*kept, *checks])
        if "memory" in wanted:
            rows = []
            for row in memory(folder):
                rows.append(row)
                print(*row.values(), flush=True)
            write("gpu-memory.csv", MEMORY_COLUMNS, rows)


if __name__ == "__main__":
    main()
