"""Does the model copy? Nearest training pictures of samples, beside those of pictures it has never seen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from liquid_diffusion.data.transforms import to_pil
from liquid_diffusion.grid import draw_grid

WORST_PAIRS = 16


@dataclass(frozen=True)
class Nearness:
    """Distances to the nearest training picture, of samples and of held-out pictures.

    Where samples are copies, their median is far below that of held-out pictures, and many of them are nearer than all
    but one in a hundred of these. What is None had no held-out pictures to be told from.
    """

    samples_median: float
    held_out_median: float | None = None
    held_out_1st_percentile: float | None = None
    share_of_samples_nearer: float | None = None

    @classmethod
    def of(cls, samples: Tensor, held_out: Tensor | None) -> Nearness:
        """Of distances (M,) of samples and (K,) of held-out pictures, if there are any."""
        if held_out is None or not len(held_out):
            return cls(float(samples.median()))
        threshold = torch.quantile(held_out.double(), 0.01)
        nearer = (samples.double() < threshold).double().mean()
        return cls(float(samples.median()), float(held_out.median()), float(threshold), float(nearer))


def draw_pairs(samples: Tensor, nearest: Tensor) -> Image.Image:
    """Rows of samples (K, 3, H, W) in [-1, 1], each over the row of their nearest training pictures."""
    columns = min(8, len(samples))
    rows: list[Image.Image] = []
    for start in range(0, len(samples), columns):
        for pictures in (to_pil(samples[start : start + columns]), to_pil(nearest[start : start + columns])):
            rows += pictures + [Image.new("RGB", pictures[0].size, "white")] * (columns - len(pictures))
    return draw_grid(rows, columns, row_names=["sample", "nearest"] * (len(rows) // (2 * columns)), rows_together=2)
