"""Models that others ship, at the size of ours, all called as model(x, t, labels) with t in [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from blocks import DiCoBlock, FCDMBlock, in_our_frame
from diffusers import DiTTransformer2DModel, UNet2DModel
from diffusers.models.embeddings import LabelEmbedding
from torch import Tensor, nn

from liquid_diffusion.models.layers import ConditionEmbedding, Downsample, PositionEmbedding
from liquid_diffusion.models.liquid import SCALES
from liquid_diffusion.models.unet import LiquidUNet, hidden_width
from liquid_diffusion.presets import preset
from liquid_diffusion.training.optimizer import channel_mixers as ours

# Chosen so that the parameters are those of our preset, within 5 % (`check_size` tells).
_UNET_WIDTHS = {"nano": (64, 96, 128), "tiny": (96, 160, 288), "small": (160, 288, 512), "base": (224, 448, 768)}
_UNET_WIDTHS_WITHOUT_ATTENTION = {"nano": (32, 128, 128), "tiny": (128, 192, 288)}
_DICO_SHAPES = {"nano": ((64, 128, 160), (1, 2, 3)), "tiny": ((96, 192, 256), (2, 4, 6))}  # widths, depths
_FCDM_SHAPES = {"nano": ((64, 160, 192), (1, 3, 3)), "tiny": ((96, 192, 256), (3, 4, 11))}
# layers, heads, channels of a head: but for nano multiples of 16, which the attention of a GPU is fast in
_DIT_SHAPES = {"nano": (6, 4, 52), "tiny": (7, 5, 80), "small": (12, 11, 48), "base": (15, 9, 80)}


class Peer(nn.Module):
    """A model of diffusers with our call."""

    def __init__(self, model: nn.Module, null_label: int) -> None:
        super().__init__()
        self.model = model
        self.null_label = null_label

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        if labels is None:
            labels = torch.full((len(x),), self.null_label, device=x.device)
        return self.model(x, 1000 * t, class_labels=labels).sample


def unet2d(name: str, channels: int, num_classes: int, size: int, attention: bool = True) -> Peer:
    """diffusers' UNet2DModel of three stages, with attention at the two coarser ones, as its training example has it,
    or with none at all."""
    kind = "Attn" if attention else ""
    return Peer(
        UNet2DModel(
            sample_size=size, in_channels=channels, out_channels=channels, layers_per_block=2,
            block_out_channels=(_UNET_WIDTHS if attention else _UNET_WIDTHS_WITHOUT_ATTENTION)[name],
            down_block_types=("DownBlock2D", f"{kind}DownBlock2D", f"{kind}DownBlock2D"),
            up_block_types=(f"{kind}UpBlock2D", f"{kind}UpBlock2D", "UpBlock2D"),
            add_attention=attention, num_class_embeds=num_classes + 1,
        ),
        num_classes,
    )  # fmt: skip


def dico(name: str, channels: int, num_classes: int) -> LiquidUNet:
    """Our frame with DiCo's blocks."""
    return in_our_frame(lambda width, t, _: DiCoBlock(width, t), channels, num_classes, *_DICO_SHAPES[name])


def fcdm(name: str, channels: int, num_classes: int) -> LiquidUNet:
    """Our frame with FCDM's blocks."""
    return in_our_frame(lambda width, t, _: FCDMBlock(width, t), channels, num_classes, *_FCDM_SHAPES[name])


def dit(name: str, channels: int, num_classes: int, size: int) -> Peer:
    """diffusers' DiTTransformer2DModel with patches of 2.

    In training it would hide a tenth of the labels by itself, behind a null label of its own; ours are hidden already.
    """
    layers, heads, head = _DIT_SHAPES[name]
    model = DiTTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=head, num_layers=layers, in_channels=channels,
        sample_size=size, patch_size=2, num_embeds_ada_norm=num_classes + 1,
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0.0
    return Peer(model, num_classes)


def channel_mixers(model: nn.Module) -> list[nn.Parameter]:
    """The weights that Muon trains: of convolutions, attention and feed-forward, but not of a model's first and last
    layer, its embeddings and its modulation."""
    if isinstance(model, LiquidUNet):
        return list(ours(model))
    found = []
    for name, module in model.named_modules():
        convolution = isinstance(module, nn.Conv2d) and not name.endswith(("conv_in", "conv_out", "pos_embed.proj"))
        product = isinstance(module, nn.Linear) and any(part in name for part in (".attn1.", ".attentions.", ".ff."))
        if convolution or product:
            found.append(module.weight)
    return found


