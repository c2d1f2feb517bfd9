"""LiquidUNet in a training loop of one's own: torch, accelerate and diffusers, and of this package only the data.

    python examples/train_loop.py --steps 500 --out loop
    accelerate launch examples/train_loop.py --steps 500 --out loop

Pixels of 32 x 32 go into the model as they are, without a codec. For all that this leaves out (averaged weights, exact
resuming, guidance, latents, other data) there is `liquid-diffusion train`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import FlowMatchEulerDiscreteScheduler, SchedulerMixin
from diffusers.optimization import get_cosine_schedule_with_warmup
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from liquid_diffusion import LiquidUNet
from liquid_diffusion.data.sources import open_source


def load_emoji(size: int) -> tuple[TensorDataset, int]:
    """The packaged emoji as pictures (N, 3, size, size) in [-1, 1] with labels (N,), and the number of classes."""
    source = open_source("emoji")
    pairs = [source.read(i) for i in range(len(source))]
    pixels = np.stack([np.asarray(ImageOps.fit(image, (size, size))) for image, _ in pairs])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
    return TensorDataset(images, torch.tensor([label for _, label in pairs])), len(source.label_names)


@torch.no_grad()
def sample(
    model: LiquidUNet, scheduler: SchedulerMixin, labels: Tensor, size: int, steps: int, seed: int = 0
) -> Tensor:
    """Pictures (N, 3, size, size), one for each label, by any of diffusers' flow schedulers."""
    noise = torch.randn(len(labels), 3, size, size, generator=torch.Generator().manual_seed(seed))
    x = noise.to(model.device)
    scheduler.set_timesteps(steps, device=model.device)
    for timestep in scheduler.timesteps:
        t = timestep.float() / 1000  # the model's time is in [0, 1]
        v = model(x, t, labels.to(model.device)).sample
        x = scheduler.step(v, timestep, x, return_dict=False)[0]
    return x


def main() -> None:
    """Train, draw a row of pictures for each class, save the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, default=Path("loop"))
    settings = parser.parse_args()

    accelerator = Accelerator()
    set_seed(0)
    dataset, classes = load_emoji(settings.size)
    model = LiquidUNet.from_preset("nano", in_channels=3, num_classes=classes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, betas=(0.9, 0.99))
    processes = accelerator.num_processes  # accelerate takes a step of the schedule for each of them
    batch_size = min(settings.batch_size, len(dataset) // processes)
    loader = DataLoader(dataset, batch_size, shuffle=True, drop_last=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, 10 * processes, settings.steps * processes)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    set_seed(0, device_specific=True)  # each process draws its own times and noise

    bar = tqdm(total=settings.steps, disable=not accelerator.is_main_process)
    step = 0
    while step < settings.steps:
        for x0, labels in loader:
            noise = torch.randn_like(x0)
            t = torch.sigmoid(torch.randn(len(x0), device=x0.device))  # (B,), logit-normal
            x_t = torch.lerp(x0, noise, t[:, None, None, None])  # 0 is data, 1 is noise
            loss = F.mse_loss(model(x_t, t, labels).sample, noise - x0)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            step += 1
            bar.update()
            bar.set_postfix(loss=f"{loss.item():.3f}")
            if step == settings.steps:
                break

    if accelerator.is_main_process:
        trained = accelerator.unwrap_model(model).eval()
        trained.save_pretrained(settings.out)
        rows = torch.arange(classes).repeat_interleave(4)
        drawn = sample(trained, FlowMatchEulerDiscreteScheduler(), rows, settings.size, 20).clamp(-1, 1)
        grid = drawn.unflatten(0, (classes, 4)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)  # (H, W, 3)
        Image.fromarray(((grid + 1) * 127.5).round().byte().cpu().numpy()).save(settings.out / "samples.png")
    accelerator.end_training()


if __name__ == "__main__":
    main()
