"""The sampler on a problem with a known answer: data N(mu, s^2), whose velocity and flow are exact.

x_t is N((1 - t) mu, (1 - t)^2 s^2 + t^2), so v(x, t) = E[eps - x0 | x_t = x] follows from the joint Gaussian, and the
flow takes x_1 to mu + s x_1.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from liquid_diffusion.config import SOLVERS, UserError
from liquid_diffusion.sampling import guide, make_scheduler, sample_steps, seeded_generators, solver_times

MEAN, DEVIATION = 0.7, 0.3


def exact_velocity(x: Tensor, t: Tensor) -> Tensor:
    t = t[:, None, None, None].to(x)
    variance = (1 - t) ** 2 * DEVIATION**2 + t**2
    covariance = t - (1 - t) * DEVIATION**2  # of eps - x0 with x_t
    return -MEAN + covariance / variance * (x - (1 - t) * MEAN)


def error(solver: str, steps: int, noise: Tensor) -> float:
    *_, last = sample_steps(exact_velocity, noise, make_scheduler(solver), steps)
    return (last.x - (MEAN + DEVIATION * noise)).square().mean().sqrt().item()


@pytest.fixture
def noise() -> Tensor:
    return torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)).double()


@pytest.mark.parametrize(("solver", "bound"), [("euler", 0.03), ("heun", 0.001), ("unipc", 0.005), ("dpm++", 0.006)])
def test_25_steps_reach_the_exact_answer(solver: str, bound: float, noise: Tensor) -> None:
    """Bounds: the errors that diffusers' schedulers are known to have on this flow, with some room."""
    assert error(solver, 25, noise) < bound


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_order_of_convergence(solver: str, order: int, noise: Tensor) -> None:
    steps = np.array([8, 16, 32, 64])
    slope = np.polyfit(np.log(steps), [np.log(error(solver, int(n), noise)) for n in steps], 1)[0]
    assert -slope == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize("solver", SOLVERS)
def test_steps_go_from_noise_to_data(solver: str, noise: Tensor) -> None:
    steps = list(sample_steps(exact_velocity, noise, make_scheduler(solver), 10))
    times = [step.t for step in steps]
    assert times[0] == pytest.approx(1.0, abs=1e-3)
    assert all(first >= second for first, second in itertools.pairwise(times))
    assert [step.index for step in steps] == list(range(steps[0].total))
    assert len(steps) == (19 if solver == "heun" else 10)
    # a straight line along the exact velocity from late on the path ends near the exact answer
    assert (steps[-1].x0 - (MEAN + DEVIATION * noise)).square().mean().sqrt() < 0.1


def test_guidance_moves_along_the_difference() -> None:
    class Output:
        def __init__(self, sample: Tensor) -> None:
            self.sample = sample

    def model(x: Tensor, t: Tensor, labels: Tensor | None = None) -> Output:
        return Output(x + t[:, None, None, None] + (0 if labels is None else 10 * labels[:, None, None, None]))

    x, t, labels = torch.zeros(2, 1, 1, 1), torch.tensor([0.25, 0.5]), torch.tensor([1, 2])
    expected = t[:, None, None, None] + 30 + 3 * 10 * (labels - 3)[:, None, None, None]
    torch.testing.assert_close(guide(model, labels, null_label=3, scale=3.0)(x, t), expected)
    torch.testing.assert_close(guide(model, labels)(x, t), model(x, t, labels).sample)
    torch.testing.assert_close(guide(model)(x, t), model(x, t).sample)
    with pytest.raises(ValueError, match="null label"):
        guide(model, labels, scale=2.0)


def test_generators_are_their_seeds() -> None:
    draws = [torch.randn(3, generator=generator) for generator in seeded_generators(5, 3)]
    for i, draw in enumerate(draws):
        torch.testing.assert_close(draw, torch.randn(3, generator=torch.Generator().manual_seed(5 + i)))


def test_wrong_wishes_are_refused() -> None:
    with pytest.raises(UserError, match="no solver 'rk45'; choose from euler"):
        make_scheduler("rk45")
    with pytest.raises(UserError, match="at least 1 step"):
        next(sample_steps(exact_velocity, torch.zeros(1, 1, 4, 4), make_scheduler(), 0))


def test_euler_steps_are_equal_down_to_zero() -> None:
    """Its own spacing would take the last step from t = 0.001."""
    assert solver_times(make_scheduler("euler"), 4) == pytest.approx([1.0, 0.75, 0.5, 0.25])
