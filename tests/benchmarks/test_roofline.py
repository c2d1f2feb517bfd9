from __future__ import annotations

import pytest
import torch
from roofline import count
from torch import nn


@pytest.mark.parametrize("groups", [1, 4, 16])
def test_a_convolution_in_groups_has_as_many_flops_backward_for_each_gradient(groups: int) -> None:
    layer = nn.Conv2d(16, 16, 3, padding=1, groups=groups)
    forward = 2 * (2 * 16 * 8 * 8) * (16 // groups) * 9  # two for each weight of each output: 2 pictures, 8 x 8
    for gradients, asked in ((2, True), (1, False)):
        x = torch.randn(2, 16, 8, 8, requires_grad=asked)
        assert count(lambda x=x: layer(x).sum().backward())[0] == (1 + gradients) * forward
