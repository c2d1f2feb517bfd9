"""The block against the formulas written out again in float64, with nothing of the package but its weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from liquid_diffusion.models.liquid import (
    LiquidBlock,
    ParallelCfC,
    cfc_gate,
    liquid_relaxation,
    relaxation_weight,
)

C, T, H = 32, 48, 64


def perturbed(block: LiquidBlock) -> LiquidBlock:
    """Away from the start, where output gates are zero and slopes one."""
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return block


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def pointwise(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """1x1 convolution as a sum over channels."""
    weight = weights[f"{name}.weight"][:, :, 0, 0]
    return torch.einsum("oc,bchw->bohw", weight, x) + weights[f"{name}.bias"][None, :, None, None]


def linear(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return torch.einsum("oc,bc->bo", weights[f"{name}.weight"], x) + weights[f"{name}.bias"]


def normalise(x: Tensor) -> Tensor:
    mean = x.mean(1, keepdim=True)
    variance = ((x - mean) ** 2).mean(1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-6)


def depthwise(x: Tensor, kernel: Tensor) -> Tensor:
    """Written as shifts: out[y, x] = sum_ij kernel[i, j] in[y + i - p, x + j - p]."""
    size = kernel.shape[-1]
    p = size // 2
    padded = torch.zeros(*x.shape[:2], x.shape[2] + 2 * p, x.shape[3] + 2 * p, dtype=x.dtype)
    padded[:, :, p : p + x.shape[2], p : p + x.shape[3]] = x
    out = torch.zeros_like(x)
    for i in range(size):
        for j in range(size):
            out += kernel[None, :, 0, i, j, None, None] * padded[:, :, i : i + x.shape[2], j : j + x.shape[3]]
    return out


def transcription(weights: dict[str, Tensor], x: Tensor, condition: Tensor, scales: tuple[int, ...]) -> Tensor:
    """One liquid block, gate and relaxation liquid, in the dtype of its arguments."""
    m = [part[:, :, None, None] for part in linear(weights, "modulation", condition).split(C, dim=1)]

    a, b = (part[:, :, None, None] for part in linear(weights, "cfc.time_gate", condition).split(C, dim=1))
    f, v = pointwise(weights, "cfc.heads", a * normalise(x) + b).split(H, dim=1)
    gate, g, h = sigmoid(f), f * v, 0
    out = pointwise(weights, "cfc.project", gate * g + (1 - gate) * h)
    rate = torch.exp(weights["cfc.log_rate"])
    alpha = torch.exp(-rate * linear(weights, "cfc.time_relaxation", condition).abs())[:, :, None, None]
    x = alpha * x + (1 - alpha) * out

    u = normalise(x) * (1 + m[0]) + m[1]
    mixed = sum(depthwise(u, weights[f"mix.kernel_{k}"]) for k in scales)
    mixed = pointwise(weights, "mix.project", mixed + weights["mix.bias"][None, :, None, None])
    if len(scales) > 1:
        mean = u.sum((2, 3)) / (u.shape[2] * u.shape[3])
        mixed = mixed + torch.einsum("oc,bc->bo", weights["mix.context.weight"][:, :, 0, 0], mean)[:, :, None, None]
    return x + m[2] * mixed


@pytest.mark.parametrize("scales", [(3, 5, 7), (3,)])
def test_block_equals_the_formulas_in_float64(scales: tuple[int, ...]) -> None:
    block = perturbed(LiquidBlock(C, T, H, scales=scales))
    x, condition = torch.randn(2, C, 8, 12), torch.randn(2, T)
    weights = {name: value.double() for name, value in block.state_dict().items()}
    expected = transcription(weights, x.double(), condition.double(), scales)
    torch.testing.assert_close(block(x, condition).double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(block.double()(x.double(), condition.double()), expected, atol=1e-6, rtol=1e-6)


def test_gate_goes_from_h_to_g() -> None:
    f, g, h = torch.tensor([-50.0, 0.0, 50.0]), torch.full((3,), 3.0), torch.full((3,), 1.0)
    torch.testing.assert_close(cfc_gate(f, g, h), torch.tensor([1.0, 2.0, 3.0]))
    torch.testing.assert_close(cfc_gate(f, g, h, a=-1.0), torch.tensor([3.0, 2.0, 1.0]))
    torch.testing.assert_close(cfc_gate(f, g, h, b=50.0), torch.tensor([1.0, 1.0, 2.0]))


def test_gate_is_the_papers_equation() -> None:
    """x(t) = sigma(-f t) g + (1 - sigma(-f t)) h is a = -t, b = 0."""
    f, g, h = torch.randn(3, 2, 4, 5, 5).double()
    t = 0.7
    paper = sigmoid(-f * t) * g + (1 - sigmoid(-f * t)) * h
    torch.testing.assert_close(cfc_gate(f, g, h, a=-t), paper)


def test_relaxation_solves_its_differential_equation() -> None:
    """dx/dt = -lambda (x - out) integrated in 100,000 small steps over the time |w|."""
    x, out, rate, w = 2.0, -1.0, 1.3, -0.9
    state, steps = x, 100_000
    for _ in range(steps):
        state -= rate * (state - out) * abs(w) / steps
    alpha = relaxation_weight(torch.tensor([rate]), torch.tensor([[w]]))
    relaxed = liquid_relaxation(torch.tensor(x), torch.tensor(out), alpha.squeeze())
    assert relaxed.item() == pytest.approx(state, abs=1e-4)


def test_start_of_the_liquid_layer() -> None:
    """a = 1, b = 0, alpha = 0.95 up to a small slope in time."""
    from liquid_diffusion.models.unet import LiquidUNet

    torch.manual_seed(1)
    layers = [m for m in LiquidUNet.from_preset("nano").modules() if isinstance(m, ParallelCfC)]
    for layer in layers:
        condition = torch.randn(16, layer.time_gate.in_features) * 0.5
        a, b = layer.slope_and_offset(condition)
        torch.testing.assert_close(a, torch.ones_like(a))
        torch.testing.assert_close(b, torch.zeros_like(b))
        assert abs(layer.alpha(condition).mean().item() - 0.95) < 0.01


@pytest.mark.parametrize("what", ["gate", "alpha"])
def test_liquid_parts_depend_on_the_condition(what: str) -> None:
    layer = perturbed(LiquidBlock(C, T, H)).cfc
    early, late = torch.randn(1, T), torch.randn(1, T)
    if what == "alpha":
        assert (layer.alpha(early) - layer.alpha(late)).abs().max() > 1e-3
    else:
        for first, second in zip(layer.slope_and_offset(early), layer.slope_and_offset(late), strict=True):
            assert (first - second).abs().max() > 1e-3


def test_a_static_gate_does_not_depend_on_time() -> None:
    layer = ParallelCfC(C, T, H, "static", "none")
    with torch.no_grad():
        layer.output_gate.weight.zero_()  # the only other place of the time
    x = torch.randn(2, C, 8, 8)
    torch.testing.assert_close(layer(x, torch.randn(2, T)), layer(x, torch.randn(2, T)), atol=0, rtol=0)


def test_without_relaxation_the_layer_is_a_residual_swiglu_behind_adaln() -> None:
    """``x + c W (SiLU(U u) V u)`` (Shazeer, arXiv 2002.05202), u = a norm(x) + b, as others write it."""
    layer = ParallelCfC(C, T, H, relaxation="none").double()
    x, condition = torch.randn(2, C, 4, 6).double(), torch.randn(2, T).double()
    weights = layer.state_dict()
    a, b = (part[:, :, None, None] for part in linear(weights, "time_gate", condition).split(C, dim=1))
    gate, value = pointwise(weights, "heads", a * normalise(x) + b).split(H, dim=1)
    c = linear(weights, "output_gate", condition)[:, :, None, None]
    expected = x + c * pointwise(weights, "project", gate * sigmoid(gate) * value)
    torch.testing.assert_close(layer(x, condition), expected, atol=1e-6, rtol=1e-6)


def test_a_new_block_hardly_changes_its_state() -> None:
    from liquid_diffusion.models.layers import ConditionLinear
    from liquid_diffusion.models.unet import LiquidUNet

    block = next(m for m in LiquidUNet.from_preset("nano").modules() if isinstance(m, LiquidBlock))
    x = torch.randn(2, 128, 8, 8)
    condition = torch.randn(2, block.modulation.in_features) * 0.5
    out = block(x, condition)
    assert 0.01 < (out - x).norm() / x.norm() < 0.1
    block.cfc.relaxation = "none"
    block.cfc.output_gate = ConditionLinear(block.modulation.in_features, 128)
    block.cfc.reset_parameters()
    torch.testing.assert_close(block(x, condition), x, atol=0, rtol=0)
