"""Variants of the liquid block, by name: each changes one thing of the block that the presets ship.

Where a variant has fewer or more parameters, the embedding of time and label is made wider or narrower until the model
has as many as ours, so that a comparison tells of the change and not of the size; a step takes hardly longer by that.

Shapes: B batch, C channels, H W height and width, T width of the condition.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from blocks import GlobalResponseNorm, in_our_frame
from torch import Tensor, nn

from liquid_diffusion.flow import TimeSampling
from liquid_diffusion.models.depthwise import depthwise_conv
from liquid_diffusion.models.layers import ConditionLinear, PointwiseConv, channel_norm
from liquid_diffusion.models.liquid import (
    SCALES,
    Gate,
    LiquidBlock,
    MultiScaleSpatialMix,
    ParallelCfC,
    Relaxation,
    cfc_gate,
    liquid_relaxation,
    modulate,
)
from liquid_diffusion.models.unet import LiquidUNet, hidden_width
from liquid_diffusion.presets import preset

_STEP = 32  # channels; a CPU computes slices of other sizes several times slower
_EQUAL = 0.02


def swish_mlp_width(hidden: int) -> int:
    """Of a layer with one head and an output, which then has as many weights as one with two heads has at `hidden`."""
    return 3 * hidden // 2


@torch.no_grad()
def _start_at_one_and_zero(slope_and_offset: ConditionLinear) -> None:
    """a = 1 and b = 0, whatever the time."""
    slope_and_offset.weight.zero_()
    slope_and_offset.bias.view(2, -1).copy_(torch.tensor([[1.0], [0.0]]))


class MeanRelaxation(ParallelCfC):
    """The seed's form, ``alpha = exp(-lambda |mean(t_emb)|)``: one number for all channels, about 1 at the start."""

    def __init__(self, channels: int, condition_channels: int, hidden: int) -> None:
        super().__init__(channels, condition_channels, hidden)
        del self.time_relaxation

    def reset_parameters(self) -> None:
        _start_at_one_and_zero(self.time_gate)

    def alpha(self, condition: Tensor) -> Tensor:
        return torch.exp(-self.log_rate.float().exp() * condition.float().mean(1, keepdim=True).abs())  # (B, C)


class StaticRelaxation(ParallelCfC):
    """``alpha = exp(-lambda)``: learned of each channel, the same at all times and for all labels."""

    def __init__(self, channels: int, condition_channels: int, hidden: int, gate: Gate = "liquid") -> None:
        super().__init__(channels, condition_channels, hidden, gate)
        del self.time_relaxation

    def reset_parameters(self) -> None:
        if self.gate != "static":
            _start_at_one_and_zero(self.time_gate)
        nn.init.constant_(self.log_rate, math.log(-math.log(0.95)))

    def alpha(self, condition: Tensor) -> Tensor:
        return torch.exp(-self.log_rate.float().exp())[None]  # (1, C)


class HalfRelaxation(ParallelCfC):
    """Relaxation that starts at alpha = 1/2."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.constant_(self.time_relaxation.bias, math.log(2))


class ContentFreeGate(ParallelCfC):
    """A gate that knows the time alone: ``sigmoid(-d(t)) f v``, the same for all pixels."""

    def __init__(self, channels: int, condition_channels: int, hidden: int) -> None:
        super().__init__(channels, condition_channels, hidden)
        self.time = ConditionLinear(condition_channels, hidden)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        a, b = self.slope_and_offset(condition)  # (B, C, 1, 1) each
        f, v = self.heads(torch.addcmul(b, channel_norm(x), a)).chunk(2, dim=1)  # (B, H, H, W) each
        gate = torch.sigmoid(-self.time(condition))[:, :, None, None].to(f.dtype)  # (B, H, 1, 1)
        alpha = self.alpha(condition)[:, :, None, None].to(f.dtype)  # (B, C, 1, 1)
        return liquid_relaxation(x, self.project(gate * f * v), alpha)


class ThreeHeads(ParallelCfC):
    """All of `cfc_gate`, ``sigma(f) g + (1 - sigma(f)) h``, with a convolution for each head; three quarters as wide.

    Args:
        product: whether the head g is f times its convolution, as in ours.
    """

    def __init__(self, channels: int, condition_channels: int, hidden: int, product: bool) -> None:
        super().__init__(channels, condition_channels, 3 * hidden // 4)
        self.product = product
        self.heads = PointwiseConv(channels, 3 * self.project.in_channels)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        a, b = self.slope_and_offset(condition)  # (B, C, 1, 1) each
        f, g, h = self.heads(torch.addcmul(b, channel_norm(x), a)).chunk(3, dim=1)  # (B, H, H, W) each
        out = self.project(cfc_gate(f, f * g if self.product else g, h))  # (B, C, H, W)
        return liquid_relaxation(x, out, self.alpha(condition)[:, :, None, None].to(out.dtype))


class TimeBehindHeads(ParallelCfC):
    """A second slope and offset of the time, of each hidden channel, behind the heads: ``sigma(a f - b)``."""

    def __init__(self, channels: int, condition_channels: int, hidden: int) -> None:
        super().__init__(channels, condition_channels, hidden)
        self.behind = ConditionLinear(condition_channels, 2 * hidden)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        _start_at_one_and_zero(self.behind)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        a, b = self.slope_and_offset(condition)  # (B, C, 1, 1) each
        f, v = self.heads(torch.addcmul(b, channel_norm(x), a)).chunk(2, dim=1)  # (B, H, H, W) each
        slope, offset = self.behind(condition)[:, :, None, None].to(f.dtype).chunk(2, dim=1)  # (B, H, 1, 1) each
        out = self.project(F.silu(slope * f - offset) * v)  # (B, C, H, W)
        return liquid_relaxation(x, out, self.alpha(condition)[:, :, None, None].to(out.dtype))


class Depthwise7(nn.Conv2d):
    """A depthwise 7x7 convolution with our backward pass."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 7, padding=3, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        return depthwise_conv(x, self.weight, self.bias)


