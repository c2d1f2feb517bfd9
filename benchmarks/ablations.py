"""Variants of the liquid block, by name: each changes one thing of the block that the presets ship.

Where a variant has fewer or more parameters, its hidden features are made wider or narrower until the model has as many
as ours within 5 %, so that a comparison tells of the change and not of the size.

Shapes: B batch, C channels, H W height and width, T width of the condition.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from blocks import GlobalResponseNorm, in_our_frame
from torch import Tensor, nn

from liquid_diffusion.config import UNetConfig
from liquid_diffusion.flow import TimeSampling
from liquid_diffusion.models.depthwise import depthwise_conv7, merge_kernels
from liquid_diffusion.models.layers import channel_norm
from liquid_diffusion.models.liquid import (
    Gate,
    LiquidBlock,
    MultiScaleSpatialMix,
    ParallelCfC,
    Relaxation,
    liquid_relaxation,
    modulate,
)
from liquid_diffusion.models.unet import LiquidUNet
from liquid_diffusion.presets import preset

_STEP = 32  # channels; a CPU computes slices of other sizes several times slower


def hidden_width(channels: int, ratio: float) -> int:
    """About `ratio` times as wide, in steps of 32 channels."""
    return _STEP * max(1, round(ratio * channels / _STEP))


def mlp(channels: int, hidden: int) -> nn.Sequential:
    """1x1 -> SiLU -> 1x1."""
    return nn.Sequential(nn.Conv2d(channels, hidden, 1), nn.SiLU(), nn.Conv2d(hidden, channels, 1))


class MeanRelaxation(ParallelCfC):
    """The seed's form, ``alpha = exp(-lambda |mean(t_emb)|)``: one number for all channels, about 1 at the start."""

    def __init__(self, channels: int, condition_channels: int, hidden: int) -> None:
        super().__init__(channels, condition_channels, hidden)
        del self.time_relaxation

    def reset_parameters(self) -> None:
        self.relaxation = "none"  # the parent would reset what is not there
        super().reset_parameters()
        self.relaxation = "liquid"

    def alpha(self, condition: Tensor) -> Tensor:
        return torch.exp(-self.log_rate.float().exp() * condition.float().mean(1, keepdim=True).abs())  # (B, C)


class EarlyRelaxation(ParallelCfC):
    """Relaxation that starts at alpha = 1/2."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.constant_(self.time_relaxation.bias, math.log(2))


class ContentFreeGate(ParallelCfC):
    """A gate that knows the time alone: ``sigmoid(-b(t))``, the same for all pixels."""

    def __init__(self, channels: int, condition_channels: int, hidden: int) -> None:
        super().__init__(channels, condition_channels, hidden, "none")
        self.offset = nn.Linear(condition_channels, channels)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        g, h = self.heads(F.silu(self.backbone(x))).chunk(2, dim=1)  # (B, C, H, W) each
        gate = torch.sigmoid(-self.offset(condition))[:, :, None, None].to(g.dtype)  # (B, C, 1, 1)
        alpha = self.alpha(condition)[:, :, None, None].to(g.dtype)  # (B, C, 1, 1)
        return liquid_relaxation(x, torch.lerp(h, g, gate), alpha)


class WithoutCondition(nn.Module):
    """A layer in the place of the liquid one that hears of the time only by the modulation of its input."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        del condition
        return self.layer(x)


class SwiGLU(nn.Module):
    """``W (silu(U x) * V x)`` (Shazeer, arXiv 2002.05202)."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.widen = nn.Conv2d(channels, 2 * hidden, 1)
        self.narrow = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.widen(x).chunk(2, dim=1)  # (B, hidden, H, W) each
        return self.narrow(F.silu(a) * b)


class Depthwise7(nn.Conv2d):
    """A depthwise 7x7 convolution with our backward pass."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 7, padding=3, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        return depthwise_conv7(x, self.weight, self.bias)


class MixWithResponseNorm(MultiScaleSpatialMix):
    """Global response normalisation in place of the gate from global pooling."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        del self.pool_gate
        self.norm = GlobalResponseNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        kernel = merge_kernels(self.kernel_3, self.kernel_5, self.kernel_7)  # (C, 1, 7, 7)
        return self.project(self.norm(depthwise_conv7(x, kernel, self.bias)))


class MixWithoutGate(MultiScaleSpatialMix):
    """No gate."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        del self.pool_gate

    def forward(self, x: Tensor) -> Tensor:
        return self.project(depthwise_conv7(x, merge_kernels(self.kernel_3, self.kernel_5, self.kernel_7), self.bias))


