from __future__ import annotations

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F

from liquid_diffusion.models.depthwise import depthwise_conv, merge_kernels
from liquid_diffusion.models.unet import LiquidUNet


def kernels(channels: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    k3, k5, k7 = (torch.randn(channels, 1, k, k) for k in (3, 5, 7))
    return k3, k5, k7


@pytest.mark.parametrize(("height", "width"), [(16, 16), (9, 14), (4, 4), (1, 3), (6, 2)])
def test_merged_kernel_is_the_sum_of_three_convolutions(height: int, width: int) -> None:
    x = torch.randn(2, 8, height, width)
    three = kernels(8)
    expected = sum(F.conv2d(x, k, padding=k.shape[-1] // 2, groups=8) for k in three)
    torch.testing.assert_close(depthwise_conv(x, merge_kernels(three)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scales", [1, 2, 3])
@pytest.mark.parametrize(("height", "width"), [(16, 16), (9, 14), (4, 4), (8, 3), (6, 2), (1, 1)])
def test_gradients_equal_the_library_in_float64(height: int, width: int, scales: int) -> None:
    """The strips of the weight gradient and the turned kernel, against autograd through convolutions one by one."""
    x = torch.randn(3, 8, height, width).to(memory_format=torch.channels_last)
    bias = torch.randn(8)
    upstream = torch.randn(3, 8, height, width)
    leaves = [leaf.requires_grad_() for leaf in (x, *kernels(8)[:scales], bias)]
    out = depthwise_conv(leaves[0], merge_kernels(leaves[1:-1]), leaves[-1])
    ours = torch.autograd.grad(out, leaves, upstream)

    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    out64 = sum(F.conv2d(exact[0], k, padding=k.shape[-1] // 2, groups=8) for k in exact[1:-1])
    theirs = torch.autograd.grad(out64 + exact[-1][None, :, None, None], exact, upstream.double())
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


@pytest.mark.parametrize(("height", "width", "side"), [(5, 4, 7), (8, 8, 7), (5, 4, 3)])
def test_gradients_can_be_differentiated_again_and_forwards(height: int, width: int, side: int) -> None:
    """By finite differences in float64, as a penalty of the gradient and `torch.func` want it."""
    x = torch.randn(1, 2, height, width, dtype=torch.float64)
    leaves = [leaf.requires_grad_() for leaf in (x, torch.randn(2, 1, side, side).double(), torch.randn(2).double())]
    assert torch.autograd.gradcheck(depthwise_conv, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(depthwise_conv, leaves)


def test_a_jacobian_vector_product_of_a_model() -> None:
    """Through all of it, along the time: by `torch.func.jvp` and by a difference."""
    model = LiquidUNet(3, widths=(32, 64), depths=(1, 1)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    x, t, step = torch.randn(1, 3, 8, 8).double(), torch.tensor([0.4]), 1e-3
    derivative = torch.func.jvp(lambda t: model(x, t).sample, (t,), (torch.ones(1),))[1]
    with torch.no_grad():
        difference = (model(x, t + step).sample - model(x, t - step).sample) / (2 * step)
    torch.testing.assert_close(derivative, difference, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("side", [3, 7])
def test_it_is_compiled_without_a_break_of_the_graph(side: int) -> None:
    x = torch.randn(1, 2, 8, 8, requires_grad=True)
    assert torch._dynamo.explain(depthwise_conv)(x, torch.randn(2, 1, side, side)).graph_break_count == 0
