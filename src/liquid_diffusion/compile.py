"""The model rewritten for one sampling schedule.

Without attention, all that depends on time and label is known before the first step: it is computed once for the
whole schedule, what remains is a chain of convolutions and a few fused elementwise passes on one picture.

What is rewritten, all of it exactly:

- time embedding, label embedding, and every linear layer behind them become a table of vectors, a row for each
  (time, label), and the embedding of places is computed once for a size;
- where all pictures share one condition, slope and offset of the gate, scale and shift of the modulation become weight
  and bias of the norms, and the rows of the table are multiplied into the convolutions, which add to the residual
  stream themselves;
- the three depthwise kernels become one; of the two heads one is multiplied into the other by its convolution;
- weights are converted to the sampling dtype, and on a CPU to the layout of its matrix unit, once;
- on a GPU the whole evaluation is recorded as a CUDA graph at its second call and replayed from then on.

Shapes: B batch, C channels, H W height and width, T width of the condition embedding, R rows of the table.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liquid_diffusion.convolution import PackedConvolution
from liquid_diffusion.hardware import fastest_dtype
from liquid_diffusion.models.layers import channel_norm
from liquid_diffusion.sampling import Velocity

if TYPE_CHECKING:  # of a bundled pipeline the model's classes are in another file
    from liquid_diffusion.models.layers import Join
    from liquid_diffusion.models.liquid import LiquidBlock
    from liquid_diffusion.models.unet import LiquidUNet

# What a model consists of that is rewritten here: of this package by name, since a bundle's are other classes
_OWN_PARTS = frozenset({
    "LiquidUNet", "ConditionEmbedding", "ConditionLinear", "PositionEmbedding", "LiquidBlock", "ParallelCfC",
    "MultiScaleSpatialMix", "Downsample", "Join", "ChannelNorm", "PointwiseConv",
})  # fmt: skip
_TORCH_PARTS = (nn.ModuleList, nn.Conv2d, nn.Linear, nn.Embedding)

# Of one tensor at the finest stage, in a part of a batch. Eight pictures of tiny at 128 x 128 latents took 379, 348,
# 343 and 355 ms in parts of one, two, four and six (5 to 30 MiB), of base at 64 x 64 329, 313 and 291 in parts of
# three, six and eight (8 to 20 MiB).
_PART_BYTES = 20 * 2**20
# Of the table that are computed at once, always as many: a matrix product rounds a row in another way among others, and
# a picture is to be the same in a batch of any size.
_ROWS = 32


def _modulated_norm(x: Tensor, scale: Tensor, shift: Tensor, shared: bool) -> Tensor:
    """``scale norm(x) + shift``, in one pass where one scale (1, C, 1, 1) is shared by all of x (B, C, H, W)."""
    if shared:
        return channel_norm(x, scale.flatten(), shift.flatten())
    return torch.addcmul(shift, channel_norm(x), scale)


def _conditions(model: LiquidUNet, t: Tensor, labels: Tensor) -> Tensor:
    """Embeddings (R, T) of all labels at all times, those of one time together.

    The last one is there again and again, until there are as many as a multiple of _ROWS.
    """
    times, labels = t.repeat_interleave(len(labels)), labels.repeat(len(t))
    rows = torch.arange(-(-len(times) // _ROWS) * _ROWS, device=t.device).clamp_max(len(times) - 1)
    return torch.cat([model.condition(times[some], labels[some]) for some in rows.split(_ROWS)])


class _FoldedBlock:
    """A `LiquidBlock` that is told what it takes of a condition, by rows of its `table`.

    Whether a condition is `shared`, one by all pictures at once, decides how it computes. That a batch has only one
    picture does not: it is to be the same in a batch of many.
    """

    def __init__(self, block: LiquidBlock, shared: bool, dtype: torch.dtype) -> None:
        cfc, mix, self.shared = block.cfc, block.mix, shared
        self.relaxed = cfc.relaxation == "liquid"
        weights, biases = [cfc.heads.weight], [cast("Tensor", cfc.heads.bias)]
        if cfc.gate != "none":
            weights, biases = list(weights[0].chunk(2)), list(biases[0].chunk(2))
        self.gate, *self.value = [
            PackedConvolution(weight, bias, dtype, silu=i == 0)
            for i, (weight, bias) in enumerate(zip(weights, biases, strict=True))
        ]
        self.out = PackedConvolution.of(cfc.project, dtype)
        kernel = mix.kernel
        self.depthwise = PackedConvolution(kernel, mix.bias, dtype, groups=kernel.shape[0])
        self.project = PackedConvolution.of(mix.project, dtype)
        self.context = None
        if mix.context is not None:
            self.context = PackedConvolution(mix.context.weight, torch.zeros_like(mix.bias), dtype)

    @classmethod
    def table(cls, block: LiquidBlock, conditions: Tensor) -> Tensor:
        """What the block takes of the conditions (R, T) that will be met: (R, 6 C)."""
        return torch.cat([cls._rows(block, some) for some in conditions.split(_ROWS)]).flatten(1)

    @staticmethod
    def _rows(block: LiquidBlock, conditions: Tensor) -> Tensor:
        """What the block takes of some conditions (_ROWS, T): (_ROWS, 6, C)."""
        cfc = block.cfc
        slope, offset = (part[:, :, 0, 0].expand(_ROWS, -1) for part in cfc.slope_and_offset(conditions))  # (_ROWS, C)
        take = 1 - cfc.alpha(conditions) if cfc.relaxation == "liquid" else cfc.output_gate(conditions)
        scale, shift, output = block.modulation(conditions).chunk(3, dim=1)
        return torch.stack([slope, offset, take, 1 + scale, shift, output], 1)

    def __call__(self, x: Tensor, vectors: Tensor) -> Tensor:
        """x (B, C, H, W), which is overwritten, and the rows of the table for its pictures, or one for all."""
        slope, offset, take, scale, shift, output = vectors[..., None, None].chunk(6, dim=1)  # (B or 1, C, 1, 1) each
        u = _modulated_norm(x, slope, offset, self.shared)
        z = self.gate(u)
        for value in self.value:  # none where there is no gate
            z = value.times(u, z)
        if self.relaxed:
            x.lerp_(self.out(z), take)
        else:
            self.out.add_scaled_to(x, z, take, self.shared)

        u = _modulated_norm(x, scale, shift, self.shared)
        x = self.project.add_scaled_to(x, self.depthwise(u), output, self.shared)
        if self.context is None:
            return x
        return x.add_(output * self.context(u.mean((2, 3), keepdim=True)))  # faster than `addcmul_` of three shapes


class _FoldedJoin:
    """A `Join` with its weights in the sampling dtype."""

    def __init__(self, join: Join, dtype: torch.dtype) -> None:
        self.scale = join.scale
        self.below, self.skip = PackedConvolution.of(join.below, dtype), PackedConvolution.of(join.skip, dtype)

    def __call__(self, x: Tensor, skip: Tensor) -> Tensor:
        """x (B, C', H / scale, W / scale), skip (B, C, H, W) -> (B, C, H, W), a new tensor."""
        x = self.below(x)
        if self.scale > 1:
            x = F.interpolate(x, scale_factor=float(self.scale), mode="nearest")
        return self.skip.add_to(x, skip)


class _Recording:
    """A forward pass on a GPU, recorded for one shape of its inputs as a CUDA graph.

    At these sizes a kernel takes less time than its launch from Python; a replay launches all of them at once.

    Args:
        forward: what is recorded, called as forward(x, rows); it may not look at values.
        x, rows: of the shapes that it will be called with; it has run with such before, so that the libraries have
            chosen their kernels.
    """

    def __init__(self, forward: Callable[[Tensor, Tensor], Tensor], x: Tensor, rows: Tensor) -> None:
        self.x, self.rows, self.graph = x.clone(), rows.clone(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):  # other threads may use the GPU meanwhile
            self.out = forward(self.x, self.rows)

    def __call__(self, x: Tensor, rows: Tensor) -> Tensor:
        self.x.copy_(x)
        self.rows.copy_(rows)
        self.graph.replay()
        return self.out.clone()  # the next replay writes over it


class CompiledVelocity:
    """v(x, t) of a model for the times of one schedule; made by `compile_for_sampling`.

    The model is not touched. It has to stay as it is meanwhile: in float32 the weights are shared with it.
    """

    def __init__(
        self, model: LiquidUNet, times: Sequence[float], labels: Tensor | None, guidance: float, dtype: torch.dtype
    ) -> None:
        self.device, self.dtype, self.guidance = model.device, dtype, guidance
        self._step = {round(t, 6): i for i, t in enumerate(sorted(set(times)))}
        self.steps = torch.arange(len(self._step), device=self.device)
        met = self._take_labels(labels, model.config["num_classes"])
        conditions = _conditions(model, torch.tensor(sorted(set(times)), device=self.device), met)

        def blocks(stage: nn.Module) -> list[_FoldedBlock]:
            shared = self.any_batch and not self.guided
            return [_FoldedBlock(cast("LiquidBlock", block), shared, dtype) for block in stage.children()]

        def convolutions(layers: nn.Module) -> list[PackedConvolution]:
            return [PackedConvolution.of(layer, dtype) for layer in layers.children() if isinstance(layer, nn.Conv2d)]

        self.stem = PackedConvolution.of(model.stem, dtype)
        self.position = model.position
        self.positions: dict[torch.Size, Tensor] = {}  # by height and width, (1, C, H, W) each
        self.encoder = [blocks(stage) for stage in model.encoder]
        self.downsamples = convolutions(model.downsamples)
        self.bottleneck = blocks(model.bottleneck)
        self.joins = [_FoldedJoin(cast("Join", join), dtype) for join in model.joins]
        self.decoder = [blocks(stage) for stage in model.decoder]
        self.norm = functools.partial(
            channel_norm, weight=model.norm.weight.to(dtype), bias=model.norm.bias.to(dtype), eps=model.norm.eps
        )
        self.head = PackedConvolution.of(model.head, dtype)
        in_order = [block for stage in (*model.encoder, model.bottleneck, *model.decoder) for block in stage.children()]
        tables = [_FoldedBlock.table(cast("LiquidBlock", block), conditions).to(dtype) for block in in_order]
        self.table, self.table_widths = torch.cat(tables, 1), [table.shape[1] for table in tables]
        self.recordings: dict[torch.Size, _Recording | None] = {}  # of a GPU; None for a shape that was met once

    def _take_labels(self, labels: Tensor | None, classes: int) -> Tensor:
        """Set which rows of the table pictures take at a time; returns the labels met, one for each of those rows."""
        labels = labels if classes else None
        self.guided = self.guidance != 1.0 and labels is not None
        self.any_batch = labels is None or not labels.dim()  # one condition for all pictures
        wanted = (torch.tensor(classes, device=self.device) if labels is None else labels).reshape(-1)
        if self.guided:
            wanted = torch.cat([wanted, torch.full_like(wanted, classes)])
        met, self.rows = wanted.unique(return_inverse=True)
        self.labels_per_step = len(met)
        return met

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """The velocity at x (B, C, H, W) and t (B,), the same time for all, which must be one of the schedule.

        Raises:
            ValueError: the time is not of the schedule, or the batch is not the one of the labels.
        """
        step = self._step.get(round(float(t[0]), 6))
        if step is None:
            raise ValueError(f"t = {float(t[0])} is not of the schedule that the model was compiled for")
        batch = 2 * len(x) if self.guided else len(x)
        if not self.any_batch and len(self.rows) != batch:
            raise ValueError(f"compiled for a batch of {len(self.rows)} pictures, called with {batch}")
        if self.any_batch and not self.guided:
            rows = self.steps[step : step + 1]
        else:
            rows = (step * self.labels_per_step + self.rows).repeat_interleave(batch // len(self.rows))
        z = x.to(self.dtype).contiguous(memory_format=torch.channels_last)
        v = self._evaluate(torch.cat([z, z]) if self.guided else z, rows).to(x.dtype)
        if not self.guided:
            return v
        v_label, v_null = v.chunk(2)
        return torch.lerp(v_null, v_label, self.guidance)

    def _evaluate(self, x: Tensor, rows: Tensor) -> Tensor:
        """In parts that a CPU need not read from memory at every pass; a GPU wants all at once, and recorded."""
        if self.device.type == "cuda":
            return self._recorded(x, rows)
        at_once = max(1, _PART_BYTES // (len(self.stem.bias) * x.shape[2] * x.shape[3] * x.element_size()))
        if self.device.type != "cpu" or len(x) <= at_once:
            return self._forward(x, rows)
        parts = x.split(at_once)
        some = rows.split(at_once) if len(rows) > 1 else [rows] * len(parts)
        return torch.cat([self._forward(part, row) for part, row in zip(parts, some, strict=True)])

    def _recorded(self, x: Tensor, rows: Tensor) -> Tensor:
        if x.shape not in self.recordings:
            self.recordings[x.shape] = None
            return self._forward(x, rows)
        recording = self.recordings[x.shape] or _Recording(self._forward, x, rows)
        self.recordings[x.shape] = recording
        return recording(x, rows)

    def _places_of(self, x: Tensor) -> Tensor:
        """The embedding of the places of x (B, in channels, H, W) for each picture: (B, C, H, W), a new tensor."""
        if x.shape[2:] not in self.positions:
            self.positions[x.shape[2:]] = self.position(x.to(self.position.project.weight.dtype)).to(self.dtype)
        places = self.positions[x.shape[2:]].expand(len(x), -1, -1, -1)
        return places.clone(memory_format=torch.channels_last)  # `repeat` takes fifty times as long

    def _forward(self, x: Tensor, rows: Tensor) -> Tensor:
        """x (B, C, H, W) and rows of the table, (B,) or (1,) for all -> (B, C, H, W)."""
        vectors = iter(self.table[rows].split(self.table_widths, dim=1))
        x, skips = self.stem.add_to(self._places_of(x), x), []
        for i, stage in enumerate(self.encoder):
            for block in stage:
                x = block(x, next(vectors))
            skips.append(x)
            x = self.downsamples[i](x) if i < len(self.downsamples) else x.clone()
        for block in self.bottleneck:
            x = block(x, next(vectors))
        for join, stage in zip(self.joins, self.decoder, strict=True):
            x = join(x, skips.pop())
            for block in stage:
                x = block(x, next(vectors))
        return self.head(F.silu(self.norm(x), inplace=True))


def can_be_compiled(model: nn.Module) -> bool:
    """Whether a model computes what its weights say and nothing else: no hook, no part that somebody put in or around.

    What is rewritten reads the weights and calls no part, so that hooks, adapters and offloading would do nothing.
    """
    model = getattr(model, "_orig_mod", model)  # of one that torch.compile has
    return all(
        (type(part) in _TORCH_PARTS or type(part).__name__ in _OWN_PARTS)
        and not (part._forward_hooks or part._forward_pre_hooks or _has_other_forward(part))
        for part in model.modules()
    )


def _has_other_forward(part: nn.Module) -> bool:
    """Whether somebody put another method in the place of its class's; accelerate's mixed precision keeps that."""
    forward = vars(part).get("_original_forward", vars(part).get("forward"))
    return forward is not None and getattr(forward, "__func__", None) is not type(part).forward


@torch.no_grad()
def compile_for_sampling(
    model: LiquidUNet,
    timesteps: Sequence[float],
    labels: Tensor | None = None,
    guidance: float = 1.0,
    dtype: torch.dtype | None = None,
) -> Velocity:
    """A model as the velocity v(x, t) of one schedule, with all that is known beforehand computed beforehand.

    Args:
        model: left as it is.
        timesteps: the times in [0, 1] at which the solver will ask, see `sampling.solver_times`.
        labels: (B,) int64, one for each picture; () one for any number of pictures, which is a little faster; or None
            for the null label.
        guidance: classifier-free guidance; 1 is none.
        dtype: None for `fastest_dtype`; float32 equals the model to rounding.
    """
    return CompiledVelocity(model, timesteps, labels, guidance, dtype or fastest_dtype(model.device))