class Variant(LiquidBlock):
    """Our block with any layer in the place of the liquid one, called as layer(x, condition)."""

    def __init__(self, channels: int, condition_channels: int, layer: nn.Module) -> None:
        super().__init__(channels, condition_channels, 1)
        self.cfc = layer


class WithFeedForward(Variant):
    """Three residual steps: hidden features as wide as the input, and a feed-forward of any width at the end."""

    def __init__(self, channels: int, condition_channels: int, ratio: float) -> None:
        super().__init__(channels, condition_channels, ParallelCfC(channels, condition_channels, channels))
        hidden = hidden_width(channels, ratio)
        self.modulation = nn.Linear(condition_channels, 9 * channels)
        self.feed_forward = nn.Sequential(nn.Conv2d(channels, hidden, 1), nn.GELU(), nn.Conv2d(hidden, channels, 1))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        m = self.modulation(condition)[:, :, None, None].chunk(9, dim=1)  # 9 x (B, C, 1, 1)
        x = torch.addcmul(x, m[2], self.cfc(modulate(channel_norm(x), m[0], m[1]), condition))
        x = torch.addcmul(x, m[5], self.mix(modulate(channel_norm(x), m[3], m[4])))
        return torch.addcmul(x, m[8], self.feed_forward(modulate(channel_norm(x), m[6], m[7])))


class PoolingGate(nn.Module):
    """``x sigmoid(W mean(x))``, the gate of our spatial mix."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.linear(x.mean((2, 3))))[:, :, None, None]


class OneStep(Variant):
    """Liquid layer and spatial mix in one residual step: the hidden features of the heads look around."""

    def __init__(self, channels: int, condition_channels: int, ratio: float) -> None:
        hidden = hidden_width(channels, ratio)
        layer = ParallelCfC(channels, condition_channels, hidden)
        layer.backbone = nn.Sequential(layer.backbone, Depthwise7(hidden))
        layer.heads = nn.Sequential(PoolingGate(hidden), layer.heads)
        super().__init__(channels, condition_channels, layer)
        del self.mix
        self.modulation = nn.Linear(condition_channels, 3 * channels)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        m = self.modulation(condition)[:, :, None, None].chunk(3, dim=1)  # 3 x (B, C, 1, 1)
        return torch.addcmul(x, m[2], self.cfc(modulate(channel_norm(x), m[0], m[1]), condition))


class WithoutOutputGates(Variant):
    """``x <- x + part(modulate(norm(x)))``: no adaLN-zero, so that a new block is not the identity."""

    def __init__(self, channels: int, condition_channels: int, ratio: float) -> None:
        super().__init__(
            channels, condition_channels, ParallelCfC(channels, condition_channels, hidden_width(channels, ratio))
        )
        self.modulation = nn.Linear(condition_channels, 4 * channels)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        m = self.modulation(condition)[:, :, None, None].chunk(4, dim=1)  # 4 x (B, C, 1, 1)
        x = x + self.cfc(modulate(channel_norm(x), m[0], m[1]), condition)
        return x + self.mix(modulate(channel_norm(x), m[2], m[3]))


Block = Callable[[int, int, float], nn.Module]  # made of (channels, condition_channels, ratio)


def _with_liquid(make: Callable[[int, int, int], nn.Module]) -> Block:
    """Another layer in the liquid one's place, made of (channels, condition_channels, hidden features)."""
    return lambda channels, t, ratio: Variant(channels, t, make(channels, t, hidden_width(channels, ratio)))


def _switched(gate: Gate, relaxation: Relaxation) -> Block:
    return _with_liquid(lambda channels, t, hidden: ParallelCfC(channels, t, hidden, gate, relaxation))


def _without_condition(make: Callable[[int, int], nn.Module]) -> Block:
    return _with_liquid(lambda channels, _, hidden: WithoutCondition(make(channels, hidden)))


def _with_mix(make: Callable[[int], nn.Module]) -> Block:
    def block(channels: int, condition_channels: int, ratio: float) -> nn.Module:
        variant = Variant(
            channels, condition_channels, ParallelCfC(channels, condition_channels, hidden_width(channels, ratio))
        )
        variant.mix = make(channels)
        return variant

    return block


