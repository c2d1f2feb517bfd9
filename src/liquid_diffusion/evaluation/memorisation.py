"""Does the model copy? Nearest training pictures of samples, beside those of pictures it has never seen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from liquid_diffusion.data.transforms import to_pil
from liquid_diffusion.grid import draw_grid

WORST_PAIRS = 16
_RESAMPLES = 1000  # of the bootstrap: a standard error to 2 % of itself


@dataclass(frozen=True)
class Nearness:
    """Distances to the nearest training picture, of samples and of held-out pictures.

    Where samples are copies, their median is far below that of held-out pictures, and many of them are nearer than all
    but one in a hundred of these. `ratio` is the samples' median over the other; its standard error is of the pictures
    on both sides, by the bootstrap. What is None had no held-out pictures to be told from.
    """

    samples_median: float
    held_out_median: float | None = None
    held_out_1st_percentile: float | None = None
    share_of_samples_nearer: float | None = None
    ratio: float | None = None
    ratio_standard_error: float | None = None

    @classmethod
    def of(cls, samples: Tensor, held_out: Tensor | None, weights: Tensor | None = None) -> Nearness:
        """Of distances (M,) of samples and (K,) of held-out pictures, if there are any.

        Args:
            samples, held_out: the distances.
            weights: (K,), how often each held-out picture counts, see `class_weights`.
        """
        if held_out is None or not len(held_out):
            return cls(float(samples.median()))
        samples, held_out = samples.double(), held_out.double()
        weights = torch.ones_like(held_out) if weights is None else weights.double()
        median, threshold = (float(_quantile(held_out, weights, share)) for share in (0.5, 0.01))
        nearer = float((samples < threshold).double().mean())
        middle = float(samples.median())
        if median == 0:  # half of what was held out is what was trained on
            return cls(middle, median, threshold, nearer)
        draws, ratios = torch.Generator().manual_seed(0), []
        for _ in range(_RESAMPLES):
            some = torch.randint(len(samples), (len(samples),), generator=draws)
            others = torch.randint(len(held_out), (len(held_out),), generator=draws)
            if weights[others].any():  # else there is nothing to go by
                ratios.append(samples[some].median() / _quantile(held_out[others], weights[others], 0.5))
        error = torch.stack(ratios).std()
        return cls(middle, median, threshold, nearer, middle / median, float(error) if error.isfinite() else None)


def class_weights(held_out: Tensor, samples: Tensor) -> Tensor:
    """How often each held-out picture has to count for its class to be as frequent as among the samples.

    Pictures of one class may be nearer to each other than those of another: faces lie nearer to faces than a tool to
    any tool. A few held-out pictures have other classes by chance, which would be taken for nearness of the samples.

    Args:
        held_out, samples: labels (K,) and (M,) int64.

    Returns:
        (K,) float64; all ones where no class is on both sides.
    """
    classes = 1 + int(torch.cat([held_out, samples]).max())
    wanted, had = (labels.bincount(minlength=classes).double() for labels in (samples, held_out))
    weights = (wanted / had.clamp_min(1))[held_out]
    return weights if weights.any() else torch.ones_like(weights)


def _quantile(values: Tensor, weights: Tensor, share: float) -> Tensor:
    """The least of some values (K,), () as they are, below or at which a share of all their weights (K,) lies."""
    values, order = values.sort()
    reached = weights[order].cumsum(0)
    return values[torch.searchsorted(reached, share * reached[-1])]


def draw_pairs(samples: Tensor, nearest: Tensor) -> Image.Image:
    """Rows of samples (K, 3, H, W) in [-1, 1], each over the row of their nearest training pictures."""
    columns = min(8, len(samples))
    rows: list[Image.Image] = []
    for start in range(0, len(samples), columns):
        for pictures in (to_pil(samples[start : start + columns]), to_pil(nearest[start : start + columns])):
            rows += pictures + [Image.new("RGB", pictures[0].size, "white")] * (columns - len(pictures))
    return draw_grid(rows, columns, row_names=["sample", "nearest"] * (len(rows) // (2 * columns)), rows_together=2)
