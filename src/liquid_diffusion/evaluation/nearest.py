"""Is it a copy? The nearest training picture of a sample."""

from __future__ import annotations

import torch
from torch import Tensor
from tqdm import tqdm

from liquid_diffusion.data.pictures import PictureDataset
from liquid_diffusion.data.transforms import to_float

_CANDIDATES = 4  # a product of matrices finds them; it loses the digits that tell a copy from a near one


@torch.no_grad()
def nearest_pictures(samples: Tensor, dataset: PictureDataset, batch_size: int = 512) -> tuple[Tensor, Tensor]:
    """The training picture at the smallest root mean square distance of each sample, mirrored ones included.

    Args:
        samples: (B, 3, H, W) in [-1, 1].
        dataset: the pictures that the model was trained on, of the same size.
        batch_size: pictures compared at once.

    Returns:
        The pictures (B, 3, H, W) in [-1, 1] and their distances (B,), 0 for a copy and at most 2.
    """
    best = torch.full((len(samples),), torch.inf)
    nearest = torch.zeros_like(samples)
    flat = samples.flatten(1)
    starts = range(0, len(dataset), batch_size)
    for start in tqdm(starts, "Nearest training pictures", unit="batch", leave=False, delay=2):
        stop = min(start + batch_size, len(dataset))
        pictures = to_float(torch.stack([dataset.picture(i)["image"] for i in range(start, stop)]))
        if dataset.flip:
            pictures = torch.cat([pictures, pictures.flip(-1)])
        about = torch.cdist(flat, pictures.flatten(1), compute_mode="use_mm_for_euclid_dist")
        for index in about.topk(min(_CANDIDATES, len(pictures)), largest=False).indices.unbind(1):
            candidates = pictures[index]
            distance = (samples - candidates).square().mean((1, 2, 3)).sqrt()
            closer = distance < best
            best[closer] = distance[closer]
            nearest[closer] = candidates[closer]
    return nearest, best
