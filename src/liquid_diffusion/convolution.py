"""A convolution as the sampler calls it: weights converted and laid out once, what follows it done on the way.

Shapes: B batch, C and C' channels in and out, H W and H' W' height and width.
"""

from __future__ import annotations

import functools
import platform

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# A weight is multiplied, and brought into oneDNN's layout, in the time in which a pass does so many numbers: at tiny's
# coarsest stage, 8 pictures of 8 x 8, folding took 150 us and the pass 130; at the one above it 110 and 170.
_WEIGHT_BY_NUMBER = 4


@functools.cache
def _onednn_computes(dtype: torch.dtype) -> bool:
    """Whether oneDNN's operators are there for a dtype, on a processor of the kind that they were measured on."""
    if not torch.backends.mkldnn.is_available() or platform.machine() not in ("x86_64", "AMD64"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class PackedConvolution:
    """A convolution with its weights in the sampling dtype, and a SiLU behind it or not.

    On an x86 processor it calls oneDNN by the operators that torch.compile puts there: activation and residual sum are
    part of the convolution, which spares a pass over memory each, and the weights are brought into oneDNN's layout once
    instead of at every call. The layout is asked for with the size of the input: the one for any size can be 50 times
    slower than none.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        dtype: torch.dtype,
        *,
        stride: int = 1,
        groups: int = 1,
        silu: bool = False,
    ) -> None:
        self.weight = weight.to(dtype).contiguous(memory_format=torch.channels_last)
        self.bias = bias.to(dtype)
        self.stride, self.padding, self.groups = [stride] * 2, [(weight.shape[-1] - 1) // 2] * 2, groups
        self.silu = silu
        self.packed: dict[torch.Size, Tensor] = {}  # by the shape of the input
        self.onednn = weight.device.type == "cpu" and _onednn_computes(dtype)

    @classmethod
    def of(cls, layer: nn.Conv2d, dtype: torch.dtype) -> PackedConvolution:
        """The convolution of a layer with "same" padding, or of a downsampling one without."""
        assert layer.bias is not None
        return cls(layer.weight, layer.bias, dtype, stride=layer.stride[0])

    @property
    def _geometry(self) -> tuple[list[int], list[int], list[int], int]:
        return self.padding, self.stride, [1, 1], self.groups

    def _call(self, z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if self.onednn:
            return torch.ops.mkldnn._convolution_pointwise(
                z, weight, bias, *self._geometry, "swish" if self.silu else "none", [], "none"
            )
        if z.is_cuda and weight.shape[2] == 1:  # cuBLAS adds the bias itself, cuDNN's convolution in another kernel
            y = F.linear(z.permute(0, 2, 3, 1), weight[:, :, 0, 0], bias).permute(0, 3, 1, 2)
        else:
            y = F.conv2d(z, weight, bias, self.stride, self.padding, 1, self.groups)
        return F.silu(y, inplace=True) if self.silu else y

    def __call__(self, z: Tensor) -> Tensor:
        """z (B, C, H, W) -> (B, C', H', W')."""
        return self._call(z, self._weight_for(z), self.bias)

    def _weight_for(self, z: Tensor) -> Tensor:
        if not self.onednn:
            return self.weight
        if z.shape not in self.packed:
            self.packed[z.shape] = torch.ops.mkldnn._reorder_convolution_weight(self.weight, *self._geometry, z.shape)
        return self.packed[z.shape]

    def times(self, z: Tensor, factor: Tensor) -> Tensor:
        """``factor conv(z)``, factor (B, C', H', W'), which may be overwritten."""
        if not self.onednn:
            return factor.mul_(self(z))
        weight = self._weight_for(z)
        return torch.ops.mkldnn._convolution_pointwise.binary(
            z, factor, weight, self.bias, *self._geometry, "mul", None, None, [], None
        )

    def folds(self, z: Tensor) -> bool:
        """Whether it is cheaper to multiply a scale into the weights than to pass over what comes out."""
        return z.device.type == "cpu" and _WEIGHT_BY_NUMBER * self.weight.numel() < z[0].numel()

    def add_to(self, x: Tensor, z: Tensor) -> Tensor:
        """``x <- x + conv(z)``, which is returned."""
        return self._add_to(x, z, self._weight_for(z), self.bias)

    def add_scaled_to(self, x: Tensor, z: Tensor, scale: Tensor, shared: bool) -> Tensor:
        """``x <- x + scale conv(z)``, which is returned; of a scale (B, C', 1, 1), or (1, C', 1, 1) that is shared."""
        if not (shared and self.folds(z)):
            return x.addcmul_(self(z), scale)
        scale = scale.flatten()
        return self._add_to(x, z, self.weight * scale[:, None, None, None], self.bias * scale)

    def _add_to(self, x: Tensor, z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if not self.onednn:
            return x.add_(self._call(z, weight, bias))
        return torch.ops.mkldnn._convolution_pointwise_.binary(
            x, z, weight, bias, *self._geometry, "add", None, None, [], None
        )
