"""From noise to data: the loop over a diffusers scheduler, and guidance as a wrapper of the velocity.

Any callable v(x, t) can be sampled, x (B, C, H, W), t (B,) in [0, 1]; the model is only one of them.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from torch import Tensor

from liquid_diffusion.config import SOLVER, SOLVERS, STEPS
from liquid_diffusion.errors import UserError
from liquid_diffusion.flow import predicted_data

Velocity = Callable[[Tensor, Tensor], Tensor]

_MULTISTEP: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 1.0}


@dataclass(frozen=True)
class SampleStep:
    """One evaluation on the way: `x` the state after it, `x0` the data it predicted, (B, C, H, W) each.

    `t` is the time at which the velocity was taken; `index` counts evaluations from 0, of `total`.
    """

    index: int
    total: int
    t: float
    x: Tensor
    x0: Tensor


def make_scheduler(solver: str = SOLVER) -> SchedulerMixin:
    """The diffusers scheduler called unipc, euler, heun or dpm++, set up for a flow.

    Raises:
        UserError: there is none of that name.
    """
    if solver == "euler":
        return FlowMatchEulerDiscreteScheduler()
    if solver == "heun":
        return FlowMatchHeunDiscreteScheduler()
    if solver == "unipc":
        return UniPCMultistepScheduler(**_MULTISTEP)
    if solver == "dpm++":
        return DPMSolverMultistepScheduler(**_MULTISTEP)
    raise UserError(f"There is no solver {solver!r}; choose from {', '.join(SOLVERS)}.")


def for_flow(scheduler: SchedulerMixin) -> SchedulerMixin:
    """The scheduler itself if it integrates a flow, or one of its kind that does.

    Made by ``X.from_config(other.config)`` the multistep schedulers predict noise along another path, because the
    configuration of a flow scheduler does not speak of what only they have to be told.

    Raises:
        UserError: there is no flow in it, or one whose times depend on the size of a picture.
    """
    if scheduler.config.get("use_dynamic_shifting"):
        raise UserError(
            "A scheduler with use_dynamic_shifting asks how large a picture is, which changes nothing here; give "
            "use_dynamic_shifting=False to its from_config."
        )
    kind, config = type(scheduler), scheduler.config
    known = inspect.signature(kind).parameters
    if "use_flow_sigmas" in known and hasattr(kind, "set_begin_index"):  # which that from data to noise has not
        if config["use_flow_sigmas"] and config["prediction_type"] == "flow_prediction":
            return scheduler
        own = {name: config[name] for name in known if name in config} | _MULTISTEP
        if config.get("flow_shift", 1.0) != 1:
            own["flow_shift"] = config["flow_shift"]
        elif "shift" in config:  # of the flow scheduler that its configuration came from
            own["flow_shift"] = config["shift"]
        return kind(**own)
    if kind.__name__.startswith("FlowMatch"):
        return scheduler
    raise UserError(
        f"{kind.__name__} integrates no rectified flow; take FlowMatchEulerDiscreteScheduler, "
        "FlowMatchHeunDiscreteScheduler, UniPCMultistepScheduler or DPMSolverMultistepScheduler."
    )


def seeded_generators(seed: int, count: int) -> list[torch.Generator]:
    """A generator for each picture, seeded seed, seed + 1, ...

    On the CPU, so that a seed means the same noise on every device and in a batch of any size.
    """
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


def guide(
    model: Callable[..., Any], labels: Tensor | None = None, null_label: int | None = None, scale: float = 1.0
) -> Velocity:
    """A model, labels and guidance as v(x, t).

    Classifier-free guidance (Ho and Salimans, arXiv 2207.12598): ``v = v_null + scale (v_label - v_null)``, both
    from one call of twice the batch. Scale 1 is the conditional model itself, and costs one evaluation.

    Args:
        model: called as model(x, t, labels).sample, as `LiquidUNet` is.
        labels: (B,) int64, or None for a model without classes.
        null_label: the label that means "none"; wanted where scale is not 1.
        scale: strength of the guidance.
    """
    if labels is None:
        return lambda x, t: model(x, t).sample
    if scale == 1.0:
        return lambda x, t: model(x, t, labels).sample
    if null_label is None:
        raise ValueError("guidance needs the null label")
    both = torch.cat([labels, torch.full_like(labels, null_label)])

    def guided(x: Tensor, t: Tensor) -> Tensor:
        v_label, v_null = model(torch.cat([x, x]), torch.cat([t, t]), both).sample.chunk(2)
        return torch.lerp(v_null, v_label, scale)

    return guided


def solver_times(scheduler: SchedulerMixin, steps: int, device: torch.device | str = "cpu") -> list[float]:
    """Set a scheduler to some steps, and tell the times in [0, 1] at which it will ask for the velocity.

    Raises:
        UserError: there is no step, or the scheduler's times are none of a flow.
    """
    if steps < 1:
        raise UserError(f"A sample needs at least 1 step, not {steps}.")
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        # its own spacing spends the last step between t = 0.001 and 0
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / steps, steps).tolist(), device=device)
    else:
        scheduler.set_timesteps(steps, device=device)
    # the multistep schedulers round their timesteps to whole numbers; their sigmas are the exact times
    times = [float(sigma) for sigma in scheduler.sigmas[: len(scheduler.timesteps)]]
    if not (times[0] <= 1 and times[-1] >= 0 and all(t >= after for t, after in itertools.pairwise(times))):
        raise UserError(
            f"The times of this {type(scheduler).__name__} do not fall from 1 to 0, as a flow's do: set "
            "use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas, use_lu_lambdas or invert_sigmas to False."
        )
    scheduler.set_begin_index(0)  # else it looks for the first timestep, which, rounded, may be there twice
    return times


@torch.no_grad()
def sample_steps(
    velocity: Velocity,
    noise: Tensor,
    scheduler: SchedulerMixin,
    steps: int = STEPS,
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> Generator[SampleStep, Tensor | None, None]:
    """Integrate from noise at t = 1 to data at t = 0, yielding after every evaluation of the velocity.

    Args:
        velocity: v(x, t).
        noise: (B, C, H, W), standard normal.
        scheduler: any of diffusers' flow schedulers; its state is reset.
        steps: steps of the solver; heun evaluates 2 steps - 1 times, the others once a step.
        generator: one, or one for each picture, of a scheduler that draws on the way; the four solvers do not.

    Yields:
        A `SampleStep` for each evaluation; the last one's `x` is the sample. What is sent back, if anything, takes
        the place of `x`.
    """
    schedule = solver_times(scheduler, steps, noise.device)
    x, total = noise, len(schedule)
    draws = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for index, (t, timestep) in enumerate(zip(schedule, scheduler.timesteps, strict=True)):
        times = torch.full((len(x),), t, device=x.device)
        v = velocity(x, times).to(x.dtype)
        x0 = predicted_data(x, v, times)
        x = scheduler.step(v, timestep, x, return_dict=False, **draws)[0]
        replaced = yield SampleStep(index, total, t, x, x0)
        x = x if replaced is None else replaced
