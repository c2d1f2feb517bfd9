from __future__ import annotations

import sys

import pytest
import torch
from accelerate import Accelerator
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from accelerate.state import AcceleratorState
from torch import Tensor

from liquid_diffusion import convolution
from liquid_diffusion.compile import can_be_compiled, compile_for_sampling
from liquid_diffusion.config import SOLVERS
from liquid_diffusion.models.unet import LiquidUNet
from liquid_diffusion.presets import PRESETS
from liquid_diffusion.sampling import guide, make_scheduler, sample_steps, solver_times

CLASSES = 3


def perturbed(model: LiquidUNet) -> LiquidUNet:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model


@pytest.fixture(scope="module", params=list(PRESETS))
def model(request: pytest.FixtureRequest) -> LiquidUNet:
    return perturbed(LiquidUNet.from_preset(request.param, in_channels=4, num_classes=CLASSES))


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("size", [(8, 8), (16, 12)])
def test_equals_the_model_on_every_label_and_size(model: LiquidUNet, size: tuple[int, int]) -> None:
    labels = torch.arange(CLASSES + 1)
    x = torch.randn(len(labels), 4, *size)
    times = [1.0, 0.6, 0.05, 0.0]
    compiled = compile_for_sampling(model, times, labels, dtype=torch.float32)
    for time in times:
        t = torch.full((len(labels),), time)
        with torch.no_grad():
            assert relative_error(compiled(x, t), model(x, t, labels).sample) < 1e-4


def test_equals_the_model_where_all_have_one_condition(model: LiquidUNet) -> None:
    """Then the rows of the table are multiplied into the convolutions."""
    x, t = torch.randn(2, 4, 16, 12), torch.full((2,), 0.4)
    for labels in (None, torch.tensor(1)):
        compiled = compile_for_sampling(model, [0.4], labels, dtype=torch.float32)
        with torch.no_grad():
            expected = model(x, t, None if labels is None else labels.expand(2)).sample
        assert relative_error(compiled(x, t), expected) < 1e-4


@pytest.mark.parametrize("solver", SOLVERS)
def test_samples_equal_the_models(model: LiquidUNet, solver: str) -> None:
    labels, guidance = torch.tensor([2, 0]), 3.0
    noise = torch.randn(2, 4, 8, 8)
    scheduler = make_scheduler(solver)
    velocities = [
        guide(model, labels, CLASSES, guidance),
        compile_for_sampling(model, solver_times(scheduler, 3), labels, guidance, torch.float32),
    ]
    plain, compiled = ([step.x for step in sample_steps(v, noise, scheduler, 3)][-1] for v in velocities)
    assert relative_error(compiled, plain) < 1e-4


@pytest.mark.parametrize(("gate", "relaxation"), [("static", "liquid"), ("none", "liquid"), ("liquid", "none")])
def test_research_switches(gate: str, relaxation: str) -> None:
    model = perturbed(LiquidUNet(4, 0, (32, 64), (1, 1), gate=gate, relaxation=relaxation))  # type: ignore[arg-type]
    x, t = torch.randn(2, 4, 8, 8), torch.full((2,), 0.3)
    compiled = compile_for_sampling(model, [0.3], dtype=torch.float32)
    with torch.no_grad():
        assert relative_error(compiled(x, t), model(x, t).sample) < 1e-4


def small() -> LiquidUNet:
    return perturbed(LiquidUNet(4, CLASSES, widths=(32, 64), depths=(1, 1)))


def test_one_label_serves_any_batch() -> None:
    model = small()
    for labels in (None, torch.tensor(1)):
        for guidance in (1.0, 2.0):
            compiled = compile_for_sampling(model, [0.5], labels, guidance, torch.float32)
            for batch in (1, 3):
                x, t = torch.randn(batch, 4, 8, 8), torch.full((batch,), 0.5)
                label = torch.full((batch,), CLASSES if labels is None else 1)
                with torch.no_grad():
                    expected = guide(model, label, CLASSES, guidance)(x, t)
                assert relative_error(compiled(x, t), expected) < 1e-4