def _with_backbone(make: Callable[[int], nn.Module]) -> Block:
    """A depthwise convolution in front of the 1x1 that makes the hidden features of the liquid layer."""

    def block(channels: int, condition_channels: int, ratio: float) -> nn.Module:
        layer = ParallelCfC(channels, condition_channels, hidden_width(channels, ratio))
        layer.backbone = nn.Sequential(make(channels), layer.backbone)
        return Variant(channels, condition_channels, layer)

    return block


def _dense(channels: int, condition_channels: int, ratio: float) -> nn.Module:
    """A full 3x3 convolution in place of the 1x1 that makes the hidden features of the liquid layer."""
    hidden = hidden_width(channels, ratio)
    layer = ParallelCfC(channels, condition_channels, hidden)
    layer.backbone = nn.Conv2d(channels, hidden, 3, padding=1)
    return Variant(channels, condition_channels, layer)


@dataclass(frozen=True)
class Ablation:
    """A variant.

    Attributes:
        question: what it answers, in a few words for the table.
        block: made of (channels, condition_channels, ratio).
        times, time_shift: the distribution of the training times.
        shape: in place of the preset's; its parameters are not matched, but may not be 5 % off either.
        equal: whether its parameters are matched; else it has what it has, and the table tells.
    """

    question: str
    block: Block
    times: TimeSampling = "logit-normal"
    time_shift: float = 1.0
    shape: UNetConfig | None = None
    equal: bool = True


_NARROW = UNetConfig((64, 128, 160), (1, 1, 1), 3)

ABLATIONS = {
    "liquid": Ablation("the block as it ships", _switched("liquid", "liquid")),
    "gate static": Ablation("a gate without time", _switched("static", "liquid")),
    "gate none": Ablation("no gate: the mean of two heads", _switched("none", "liquid")),
    "gate content-free": Ablation("a gate of time alone", _with_liquid(ContentFreeGate)),
    "relaxation none": Ablation("no relaxation", _switched("liquid", "none")),
    "relaxation mean": Ablation("the seed's relaxation", _with_liquid(MeanRelaxation)),
    "relaxation early": Ablation("alpha starts at a half, not at 0.05", _with_liquid(EarlyRelaxation)),
    "plain": Ablation("neither gate nor relaxation: 1x1, SiLU, 1x1", _without_condition(mlp)),
    "plain, smaller": Ablation("the same, parameters not spent", _without_condition(mlp), equal=False),
    "swiglu": Ablation("SwiGLU in the liquid layer's place", _without_condition(SwiGLU)),
    "backbone 3x3": Ablation(
        "depthwise 3x3 before the heads", _with_backbone(lambda c: nn.Conv2d(c, c, 3, padding=1, groups=c))
    ),
    "backbone 7x7": Ablation("depthwise 7x7 before the heads", _with_backbone(Depthwise7)),
    "backbone dense": Ablation("a full 3x3 makes the hidden features", _dense),
    "narrow": Ablation("a finest stage of 64 channels, not 96", _switched("liquid", "liquid"), shape=_NARROW),
    "feed-forward": Ablation("and a step of its own for the wide features", WithFeedForward, shape=_NARROW),
    "one step": Ablation("liquid layer and spatial mix in one step", OneStep),
    "mix grn": Ablation("response norm for the pooling gate", _with_mix(MixWithResponseNorm)),
    "mix no gate": Ablation("no pooling gate", _with_mix(MixWithoutGate)),
    "no adaln-zero": Ablation("residual steps without output gates", WithoutOutputGates),
    "times uniform": Ablation("training times uniform", _switched("liquid", "liquid"), times="uniform"),
    "times shifted": Ablation("training times nearer to noise", _switched("liquid", "liquid"), time_shift=3.0),
}


def ablated(name: str, size: str, channels: int, num_classes: int) -> LiquidUNet:
    """The variant called `name` in the shape of a preset, its parameters matched by its hidden features."""
    ablation = ABLATIONS[name]
    shape = ablation.shape or preset(size)

    def build(ratio: float) -> LiquidUNet:
        def block(width: int, condition_channels: int) -> nn.Module:
            return ablation.block(width, condition_channels, ratio)

        return in_our_frame(block, channels, num_classes, shape.widths, shape.depths)

    if not ablation.equal or ablation.shape or name == "liquid":
        return build(shape.ratio)
    few, many = 0.5, 9.0
    with torch.device("meta"):
        wanted = LiquidUNet.from_preset(size, channels, num_classes).num_parameters()
        while many - few > 0.05:  # a step of 32 channels is rarely finer
            ratio = (few + many) / 2
            few, many = (few, ratio) if build(ratio).num_parameters() > wanted else (ratio, many)
    return build(few)
