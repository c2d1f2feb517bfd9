"""What a model is told beside the picture, against formulas written out in float64 with numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from liquid_diffusion.models.layers import ConditionEmbedding, PositionEmbedding


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
