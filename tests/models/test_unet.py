from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from liquid_diffusion.errors import UserError
from liquid_diffusion.models.liquid import LiquidBlock, ParallelCfC
from liquid_diffusion.models.unet import LiquidUNet


def small_model(**changes: object) -> LiquidUNet:
    settings: dict[str, object] = {"in_channels": 4, "num_classes": 3, "widths": (32, 64, 96), "depths": (1, 1, 1)}
    return LiquidUNet(**{**settings, **changes})  # type: ignore[arg-type]


def perturbed(model: LiquidUNet) -> LiquidUNet:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


@pytest.mark.parametrize(("name", "millions"), [("tiny", 23), ("small", 69), ("base", 154)])
def test_parameters_of_the_presets(name: str, millions: int) -> None:
    with torch.device("meta"):
        model = LiquidUNet.from_preset(name, in_channels=4)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert abs(count / 1e6 - millions) <= 0.05 * millions


def test_nano_has_at_most_six_million() -> None:
    for channels, classes in ((4, 0), (12, 9)):
        model = LiquidUNet.from_preset("nano", channels, classes)
        assert sum(parameter.numel() for parameter in model.parameters()) <= 6e6


def test_every_parameter_gets_a_gradient() -> None:
    model = perturbed(small_model())
    out = model(torch.randn(2, 4, 16, 16), torch.rand(2), torch.tensor([0, 3])).sample
    out.square().mean().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not silent


def test_gate_and_alpha_depend_on_the_time() -> None:
    """In every liquid layer, from the time itself on; of a new model the gate still does not."""
    model = perturbed(LiquidUNet.from_preset("nano", num_classes=3))
    layers = [module for module in model.modules() if isinstance(module, ParallelCfC)]
    assert len(layers) == 8
    early, late = model.condition(torch.tensor([0.1, 0.9]), torch.tensor([1, 1])).split(1)
    for layer in layers:
        for first, second in zip(layer.slope_and_offset(early), layer.slope_and_offset(late), strict=True):
            assert (first - second).abs().max() > 1e-3
        assert (layer.alpha(early) - layer.alpha(late)).abs().max() > 1e-3


@pytest.mark.parametrize(("what", "expected"), [("gate", "static"), ("gate", "none"), ("relaxation", "none")])
def test_research_switches_build_and_learn(what: str, expected: str) -> None:
    model = perturbed(small_model(**{what: expected}))
    model(torch.randn(2, 4, 8, 8), torch.rand(2)).sample.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_no_attention_anywhere() -> None:
    """Neither a module nor an operation: nothing in the graph multiplies two functions of the input by a matmul."""
    model = small_model()
    for module in model.modules():
        assert not isinstance(module, nn.MultiheadAttention | nn.Transformer | nn.RNNBase)
        assert "attention" not in type(module).__name__.lower()
    graph = make_fx(model)(torch.randn(1, 4, 16, 16), torch.rand(1), torch.tensor([1]), False)
    weights = 0
    for node in graph.graph.nodes:
        name = str(node.target)
        assert "attention" not in name
        assert "bmm" not in name
        assert "softmax" not in name
        weights += "convolution" in name or "addmm" in name
    assert weights > 20  # the graph was really traced


def test_half_precision_is_finite() -> None:
    """float16 weights and inputs, large ones too, as on a T4."""
    model = perturbed(small_model()).half()
    for scale in (1.0, 30.0):
        x = (torch.randn(2, 4, 16, 16) * scale).half()
        out = model(x, torch.tensor([0.0, 1.0]), torch.tensor([0, 1])).sample
        assert out.dtype == torch.float16
        assert out.isfinite().all()


def test_output_of_a_new_model_is_zero_and_of_a_trained_one_depends_on_all_inputs() -> None:
    x, t, y = torch.randn(1, 4, 16, 16), torch.tensor([0.3]), torch.tensor([1])
    assert small_model()(x, t, y).sample.abs().max() == 0
    model = perturbed(small_model())
    base = model(x, t, y).sample
    for other in (model(x + 0.1, t, y), model(x, t + 0.1, y), model(x, t, y + 1), model(x, t)):
        assert (other.sample - base).abs().max() > 1e-4


def test_no_labels_means_the_null_label() -> None:
    model = perturbed(small_model())
    x = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(model(x, 0.5).sample, model(x, 0.5, torch.tensor([3, 3])).sample)


