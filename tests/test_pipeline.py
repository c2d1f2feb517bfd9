from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from safetensors.torch import save_file
from torch import nn

from liquid_diffusion.codecs import AutoencoderCodec
from liquid_diffusion.config import GUIDANCE
from liquid_diffusion.errors import UserError
from liquid_diffusion.loading import load_pipeline
from liquid_diffusion.models.unet import LiquidUNet
from liquid_diffusion.pipeline import LiquidDiffusionPipeline
from liquid_diffusion.sampling import make_scheduler, seeded_generators

NAMES = ["Cat", "dog"]


def small_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=[8, 16], norm_num_groups=4,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
    )  # fmt: skip


def make(classes: int = 2, vae: AutoencoderKL | None = None) -> LiquidDiffusionPipeline:
    model = LiquidUNet(4 if vae else 12, classes, widths=(32, 64), depths=(1, 1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    codec = AutoencoderCodec(vae, "somewhere").state() if vae else None
    pipeline = LiquidDiffusionPipeline(
        model, make_scheduler("euler"), vae, codec=codec, label_names=NAMES[:classes], image_size=16
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_a_picture_does_not_change_with_the_batch() -> None:
    pipeline = make()
    labels = [0, 1, 1, 0, 1]
    together = pipeline(5, labels, 4, 2.0, seeded_generators(10, 5), output_type="pt").images
    alone = [pipeline(1, [labels[i]], 4, 2.0, seeded_generators(10 + i, 1), output_type="pt").images for i in range(5)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=1e-4)
    assert (together[1] - together[2]).abs().max() > 0.1  # same class, other seed


def test_output_types_are_the_same_picture() -> None:
    pipeline = make()
    pt, array, pil, latent = (
        pipeline(2, "dog", 2, generator=seeded_generators(0, 2), output_type=kind, return_dict=False)[0]
        for kind in ("pt", "np", "pil", "latent")
    )
    np.testing.assert_allclose(array, pt.permute(0, 2, 3, 1).numpy())
    np.testing.assert_allclose(np.asarray(pil[1]) / 255, array[1], atol=1 / 255)
    torch.testing.assert_close(pipeline.codec.decode(latent), 2 * pt - 1)
    assert 0 <= pt.min() < pt.max() <= 1


def test_class_names() -> None:
    pipeline = make()
    expected: dict[str | int | None, list[int]] = {
        "cat": [0] * 3,
        "DOG ": [1] * 3,
        1: [1] * 3,
        "1": [1] * 3,
        None: [0, 1, 0],
    }
    for given, numbers in expected.items():
        labels = pipeline.labels(given, 3)
        assert labels is not None
        assert labels.tolist() == numbers
    pipeline.register_to_config(label_names=["10", "2"])
    numeric: dict[str | int | None, list[int]] = {"10": [0] * 3, "2": [1] * 3, 1: [1] * 3, "0": [0] * 3}
    for given, numbers in numeric.items():
        labels = pipeline.labels(given, 3)
        assert labels is not None
        assert labels.tolist() == numbers
    pipeline.register_to_config(label_names=NAMES)
    for wrong in ("horse", 2, -1):
        with pytest.raises(UserError, match=r"no class .*; the model knows Cat, dog"):
            pipeline.labels(wrong, 3)
    with pytest.raises(UserError, match="2 classes were given for 3 pictures"):
        pipeline.labels(["cat", "dog"], 3)
    several: tuple[tuple[Any, int], ...] = (
        (["cat", "dog", "cat"], 3), (torch.tensor([1, 0]), 2), (np.array([1, 0]), 2),
        ("dog", 1), (torch.tensor(1), 1), (np.int64(1), 1), (None, 1),
    )  # fmt: skip
    for some, count in several:
        drawn = pipeline(class_labels=some, num_inference_steps=1, output_type="pt")  # as many as classes are given
        assert len(drawn.images) == count
    cased = make()
    cased.register_to_config(label_names=["A", "a"])
    found = cased.labels(["a", "A", "a"], 3)
    assert found is not None
    assert found.tolist() == [1, 0, 1]  # as it is written goes before any case
    assert make(classes=0).labels(None, 3) is None
    with pytest.raises(UserError, match="has no classes"):
        make(classes=0).labels("cat", 3)


def test_labels_and_guidance_reach_the_picture() -> None:
    pipeline = make()

    def draw(label: str, guidance: float) -> torch.Tensor:
        return pipeline(1, label, 2, guidance, seeded_generators(0, 1), output_type="latent").images

    assert (draw("cat", 1.0) - draw("dog", 1.0)).abs().max() > 1e-3
    assert (draw("cat", 1.0) - draw("cat", 3.0)).abs().max() > 1e-3


def test_names_of_classes_are_the_same_in_either_form_of_an_accent() -> None:
    """macOS takes accents from their letters in names of folders; spaces at the ends are no part of a wish."""
    pipeline = make()
    pipeline.register_to_config(label_names=["cafe\u0301", " lead"])
    assert pipeline.labels(["caf\u00e9", "CAFE\u0301", "lead", " lead"], 4).tolist() == [0, 0, 1, 1]  # type: ignore[union-attr]


def test_callback_sees_every_step() -> None:
    seen = []

    def look(_: object, index: int, timestep: int, tensors: dict[str, torch.Tensor]) -> None:
        seen.append((index, timestep, tensors["latents"].shape, tensors["x0"].shape))

    make()(2, num_inference_steps=4, callback_on_step_end=look)
    shape = (2, 12, 8, 8)
    assert seen == [(i, t, shape, shape) for i, t in enumerate((1000, 750, 500, 250))]


def test_steps_lead_where_the_call_does() -> None:
    pipeline = make()
    noise = pipeline.noise(2, seeded_generators(3, 2))
    steps = list(pipeline.steps(noise, pipeline.labels("dog", 2), 4, 3.0))
    images = pipeline(2, "dog", 4, 3.0, seeded_generators(3, 2), output_type="pt").images
    torch.testing.assert_close(pipeline.codec.decode(steps[-1].x), 2 * images - 1)
    assert [step.t for step in steps] == [1.0, 0.75, 0.5, 0.25]
    torch.testing.assert_close(steps[-1].x0, steps[-1].x)  # the last step of Euler goes to the data it predicts
    # a step of 1/4 on the straight line from (noise, t = 1) through the data predicted there
    torch.testing.assert_close(steps[0].x, noise + (steps[0].x0 - noise) / 4)


def test_callback_changes_the_state_and_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    # in bfloat16 a schedule of one time and one of four may round a velocity differently
    monkeypatch.setattr("liquid_diffusion.compile.fastest_dtype", lambda device: torch.float32)
    pipeline = make()
    full = pipeline(1, num_inference_steps=4, generator=seeded_generators(0, 1), output_type="latent").images
    states: list[torch.Tensor] = []

    def shift(
        pipe: LiquidDiffusionPipeline, index: int, _: int, tensors: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        assert set(tensors) == {"latents"}
        states.append(tensors["latents"])
        pipe._interrupt = index == 2
        return {"latents": tensors["latents"] + 1} if index in (0, 2) else {}

    changed = pipeline(
        1, num_inference_steps=4, generator=seeded_generators(0, 1), output_type="latent",
        callback_on_step_end=shift, callback_on_step_end_tensor_inputs=["latents"],
    ).images  # fmt: skip
    assert len(states) == 3
    torch.testing.assert_close(changed, states[2] + 1)
    # by hand: the step from t = 0.75 to 0.5, from the state that was moved
    moved = states[0] + 1
    v = pipeline._velocity([0.75], pipeline.labels(None, 1), GUIDANCE)(moved, torch.tensor([0.75]))
    torch.testing.assert_close(states[1], moved - 0.25 * v)
    again = pipeline(1, num_inference_steps=4, generator=seeded_generators(0, 1), output_type="latent").images
    torch.testing.assert_close(again, full)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, not 0"),
        ({"batch_size": 2.0}, r"not 2\.0"),
        ({"num_inference_steps": 0}, "num_inference_steps must be a whole number of at least 1"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a number, not nan"),
        ({"batch_size": 2, "generator": seeded_generators(0, 3)}, "3 generators were given for 2 pictures"),
        ({"output_type": "jpeg"}, "must be pil, np, pt or latent, not 'jpeg'"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "can see latents and x0, not 'noise'"),
        ({"height": 18}, "divisible by 4, not 18 x 16"),
        ({"width": 0}, "width must be a whole number of at least 1, not 0"),
        ({"height": 16.0}, r"height must be a whole number of at least 1, not 16\.0"),
        ({"class_labels": "horse"}, "no class 'horse'"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_wrong_arguments_are_refused_before_the_work(arguments: dict[str, Any], words: str) -> None:
    pipeline = make()
    pipeline.unet.condition = None  # type: ignore[assignment]  # whoever begins to work fails
    with pytest.raises(UserError, match=words):
        pipeline(**arguments)


def test_parts_that_do_not_belong_together_are_refused() -> None:
    vae, scheduler = small_vae(), make_scheduler()
    latents = AutoencoderCodec(vae, "somewhere").state()
    small: dict[str, Any] = {"widths": (32, 64), "depths": (1, 1)}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"unet": LiquidUNet(4, **small)}, "A model of 4 channels is none of pixels"),
        ({"unet": LiquidUNet(4, **small), "vae": vae}, "Give `codec` beside `vae`"),
        ({"unet": LiquidUNet(4, **small), "codec": latents}, "codec somewhere needs its autoencoder"),
        ({"unet": LiquidUNet(12, **small), "vae": vae, "codec": latents}, "codec has 4 channels and the model 12"),
        ({"unet": LiquidUNet(12, 3, **small), "label_names": NAMES}, "2 names of classes were given for a model"),
    ]
    for parts, words in cases:
        with pytest.raises(UserError, match=words):
            LiquidDiffusionPipeline(scheduler=scheduler, **parts)


def test_a_model_alone_makes_a_pipeline() -> None:
    """Of pixels as they are, as examples/train_loop.py trains it; classes without names go by their numbers."""
    pipeline = LiquidDiffusionPipeline(LiquidUNet(3, 2, widths=(32, 64), depths=(1, 1)), make_scheduler(), image_size=8)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.config["label_names"] == ["0", "1"]
    noise = pipeline.noise(1, seeded_generators(0, 1))
    drawn = pipeline(1, "1", 1, generator=seeded_generators(0, 1), output_type="pt").images
    torch.testing.assert_close(drawn, noise.clamp(-1, 1) / 2 + 0.5)  # of a new model the velocity is zero
    counts: dict[str, Any] = {"batch_size": np.int64(2), "num_inference_steps": np.int64(1), "height": np.int32(4)}
    assert pipeline(**counts, generator=seeded_generators(0, 2), output_type="pt").images.shape == (2, 3, 4, 8)


def test_any_flow_scheduler_by_from_config() -> None:
    """Each solver comes near the same picture, which the configuration of Euler alone does not tell them to."""
    pipeline = make()
    settings: dict[str, Any] = {"class_labels": "cat", "num_inference_steps": 50, "output_type": "latent"}
    pipeline.scheduler = FlowMatchHeunDiscreteScheduler.from_config(pipeline.scheduler.config)
    exact = pipeline(1, generator=seeded_generators(0, 1), **settings).images
    kinds = (
        FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, DPMSolverMultistepScheduler, DEISMultistepScheduler,
        FlowMatchHeunDiscreteScheduler,
    )  # fmt: skip
    for kind in kinds:
        pipeline.scheduler = kind.from_config(pipeline.scheduler.config)
        drawn = pipeline(1, generator=seeded_generators(0, 1), **settings).images
        assert type(pipeline.scheduler) is kind
        assert (drawn - exact).square().mean().sqrt() < 0.02 * exact.std(), kind
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    with pytest.raises(UserError, match="DDIMScheduler integrates no rectified flow; take Flow"):
        pipeline(1)


def test_a_scheduler_that_draws_does_so_by_the_generators_of_the_pictures() -> None:
    pipeline = make()
    pipeline.scheduler = DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++")

    def drawn(seed: int, count: int) -> torch.Tensor:
        torch.randn(3)  # another state of the generator of all
        return pipeline(count, "cat", 6, generator=seeded_generators(seed, count), output_type="pt").images

    torch.testing.assert_close(drawn(0, 1), drawn(0, 1), atol=0, rtol=0)
    torch.testing.assert_close(drawn(0, 2)[1:], drawn(1, 1), atol=1e-2, rtol=0)  # in bfloat16 where that is fast
    assert not torch.equal(drawn(0, 1), drawn(1, 1))


def test_times_that_depend_on_the_size_are_refused() -> None:
    pipeline = make()
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    with pytest.raises(UserError, match="use_dynamic_shifting=False"):
        pipeline(1, "cat", 2)


def test_dtype_progress_and_vae_switches(capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = make(vae=small_vae())
    expected = pipeline(1, "cat", 2, generator=seeded_generators(0, 1), output_type="pt").images
    pipeline.enable_vae_slicing()
    pipeline.enable_vae_tiling()
    assert pipeline.vae is not None
    assert (pipeline.vae.use_slicing, pipeline.vae.use_tiling) == (True, True)
    pipeline.set_progress_bar_config(disable=False)
    pipeline.to(torch.bfloat16)
    half = pipeline(1, "cat", 2, generator=seeded_generators(0, 1), output_type="pt").images
    assert "2/2" in capsys.readouterr().err
    assert (half - expected).abs().max() < 0.05
    assert pipeline.vae.use_slicing
    pipeline.disable_vae_slicing()
    pipeline.disable_vae_tiling()
    pipeline(1, num_inference_steps=1)
    assert (pipeline.vae.use_slicing, pipeline.vae.use_tiling) == (False, False)
    pixels = make()
    for switch in ("enable_vae_slicing", "enable_vae_tiling", "disable_vae_slicing", "disable_vae_tiling"):
        getattr(pixels, switch)()  # a program that asks for less memory gets it


def test_offloaded_weights() -> None:
    pipeline = make(vae=small_vae())
    settings: dict[str, Any] = {"class_labels": "cat", "num_inference_steps": 2, "output_type": "pt"}
    expected = pipeline(1, generator=seeded_generators(0, 1), **settings).images
    for part in (pipeline.unet, pipeline.vae):
        cpu_offload(part, execution_device=torch.device("cpu"))
    assert pipeline.unet.device.type == "meta"
    drawn = pipeline(1, generator=seeded_generators(0, 1), **settings).images
    torch.testing.assert_close(drawn, expected, atol=0.02, rtol=0)  # the other computes in bfloat16 where it can


@pytest.mark.parametrize("class_labels", ["cat", None])
def test_offloaded_weights_in_half_precision(class_labels: str | None) -> None:
    """As diffusers' users load them; held against the same weights in float32."""
    expected, halved = make(), make()
    halved.unet.to(torch.bfloat16)
    expected.unet.load_state_dict({name: value.float() for name, value in halved.unet.state_dict().items()})
    cpu_offload(halved.unet, execution_device=torch.device("cpu"))
    drawn, exact = (
        p(2, class_labels, 2, 2.0, generator=seeded_generators(0, 2), output_type="pt").images
        for p in (halved, expected)
    )
    torch.testing.assert_close(drawn, exact, atol=0.03, rtol=0)


def test_a_pipeline_of_the_same_parts() -> None:
    pipeline = make(vae=small_vae())
    again = LiquidDiffusionPipeline.from_pipe(pipeline)
    assert again.unet is pipeline.unet
    assert again.vae is pipeline.vae
    assert again.config["label_names"] == NAMES
    assert again.codec.state() == pipeline.codec.state()
    other = LiquidDiffusionPipeline.from_pipe(pipeline, scheduler=make_scheduler("heun"))
    assert isinstance(other.scheduler, FlowMatchHeunDiscreteScheduler)


def test_what_is_put_around_a_part_of_the_model_is_seen() -> None:
    """A hook, and an adapter that has the weight of what it is put around, as those of LoRA have."""

    class Adapter(nn.Module):
        def __init__(self, base: nn.Conv2d) -> None:
            super().__init__()
            self.base = base

        @property
        def weight(self) -> nn.Parameter:
            return self.base.weight  # type: ignore[return-value]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) + 0.5 * x.flip(1)[:, : self.base.out_channels]

    pipeline = make()
    wish: dict[str, Any] = {"num_inference_steps": 2, "output_type": "pt"}

    def drawn() -> torch.Tensor:
        return pipeline(1, "cat", generator=seeded_generators(0, 1), **wish).images

    plain = drawn()
    handle = pipeline.unet.bottleneck[0].register_forward_hook(lambda _module, _inputs, out: out * 0)
    assert (drawn() - plain).abs().max() > 0.01
    handle.remove()
    torch.testing.assert_close(drawn(), plain, atol=0, rtol=0)
    pipeline.unet.head = Adapter(pipeline.unet.head)  # type: ignore[assignment]
    assert (drawn() - plain).abs().max() > 0.01


def test_weights_that_are_stored_in_eight_bits() -> None:
    pipeline = make()
    exact = pipeline(1, "cat", 2, generator=seeded_generators(0, 1), output_type="pt").images
    pipeline.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    cast = pipeline(1, "cat", 2, generator=seeded_generators(0, 1), output_type="pt").images
    assert 0 < (cast - exact).abs().max() < 0.2


def test_a_compiled_model_is_saved_as_what_it_is(tmp_path: Path) -> None:
    pipeline = make()
    expected = pipeline(1, "cat", 2, generator=seeded_generators(0, 1), output_type="pt").images
    pipeline.unet = torch.compile(pipeline.unet)  # type: ignore[assignment]
    pipeline.save_pretrained(tmp_path)
    again = load_pipeline(str(tmp_path))
    assert type(again.unet) is LiquidUNet
    drawn = again(1, "cat", 2, generator=seeded_generators(0, 1), output_type="pt").images
    torch.testing.assert_close(drawn, expected, atol=0, rtol=0)


def test_what_lies_beside_a_saved_pipeline_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"_name_or_path": "mine", // a comment\n}')
    make().save_pretrained(tmp_path)
    assert "a comment" in (tmp_path / "other" / "config.json").read_text()
    make().save_config(str(tmp_path / "alone"))
    assert (tmp_path / "alone" / "model_index.json").is_file()


def test_classes_as_a_tensor() -> None:
    pipeline = make()
    wanted = pipeline.labels(["dog", "Cat", "dog"], 3)
    assert wanted is not None
    again = pipeline.labels(wanted, 3)
    assert again is not None
    assert again.tolist() == [1, 0, 1]


def test_other_sizes() -> None:
    pipeline = make()
    assert pipeline(1, height=24, width=8, output_type="pt").images.shape == (1, 3, 24, 8)


@pytest.mark.parametrize("with_vae", [False, True])
def test_save_and_load(tmp_path: Path, with_vae: bool) -> None:
    pipeline = make(vae=small_vae() if with_vae else None)
    pipeline.save_pretrained(tmp_path)
    again = load_pipeline(str(tmp_path))
    again.set_progress_bar_config(disable=True)
    first, second = (
        p(2, "cat", 2, generator=seeded_generators(0, 2), output_type="pt").images for p in (pipeline, again)
    )
    torch.testing.assert_close(first, second, atol=0, rtol=0)
    assert again.config["label_names"] == NAMES
    again.scheduler = FlowMatchHeunDiscreteScheduler.from_config(again.scheduler.config)
    assert again(1, output_type="pt").images.isfinite().all()


def test_runs_that_can_not_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for nowhere in ("./nowhere", "runs/nowhere/pipeline", "/nowhere"):
        with pytest.raises(UserError, match=f"There is no folder {nowhere}"):
            LiquidDiffusionPipeline.from_pretrained(nowhere)
    with pytest.raises(UserError, match=r"no run './nowhere'; train one with"):
        load_pipeline("./nowhere")
    with pytest.raises(UserError, match="no trained model yet"):
        load_pipeline(str(tmp_path))
    with pytest.raises(UserError, match="no trained model yet"):
        load_pipeline(tmp_path)
    make().save_pretrained(tmp_path / "run" / "pipeline")
    with pytest.raises(UserError, match=r"it has no model_index\.json\. Take .*/run/pipeline"):
        LiquidDiffusionPipeline.from_pretrained(tmp_path / "run")
    monkeypatch.setenv("HOME", str(tmp_path / "run"))
    assert LiquidDiffusionPipeline.from_pretrained("~/pipeline").config["label_names"] == NAMES
    make().save_pretrained(tmp_path)
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="is damaged"):
        load_pipeline(str(tmp_path))
    save_file({name: weight for name, weight in make().unet.state_dict().items() if name != "stem.bias"}, weights)
    with pytest.raises(UserError, match=r"lacks stem\.bias: it was saved by another version"):
        load_pipeline(str(tmp_path))