def test_parts_equal_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model, labels = small(), torch.tensor([0, 2, 1])
    x, t = torch.randn(3, 4, 8, 8), torch.full((3,), 0.5)
    for label in (labels, None):
        whole = compile_for_sampling(model, [0.5], label, 2.0, torch.float32)(x, t)
        with monkeypatch.context() as patch:
            patch.setattr(
                sys.modules[compile_for_sampling.__module__], "_PART_BYTES", 2 * 32 * 8 * 8 * 4
            )  # two pictures at once
            parts = compile_for_sampling(model, [0.5], label, 2.0, torch.float32)(x, t)
        torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("labels", [None, torch.tensor(1), torch.tensor([0, 1, 1, 2, 0])])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_picture_does_not_depend_on_its_batch(
    labels: torch.Tensor | None, guidance: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit: in a batch of any size, and in parts of it."""
    model, x = LiquidUNet.from_preset("nano", 4, CLASSES), torch.randn(5, 4, 16, 16)
    perturbed(model)

    def velocity(which: slice) -> torch.Tensor:
        some = labels if labels is None or not labels.dim() else labels[which]
        return compile_for_sampling(model, [0.4, 0.5], some, guidance, dtype)(x[which], torch.full((5,), 0.5)[which])

    whole = velocity(slice(None))
    for start, stop in ((0, 1), (1, 3), (3, 5), (4, 5)):
        assert torch.equal(velocity(slice(start, stop)), whole[start:stop])
    monkeypatch.setattr(sys.modules[compile_for_sampling.__module__], "_PART_BYTES", 2 * 128 * 16**2 * dtype.itemsize)
    assert torch.equal(velocity(slice(None)), whole)


def test_what_is_rewritten_is_the_model_and_nothing_else() -> None:
    """accelerate's mixed precision, and hooks that were taken away again, change nothing that a model computes."""
    model = small()
    assert can_be_compiled(model)
    assert can_be_compiled(torch.compile(model))  # type: ignore[arg-type]
    add_hook_to_module(model, ModelHook())
    assert not can_be_compiled(model)
    remove_hook_from_module(model)
    assert can_be_compiled(model)
    AcceleratorState._reset_state()
    assert can_be_compiled(Accelerator(mixed_precision="bf16").prepare(model))
    AcceleratorState._reset_state()
    model.bottleneck[0].forward = lambda x, condition: x  # type: ignore[method-assign]
    assert not can_be_compiled(model)


def test_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on another processor, and in a dtype that oneDNN does not have."""
    model, x, t = small(), torch.randn(2, 4, 8, 8), torch.full((2,), 0.5)
    labels = torch.tensor(1)
    with torch.no_grad():
        expected = model(x, t, labels.expand(2)).sample
    exact = compile_for_sampling(model.double(), [0.5], labels, dtype=torch.float64)(x.double(), t)
    assert relative_error(exact.float(), expected) < 1e-5
    monkeypatch.setattr(convolution, "_onednn_computes", lambda dtype: False)
    assert relative_error(compile_for_sampling(model.float(), [0.5], labels)(x, t), expected) < 2e-2
    plain = compile_for_sampling(model, [0.5], labels, dtype=torch.float32)(x, t)
    assert relative_error(plain, expected) < 1e-5


def test_the_original_is_untouched() -> None:
    model = small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x, t = torch.randn(2, 4, 8, 8), torch.full((2,), 0.5)
    kept = x.clone()
    compile_for_sampling(model, [0.5], torch.tensor([0, 1]), 2.0, torch.float32)(x, t)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(x, kept)


def test_bfloat16_stays_near() -> None:
    model = small()
    x, t = torch.randn(2, 4, 16, 16), torch.full((2,), 0.5)
    exact, half = (compile_for_sampling(model, [0.5], dtype=d)(x, t) for d in (torch.float32, torch.bfloat16))
    assert half.dtype == torch.float32
    assert relative_error(half, exact) < 0.02


def test_other_times_and_batches_are_refused() -> None:
    compiled = compile_for_sampling(small(), [0.5], torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="not of the schedule"):
        compiled(torch.randn(2, 4, 8, 8), torch.full((2,), 0.4))
    with pytest.raises(ValueError, match="compiled for a batch of 2 pictures, called with 3"):
        compiled(torch.randn(3, 4, 8, 8), torch.full((3,), 0.5))