@pytest.mark.parametrize("size", [(8, 8), (12, 20), (64, 4)])
def test_any_size_divisible_by_four(size: tuple[int, int]) -> None:
    """Also independent of the batch: a picture in a batch equals the picture alone."""
    model = perturbed(small_model())
    x = torch.randn(3, 4, *size)
    t = torch.rand(3)
    together = model(x, t, return_dict=False)[0]
    assert together.shape == x.shape
    alone = torch.cat([model(x[i : i + 1], t[i : i + 1]).sample for i in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((torch.randn(1, 4, 10, 8), 0.5), "divisible by 4"),
        ((torch.randn(1, 3, 8, 8), 0.5), "3 channels"),
        ((torch.randn(1, 4, 8, 8), 500), "from 0 to 1, not 500"),
        ((torch.randn(1, 4, 8, 8), float("nan")), "from 0 to 1, not nan"),
        ((torch.randn(1, 4, 8, 8), 0.5, torch.tensor([0, 1])), r"of shape \(1,\), not \(2,\)"),
    ],
)
def test_wrong_samples_are_refused(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        small_model()(*arguments)


def test_wrong_construction_is_refused() -> None:
    with pytest.raises(ValueError, match="without classes"):
        small_model(num_classes=0)(torch.randn(1, 4, 8, 8), 0.5, torch.tensor([0]))
    with pytest.raises(ValueError, match="differ in length"):
        small_model(depths=(1, 1))
    with pytest.raises(ValueError, match=r"\(0, 2\) differ in length"):
        small_model(decoder_depths=(0, 2))
    with pytest.raises(UserError, match="no model 'huge'; choose from nano, tiny, small, base"):
        LiquidUNet.from_preset("huge")


def test_gradient_checkpointing_changes_no_gradient() -> None:
    model = perturbed(small_model())
    x, t = torch.randn(2, 4, 8, 8), torch.rand(2)
    gradients = []
    for switch in (model.disable_gradient_checkpointing, model.enable_gradient_checkpointing):
        switch()
        model.zero_grad()
        model(x, t).sample.square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert model.is_gradient_checkpointing
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again, atol=0, rtol=0)


def test_save_and_load(tmp_path: Path) -> None:
    model = perturbed(small_model())
    model.save_pretrained(tmp_path)
    again = LiquidUNet.from_pretrained(tmp_path)
    x = torch.randn(1, 4, 8, 8)
    for name, value in again.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], atol=0, rtol=0)
    # to rounding: weights that lie elsewhere in memory are summed in another order by some processors' kernels
    torch.testing.assert_close(again(x, 0.2).sample, model.eval()(x, 0.2).sample, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("low_memory", [True, False])
def test_weights_that_are_missing_are_not_made_up(tmp_path: Path, low_memory: bool) -> None:
    """diffusers warns, and leaves them without data or as they start, by how it loads."""
    model = small_model()
    model.save_pretrained(tmp_path)
    again, info = LiquidUNet.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(again, LiquidUNet)
    assert not info["missing_keys"]
    weights = {name: weight for name, weight in model.state_dict().items() if not name.startswith("stem")}
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match=r"lacks stem\.bias and 1 more: it was saved by another version"):
        LiquidUNet.from_pretrained(tmp_path, low_cpu_mem_usage=low_memory)


def test_scales_of_the_spatial_mix() -> None:
    """3x3 alone at the finest stage, 3x3, 5x5 and 7x7 at the others, in encoder, bottleneck and decoder."""
    model = small_model()
    finest, coarse = (3,), (3, 5, 7)
    stages = [*model.encoder, model.bottleneck, *model.decoder]
    found = [block.mix.scales for stage in stages for block in stage.children()]  # type: ignore[union-attr]
    assert found == [finest, coarse, coarse, coarse, coarse, coarse, coarse, finest]


def test_encoder_and_decoder_may_have_other_depths() -> None:
    model = perturbed(small_model(depths=(0, 1, 2), decoder_depths=(2, 0, 1)))
    assert [len(stage) for stage in model.encoder] == [0, 1, 2]  # type: ignore[arg-type]
    assert [len(stage) for stage in model.decoder] == [1, 0, 2]  # type: ignore[arg-type]  # from the coarsest
    x = torch.randn(2, 4, 8, 12)
    out = model(x, 0.3).sample
    assert out.shape == x.shape
    out.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_state_dict_keys_are_frozen() -> None:
    """Renaming a weight breaks everybody's checkpoints: change this list only with a new major version."""
    block = set(LiquidBlock(32, 64, 64).state_dict())
    assert block == {
        "modulation.weight", "modulation.bias",
        "cfc.heads.weight", "cfc.heads.bias", "cfc.project.weight", "cfc.project.bias",
        "cfc.time_gate.weight", "cfc.time_gate.bias",
        "cfc.time_relaxation.weight", "cfc.time_relaxation.bias", "cfc.log_rate",
        "mix.kernel_3", "mix.kernel_5", "mix.kernel_7", "mix.bias", "mix.project.weight", "mix.project.bias",
            "mix.context.weight",
    }  # fmt: skip
    tops = {name.split(".")[0] for name in small_model().state_dict()}
    assert tops == {
        "condition", "stem", "position", "encoder", "downsamples", "bottleneck", "joins", "decoder", "norm", "head"
    }  # fmt: skip


@pytest.mark.parametrize("switch", [{"gate": "Static"}, {"gate": None}, {"relaxation": "None"}])
def test_research_switches_are_spelt_right(switch: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="is none of liquid"):
        small_model(**switch)