class MixWithResponseNorm(MultiScaleSpatialMix):
    """Global response normalisation behind the depthwise convolution."""

    def __init__(self, channels: int, scales: Sequence[int]) -> None:
        super().__init__(channels, scales)
        self.norm = GlobalResponseNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.add_context(self.project(self.norm(depthwise_conv(x, self.kernel, self.bias))), x)


class MixWithPoolingGate(MultiScaleSpatialMix):
    """A gate of each channel from the mean of the picture behind the depthwise convolution."""

    def __init__(self, channels: int, scales: Sequence[int]) -> None:
        super().__init__(channels, scales)
        self.pool_gate = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        pooled = torch.sigmoid(self.pool_gate(x.mean((2, 3))))  # (B, C)
        return self.add_context(self.project(depthwise_conv(x, self.kernel, self.bias) * pooled[:, :, None, None]), x)


class MixWithoutContext(MultiScaleSpatialMix):
    """The depthwise convolution alone; nothing of the picture's mean."""

    def __init__(self, channels: int, scales: Sequence[int]) -> None:
        super().__init__(channels, scales)
        self.context = None


class Variant(LiquidBlock):
    """Our block with another layer in the place of the liquid one, called as layer(x, condition)."""

    def __init__(self, channels: int, condition_channels: int, layer: nn.Module, scales: Sequence[int]) -> None:
        super().__init__(channels, condition_channels, 32, scales=scales)
        self.cfc = layer


