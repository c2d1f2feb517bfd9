"""Is it a copy? The nearest training picture of a sample."""

from __future__ import annotations

import torch
from torch import Tensor
from tqdm import tqdm

from liquid_diffusion.data.parallel import map_in_threads
from liquid_diffusion.data.pictures import PictureDataset
from liquid_diffusion.data.transforms import to_float

_AT_ONCE = 64  # samples beside their candidates, which take as much memory as five times as many
_PART_BYTES = 2**28  # of the float32 pictures on either side that are compared at once
_CANDIDATES = 4  # a product of matrices finds them; it loses the digits that tell a copy from a near one


@torch.no_grad()
def nearest_places(samples: Tensor, dataset: PictureDataset) -> tuple[Tensor, Tensor]:
    """Where the training picture at the smallest root mean square distance of each sample is, mirrored ones included.

    Args:
        samples: (B, 3, H, W), uint8 or in [-1, 1].
        dataset: the pictures that the model was trained on, of the same size.

    Returns:
        Distances (B,), 0 for a copy and at most 2; and places (B,) int64 in the set, for a mirrored picture
        len(dataset) more.
    """
    best = torch.full((len(samples),), torch.inf)
    places = torch.zeros(len(samples), dtype=torch.long)
    at_once = max(1, _PART_BYTES // (4 * samples[0].numel()))
    starts = range(0, len(dataset), at_once)
    for start in tqdm(starts, "Nearest training pictures", unit="batch", leave=False, delay=2):
        stop = min(start + at_once, len(dataset))
        read = map_in_threads(lambda i: dataset.picture(i)["image"], range(start, stop))
        pictures, place = to_float(torch.stack(list(read))), torch.arange(start, stop)
        if dataset.flip:
            pictures = torch.cat([pictures, pictures.flip(-1)])
            place = torch.cat([place, place + len(dataset)])
        flat = pictures.flatten(1)
        for some in torch.arange(len(samples)).split(at_once):
            wanted = samples[some] if samples.is_floating_point() else to_float(samples[some])
            about = torch.cdist(wanted.flatten(1), flat, compute_mode="use_mm_for_euclid_dist")
            candidates = about.topk(min(_CANDIDATES, len(pictures)), largest=False).indices  # (some, candidates)
            for part in torch.arange(len(some)).split(_AT_ONCE):
                chosen = candidates[part]
                apart = (wanted[part, None] - pictures[chosen]).square().mean((2, 3, 4)).sqrt()  # (part, candidates)
                least, which = apart.min(1)
                closer = least < best[some[part]]
                best[some[part][closer]] = least[closer]
                places[some[part][closer]] = place[chosen[closer, which[closer]]]
    return best, places


def pictures_at(dataset: PictureDataset, places: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) uint8 of a set at places (B,), from len(dataset) on mirrored."""
    pictures = []
    for place in places.tolist():
        image = dataset.picture(place % len(dataset))["image"]
        pictures.append(image.flip(-1) if place >= len(dataset) else image)
    return torch.stack(pictures)


def nearest_pictures(samples: Tensor, dataset: PictureDataset) -> tuple[Tensor, Tensor]:
    """The nearest training pictures (B, 3, H, W) in [-1, 1], and their distances (B,); see `nearest_places`."""
    distances, places = nearest_places(samples, dataset)
    return to_float(pictures_at(dataset, places)), distances
