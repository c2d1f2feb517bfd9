"""Depthwise convolution of three kernel sizes as one, with a backward pass that a CPU runs fast.

Shapes: B batch, C channels, H W height and width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_KERNEL = 7  # whose weight gradient is taken in strips
# oneDNN has a fast weight gradient for depthwise kernels at most three wide; a wider one falls back to a
# reference loop. Measured at (64, 64, 16, 16) in bfloat16 on two cores: 7x7 17.3 ms, 7x3 0.6 ms.
_STRIP = 3


def merge_kernels(kernels: Sequence[Tensor]) -> Tensor:
    """The kernel whose convolution equals the sum of the convolutions with each of `kernels`.

    Convolution is linear in its kernel, so ``conv(x, k3) + conv(x, k5) + conv(x, k7)`` with "same" padding is
    ``conv(x, k)`` where k holds the smaller kernels added into its centre.

    Args:
        kernels: (C, 1, K, K) each, K odd, the largest last.

    Returns:
        (C, 1, K, K) of the largest K.
    """
    *smaller, merged = kernels
    for kernel in smaller:
        merged = merged + F.pad(kernel, [(merged.shape[-1] - kernel.shape[-1]) // 2] * 4)
    return merged


def depthwise_conv(x: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
    """Depthwise convolution with "same" zero padding, on a CPU with a backward pass of ours.

    Args:
        x: (B, C, H, W); on a CPU `channels_last` is many times faster.
        kernel: (C, 1, K, K), K odd, converted to the dtype of `x`.
        bias: (C,) or None.

    Returns:
        (B, C, H, W) in the dtype of `x`.
    """
    kernel = kernel.to(x.dtype)
    if bias is not None:
        bias = bias.to(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        if x.device.type != "cpu" or not torch.is_grad_enabled():
            return _same_conv(x, kernel, bias)
        function = _DepthwiseConv if torch.compiler.is_compiling() else _DepthwiseConvForwards
        return function.apply(x, kernel, bias)


def _same_conv(x: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
    """The library's depthwise convolution, as large as `x`."""
    return F.conv2d(x, kernel, bias, padding=kernel.shape[-1] // 2, groups=x.shape[1])


def _weight_gradient(grad: Tensor, x: Tensor, height: int, width: int) -> Tensor:
    """Gradient of a (C, 1, height, width) depthwise kernel, by the library's own backward."""
    kernel = x.new_empty(x.shape[1], 1, height, width)
    padding = [height // 2, width // 2]
    return torch.ops.aten.convolution_backward(
        grad, x, kernel, None, [1, 1], padding, [1, 1], False, [0, 0], x.shape[1], [False, True, False]
    )[1]


def _weight_gradient_in_strips(grad: Tensor, x: Tensor) -> Tensor:
    """The 7x7 weight gradient as three gradients of strips, seven high and three wide.

    Column j of the kernel sees x moved by j - 3. The strip in the middle has columns 2 to 4; the outer two are the
    same gradient after x and grad were cropped against each other by three columns less one, of which the column
    that crosses the crop is dropped.
    """
    missing = _KERNEL - x.shape[2]
    if missing > 0:  # the fast path wants pictures at least as high as the kernel; rows of zeros add nothing
        x, grad = F.pad(x, (0, 0, 0, missing)), F.pad(grad, (0, 0, 0, missing))
    shift = _STRIP - 1
    if x.shape[3] <= shift:
        return _weight_gradient(grad, x, _KERNEL, _KERNEL)
    near = {"memory_format": torch.channels_last}
    strip = (_KERNEL, _STRIP)
    middle = _weight_gradient(grad, x, *strip)
    left = _weight_gradient(grad[..., shift:].contiguous(**near), x[..., :-shift].contiguous(**near), *strip)
    right = _weight_gradient(grad[..., :-shift].contiguous(**near), x[..., shift:].contiguous(**near), *strip)
    return torch.cat([left[..., :shift], middle, right[..., 1:]], dim=-1)


class _DepthwiseConv(torch.autograd.Function):
    """F.conv2d with another way to the same gradients, which can be differentiated again.

    The gradient of the input is a forward convolution, which of 7x7 is faster than its own backward pass, and without
    which torch.compile (2.13) brings the pictures of the backward pass into the memory layout of the kernel's gradient.
    """

    @staticmethod
    def forward(x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
        return _same_conv(x, kernel, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        del output
        x, kernel, _ = inputs
        ctx.save_for_backward(x, kernel)
        ctx.save_for_forward(x, kernel)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, kernel = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        needs_x, needs_kernel, needs_bias = ctx.needs_input_grad
        grad_x = grad_kernel = grad_bias = None
        if needs_x:
            grad_x = _same_conv(grad, kernel.flip(2, 3))
        if needs_kernel:
            side = kernel.shape[-1]
            in_strips = side == _KERNEL
            grad_kernel = _weight_gradient_in_strips(grad, x) if in_strips else _weight_gradient(grad, x, side, side)
        if needs_bias:
            grad_bias = grad.sum((0, 2, 3))
        return grad_x, grad_kernel, grad_bias


class _DepthwiseConvForwards(_DepthwiseConv):
    """Which forward-mode differentiation passes too; torch.compile refuses a function with a `jvp`."""

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, dkernel: Tensor, dbias: Tensor | None) -> Tensor:
        x, kernel = ctx.saved_tensors
        return _same_conv(dx, kernel, dbias) + _same_conv(x, dkernel)
