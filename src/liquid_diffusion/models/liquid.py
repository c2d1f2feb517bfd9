"""The liquid block: a closed-form continuous-depth (CfC) gate whose time is the diffusion time.

The formulas are pure functions, so that they can be held against the papers line by line.
Shapes: B batch, C channels, H W height and width, T width of the condition embedding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liquid_diffusion.models.depthwise import depthwise_conv, merge_kernels
from liquid_diffusion.models.layers import ConditionLinear, PointwiseConv, channel_norm

Gate = Literal["liquid", "static", "none"]
Relaxation = Literal["liquid", "none"]
SCALES = (3, 5, 7)  # sides of the kernels of a spatial mix


def cfc_gate(f: Tensor, g: Tensor, h: Tensor, a: Tensor | float = 1.0, b: Tensor | float = 0.0) -> Tensor:
    """Closed-form continuous-time mixture of two heads, gated by a third.

    ``sigma(a f - b) g + (1 - sigma(a f - b)) h``: equation 10 of Hasani et al., "Closed-form continuous-time neural
    networks" (arXiv 2106.13898), ``x(t) = sigma(-f t) g + (1 - sigma(-f t)) h``, with the time's part of the exponent,
    there ``-t`` for all channels, generalised to learned functions a(t) and b(t) of each channel.

    Args:
        f, g, h: heads (B, C, H, W).
        a, b: slope and offset, broadcast against the heads: (B, C, 1, 1) as functions of time, or numbers.

    Returns:
        (B, C, H, W), everywhere between g and h.
    """
    return torch.lerp(h, g, torch.sigmoid(a * f - b))


def relaxation_weight(rate: Tensor, w: Tensor) -> Tensor:
    """How much of its input a liquid layer keeps: ``alpha = exp(-lambda |w(t)|)``, in (0, 1].

    The solution of ``dx/dt = -lambda (x - out)`` after the time |w|, cf. LiquidTAD (arXiv 2604.18274). A vector w(t)
    stands in place of the mean of the time embedding, which is near zero at the start: alpha would be 1, and neither
    lambda nor the branch behind it would get a gradient.

    Args:
        rate: lambda > 0, (C,).
        w: (B, C), linear in the time embedding.

    Returns:
        (B, C) in float32.
    """
    return torch.exp(-rate.float() * w.float().abs())


def liquid_relaxation(x: Tensor, out: Tensor, alpha: Tensor) -> Tensor:
    """``alpha x + (1 - alpha) out``: the state x relaxed towards `out`.

    Args:
        x, out: (B, C, H, W).
        alpha: broadcast against x, in [0, 1].

    Returns:
        (B, C, H, W), everywhere between x and out.
    """
    return torch.lerp(out, x, alpha)


def modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``x (1 + scale) + shift`` for x (B, C, H, W) and scale, shift (B, C, 1, 1) (DiT, arXiv 2212.09748)."""
    return torch.addcmul(shift, x, 1 + scale)


class ParallelCfC(nn.Module):
    """The liquid layer: every pixel takes one closed-form step, all in parallel; no recurrence, no solver.

    ``f, v = heads(a(t) norm(x) + b(t))``, ``out = project(sigma(f) g)`` with the head ``g = f v``, and the state x is
    relaxed towards `out`. Slope and offset of the time stand in front of the heads, where there are fewer channels; the
    second head of `cfc_gate` is zero (docs/liquid-block.md has what a third convolution for it was worth).

    Args:
        channels: C.
        condition_channels: T.
        hidden: width D of the heads.
        gate: "liquid" has slope and offset that depend on the time, "static" learned constants; with "none" there is
            no gate but one nonlinear head, ``out = project(SiLU(f))``.
        relaxation: "liquid", or "none" for a residual sum ``x + c(t) out`` that starts at c = 0 (adaLN-zero).
    """

    def __init__(
        self,
        channels: int,
        condition_channels: int,
        hidden: int,
        gate: Gate = "liquid",
        relaxation: Relaxation = "liquid",
    ) -> None:
        super().__init__()
        self.gate = gate
        self.relaxation = relaxation
        self.heads = PointwiseConv(channels, hidden if gate == "none" else 2 * hidden)
        self.project = PointwiseConv(hidden, channels)
        if gate == "static":
            self.slope = nn.Parameter(torch.ones(channels))
            self.offset = nn.Parameter(torch.zeros(channels))
        else:
            self.time_gate = ConditionLinear(condition_channels, 2 * channels)
        if relaxation == "liquid":
            self.time_relaxation = ConditionLinear(condition_channels, channels)
            self.log_rate = nn.Parameter(torch.zeros(channels))
        else:
            self.output_gate = ConditionLinear(condition_channels, channels)

    def reset_parameters(self) -> None:
        """Start at a = 1, b = 0 and alpha = 0.95: close to the identity, whatever the time."""
        if self.gate != "static":
            nn.init.zeros_(self.time_gate.weight)
            slope, offset = self.time_gate.bias.detach().chunk(2)
            slope.fill_(1)
            offset.fill_(0)
        if self.relaxation == "liquid":
            nn.init.normal_(self.time_relaxation.weight, std=0.002)  # so small that w > 0, where alpha is smooth
            nn.init.constant_(self.time_relaxation.bias, -math.log(0.95))
        else:
            nn.init.zeros_(self.output_gate.weight)
            nn.init.zeros_(self.output_gate.bias)

    def slope_and_offset(self, condition: Tensor) -> tuple[Tensor, Tensor]:
        """a and b of the gate for a condition (B, T): (B or 1, C, 1, 1) each."""
        if self.gate == "static":
            return self.slope[None, :, None, None], self.offset[None, :, None, None]
        a, b = self.time_gate(condition)[:, :, None, None].chunk(2, dim=1)
        return a, b

    def alpha(self, condition: Tensor) -> Tensor:
        """The relaxation weight for a condition (B, T): (B, C), float32, in (0, 1]."""
        return relaxation_weight(self.log_rate.float().exp(), self.time_relaxation(condition))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        a, b = self.slope_and_offset(condition)  # (B, C, 1, 1) each
        z = self.heads(torch.addcmul(b.to(x.dtype), channel_norm(x), a.to(x.dtype)))  # (B, 2 D, H, W); D without a gate
        if self.gate == "none":
            z = F.silu(z)  # (B, D, H, W)
        else:
            f, v = z.chunk(2, dim=1)
            z = F.silu(f) * v  # (B, D, H, W), cfc_gate(f, f * v, 0)
        out = self.project(z)  # (B, C, H, W)
        if self.relaxation == "none":
            return torch.addcmul(x, self.output_gate(condition)[:, :, None, None].to(x.dtype), out)
        alpha = self.alpha(condition)[:, :, None, None].to(out.dtype)  # (B, C, 1, 1)
        return liquid_relaxation(x, out, alpha)


