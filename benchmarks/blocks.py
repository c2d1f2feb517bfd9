"""Attention-free blocks of other papers, in the frame of our U-Net: everything but the block is the same.

Written from the papers, not from their code.
Shapes: B batch, C channels, H W height and width, T width of the condition.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liquid_diffusion.models.depthwise import depthwise_conv
from liquid_diffusion.models.layers import ConditionLinear, PointwiseConv, channel_norm
from liquid_diffusion.models.liquid import modulate
from liquid_diffusion.models.unet import LiquidUNet

Block = Callable[[int, int, Sequence[int]], nn.Module]


def in_our_frame(
    block: Block,
    channels: int,
    num_classes: int,
    widths: Sequence[int],
    depths: Sequence[int],
    decoder_depths: Sequence[int] | None = None,
    condition_channels: int | None = None,
) -> LiquidUNet:
    """Our U-Net with other blocks, made by block(channels, condition_channels, scales), called as block(x, condition).

    What a block does with the scales that ours would have there is its own affair.
    """

    class Framed(LiquidUNet):
        def make_block(self, channels: int, condition_channels: int, scales: Sequence[int]) -> nn.Module:
            return block(channels, condition_channels, scales)

    model = Framed(
        channels, num_classes,
        widths=widths, depths=depths, decoder_depths=decoder_depths, condition_channels=condition_channels,
    )  # fmt: skip
    stages = (*model.encoder.children(), model.bottleneck, *model.decoder.children())
    model._repeated_blocks = sorted({type(block).__name__ for stage in stages for block in stage.children()})
    return model


def zero_modulation(condition_channels: int, channels: int) -> nn.Linear:
    """Scales, shifts and gates of adaLN-zero, all zero at the start."""
    linear = ConditionLinear(condition_channels, channels)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


class GlobalResponseNorm(nn.Module):
    """``x + gamma (x N(x)) + beta``, N the norm of each channel over the picture divided by the mean over channels.

    ConvNeXt V2 (Woo et al., arXiv 2301.00808), equations 1 to 3.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x.float(), dim=(2, 3), keepdim=True)  # (B, C, 1, 1)
        scale = (norm / (norm.mean(1, keepdim=True) + 1e-6)).to(x.dtype)
        gamma, beta = (p.to(x.dtype)[None, :, None, None] for p in (self.gamma, self.beta))
        return torch.addcmul(x + beta, x, gamma * scale)


class DiCoBlock(nn.Module):
    """DiCo (Ai et al., arXiv 2505.11196): a convolution module and a feed-forward of ratio 2, each with adaLN-zero.

    1x1 -> depthwise 3x3 -> GELU -> compact channel attention -> 1x1, where the attention is
    ``x sigmoid(W mean(x))``, a gate of each channel from the picture's mean.
    """

    def __init__(self, channels: int, condition_channels: int, ratio: int = 2) -> None:
        super().__init__()
        self.modulation = zero_modulation(condition_channels, 6 * channels)
        self.widen = PointwiseConv(channels, channels)
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.attention = nn.Linear(channels, channels)
        self.project = PointwiseConv(channels, channels)
        inner = ratio * channels
        self.feed_forward = nn.Sequential(PointwiseConv(channels, inner), nn.GELU(), PointwiseConv(inner, channels))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        m = self.modulation(condition)[:, :, None, None].chunk(6, dim=1)  # 6 x (B, C, 1, 1)
        y = F.gelu(self.depthwise(self.widen(modulate(channel_norm(x), m[0], m[1]))))  # (B, C, H, W)
        y = self.project(y * torch.sigmoid(self.attention(y.mean((2, 3))))[:, :, None, None])
        x = torch.addcmul(x, m[2], y)
        return torch.addcmul(x, m[5], self.feed_forward(modulate(channel_norm(x), m[3], m[4])))


class FCDMBlock(nn.Module):
    """FCDM (Kwon et al., arXiv 2603.09408): a ConvNeXt block for diffusion, without a feed-forward of its own.

    depthwise 7x7 -> adaLN -> 1x1, `ratio` times as wide -> GELU -> global response norm -> 1x1 -> gate. The depthwise
    convolution is ours, whose backward pass a CPU runs several times faster than the library's.
    """

    def __init__(self, channels: int, condition_channels: int, ratio: int = 3) -> None:
        super().__init__()
        self.modulation = zero_modulation(condition_channels, 3 * channels)
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.widen = PointwiseConv(channels, ratio * channels)
        self.norm = GlobalResponseNorm(ratio * channels)
        self.project = PointwiseConv(ratio * channels, channels)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift, gate = self.modulation(condition)[:, :, None, None].chunk(3, dim=1)  # (B, C, 1, 1) each
        y = depthwise_conv(x, self.depthwise.weight, self.depthwise.bias)  # (B, C, H, W)
        y = self.norm(F.gelu(self.widen(modulate(channel_norm(y), scale, shift))))  # (B, ratio C, H, W)
        return torch.addcmul(x, gate, self.project(y))
