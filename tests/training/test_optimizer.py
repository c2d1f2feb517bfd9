"""Muon against torch's own, which takes matrices only, and AdamW."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from liquid_diffusion.models.unet import LiquidUNet
from liquid_diffusion.training.optimizer import (
    Muon,
    channel_mixers,
    condition_weights,
    orthogonalise,
    set_learning_rate,
)


@pytest.mark.parametrize("shape", [(3, 16, 48), (2, 48, 16), (1, 32, 32)])
def test_singular_values_come_near_to_one(shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(matrices))
    before = torch.linalg.svdvals(matrices)
    big = values[before > 0.1 * before.amax(dim=1, keepdim=True)]  # the iteration is not done with the smallest
    assert big.min() > 0.6
    assert big.max() < 1.3
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    overlap = (orthogonalise(matrices) * (left @ right)).sum((1, 2))  # with U V^T, which has min(R, C) with itself
    assert (overlap / min(shape[1:]) > 0.8).all()


def test_it_steps_like_torchs_muon_and_adamw() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(16, 32, 1, 1), (16, 32, 1, 1), (24, 8, 3, 3), (48, 16, 1, 1)]
    mixers = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    others = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((7,), (5, 3))]
    matrices = [nn.Parameter(weight.detach().flatten(1).clone()) for weight in mixers]
    slow = [nn.Parameter(torch.randn((9, 4), generator=generator))]
    vectors, slow_vectors = copy.deepcopy(others), copy.deepcopy(slow)
    ours = Muon(mixers, slow, others, lr=0.01, weight_decay=0.1)
    muon = torch.optim.Muon(matrices, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(vectors, lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
    slow_adamw = torch.optim.AdamW(slow_vectors, lr=0.0002, betas=(0.9, 0.99), weight_decay=0.1)
    for step in range(4):
        for mine, theirs in zip([*mixers, *others, *slow], [*matrices, *vectors, *slow_vectors], strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            theirs.grad = mine.grad.reshape(theirs.shape).clone()
        if step == 2:
            set_learning_rate(ours, 0.005)
            for optimizer, lr in ((muon, 0.005), (adamw, 0.005), (slow_adamw, 0.0001)):
                optimizer.param_groups[0]["lr"] = lr
        for optimizer in (ours, muon, adamw, slow_adamw):
            optimizer.step()
    for mine, theirs in zip(mixers, matrices, strict=True):
        # both iterate in 8 bits of mantissa where the machine is fast in it; an update is 0.002 in the mean
        torch.testing.assert_close(mine.flatten(1), theirs, atol=2e-3, rtol=0)
        assert (mine.flatten(1) - theirs).norm() < 0.02 * 4 * 0.002 * theirs.numel() ** 0.5
    for mine, theirs in zip([*others, *slow], [*vectors, *slow_vectors], strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_closure_is_called_before_the_step() -> None:
    """What it computes are the gradients of this step, and what it returns is handed back."""
    stepped = []
    for by_closure in (False, True):
        mixer, other = nn.Parameter(torch.eye(4)), nn.Parameter(torch.ones(3))
        optimizer = Muon([mixer], [], [other], lr=0.1, weight_decay=0.0)

        def loss(mixer: nn.Parameter = mixer, other: nn.Parameter = other) -> float:
            total = mixer.square().sum() + other.square().sum()
            total.backward()
            return total.item()

        if by_closure:
            assert optimizer.step(loss) == 7
        else:
            loss()
            optimizer.step()
        stepped.append((mixer, other))
    for one, two in zip(*stepped, strict=True):
        assert torch.equal(one, two)
        assert one.max() < 1


def test_every_convolution_inside_is_a_mixer_and_nothing_else() -> None:
    model = LiquidUNet(in_channels=12, num_classes=3, widths=(32, 64), depths=(1, 1), ratio=2)
    chosen = {id(weight) for weight in channel_mixers(model)}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in chosen}
    inside = ("cfc.heads.weight", "cfc.project.weight", "mix.project.weight", "mix.context.weight")
    wanted = {name for name, _ in model.named_parameters() if name.endswith(inside)}
    wanted |= {"downsamples.0.weight"}
    wanted |= {f"joins.{i}.{side}.weight" for i in (0, 1) for side in ("below", "skip")}
    assert names == wanted


def test_the_weights_that_read_the_condition() -> None:
    model = LiquidUNet(in_channels=12, num_classes=3, widths=(32, 64), depths=(1, 1), ratio=2, condition_channels=64)
    chosen = {id(weight) for weight in condition_weights(model)}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in chosen}
    readers = ("time_gate.weight", "time_relaxation.weight", "modulation.weight")
    assert names == {n for n, _ in model.named_parameters() if n.endswith(readers)} | {"condition.linear_2.weight"}


def test_a_step_whose_scaled_gradients_overflowed_changes_nothing() -> None:
    """Neither what is orthogonalised nor what is not; the next one does."""
    mixer, other = nn.Parameter(torch.ones(4, 8, 1, 1)), nn.Parameter(torch.ones(3))
    optimizer = Muon([mixer], [], [other], lr=0.1, weight_decay=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for value, stays in ((float("inf"), True), (1.0, False)):
        mixer.grad = torch.full_like(mixer, value)
        other.grad = torch.ones_like(other)
        scaler.scale(torch.ones(1))  # makes its state
        scaler.step(optimizer)
        scaler.update()
        assert bool((mixer == 1).all()) == stays
        assert bool((other == 1).all()) == stays
