"""A U-Net of liquid blocks: the velocity field of a rectified flow, without attention.

Shapes: B batch, C channels of a stage, H W height and width, T width of the condition embedding.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from os import PathLike
from typing import Any, get_args

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from liquid_diffusion.errors import UserError
from liquid_diffusion.models.layers import (
    ChannelNorm,
    ConditionEmbedding,
    Downsample,
    Join,
    PositionEmbedding,
    add_to_each,
)
from liquid_diffusion.models.liquid import SCALES, Gate, LiquidBlock, ParallelCfC, Relaxation
from liquid_diffusion.presets import preset


def hidden_width(channels: int, ratio: float) -> int:
    """About `ratio` times as wide, in multiples of 32 channels, the numbers that a CPU computes with at a time."""
    return 32 * max(1, round(ratio * channels / 32))


class LiquidUNet(ModelMixin, ConfigMixin):
    """U-Net of liquid blocks; call and output are those of diffusers' `UNet2DModel`, but for the time.

    That is t in [0, 1], a flow scheduler's timestep over 1000; and no label means the null label.

    The presets are made by `from_preset`; what is left out here is a small model, and none of them.

    Args:
        in_channels: channels of the sample and of the predicted velocity.
        num_classes: labels 0 to num_classes - 1; num_classes itself is the null label. 0 for an unconditional model.
        widths: channels of each stage, from the finest.
        depths: liquid blocks of each stage of the encoder.
        decoder_depths: of the decoder, from the finest as well; None for as many as in the encoder.
        ratio: width of the heads of the liquid layers over the channels, see `hidden_width`.
        condition_channels: width T of the embedding of time and label; None for four times the first width.
        gate: "liquid", or for research "static" (no time in it) or "none" (one head and SiLU).
        relaxation: "liquid", or for research "none".

    Raises:
        ValueError: `widths` and depths differ in length, or there is no such gate or relaxation.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["LiquidBlock"]
    _repeated_blocks = ["LiquidBlock"]  # what `compile_repeated_blocks` compiles
    _skip_layerwise_casting_patterns = ("condition", "norm")  # once for a picture, and wanted as it is

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        num_classes: int = 0,
        widths: Sequence[int] = (64, 128, 256),
        depths: Sequence[int] = (2, 2, 4),
        decoder_depths: Sequence[int] | None = None,
        ratio: float = 1.3,
        condition_channels: int | None = None,
        gate: Gate = "liquid",
        relaxation: Relaxation = "liquid",
    ) -> None:
        super().__init__()
        decoder_depths = depths if decoder_depths is None else decoder_depths
        for some in (depths, decoder_depths):
            if len(widths) != len(some):
                raise ValueError(f"widths {tuple(widths)} and depths {tuple(some)} differ in length")
        for value, known in ((gate, get_args(Gate)), (relaxation, get_args(Relaxation))):
            if value not in known:
                raise ValueError(f"{value!r} is none of {', '.join(known)}")
        embedding = condition_channels or 4 * widths[0]

        def blocks(stage: int, depth: int) -> nn.ModuleList:
            # What is far apart at the finest stage is near at the others, in a quarter of the time and less
            scales = SCALES if stage else SCALES[:1]
            return nn.ModuleList(self.make_block(widths[stage], embedding, scales) for _ in range(depth))

        self.condition = ConditionEmbedding(widths[0], embedding, num_classes)
        self.stem = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.position = PositionEmbedding(widths[0])
        steps = list(itertools.pairwise(widths))
        self.encoder = nn.ModuleList(blocks(i, depth) for i, depth in enumerate(depths))
        self.downsamples = nn.ModuleList(Downsample(fine, coarse) for fine, coarse in steps)
        self.bottleneck = blocks(len(widths) - 1, 2)
        self.joins = nn.ModuleList(
            [Join(widths[-1], widths[-1], 1), *(Join(coarse, fine, 2) for fine, coarse in reversed(steps))]
        )
        self.decoder = nn.ModuleList(blocks(i, depth) for i, depth in reversed(list(enumerate(decoder_depths))))
        self.norm = ChannelNorm(widths[0])
        self.head = nn.Conv2d(widths[0], in_channels, 3, padding=1)
        self.gradient_checkpointing = False
        self.reset_parameters()

    @classmethod
    def from_preset(cls, name: str, in_channels: int = 4, num_classes: int = 0) -> LiquidUNet:
        """The model called nano, tiny, small or base.

        Raises:
            UserError: there is none of that name.
        """
        shape = preset(name)
        return cls(  # by name: `from_config` takes what was given by place for a default that it may forget
            in_channels=in_channels,
            num_classes=num_classes,
            widths=shape.widths,
            depths=shape.depths,
            decoder_depths=shape.decoder_depths,
            ratio=shape.ratio,
            condition_channels=shape.condition_channels,
        )

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | PathLike[str], **kwargs: Any
    ) -> LiquidUNet | tuple[LiquidUNet, dict[str, Any]]:
        """The model of a folder or of the Hub, as diffusers' `ModelMixin.from_pretrained`, which only warns of weights
        that are not there.

        Raises:
            UserError: weights are missing.
        """
        asked = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        if missing := sorted(info["missing_keys"]):
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            where = pretrained_model_name_or_path
            raise UserError(f"The model in {where} lacks {missing[0]}{more}: it was saved by another version.")
        return (model, info) if asked else model

    def make_block(self, channels: int, condition_channels: int, scales: Sequence[int]) -> nn.Module:
        """A block (B, C, H, W), (B, T) -> (B, C, H, W). A subclass may give another one; the frame around it stays."""
        config = self.config
        hidden = hidden_width(channels, config.ratio)
        return LiquidBlock(channels, condition_channels, hidden, config.gate, config.relaxation, scales)

    def reset_parameters(self) -> None:
        """Every block starts close to the identity and the prediction at zero; see `ParallelCfC.reset_parameters`."""
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, LiquidBlock):
                nn.init.zeros_(module.modulation.weight)
                nn.init.zeros_(module.modulation.bias)
            elif isinstance(module, ParallelCfC):
                module.reset_parameters()
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]  # it has one

    @property
    def downscale(self) -> int:
        """Height and width of a sample must be divisible by this."""
        return 2 ** len(self.downsamples)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[Tensor]:
        """Predict the velocity at a point of the path.

        Args:
            sample: (B, in_channels, H, W), H and W divisible by 4 in a model of three stages.
            timestep: time in [0, 1], 0 is data and 1 is noise: (B,), or one number for all.
            class_labels: (B,) int64; None means the null label.
            return_dict: False for a tuple.

        Returns:
            An object with `sample` (B, in_channels, H, W), in the dtype of `sample` unless autocast says otherwise.

        Raises:
            ValueError: wrong channels or size, a number that is no time, labels for another number of samples, or
                labels for a model without classes.
        """
        x, skips = sample, []
        condition = self.condition(*self._check_inputs(sample, timestep, class_labels))  # (B, T)
        x = add_to_each(self.stem(x.contiguous(memory_format=torch.channels_last)), self.position(x))  # (B, C, H, W)
        for i, stage in enumerate(self.encoder):
            x = self._run(stage, x, condition)
            skips.append(x)
            if i < len(self.downsamples):
                x = self.downsamples[i](x)  # (B, C', H/2, W/2)
        x = self._run(self.bottleneck, x, condition)
        for join, stage in zip(self.joins, self.decoder, strict=True):
            x = self._run(stage, join(x, skips.pop()), condition)  # (B, C, H, W)
        x = self.head(F.silu(self.norm(x)))  # (B, in_channels, H, W)
        return UNet2DOutput(sample=x) if return_dict else (x,)

    def _run(self, blocks: nn.Module, x: Tensor, condition: Tensor) -> Tensor:
        for block in blocks.children():
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(block, x, condition)
            else:
                x = block(x, condition)
        return x

    def _check_inputs(
        self, sample: Tensor, timestep: Tensor | float, class_labels: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        batch, channels, height, width = sample.shape
        if channels != self.config.in_channels:
            raise ValueError(f"the sample has {channels} channels, the model wants {self.config.in_channels}")
        if height % self.downscale or width % self.downscale:
            raise ValueError(f"height and width must be divisible by {self.downscale}, not {height} x {width}")
        if isinstance(timestep, int | float) and not 0 <= timestep <= 1:  # to look into a tensor a GPU would wait
            raise ValueError(f"a time is a number from 0 to 1, not {timestep}: a scheduler's timestep over 1000")
        t = torch.as_tensor(timestep, dtype=torch.float32, device=sample.device).expand(batch)
        if not self.config.num_classes:
            if class_labels is not None:
                raise ValueError("class_labels were given to a model without classes")
            return t, None
        if class_labels is None:
            class_labels = torch.full((batch,), self.config.num_classes, device=sample.device)
        elif class_labels.shape != (batch,):
            raise ValueError(f"class_labels must be of shape ({batch},), not {tuple(class_labels.shape)}")
        return t, class_labels
