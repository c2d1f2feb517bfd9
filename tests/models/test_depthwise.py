from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from liquid_diffusion.models.depthwise import depthwise_conv, merge_kernels


def kernels(channels: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    k3, k5, k7 = (torch.randn(channels, 1, k, k) for k in (3, 5, 7))
    return k3, k5, k7


@pytest.mark.parametrize(("height", "width"), [(16, 16), (9, 14), (4, 4), (1, 3), (6, 2)])
def test_merged_kernel_is_the_sum_of_three_convolutions(height: int, width: int) -> None:
    x = torch.randn(2, 8, height, width)
    three = kernels(8)
    expected = sum(F.conv2d(x, k, padding=k.shape[-1] // 2, groups=8) for k in three)
    torch.testing.assert_close(depthwise_conv(x, merge_kernels(three)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (9, 14), (4, 4), (8, 3), (6, 2), (1, 1)])
def test_gradients_equal_the_library_in_float64(height: int, width: int) -> None:
    """The strips of the weight gradient and the turned kernel, against autograd through the three convolutions."""
    x = torch.randn(3, 8, height, width).to(memory_format=torch.channels_last)
    bias = torch.randn(8)
    upstream = torch.randn(3, 8, height, width)
    leaves = [leaf.requires_grad_() for leaf in (x, *kernels(8), bias)]
    out = depthwise_conv(leaves[0], merge_kernels(leaves[1:4]), leaves[4])
    ours = torch.autograd.grad(out, leaves, upstream)

    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    out64 = sum(F.conv2d(exact[0], k, padding=k.shape[-1] // 2, groups=8) for k in exact[1:4])
    theirs = torch.autograd.grad(out64 + exact[4][None, :, None, None], exact, upstream.double())
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.double(), other, atol=1e-4, rtol=1e-4)


def test_gradients_in_bfloat16_stay_near_float32() -> None:
    x, k7, upstream = torch.randn(4, 32, 16, 16), torch.randn(32, 1, 7, 7), torch.randn(4, 32, 16, 16)
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        leaves = [x.to(dtype).requires_grad_(), k7.clone().requires_grad_()]
        gradients.append(torch.autograd.grad(depthwise_conv(*leaves), leaves, upstream.to(dtype)))
    for full, half in zip(*gradients, strict=True):
        error = (full - half.float()).norm() / full.norm()
        assert error < 0.01
