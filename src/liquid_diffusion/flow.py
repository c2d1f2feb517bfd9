"""Rectified flow. The conventions of the whole package stand here, and nowhere else differently:

    t = 0 is data, t = 1 is noise            t (B,) float32 in [0, 1]
    x_t = (1 - t) x0 + t eps                 the straight path from data x0 to noise eps
    v   = dx_t / dt = eps - x0               what the model predicts
    x0  = x_t - t v                          hence the data that a prediction means

Sampling integrates v from t = 1 to t = 0. Liu et al., "Flow straight and fast" (arXiv 2209.03003).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

TimeSampling = Literal["logit-normal", "uniform"]


def _like_images(t: Tensor) -> Tensor:
    return t[:, None, None, None]


def interpolate(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """The point at time t of the path: x0, noise (B, C, H, W), t (B,) -> (B, C, H, W)."""
    return torch.lerp(x0, noise, _like_images(t))


def velocity(x0: Tensor, noise: Tensor) -> Tensor:
    """The training target, the same at every time of the path: (B, C, H, W) twice -> (B, C, H, W)."""
    return noise - x0


def predicted_data(x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """The data x0 at which a straight line from x_t (B, C, H, W) with velocity v ends; t (B,)."""
    return x_t - _like_images(t) * v


def sample_times(batch: int, kind: TimeSampling, generator: torch.Generator, shift: float = 1.0) -> Tensor:
    """Times to train at: (batch,) float32 in [0, 1], on the generator's device.

    "logit-normal" is the sigmoid of a standard normal number: it visits the middle of the path, where the velocity is
    hardest to tell, more often (Esser et al., arXiv 2403.03206, section 3.1).

    A shift s above 1 moves them towards the noise, ``s t / (1 + (s - 1) t)`` (ibid., equation 23): the logit of t grows
    by ``log s``.
    """
    if kind == "uniform":
        t = torch.rand(batch, generator=generator, device=generator.device)
    else:
        t = torch.sigmoid(torch.randn(batch, generator=generator, device=generator.device))
    return shift * t / (1 + (shift - 1) * t)


def flow_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of the velocity, in float32: (B, C, H, W) twice -> ()."""
    return torch.nn.functional.mse_loss(prediction.float(), target.float())
