"""Training of any model under a budget, with the package's own data, codec, flow, optimiser settings and average."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from diffusers.training_utils import EMAModel
from peers import channel_mixers, compile_for_training
from torch import Tensor, nn

from liquid_diffusion.codecs import Codec
from liquid_diffusion.config import TrainConfig
from liquid_diffusion.data.pictures import PictureDataset, ShuffledBatches, collate
from liquid_diffusion.data.transforms import to_float, to_pil, to_uint8
from liquid_diffusion.flow import TimeSampling, flow_loss, interpolate, sample_times, velocity
from liquid_diffusion.hardware import fastest_dtype
from liquid_diffusion.sampling import make_scheduler, sample_steps, seeded_generators
from liquid_diffusion.training.learning_rate import learning_rate_factor
from liquid_diffusion.training.optimizer import condition_weights, optimizer_of, set_learning_rate
from liquid_diffusion.training.recording import RecordedGradients

_RUN = TrainConfig()  # whose defaults all models are trained with
_BATCH = 64
_WARM_UP = 25  # steps; the trainer's 100 would be most of what the slowest peer gets in three minutes
_FIT_PICTURES = 256
_BATCH_OF_A_GPU = 256  # drawn at once


@dataclass(frozen=True)
class Budget:
    """What all models get the same of: seconds of training steps, or pictures.

    Attributes:
        amount: seconds or pictures.
        unit: "s" or "images".
        clock: "wall", "cpu" for the process's own seconds, or "table" for `step_seconds`.
        step_seconds: what each step counts as by the clock "table", whatever it takes in this hour.
    """

    amount: float
    unit: str
    clock: str = "wall"
    step_seconds: float = 0.0

    def __str__(self) -> str:
        return f"{self.amount:g} {self.unit}"

    def now(self, device: torch.device) -> float:
        """Seconds by the clock; a GPU is waited for where they are what the budget is counted in."""
        if device.type == "cuda" and self.unit == "s" and self.clock != "table":
            torch.cuda.synchronize()
        return time.process_time() if self.clock == "cpu" else time.perf_counter()


@dataclass(frozen=True)
class Point:
    """Where a training is when a share of its budget is spent; the model has its averaged weights meanwhile."""

    fraction: float
    steps: int
    images: int
    seconds: float
    loss: float


def predict(model: nn.Module, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """The velocity (B, C, H, W), in the fastest arithmetic of the device."""
    dtype = fastest_dtype(x.device)
    with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
        out = model(x, t, labels)
    return out if isinstance(out, Tensor) else out.sample


class Training:
    """A model in training.

    It is compiled, as the trainer does. The learning rate rises in the first steps, and falls in the last part of the
    budget as a cosine, whatever the budget is counted in. Steps before the first are not counted, nor is what happens
    while the caller has a `Point`.

    Args:
        model: on its device, called as model(x, t, labels).
        dataset: pictures with labels, never mirrored.
        codec: fitted.
        lr: after the warm-up.
        seed: of batches, times, noise and hidden labels.
        times, time_shift: distribution of the training times.
        optimizer: adamw or muon.
    """

    def __init__(
        self,
        model: nn.Module,
        dataset: PictureDataset,
        codec: Codec,
        lr: float,
        seed: int,
        times: TimeSampling,
        time_shift: float = 1.0,
        optimizer: str = "adamw",
    ) -> None:
        self.model, self.codec, self.lr = model, codec, lr
        self.times, self.time_shift = times, time_shift
        self.device = next(model.parameters()).device
        mixers = channel_mixers(model) if optimizer == "muon" else []
        self.optimizer = optimizer_of(model, mixers, condition_weights(model), lr, _RUN.weight_decay)
        self.ema = EMAModel(model.parameters(), decay=_RUN.ema_decay, use_ema_warmup=True, power=0.75, foreach=True)
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.batches = iter(ShuffledBatches(len(dataset), _BATCH, seed))
        images, labels, _ = collate([dataset.picture(i) for i in range(len(dataset))])
        self.images, self.labels = images.to(self.device), labels.to(self.device)  # a GPU would wait for each batch
        self.null_label = len(dataset.label_names)
        self.gradients: Callable[..., Tensor] = self._gradients
        compile_for_training(model)

    def _problem(self, generator: torch.Generator, indices: Sequence[int]) -> tuple[Tensor, ...]:
        """Points of paths, their times, labels, and the velocities there."""
        chosen = torch.tensor(indices).to(self.device, non_blocking=True)
        x0 = self.codec.encode(to_float(self.images[chosen]))
        t = sample_times(len(x0), self.times, generator, self.time_shift)
        noise = torch.randn(x0.shape, generator=generator, device=self.device)
        hidden = torch.rand(len(x0), generator=generator, device=self.device) < _RUN.label_dropout
        labels = self.labels[chosen].masked_fill(hidden, self.null_label)
        return interpolate(x0, noise, t), t, labels, velocity(x0, noise)

    def _gradients(self, x: Tensor, t: Tensor, labels: Tensor, target: Tensor) -> Tensor:
        loss = flow_loss(predict(self.model, x, t, labels), target)
        loss.backward()
        return loss.detach()

    def warm_up(self) -> None:
        """Two steps without an update: the model is compiled and memory is taken before the clock starts.

        On a GPU its passes are recorded, as the trainer does.
        """
        problem = self._problem(torch.Generator(self.device).manual_seed(0), range(_BATCH))
        for _ in range(2):
            self._gradients(*problem)
            self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            self.gradients = RecordedGradients(self._gradients, list(self.model.parameters()), problem)

    def step(self, factor: float = 1.0) -> Tensor:
        """One step at a share of the learning rate; its loss ()."""
        set_learning_rate(self.optimizer, self.lr * factor)
        loss = self.gradients(*self._problem(self.generator, [index for _, index in next(self.batches)]))
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), _RUN.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.step(self.model.parameters())
        return loss

    def points(self, budget: Budget, fractions: Sequence[float]) -> Iterator[Point]:
        """Train, stopping at each share of the budget.

        Raises:
            FloatingPointError: the loss is no number any more.
        """
        self.model.train()
        self.warm_up()
        step, spent, losses = 0, 0.0, []
        left = list(fractions)
        while left:
            start = budget.now(self.device)
            progress = (spent if budget.unit == "s" else step * _BATCH) / budget.amount
            factor = min(1.0, (step + 1) / _WARM_UP)
            factor *= learning_rate_factor(round(1e6 * progress), 1_000_000, 0, _RUN.cooldown)
            losses.append(self.step(factor))
            step += 1
            spent += budget.step_seconds if budget.clock == "table" else budget.now(self.device) - start
            if (spent if budget.unit == "s" else step * _BATCH) >= left[0] * budget.amount:
                mean = torch.stack(losses[-200:]).mean().item()
                if not math.isfinite(mean):
                    raise FloatingPointError(f"the loss is {mean} at step {step}")
                with self._averaged():
                    yield Point(left.pop(0), step, step * _BATCH, spent, mean)

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        parameters = list(self.model.parameters())
        self.ema.store(parameters)
        self.ema.copy_to(parameters)
        self.model.eval()
        try:
            yield
        finally:
            self.ema.restore(parameters)
            self.model.train()


def fit_codec(codec: Codec, dataset: PictureDataset) -> Codec:
    """The codec with the statistics of a set, as a training measures them."""
    codec.fit(to_float(images) for images in dataset.spread(_FIT_PICTURES, 16))
    return codec


@torch.compiler.set_stance("force_eager")  # else it would be compiled again for evaluation
@torch.no_grad()
def held_out_loss(model: nn.Module, codec: Codec, dataset: PictureDataset) -> float:
    """The flow's loss on pictures that were not trained on, at four times each, uniform and stratified over [0, 1].

    Times and noise are the same for every model, so that differences have far less noise than the loss itself.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(0)
    total, count = 0.0, 4 * len(dataset)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    for places in order.split(_BATCH):
        images, labels, _ = collate([dataset.picture(int(place) % len(dataset)) for place in places])
        x0 = codec.encode(to_float(images.to(device)))
        t = ((places + 0.5) / count).to(device)
        noise = torch.randn(x0.shape, generator=generator, device=device)
        prediction = predict(model, interpolate(x0, noise, t), t, labels.to(device))
        total += flow_loss(prediction, velocity(x0, noise)).item() * len(places)
    return total / count


@torch.compiler.set_stance("force_eager")
@torch.no_grad()
def draw(model: nn.Module, codec: Codec, labels: Tensor, size: int, steps: int, solver: str = "heun") -> Tensor:
    """A picture (3, size, size) uint8 for each label, on the CPU, without guidance; picture i has the seed i."""
    device = next(model.parameters()).device
    side, pictures = size // codec.factor, []
    at_once = _BATCH if device.type == "cpu" else _BATCH_OF_A_GPU
    for start in range(0, len(labels), at_once):
        some = labels[start : start + at_once].to(device)
        draws = seeded_generators(start, len(some))
        x = torch.stack([torch.randn(codec.channels, side, side, generator=draw) for draw in draws]).to(device)
        for step in sample_steps(lambda x, t, some=some: predict(model, x, t, some), x, make_scheduler(solver), steps):
            x = step.x
        pictures += [to_uint8(picture) for picture in to_pil(codec.decode(x.float()))]
    return torch.stack(pictures)
