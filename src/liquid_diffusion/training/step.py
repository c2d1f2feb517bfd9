"""One optimiser step: what the model has to tell of a batch, the gradients of its error, and the update.

Shapes: B batch, C channels, H W height and width of the latents.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from liquid_diffusion.codecs import Codec
from liquid_diffusion.config import RunConfig
from liquid_diffusion.data.feed import Feed
from liquid_diffusion.flow import flow_loss, interpolate, sample_times, velocity
from liquid_diffusion.training.optimizer import set_learning_rate
from liquid_diffusion.training.recording import RecordedGradients
from liquid_diffusion.training.state import TrainingState


class Problem(NamedTuple):
    """What the model is trained to solve: the velocities at points of paths.

    Attributes:
        x: points (B, C, H, W).
        t: their times (B,).
        target: the velocities there (B, C, H, W).
        labels: (B,) int64, some of them hidden; None where there are no classes.
    """

    x: Tensor
    t: Tensor
    target: Tensor
    labels: Tensor | None = None


class TrainingStep:
    """Steps of a run.

    On a GPU where the run is compiled and all steps do the same in one piece, forward and backward pass are recorded at
    the first step and replayed.

    Args:
        accelerator: of the run.
        state: changed by each step.
        run: what is drawn, and how a batch is computed.
        dataset: makes latents of its batches.
        codec: fitted.
    """

    def __init__(
        self, accelerator: Accelerator, state: TrainingState, run: RunConfig, dataset: Feed, codec: Codec
    ) -> None:
        self.accelerator, self.state, self.run, self.dataset, self.codec = accelerator, state, run, dataset, codec
        alike = not (run.buckets or run.gradient_checkpointing) and run.gradient_accumulation == 1
        alone = accelerator.device.type == "cuda" and accelerator.num_processes == 1
        self._records = run.compile and alike and alone
        self._recording: RecordedGradients | None = None

    def __call__(self, images: Tensor, labels: Tensor, lr: float) -> Tensor:
        """Take a step on a batch of the data set; the loss () stays on the device."""
        set_learning_rate(self.state.optimizer, lr)
        loss = self._recorded_gradients(images, labels) if self._records else self._gradients_in_parts(images, labels)
        self.accelerator.clip_grad_norm_(self.state.wrapped.parameters(), self.run.max_grad_norm)
        self.state.optimizer.step()
        self.state.optimizer.zero_grad(set_to_none=True)
        self.state.average()
        return loss

    def release(self) -> None:
        """Give back the memory of what was recorded; the next step records again, which takes a second."""
        self._recording = None

    def problem(self, images: Tensor, labels: Tensor) -> Problem:
        """A batch of the data set and labels (B,) at times and noise drawn from the run's generator."""
        device, generator = self.accelerator.device, self.state.generator
        x0 = self.dataset.to_latents(images.to(device, non_blocking=True), self.codec, generator)
        t = sample_times(len(x0), self.run.time_sampling, generator, self.run.time_shift)
        noise = torch.randn(x0.shape, generator=generator, device=device)
        problem = Problem(interpolate(x0, noise, t), t, velocity(x0, noise))
        if not self.dataset.label_names:
            return problem
        hidden = torch.rand(len(x0), generator=generator, device=device) < self.run.label_dropout
        null_label = len(self.dataset.label_names)
        return problem._replace(labels=labels.to(device, non_blocking=True).masked_fill(hidden, null_label))

    def loss(self, problem: Problem) -> Tensor:
        """The model's error, ()."""
        return flow_loss(self.state.wrapped(problem.x, problem.t, problem.labels).sample, problem.target)

    def _gradients(self, *problem: Tensor, weight: float = 1.0) -> Tensor:
        """The loss times a weight, detached; its gradients are added to the parameters'."""
        loss = self.loss(Problem(*problem)) * weight
        self.accelerator.backward(loss)
        return loss.detach()

    def _gradients_in_parts(self, images: Tensor, labels: Tensor) -> Tensor:
        parts = self.run.gradient_accumulation
        total = torch.zeros((), device=self.accelerator.device)
        batches = list(zip(images.chunk(parts), labels.chunk(parts), strict=True))
        for i, batch in enumerate(batches):
            last = i == len(batches) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.state.wrapped):
                total += self._gradients(*_given(self.problem(*batch)), weight=len(batch[0]) / len(images))
        return total

    def _recorded_gradients(self, images: Tensor, labels: Tensor) -> Tensor:
        problem = _given(self.problem(images, labels))
        if self._recording is None:
            self._recording = RecordedGradients(self._gradients, list(self.state.model.parameters()), problem)
        return self._recording(*problem)


def _given(problem: Problem) -> list[Tensor]:
    """Its tensors, without the labels where there are none."""
    return [tensor for tensor in problem if tensor is not None]
