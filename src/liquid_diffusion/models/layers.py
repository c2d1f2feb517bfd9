"""Norm, embeddings and resampling: the parts of the U-Net that are not liquid.

Shapes: B batch, C channels, H W height and width, T width of the embedding of time and label.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

_OCTAVES = 3  # of waves, the longest of which is twice as long as the picture
_LEAST_TIME = 0.002  # nearer to 0 and 1 all times are one to the model: one in 10^9 of those trained at
_FASTEST_WAVE = 10.0  # of a time's embedding, in radians for each unit of its logit
# In a batch: up to so many a CPU trains faster by a matrix product in bfloat16 than by a 1x1 convolution, which brings
# the weights into a layout of its own and their gradient back: a step of tiny took 206 ms in place of 219 on two cores.
# Of 2,048 pixels and more both take as long, and in float32 the convolution is faster.
_FEW_PIXELS = 1024


def channel_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """LayerNorm over the channels of each pixel: (B, C, H, W) -> (B, C, H, W); weight and bias (C,), or without.

    The statistics are float32 whatever the dtype of `x`. Autocast is off because it would widen the *output* to
    float32 on CUDA, which doubles the memory traffic of all that follows.
    """
    with torch.autocast(x.device.type, enabled=False):
        return F.layer_norm(x.permute(0, 2, 3, 1), (x.shape[1],), weight, bias, eps).permute(0, 3, 1, 2)


class ChannelNorm(nn.LayerNorm):
    """`channel_norm` with a weight and a bias: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return channel_norm(x, self.weight, self.bias, self.eps)


class PointwiseConv(nn.Conv2d):
    """A 1x1 convolution, in training a matrix product where that is faster: (B, C, H, W) -> (B, C', H, W)."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        few = x.numel() <= _FEW_PIXELS * self.in_channels
        if not (few and x.device.type == "cpu" and x.dtype == torch.bfloat16 and torch.is_grad_enabled()):
            return super().forward(x)
        return F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class ConditionLinear(nn.Linear):
    """A linear layer that reads the embedding of time and label: (B, T) -> (B, C).

    A type of its own because its weights are trained at another rate, see `training.optimizer.Muon`.
    """


class ConditionEmbedding(nn.Module):
    """Time, and a label where there are classes, as one vector.

    A sinusoidal embedding of the logit of t, a two-layer MLP, and a learned vector for each label, the last one being
    the null label of classifier-free guidance. ``log(t / (1 - t))`` is half the logarithm of the noise's power over
    the picture's: it changes most at the ends of the path, where that ratio does, and t hardly.

    Args:
        sinusoid_channels: width of the sinusoidal embedding.
        channels: width T of the result.
        num_classes: number of labels without the null label; 0 for none.
    """

    def __init__(self, sinusoid_channels: int, channels: int, num_classes: int = 0) -> None:
        super().__init__()
        self.sinusoid_channels = sinusoid_channels
        self.linear_1 = nn.Linear(sinusoid_channels, channels)
        self.linear_2 = ConditionLinear(channels, channels)
        self.labels = nn.Embedding(num_classes + 1, channels) if num_classes else None

    def forward(self, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """t (B,) in [0, 1], labels (B,) int64 or None -> (B, T), float32 under autocast."""
        with torch.autocast(t.device.type, enabled=False):
            logit = torch.logit(t.float(), eps=_LEAST_TIME)  # (B,), from -6.2 to 6.2
            x = get_timestep_embedding(_FASTEST_WAVE * logit, self.sinusoid_channels)  # (B, sinusoid)
            x = self.linear_1(x.to(self.linear_1.weight.dtype))  # (B, T)
            x = self.linear_2(F.silu(x))  # (B, T)
            if self.labels is not None and labels is not None:
                x = x + self.labels(labels)  # (B, T)
            return F.silu(x)


class PositionEmbedding(nn.Module):
    """Where a pixel lies, for a picture of any size: zero at the start.

    A 1x1 convolution of the coordinates, from -1 to 1 whatever the size (CoordConv, Liu et al., arXiv 1807.03247), and
    of the sines and cosines of pi/2, pi and 2 pi times them (Fourier features, Tancik et al., arXiv 2006.10739). A
    convolution knows of places only what reaches it from the border.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(2 * (1 + 2 * _OCTAVES), channels, 1, bias=False)
        nn.init.zeros_(self.project.weight)

    def forward(self, x: Tensor) -> Tensor:
        """The embedding (1, C, H, W) of the places of x (B, any channels, H, W), in the dtype of x."""
        rows, columns = ((2 * torch.arange(size, device=x.device) + 1) / size - 1 for size in x.shape[2:])
        places = torch.stack(torch.meshgrid(rows, columns, indexing="ij"))  # (2, H, W)
        angles = [math.pi / 2 * 2**k * places for k in range(_OCTAVES)]
        features = torch.cat([places, *(wave(angle) for angle in angles for wave in (torch.sin, torch.cos))])
        return self.project(features[None].to(x.dtype).contiguous(memory_format=torch.channels_last))


def add_to_each(x: Tensor, same: Tensor) -> Tensor:
    """``x + same`` for pictures x (B, C, H, W) and what is the same for all of them (1, C, H, W).

    The gradient of `same` is a sum over the batch, for which torch takes many times as long on a CPU of pictures in
    channels-last as of rows. So they are added as rows: forward and backward pass of (64, 128, 16, 16) in bfloat16
    take 1.4 ms in place of 7.5 on two cores with AMX (benchmarks/results/convolutions.csv).
    """
    rows, row = (tensor.permute(0, 2, 3, 1).flatten(1) for tensor in (x, same))  # (B, HWC) and (1, HWC)
    return (rows + row).unflatten(1, (*x.shape[2:], x.shape[1])).permute(0, 3, 1, 2)


class Downsample(nn.Conv2d):
    """Squares of 2x2 pixels as one, by a linear map: (B, C, H, W) -> (B, C', H/2, W/2)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 2, stride=2)


class Join(nn.Module):
    """What comes from a coarser stage and what the encoder left at this one, a 1x1 convolution of each, added.

    That is the 1x1 convolution of both laid side by side. What is enlarged by nearest neighbours is convolved before
    it, which is the same in a quarter of the time.

    Args:
        below: channels C' of the coarser stage.
        channels: C of this one.
        scale: 2, or 1 where both are of one size.
    """

    def __init__(self, below: int, channels: int, scale: int) -> None:
        super().__init__()
        self.scale = scale
        self.below = PointwiseConv(below, channels)
        self.skip = PointwiseConv(channels, channels)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """x (B, C', H / scale, W / scale), skip (B, C, H, W) -> (B, C, H, W)."""
        x = self.below(x)  # (B, C, H / scale, W / scale)
        if self.scale > 1:
            x = F.interpolate(x, scale_factor=float(self.scale), mode="nearest")  # (B, C, H, W)
        return x + self.skip(skip)
