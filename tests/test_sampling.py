"""The sampler on a problem with a known answer: data N(mu, s^2), whose velocity and flow are exact.

x_t is N((1 - t) mu, (1 - t)^2 s^2 + t^2), so v(x, t) = E[eps - x0 | x_t = x] follows from the joint Gaussian, and the
flow takes x_1 to mu + s x_1.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepInverseScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from torch import Tensor

from liquid_diffusion.config import SOLVERS, EvaluateConfig, SampleConfig
from liquid_diffusion.errors import UserError
from liquid_diffusion.sampling import for_flow, guide, make_scheduler, sample_steps, seeded_generators, solver_times

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


@pytest.mark.parametrize("kind", [UniPCMultistepScheduler, DPMSolverMultistepScheduler, DPMSolverSinglestepScheduler])
def test_order_of_the_multistep_schedulers(kind: type[SchedulerMixin], noise: Tensor) -> None:
    """Made of Euler's configuration they are of second order, from the time near 1 at which they begin; a corrector as
    UniPC's can add one."""
    scheduler = for_flow(kind.from_config(make_scheduler("euler").config))
    steps = np.array([64, 128, 256, 512])
    errors = []
    for n in steps:
        t = solver_times(scheduler, int(n))[0]
        start = (1 - t) * MEAN + ((1 - t) ** 2 * DEVIATION**2 + t**2) ** 0.5 * noise
        *_, last = sample_steps(exact_velocity, start, scheduler, int(n))
        errors.append((last.x - (MEAN + DEVIATION * noise)).square().mean().sqrt().item())
    assert 1.6 < -np.polyfit(np.log(steps), np.log(errors), 1)[0] < 3


def test_schedulers_set_up_for_the_flow() -> None:
    euler = make_scheduler("euler")
    assert for_flow(euler) is euler
    shifted = UniPCMultistepScheduler.from_config(
        euler.config, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    assert for_flow(shifted) is shifted  # who set a flow up has it as it is
    noise_predictor = DPMSolverMultistepScheduler(solver_order=3, algorithm_type="dpmsolver++")
    assert noise_predictor.config["prediction_type"] == "epsilon"
    ours = for_flow(noise_predictor)
    assert (ours.config["prediction_type"], ours.config["flow_shift"]) == ("flow_prediction", 1.0)
    assert ours.config["solver_order"] == 3
    with pytest.raises(UserError, match="DDPMScheduler integrates no rectified flow; take Flow"):
        for_flow(DDPMScheduler())
    with pytest.raises(UserError, match="DPMSolverMultistepInverseScheduler integrates no rectified flow"):
        for_flow(DPMSolverMultistepInverseScheduler.from_config(euler.config))


def test_a_shift_is_kept() -> None:
    """Of a flow scheduler, and of one that is only told of the flow; sigma is s u / (1 + (s - 1) u) at equal u."""
    euler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    for scheduler in (
        UniPCMultistepScheduler.from_config(euler.config),
        UniPCMultistepScheduler.from_config(make_scheduler("euler").config, flow_shift=3.0),
        DPMSolverMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0),
    ):
        times = solver_times(for_flow(scheduler), 4)
        assert times == pytest.approx([1, 0.9, 0.75, 0.5], abs=2e-3)
    plain = for_flow(UniPCMultistepScheduler.from_config(make_scheduler("euler").config))
    assert solver_times(plain, 4) == pytest.approx([1, 0.75, 0.5, 0.25], abs=2e-3)


def test_what_is_sent_takes_the_place_of_the_state(noise: Tensor) -> None:
    walk = sample_steps(exact_velocity, noise, make_scheduler("euler"), 2)
    first = walk.send(None)
    second = walk.send(first.x + 1)
    v = exact_velocity(first.x + 1, torch.full((2,), 0.5))
    torch.testing.assert_close(second.x, first.x + 1 - 0.5 * v)


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
    with pytest.raises(UserError, match="no solver 'rk45'; choose from unipc"):
        make_scheduler("rk45")
    with pytest.raises(UserError, match="at least 1 step"):
        next(sample_steps(exact_velocity, torch.zeros(1, 1, 4, 4), make_scheduler(), 0))


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(
    "kind",
    [UniPCMultistepScheduler, DPMSolverMultistepScheduler, DEISMultistepScheduler, DPMSolverSinglestepScheduler,
     FlowMatchHeunDiscreteScheduler],
)  # fmt: skip
def test_more_steps_than_there_are_whole_timesteps(kind: type[SchedulerMixin], shift: float, noise: Tensor) -> None:
    """Timesteps between 0 and 1000 come twice then, and the exact answer is nearer all the same."""
    scheduler = for_flow(kind.from_config({"flow_shift": shift, "shift": shift}))
    *_, last = sample_steps(exact_velocity, noise, scheduler, 1200)
    assert (last.x - (MEAN + DEVIATION * noise)).square().mean().sqrt() < 4e-3


@pytest.mark.parametrize(
    "scheduler",
    [*(kind.from_config(make_scheduler().config, **{option: True})
       for kind in (UniPCMultistepScheduler, DPMSolverMultistepScheduler)
       for option in ("use_exponential_sigmas", "use_beta_sigmas")),
     DPMSolverMultistepScheduler.from_config(make_scheduler().config, use_karras_sigmas=True),
     FlowMatchEulerDiscreteScheduler(invert_sigmas=True)],
)  # fmt: skip
def test_times_that_are_none_of_a_flow_are_refused(scheduler: SchedulerMixin) -> None:
    with pytest.raises(UserError, match=f"times of this {type(scheduler).__name__} do not fall from 1 to 0"):
        solver_times(for_flow(scheduler), 10)


def test_one_solver_where_nothing_is_said() -> None:
    """Of saved pipelines, of `sample` and of `evaluate`; the bounds above say what it is better at than Euler."""
    assert isinstance(make_scheduler(), UniPCMultistepScheduler)
    assert SampleConfig().solver == EvaluateConfig().solver == "unipc"


def test_euler_steps_are_equal_down_to_zero() -> None:
    """Its own spacing would take the last step from t = 0.001."""
    assert solver_times(make_scheduler("euler"), 4) == pytest.approx([1.0, 0.75, 0.5, 0.25])
