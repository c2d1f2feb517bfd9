from __future__ import annotations

import pytest
import torch
from along_the_path import HandedOver, loss_at
from figures import path_tables
from torch import Tensor, nn


class Multiple(nn.Module):
    """Says that the velocity is a multiple of x."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        del t, labels
        return self.factor * x


@pytest.mark.parametrize("time", [0.2, 0.9])
def test_the_loss_at_a_time(time: float) -> None:
    """Of data that is 0 the path is t noise and its velocity the noise: a model that says x / t is right everywhere."""
    x0, labels = torch.zeros(70, 4, 8, 8), torch.zeros(70, dtype=torch.long)
    assert loss_at(Multiple(1 / time), x0, labels, time) < 1e-4  # bfloat16 where a machine is fast in it
    assert loss_at(Multiple(0.0), x0, labels, time) == pytest.approx(1.0, abs=0.02)  # the variance of the noise
    assert loss_at(Multiple(2 / time), x0, labels, time) == pytest.approx(1.0, abs=0.02)


@torch.no_grad()
def test_one_model_begins_and_the_other_ends() -> None:
    both = HandedOver(Multiple(1.0), Multiple(3.0), 0.9)
    x, labels = torch.ones(2, 1, 1, 1), torch.zeros(2, dtype=torch.long)
    factors = [float(both(x, torch.full((2,), t), labels)[0, 0, 0, 0]) for t in (1.0, 0.95, 0.9, 0.1)]
    assert factors == [1.0, 1.0, 3.0, 3.0]


def test_tables_have_means_over_seeds() -> None:
    shared = {"images": "32000", "lr": "0.008"}
    rows = []
    for seed, loss, kd in (("0", "0.2", "0.5"), ("1", "0.4", "0.7")):
        rows.append(shared | {"seed": seed, "model": "a", "time": "0.5", "loss": loss, "kd": ""})
        rows.append(shared | {"seed": seed, "model": "b", "time": "0.5", "loss": "0.25", "kd": ""})
        rows.append(shared | {"seed": seed, "model": "a", "time": "", "kd": kd, "kd_standard_error": "0.01"})
    tables = path_tables(rows)
    assert "32000 images each, 2 seeds" in tables["losses along the path"]
    assert "| a | 0.300 |" in tables["losses along the path"]
    assert "| b | **0.250** |" in tables["losses along the path"]
    assert "| a | 0.600 ± 0.100 |" in tables["pictures handed over"]