class EagerBlock(nn.Module):
    """The formulas of our block as one would first write them: a convolution for each scale, no fused operation."""

    def __init__(self, channels: int, condition_channels: int, hidden: int, scales: Sequence[int]) -> None:
        super().__init__()
        self.heads = nn.Conv2d(channels, 2 * hidden, 1)
        self.project_heads = nn.Conv2d(hidden, channels, 1)
        self.time_gate = nn.Linear(condition_channels, 2 * channels)
        self.time_relaxation = nn.Linear(condition_channels, channels)
        self.log_rate = nn.Parameter(torch.zeros(channels))
        self.modulation = nn.Linear(condition_channels, 3 * channels)
        self.depthwise = nn.ModuleList(nn.Conv2d(channels, channels, k, 1, k // 2, groups=channels) for k in scales)
        self.project = nn.Conv2d(channels, channels, 1)
        self.context = nn.Conv2d(channels, channels, 1, bias=False) if len(scales) > 1 else None

    @staticmethod
    def normalise(x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        return (x - mean) / torch.sqrt((x - mean).square().mean(1, keepdim=True) + 1e-6)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        a, b = self.time_gate(condition)[:, :, None, None].chunk(2, 1)
        f, v = self.heads(a * self.normalise(x) + b).chunk(2, 1)
        out = self.project_heads(torch.sigmoid(f) * f * v)
        alpha = torch.exp(-self.log_rate.exp() * self.time_relaxation(condition).abs())[:, :, None, None]
        x = alpha * x + (1 - alpha) * out
        scale, shift, c = self.modulation(condition)[:, :, None, None].chunk(3, 1)
        u = self.normalise(x) * (1 + scale) + shift
        mixed = self.project(sum(layer(u) for layer in self.depthwise))
        if self.context is not None:
            mixed = mixed + self.context(u.mean((2, 3), keepdim=True))
        return x + c * mixed


class EagerLiquidUNet(nn.Module):
    """The plain transcription of our model, to tell what the package's own code gains over its formulas."""

    def __init__(self, name: str, channels: int, num_classes: int) -> None:
        super().__init__()
        shape = preset(name)
        widths, depths, decoder_depths = shape.widths, shape.depths, shape.decoder_depths or shape.depths
        wide = shape.condition_channels or 4 * widths[0]
        self.null_label = num_classes

        def blocks(i: int, depth: int) -> nn.ModuleList:
            return nn.ModuleList(
                EagerBlock(widths[i], wide, hidden_width(widths[i], shape.ratio), SCALES if i else SCALES[:1])
                for _ in range(depth)
            )

        last = len(widths) - 1
        self.condition = ConditionEmbedding(widths[0], wide, num_classes)
        self.stem = nn.Conv2d(channels, widths[0], 3, 1, 1)
        self.position = PositionEmbedding(widths[0])
        self.encoder = nn.ModuleList(blocks(i, depth) for i, depth in enumerate(depths))
        self.downsamples = nn.ModuleList(Downsample(widths[i], widths[i + 1]) for i in range(last))
        self.bottleneck = blocks(last, 2)
        self.decoder = nn.ModuleList(blocks(i, decoder_depths[i]) for i in range(last, -1, -1))
        below = [last, *range(last, 0, -1)]
        self.fuses = nn.ModuleList(
            nn.Conv2d(widths[coarse] + widths[fine], widths[fine], 1)
            for coarse, fine in zip(below, range(last, -1, -1), strict=True)
        )
        self.norm = nn.LayerNorm(widths[0], eps=1e-6)
        self.head = nn.Conv2d(widths[0], channels, 3, 1, 1)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        if labels is None:
            labels = torch.full((len(x),), self.null_label, device=x.device)
        condition = self.condition(t, labels)
        x, skips = self.stem(x) + self.position(x), []
        for i, stage in enumerate(self.encoder):
            for block in stage.children():
                x = block(x, condition)
            skips.append(x)
            x = self.downsamples[i](x) if i < len(self.downsamples) else x
        for block in self.bottleneck:
            x = block(x, condition)
        for i, stage in enumerate(self.decoder):
            x = F.interpolate(x, scale_factor=2.0) if i else x
            x = self.fuses[i](torch.cat([x, skips.pop()], 1))
            for block in stage.children():
                x = block(x, condition)
        return self.head(F.silu(self.norm(x.movedim(1, -1)).movedim(-1, 1)))


def compile_for_training(model: nn.Module) -> None:
    """Our frame by its blocks, as the trainer does; other models whole, which gained them as much or more.

    What was compiled before is forgotten: it counts against dynamo's limit of shapes, beyond which nothing is compiled.
    """
    torch.compiler.reset()
    if isinstance(model, LiquidUNet):
        model.compile_repeated_blocks(dynamic=False)
    else:
        model.compile(dynamic=False)


def check_size(peer: nn.Module, parameters: int) -> None:
    """A comparison is fair only at equal parameters.

    Raises:
        ValueError: they differ by more than 5 %.
    """
    count = sum(parameter.numel() for parameter in peer.parameters())
    if abs(count / parameters - 1) > 0.05:
        raise ValueError(f"{type(peer).__name__} has {count / 1e6:.2f} M parameters, not {parameters / 1e6:.2f} M")
