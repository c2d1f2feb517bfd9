"""What a model is told beside the picture, against formulas written out in float64 with numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from liquid_diffusion.models.layers import ConditionEmbedding, PointwiseConv, PositionEmbedding, add_to_each


def test_the_embedding_of_time_is_made_of_waves_of_its_logit() -> None:
    embedding = ConditionEmbedding(sinusoid_channels=8, channels=16)
    t = torch.tensor([0.0, 0.002, 0.3, 0.5, 0.9, 0.998, 1.0])
    w = {name: value.double().numpy() for name, value in embedding.state_dict().items()}
    inside = np.clip(t.double().numpy(), 0.002, 0.998)
    logit = np.log(inside / (1 - inside))
    angles = 10 * logit[:, None] * 10_000.0 ** (-np.arange(4) / 3)  # as diffusers spaces them, the last at 1 / 10,000
    waves = np.concatenate([np.sin(angles), np.cos(angles)], 1)
    hidden = waves @ w["linear_1.weight"].T + w["linear_1.bias"]
    out = hidden / (1 + np.exp(-hidden)) @ w["linear_2.weight"].T + w["linear_2.bias"]
    expected = out / (1 + np.exp(-out))
    np.testing.assert_allclose(embedding(t).detach().numpy(), expected, atol=1e-4)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (4, 12)])
def test_places_are_told_by_coordinates_and_waves(height: int, width: int) -> None:
    embedding = PositionEmbedding(5)
    picture = torch.randn(2, 3, height, width)
    assert embedding(picture).abs().max() == 0
    nn.init.normal_(embedding.project.weight)
    weight = embedding.project.weight.double().detach().numpy()[:, :, 0, 0]
    expected = np.zeros((5, height, width))
    for i in range(height):
        for j in range(width):
            y, x = (i + 0.5) / height * 2 - 1, (j + 0.5) / width * 2 - 1  # of the pixel's middle
            told = [y, x]
            for wave in (np.pi / 2, np.pi, 2 * np.pi):
                told += [np.sin(wave * y), np.sin(wave * x), np.cos(wave * y), np.cos(wave * x)]
            expected[:, i, j] = weight @ np.array(told)
    np.testing.assert_allclose(embedding(picture)[0].detach().numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_what_is_added_to_each_picture_has_the_sum_of_their_gradients(layout: torch.memory_format) -> None:
    x, same, told = torch.randn(3, 5, 4, 6), torch.randn(1, 5, 4, 6), torch.randn(3, 5, 4, 6)
    leaves = [leaf.contiguous(memory_format=layout).requires_grad_() for leaf in (x, same)]
    y = add_to_each(*leaves)
    assert y.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_array_equal(y.detach().numpy(), (x + same).detach().numpy())
    of_x, of_same = torch.autograd.grad(y, leaves, told.contiguous(memory_format=torch.channels_last))
    np.testing.assert_array_equal(of_x.numpy(), told.numpy())
    np.testing.assert_allclose(of_same.numpy(), told.double().numpy().sum(0, keepdims=True), atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("side", [4, 32])  # 64 pixels in the batch are a matrix product, 4,096 a convolution
def test_a_pointwise_convolution_is_a_product_for_each_pixel(side: int, bias: bool) -> None:
    layer = PointwiseConv(6, 10, bias=bias).bfloat16()
    x = torch.randn(4, 6, side, side).bfloat16().contiguous(memory_format=torch.channels_last).requires_grad_()
    told = torch.randn(4, 10, side, side).bfloat16()
    y = layer(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    y.backward(told)
    weight, pixels, g = (v.detach().double().numpy() for v in (layer.weight[:, :, 0, 0], x, told))
    expected = np.einsum("oc,bchw->bohw", weight, pixels)
    if layer.bias is not None:
        expected += layer.bias.detach().double().numpy()[None, :, None, None]
        assert layer.bias.grad is not None
        np.testing.assert_allclose(layer.bias.grad.float(), g.sum((0, 2, 3)), rtol=0.02, atol=0.5)
    assert x.grad is not None
    assert layer.weight.grad is not None
    np.testing.assert_allclose(y.detach().float(), expected, rtol=0.01, atol=0.02)
    np.testing.assert_allclose(x.grad.float(), np.einsum("oc,bohw->bchw", weight, g), rtol=0.01, atol=0.02)
    grad = layer.weight.grad[:, :, 0, 0].float()
    np.testing.assert_allclose(grad, np.einsum("bohw,bchw->oc", g, pixels), rtol=0.01, atol=0.2)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), y, rtol=0.01, atol=0.02)