class WithFeedForward(Variant):
    """Three residual steps: a liquid layer half as wide, and a feed-forward at the end."""

    def __init__(self, channels: int, condition_channels: int, hidden: int, scales: Sequence[int]) -> None:
        super().__init__(channels, condition_channels, ParallelCfC(channels, condition_channels, hidden // 2), scales)
        inner = swish_mlp_width(hidden) // 2
        self.modulation = ConditionLinear(condition_channels, 6 * channels)
        self.feed_forward = nn.Sequential(PointwiseConv(channels, inner), nn.GELU(), PointwiseConv(inner, channels))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        m = self.modulation(condition)[:, :, None, None].chunk(6, dim=1)  # 6 x (B, C, 1, 1)
        x = self.cfc(x, condition)
        x = torch.addcmul(x, m[2], self.mix(modulate(channel_norm(x), m[0], m[1])))
        return torch.addcmul(x, m[5], self.feed_forward(modulate(channel_norm(x), m[3], m[4])))


class WithoutOutputGate(Variant):
    """``x <- x + mix(modulate(norm(x)))``: no adaLN-zero behind the spatial mix."""

    def __init__(self, channels: int, condition_channels: int, hidden: int, scales: Sequence[int]) -> None:
        super().__init__(channels, condition_channels, ParallelCfC(channels, condition_channels, hidden), scales)
        self.modulation = ConditionLinear(condition_channels, 2 * channels)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        x = self.cfc(x, condition)
        scale, shift = self.modulation(condition)[:, :, None, None].chunk(2, dim=1)  # (B, C, 1, 1) each
        return x + self.mix(modulate(channel_norm(x), scale, shift))


Block = Callable[[int, int, int, Sequence[int]], nn.Module]  # made of (channels, condition_channels, hidden, scales)
Layer = Callable[[int, int, int], nn.Module]  # made of (channels, condition_channels, hidden)


def _with_liquid(make: Layer) -> Block:
    """Another layer in the liquid one's place."""
    return lambda channels, t, hidden, scales: Variant(channels, t, make(channels, t, hidden), scales)


def _switched(gate: Gate, relaxation: Relaxation) -> Block:
    def layer(channels: int, condition_channels: int, hidden: int) -> nn.Module:
        width = swish_mlp_width(hidden) if gate == "none" else hidden
        return ParallelCfC(channels, condition_channels, width, gate, relaxation)

    return _with_liquid(layer)


def _with_mix(make: Callable[[int, Sequence[int]], nn.Module]) -> Block:
    def block(channels: int, condition_channels: int, hidden: int, scales: Sequence[int]) -> nn.Module:
        variant = LiquidBlock(channels, condition_channels, hidden)
        variant.mix = make(channels, scales)
        return variant

    return block


def _with_backbone(make: Callable[[int], nn.Module]) -> Block:
    """A depthwise convolution in front of the heads of the liquid layer."""

    def layer(channels: int, condition_channels: int, hidden: int) -> nn.Module:
        layer = ParallelCfC(channels, condition_channels, hidden)
        layer.heads = nn.Sequential(make(channels), layer.heads)
        return layer

    return _with_liquid(layer)


@dataclass(frozen=True)
class Ablation:
    """A variant.

    Attributes:
        question: what it answers, in a few words for the table.
        block: made of (channels, condition_channels, hidden, scales).
        times, time_shift: the distribution of the training times.
    """

    question: str
    block: Block
    times: TimeSampling = "logit-normal"
    time_shift: float = 1.0


ABLATIONS = {
    "liquid": Ablation("the block as it ships", _switched("liquid", "liquid")),
    "gate static": Ablation("a gate without time and label", _switched("static", "liquid")),
    "gate none": Ablation("no gate: one head and SiLU", _switched("none", "liquid")),
    "gate content-free": Ablation("a gate of time alone", _with_liquid(ContentFreeGate)),
    "gate three heads": Ablation(
        "a convolution for each of f, g, h", _with_liquid(lambda *shape: ThreeHeads(*shape, product=False))
    ),
    "gate with h": Ablation("ours, and a head h", _with_liquid(lambda *shape: ThreeHeads(*shape, product=True))),
    "gate behind": Ablation("slope and offset behind the heads too", _with_liquid(TimeBehindHeads)),
    "relaxation none": Ablation("adaLN-zero for relaxation: SwiGLU", _switched("liquid", "none")),
    "relaxation mean": Ablation("the seed's relaxation", _with_liquid(MeanRelaxation)),
    "relaxation static": Ablation("a relaxation without time and label", _with_liquid(StaticRelaxation)),
    "layer static": Ablation(
        "neither gate nor relaxation with time and label",
        _with_liquid(lambda *shape: StaticRelaxation(*shape, gate="static")),
    ),
    "relaxation half": Ablation("alpha starts at a half, not at 0.95", _with_liquid(HalfRelaxation)),
    "plain": Ablation("neither gate nor relaxation: 1x1, SiLU, 1x1", _switched("none", "none")),
    "backbone 3x3": Ablation(
        "depthwise 3x3 before the heads", _with_backbone(lambda c: nn.Conv2d(c, c, 3, padding=1, groups=c))
    ),
    "backbone 7x7": Ablation("depthwise 7x7 before the heads", _with_backbone(Depthwise7)),
    "feed-forward": Ablation("half of the layer as a feed-forward", WithFeedForward),
    "mix grn": Ablation("response norm in the spatial mix", _with_mix(MixWithResponseNorm)),
    "mix pooling gate": Ablation("a gate from the picture's mean in the spatial mix", _with_mix(MixWithPoolingGate)),
    "mix no context": Ablation("nothing of the picture's mean in the spatial mix", _with_mix(MixWithoutContext)),
    "mix 7x7": Ablation(
        "all scales at the finest stage too", _with_mix(lambda channels, _: MultiScaleSpatialMix(channels, SCALES))
    ),
    "no adaln-zero": Ablation("the spatial mix without output gate", WithoutOutputGate),
    "times uniform": Ablation("training times uniform", _switched("liquid", "liquid"), times="uniform"),
    "times shifted": Ablation("training times nearer to noise", _switched("liquid", "liquid"), time_shift=3.0),
}


def ablated(name: str, size: str, channels: int, num_classes: int) -> LiquidUNet:
    """The variant called `name` in the shape of a preset, its parameters matched by the width of its embedding."""
    ablation, shape = ABLATIONS[name], preset(size)

    def build(embedding: int | None) -> LiquidUNet:
        def block(width: int, condition_channels: int, scales: Sequence[int]) -> nn.Module:
            return ablation.block(width, condition_channels, hidden_width(width, shape.ratio), scales)

        return in_our_frame(block, channels, num_classes, shape.widths, shape.depths, shape.decoder_depths, embedding)

    with torch.device("meta"):
        wanted = LiquidUNet.from_preset(size, channels, num_classes).num_parameters()
        ours = build(shape.condition_channels)
        if abs(ours.num_parameters() / wanted - 1) > _EQUAL:
            counts = {width: build(width).num_parameters() for width in range(_STEP, 64 * _STEP, _STEP)}
            embedding = min(counts, key=lambda width: abs(counts[width] - wanted))
        else:
            embedding = shape.condition_channels
    return build(embedding)
