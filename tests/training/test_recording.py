"""What is recorded on a GPU, beside the same without recording; skipped where there is none."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from liquid_diffusion.compile import compile_for_sampling
from liquid_diffusion.config import TrainConfig
from liquid_diffusion.models.unet import LiquidUNet
from liquid_diffusion.sampling import make_scheduler, solver_times
from liquid_diffusion.training.recording import RecordedGradients
from liquid_diffusion.training.trainer import Trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="NO GPU HERE: what is recorded was not tried")


@pytest.fixture
def exact() -> Iterator[None]:
    """Convolutions in float32 without TF32, as products are anyway."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def model_of_random_weights() -> LiquidUNet:
    torch.manual_seed(0)
    model = LiquidUNet.from_preset("nano", 4, 3).to("cuda")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def batch() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(4, 4, 16, 16, device="cuda"), torch.rand(4, device="cuda"), torch.randint(4, (4,), device="cuda")


def test_gradients_are_those_of_each_batch(exact: None) -> None:
    """Also where a step has changed the weights in between, and taken the gradients away."""
    model = model_of_random_weights()
    parameters = list(model.parameters())

    def compute(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        loss = (model(x, t, labels).sample - x).square().mean()
        loss.backward()
        return loss.detach()

    recorded = RecordedGradients(compute, parameters, batch())
    for _ in range(3):
        given = batch()
        for parameter in parameters:
            parameter.grad = None
        loss = compute(*given)
        wanted = [parameter.grad for parameter in parameters]
        torch.testing.assert_close(recorded(*given), loss)
        for parameter, gradient in zip(parameters, wanted, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-6)
        with torch.no_grad():
            for parameter in parameters:
                parameter.mul_(0.9)
                parameter.grad = None


@pytest.mark.parametrize("labels", [torch.tensor(1), torch.arange(4) % 3])
def test_evaluations_are_the_models(exact: None, labels: Tensor) -> None:
    model, times = model_of_random_weights().eval(), solver_times(make_scheduler(), 5)
    classes = labels.to("cuda")
    sampler = compile_for_sampling(model, times, classes, dtype=torch.float32)
    for t in (*times, *times):
        x, at = batch()[0], torch.full((4,), t, device="cuda")
        with torch.no_grad():
            wanted = model(x, at, classes.expand(4)).sample
        assert (sampler(x, at) - wanted).norm() < 1e-4 * wanted.norm()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_recorded_training_is_the_same(quick: Callable[..., TrainConfig], precision: str) -> None:
    losses = []
    for recorded in (False, True):
        run = quick(out=f"{quick().out}-{recorded}", steps=8, compile=recorded, precision=precision)
        losses.append([result.loss.item() for result in Trainer(run).steps()])
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
