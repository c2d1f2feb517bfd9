from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from liquid_diffusion.flow import flow_loss, interpolate, predicted_data, sample_times, velocity

X0, NOISE = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(3)).double()


def test_path_runs_from_data_to_noise() -> None:
    torch.testing.assert_close(interpolate(X0, NOISE, torch.zeros(4).double()), X0)
    torch.testing.assert_close(interpolate(X0, NOISE, torch.ones(4).double()), NOISE)


def test_velocity_is_the_derivative_of_the_path() -> None:
    t, h = torch.tensor([0.1, 0.4, 0.6, 0.9]).double(), 1e-6
    difference = (interpolate(X0, NOISE, t + h) - interpolate(X0, NOISE, t - h)) / (2 * h)
    torch.testing.assert_close(velocity(X0, NOISE), difference, atol=1e-6, rtol=1e-6)


def test_predicted_data_of_the_true_velocity_is_the_data() -> None:
    t = torch.tensor([0.1, 0.4, 0.6, 1.0]).double()
    torch.testing.assert_close(predicted_data(interpolate(X0, NOISE, t), velocity(X0, NOISE), t), X0)


def test_loss_is_the_mean_square_in_float32() -> None:
    prediction, target = torch.full((2, 3), 300.0).half(), torch.zeros(2, 3).half()
    loss = flow_loss(prediction, target)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(90000.0)  # more than float16 can hold


def test_time_distributions() -> None:
    """Kolmogorov-Smirnov against scipy: the logit of a logit-normal number is normal."""
    generator = torch.Generator().manual_seed(0)
    uniform = sample_times(20000, "uniform", generator).numpy()
    assert stats.kstest(uniform, "uniform").pvalue > 0.01
    logit_normal = sample_times(20000, "logit-normal", generator).double()
    assert stats.kstest(torch.logit(logit_normal).numpy(), "norm").pvalue > 0.01
    shifted = sample_times(20000, "logit-normal", generator, shift=3.0).double()
    assert stats.kstest(torch.logit(shifted).numpy(), "norm", (math.log(3), 1)).pvalue > 0.01
