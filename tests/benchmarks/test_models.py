"""The models of the comparison: of equal parameters, alive in every part, and what their papers say."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from ablations import ABLATIONS, MeanRelaxation, ThreeHeads, ablated
from blocks import DiCoBlock, FCDMBlock, GlobalResponseNorm
from peers import channel_mixers
from quality import PEERS, build
from torch import Tensor, nn

from liquid_diffusion.models.liquid import ParallelCfC
from liquid_diffusion.models.unet import LiquidUNet

NAMES = list(dict.fromkeys([*PEERS, *ABLATIONS]))


def test_equal_parameters() -> None:
    """Within 5 %; `build` raises where a model is not."""
    with torch.device("meta"):
        models = {name: build(name, "nano", 12, 9, 16) for name in NAMES}
        for name in ("DiCo block", "FCDM block", "UNet2DModel, no attention"):
            build(name, "tiny", 12, 9, 16)
        for preset in ("tiny", "small", "base"):
            for name in ("UNet2DModel", "DiTTransformer2DModel"):
                build(name, preset, 4, 9, 32)
        ours = LiquidUNet.from_preset("nano", 12, 9).num_parameters()
    counts = {name: sum(p.numel() for p in model.parameters()) / ours for name, model in models.items()}
    assert all(0.95 <= count <= 1.05 for count in counts.values())
    assert counts["liquid"] == 1


def output(model: nn.Module, labels: Tensor) -> Tensor:
    x, t = torch.randn(2, 12, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0.2, 0.9])
    found = model(x, t, labels)
    return found if isinstance(found, Tensor) else found.sample


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_learns(name: str) -> None:
    """From a disturbed start, since gates and heads start at zero."""
    model = build(name, "nano", 12, 9, 8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    labels = torch.tensor([3, 9])
    output(model, labels).square().mean().backward()
    dead = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not dead
    with torch.no_grad():
        difference = (output(model.eval(), labels) - output(model, torch.tensor([4, 9]))).abs().amax((1, 2, 3))
    assert difference[0] > 1e-6  # the label is heard
    assert difference[1] < 1e-5  # and nothing else is drawn


def normalised(x: Tensor) -> Tensor:
    return (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, unbiased=False) + 1e-6).sqrt()


def test_global_response_norm_is_its_formula() -> None:
    norm = GlobalResponseNorm(6).double()
    nn.init.normal_(norm.gamma)
    nn.init.normal_(norm.beta)
    x = torch.randn(2, 6, 5, 4, dtype=torch.float64)
    size = x.square().sum((2, 3)).sqrt()  # (B, C)
    relative = size / size.mean(1, keepdim=True)
    expected = norm.gamma[:, None, None] * (x * relative[:, :, None, None]) + norm.beta[:, None, None] + x
    torch.testing.assert_close(norm(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [DiCoBlock, FCDMBlock])
def test_blocks_equal_a_transcription_of_their_papers(kind: type[DiCoBlock | FCDMBlock]) -> None:
    block = kind(8, 16).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x, condition = torch.randn(2, 8, 9, 7, dtype=torch.float64), torch.randn(2, 16, dtype=torch.float64)
    m = block.modulation(condition)[:, :, None, None].chunk(6 if isinstance(block, DiCoBlock) else 3, 1)
    if isinstance(block, DiCoBlock):
        y = normalised(x) * (1 + m[0]) + m[1]
        y = F.gelu(F.conv2d(block.widen(y), block.depthwise.weight, block.depthwise.bias, padding=1, groups=8))
        y = y * torch.sigmoid(block.attention(y.mean((2, 3))))[..., None, None]
        z = x + m[2] * block.project(y)
        widen, _, narrow = block.feed_forward
        assert widen(z).shape[1] == 16  # ratio 2
        expected = z + m[5] * narrow(F.gelu(widen(normalised(z) * (1 + m[3]) + m[4])))
    else:
        y = F.conv2d(x, block.depthwise.weight, block.depthwise.bias, padding=3, groups=8)
        y = F.gelu(block.widen(normalised(y) * (1 + m[0]) + m[1]))
        expected = x + m[2] * block.project(block.norm(y))
    torch.testing.assert_close(block(x, condition), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["DiCo block", "FCDM block", "relaxation none", "plain"])
def test_a_new_block_without_relaxation_is_the_identity(name: str) -> None:
    model = build(name, "nano", 12, 9, 8)
    block = next(model.bottleneck.children())  # type: ignore[union-attr, operator]
    width = model.config["widths"][-1]  # type: ignore[index]
    x = torch.randn(2, width, 8, 8)
    condition = model.condition(torch.rand(2), torch.tensor([0, 1]))  # type: ignore[operator]
    torch.testing.assert_close(block(x, condition), x, atol=0, rtol=0)


@pytest.mark.parametrize("product", [False, True])
def test_ours_is_three_heads_of_which_one_is_zero(product: bool) -> None:
    """``sigma(f) g + (1 - sigma(f)) h`` with h = 0 and g = f v, whatever its width."""
    ours, three = ParallelCfC(8, 16, 24).double(), ThreeHeads(8, 16, 32, product).double()
    x, condition = torch.randn(2, 8, 4, 4).double(), torch.randn(2, 16).double()
    weights = ours.state_dict()
    for name in ("heads.weight", "heads.bias"):
        weights[name] = torch.cat([weights[name], torch.zeros_like(weights[name][:24])])
    three.load_state_dict(weights)
    u = normalised(x)
    a, b = ours.slope_and_offset(condition)
    f, v = ours.heads(a * u + b).chunk(2, 1)
    out = ours.project(torch.sigmoid(f) * (f * v if product else v))
    alpha = ours.alpha(condition)[:, :, None, None]
    torch.testing.assert_close(three(x, condition), alpha * x + (1 - alpha) * out, atol=1e-6, rtol=1e-6)
    if product:
        torch.testing.assert_close(three(x, condition), ours(x, condition))


def test_the_seed_s_relaxation_is_the_mean_of_the_embedding() -> None:
    layer = MeanRelaxation(4, 6, 4)
    layer.reset_parameters()
    with torch.no_grad():
        layer.log_rate.copy_(torch.tensor([-1.0, 0.0, 1.0, 2.0]))
    condition = torch.randn(3, 6)
    expected = torch.exp(-layer.log_rate.exp() * condition.mean(1, keepdim=True).abs())
    torch.testing.assert_close(layer.alpha(condition), expected)
    assert layer.relaxation == "liquid"


def test_the_block_of_the_presets_is_the_base_of_the_variants() -> None:
    """The variant "liquid" with the weights of `LiquidUNet` computes what it computes."""
    ours = LiquidUNet.from_preset("nano", 12, 9)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    variant = ablated("liquid", "nano", 12, 9)
    variant.load_state_dict(ours.state_dict())
    labels = torch.tensor([3, 9])
    torch.testing.assert_close(output(variant, labels), output(ours, labels))


@pytest.mark.parametrize("name", ["UNet2DModel", "DiTTransformer2DModel", "DiCo block", "liquid"])
def test_muon_trains_what_mixes_channels_inside_a_model(name: str) -> None:
    """Products of hidden features, of two or more axes; not what reads or writes pictures, times and labels."""
    with torch.device("meta"):
        model = build(name, "nano", 12, 9, 16)
    chosen = {id(weight) for weight in channel_mixers(model)}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in chosen}
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert all(len(shapes[name]) in (2, 4) and min(shapes[name][:2]) > 12 for name in names)
    outside = (
        "time_emb",
        "class_emb",
        "norm",
        "modulation",
        "condition",
        "proj_out",
        "conv_in",
        "conv_out",
        "pos_embed",
    )
    assert not [name for name in names if any(part in name.split(".")[-2] or f".{part}" in name for part in outside)]
    left = [name for name in shapes if name not in names and len(shapes[name]) == 4 and shapes[name][1] > 1]
    assert len(left) <= 3, left  # not depthwise: two that read picture and places, one that writes