class MultiScaleSpatialMix(nn.Module):
    """Depthwise 3x3 + 5x5 + 7x7 as one convolution, then 1x1, and the widest scale: what the mean of the picture adds.

    ``project(conv(x)) + context(mean(x))``, the latter the same at all pixels: the global context of GCNet (Cao et al.,
    arXiv 1904.11492) with plain averages in place of attention. It starts at zero.

    Args:
        channels: C.
        scales: sides of the kernels, odd, ascending; with one alone there is no context either.
    """

    def __init__(self, channels: int, scales: Sequence[int] = SCALES) -> None:
        super().__init__()
        self.scales = tuple(scales)
        for side in scales:  # as weights of this module, where what offloads weights looks for them
            self.register_parameter(f"kernel_{side}", nn.Parameter(torch.empty(channels, 1, side, side)))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.project = PointwiseConv(channels, channels)
        self.context = PointwiseConv(channels, channels, bias=False) if len(self.scales) > 1 else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The scales start with equal shares of the variance of one convolution."""
        for kernel in self._kernels():
            nn.init.normal_(kernel, std=(len(self.scales) * kernel.shape[-1] ** 2) ** -0.5)
        if self.context is not None:
            nn.init.zeros_(self.context.weight)

    def _kernels(self) -> list[Tensor]:
        return [getattr(self, f"kernel_{side}") for side in self.scales]

    @property
    def kernel(self) -> Tensor:
        """All scales as one kernel (C, 1, K, K) of the largest."""
        return merge_kernels(self._kernels())

    def merge_scales(self) -> None:
        """Keep one kernel, which computes the same; not to be trained further."""
        kernel, side = self.kernel.detach(), self.scales[-1]
        for smaller in self.scales[:-1]:
            delattr(self, f"kernel_{smaller}")
        self.scales = (side,)
        self.register_parameter(f"kernel_{side}", nn.Parameter(kernel))

    def forward(self, x: Tensor) -> Tensor:
        return self.add_context(self.project(depthwise_conv(x, self.kernel, self.bias)), x)

    def add_context(self, out: Tensor, x: Tensor) -> Tensor:
        """``out + context(mean(x))``, out and x (B, C, H, W)."""
        return out if self.context is None else out + self.context(x.mean((2, 3), keepdim=True))


class LiquidBlock(nn.Module):
    """A liquid layer, and a spatial mix that is added: ``x <- cfc(x)``, ``x <- x + c mix(modulate(norm(x)))``.

    Scale, shift and output gate c of the mix are linear in the condition; c starts at zero (adaLN-zero, arXiv
    2212.09748).

    Args:
        channels: C.
        condition_channels: T.
        hidden: width of the liquid layer's heads.
        gate, relaxation: see `ParallelCfC`.
        scales: see `MultiScaleSpatialMix`.
    """

    def __init__(
        self,
        channels: int,
        condition_channels: int,
        hidden: int,
        gate: Gate = "liquid",
        relaxation: Relaxation = "liquid",
        scales: Sequence[int] = SCALES,
    ) -> None:
        super().__init__()
        self.cfc = ParallelCfC(channels, condition_channels, hidden, gate, relaxation)
        self.modulation = ConditionLinear(condition_channels, 3 * channels)
        self.mix = MultiScaleSpatialMix(channels, scales)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        x = self.cfc(x, condition)  # (B, C, H, W)
        scale, shift, c = self.modulation(condition)[:, :, None, None].chunk(3, dim=1)  # 3 x (B, C, 1, 1)
        return torch.addcmul(x, c, self.mix(modulate(channel_norm(x), scale, shift)))
