from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Features
from datasets import Image as ImageFeature
from diffusers import AutoencoderKL
from hub_sets import encoded, write_parquet
from PIL import Image

from liquid_diffusion.codecs import AutoencoderCodec
from liquid_diffusion.config import EncodeConfig, TrainConfig
from liquid_diffusion.data import pictures
from liquid_diffusion.data.encode import encode
from liquid_diffusion.data.latents import LatentDataset
from liquid_diffusion.data.sources import BadPicture
from liquid_diffusion.errors import UserError
from liquid_diffusion.grid import draw_grid
from liquid_diffusion.loading import load_pipeline
from liquid_diffusion.models.unet import LiquidUNet
from liquid_diffusion.pipeline import draw_in_batches
from liquid_diffusion.training.learning_rate import learning_rate_factor
from liquid_diffusion.training.resume import check_same_run
from liquid_diffusion.training.run_folder import RunFolder
from liquid_diffusion.training.step import Problem
from liquid_diffusion.training.trainer import Trainer

Make = Callable[..., TrainConfig]


def state(trainer: Trainer) -> dict[str, torch.Tensor]:
    """All numbers that decide how a run goes on."""
    found = {f"model.{name}": value.clone() for name, value in trainer.model.state_dict().items()}
    found |= {f"ema.{i}": value.clone() for i, value in enumerate(trainer.state.ema.shadow_params)}
    for i, moments in enumerate(trainer.state.optimizer.state.values()):
        found |= {f"optimizer.{i}.{name}": torch.as_tensor(value).clone() for name, value in moments.items()}
    found["generator"] = trainer.state.generator.get_state()
    found["lr"] = torch.tensor(trainer.learning_rate)
    return found


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"data": "photos", "gradient_accumulation": 2, "precision": "bf16"},
        {"data": "photos", "crop": "random", "buckets": True, "workers": 1},
    ],
)
def test_n_and_n_steps_equal_2n(quick: Make, photos: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """To the bit, with a new `Trainer` in between: weights, averages, moments, generator, and the data's order."""
    if "data" in changes:
        changes = {**changes, "data": str(photos)}
    straight = Trainer(quick(steps=6, out=str(tmp_path / "straight"), **changes))
    losses = [result.loss.item() for result in straight.steps()]

    first = Trainer(quick(steps=6, out=str(tmp_path / "halves"), **changes))
    halves = [result.loss.item() for result in itertools.islice(first.steps(), 3)]
    first.save()
    torch.manual_seed(123)  # what another process would have drawn
    second = Trainer(quick(steps=6, out=str(tmp_path / "halves"), **changes))
    assert second.step == 3
    halves += [result.loss.item() for result in second.steps()]

    assert halves == losses
    ours, theirs = state(second), state(straight)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def test_every_source_of_randomness_is_in_the_checkpoint(quick: Make) -> None:
    """The draws after a resume are the ones that would have come: the run's generator and the global ones."""
    trainer = Trainer(quick())
    list(itertools.islice(trainer.steps(), 2))
    trainer.save()
    expected = (torch.rand(3, generator=trainer.state.generator), torch.rand(3))
    again = Trainer(quick())
    drawn = (torch.rand(3, generator=again.state.generator), torch.rand(3))
    assert all(torch.equal(first, second) for first, second in zip(expected, drawn, strict=True))


def test_loss_falls_by_half_in_200_steps(quick: Make) -> None:
    trainer = Trainer(quick(steps=200, batch_size=16, precision="auto", warmup_steps=20))
    losses = [result.loss.item() for result in trainer.steps()]
    assert np.mean(losses[:5]) == pytest.approx(2.0, abs=0.4)  # variance of eps - x0 for normalised x0
    assert np.mean(losses[-20:]) < 0.5 * np.mean(losses[:5])


def test_target_of_the_training_is_noise_minus_data(quick: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that knows the data and answers (x_t - x0) / t, which is eps - x0, has no loss."""
    trainer = Trainer(quick(time_sampling="uniform"))
    images, labels, _ = next(trainer._batches())
    x0 = trainer.codec.encode(images.float() / 127.5 - 1)

    class Knowing:
        def __call__(self, x_t: torch.Tensor, t: torch.Tensor, _: torch.Tensor) -> Any:
            return type("Output", (), {"sample": (x_t - x0) / t[:, None, None, None]})

    monkeypatch.setattr(trainer.state, "wrapped", Knowing())
    assert trainer.training_step.loss(trainer.training_step.problem(images, labels)).item() < 1e-4


def test_training_times_follow_their_options(quick: Make) -> None:
    """Of uniform times u a shift of 3 makes 3 u / (1 + 2 u), and noise and labels stay what they were."""
    seen: list[torch.Tensor] = []
    for shift in (1.0, 3.0):
        trainer = Trainer(quick(time_sampling="uniform", time_shift=shift, out=f"{quick().out}-{shift}"))
        images, labels, _ = next(trainer._batches())
        seen.append(trainer.training_step.problem(images, labels).t)
    plain, shifted = seen
    torch.testing.assert_close(shifted, 3 * plain / (1 + 2 * plain))


def test_labels_are_hidden_at_the_wanted_rate(quick: Make) -> None:
    trainer = Trainer(quick(label_dropout=0.25))
    labels = torch.arange(1000) % 9
    seen = trainer.training_step.problem(torch.zeros(1000, 3, 16, 16, dtype=torch.uint8), labels).labels
    assert seen is not None
    hidden = seen == 9
    assert 0.2 < hidden.float().mean() < 0.3
    assert torch.equal(seen[~hidden], labels[~hidden])


@pytest.mark.parametrize(("label_dropout", "guidance"), [(0.0, 1.0), (0.1, 3.0)])
def test_grids_are_guided_where_the_null_label_was_learnt(quick: Make, label_dropout: float, guidance: float) -> None:
    trainer = Trainer(quick(steps=3, label_dropout=label_dropout, lr=0.01, warmup_steps=1))
    list(trainer.steps())
    grid = Image.open(trainer.draw_samples())
    labels = [row for row in range(9) for _ in range(8)]
    with trainer.state.averaged():
        drawn = {
            scale: draw_in_batches(trainer.pipeline(), labels, len(labels), 8, guidance_scale=scale)
            for scale in (1.0, 3.0)
        }
        expected = {
            scale: draw_grid(list(itertools.chain.from_iterable(batches)), 8, row_names=trainer.dataset.label_names)
            for scale, batches in drawn.items()
        }
    equal = {scale: np.array_equal(np.asarray(grid), np.asarray(picture)) for scale, picture in expected.items()}
    assert equal == {1.0: guidance == 1.0, 3.0: guidance == 3.0}
    assert trainer.pipeline().config["guidance"] == guidance  # which `sample` and all others take


def test_ema_follows_its_warm_up(quick: Make) -> None:
    """The averages by hand: decay min(0.999, 1 - (1 + n)^-3/4) at update n, so 20 steps are far from the start."""
    trainer = Trainer(quick(steps=20))
    name = "stem.weight"
    start = trainer.model.state_dict()[name].double().clone()
    average = start.clone()
    for i, _ in enumerate(trainer.steps()):
        decay = 0.0 if i == 0 else min(0.999, 1 - (1 + i) ** -0.75)
        average = decay * average + (1 - decay) * trainer.model.state_dict()[name].double()
    end = trainer.model.state_dict()[name].double()
    with trainer.state.averaged():
        ours = trainer.model.state_dict()[name].double().clone()
    torch.testing.assert_close(ours, average, atol=1e-6, rtol=1e-4)
    assert (ours - end).norm() < 0.5 * (start - end).norm()  # without the warm-up it would be 0.98
    assert torch.equal(trainer.model.state_dict()[name].double(), end)  # the training's own weights came back


def test_learning_rate() -> None:
    factors = [learning_rate_factor(step, 100, warmup=10, cooldown=0.4) for step in range(101)]
    np.testing.assert_allclose(factors[:10], np.arange(1, 11) / 10)
    assert set(factors[10:61]) == {1.0}
    np.testing.assert_allclose(factors[60:101], 0.5 * (1 + np.cos(np.linspace(0, np.pi, 41))), atol=1e-12)


def test_a_whole_run(quick: Make, tmp_path: Path) -> None:
    trainer = Trainer(quick(steps=4, sample_every=2, checkpoint_every=2, log_every=2))
    assert trainer.run()
    run = tmp_path / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    assert all(line["loss"] > 0 and line["images_per_second"] > 0 for line in lines)
    assert list((run / "tensorboard").iterdir())
    for step in (2, 4):
        with Image.open(run / "samples" / f"step-{step:06d}.png") as grid:
            assert grid.height >= 9 * 64
        assert (run / "checkpoints" / f"step-{step:06d}" / "manifest.json").is_file()
    assert not list(run.rglob("*.partial"))
    weights = load_pipeline(str(run)).unet.state_dict()
    with trainer.state.averaged():
        assert all(torch.equal(value, weights[name]) for name, value in trainer.model.state_dict().items())


def test_images_per_second_are_those_of_the_steps(quick: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock on which a step takes a second, and compiling, saving and drawing an hour each; resumed too."""
    clock = [0.0]

    def taking(seconds: float, result: object = None) -> Callable[..., object]:
        def act(*_: object) -> object:
            clock[0] += seconds
            return result

        return act

    monkeypatch.setattr("liquid_diffusion.training.trainer.time", SimpleNamespace(perf_counter=lambda: clock[0]))
    save = Trainer.save
    monkeypatch.setattr(Trainer, "_compile", taking(3600))
    monkeypatch.setattr(Trainer, "train_step", taking(1, torch.tensor(1.0)))
    monkeypatch.setattr(Trainer, "draw_samples", taking(3600))
    monkeypatch.setattr(Trainer, "save", lambda trainer: (taking(3600)(), save(trainer))[1])
    for steps in (6, 9):
        how = {"steps": steps, "compile": True, "log_every": 2, "sample_every": 3, "checkpoint_every": 4}
        assert Trainer(quick(**how)).run()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 3, 4, 6, 8, 9]
    assert [line["images_per_second"] for line in lines] == [8.0] * 6


def test_grids_do_not_change_the_training(quick: Make, tmp_path: Path) -> None:
    states = []
    for every in (1, 1000):
        trainer = Trainer(quick(sample_every=every, checkpoint_every=1000, out=str(tmp_path / str(every))))
        trainer.run()
        states.append(state(trainer))
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_accumulation_is_the_same_batch_in_parts(quick: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient and the loss of one whole batch and of four parts, with the draws taken out of them."""
    gradients, losses = [], []
    for parts in (1, 4):  # unclipped: all of one norm would hide a wrong weight of the parts
        trainer = Trainer(quick(gradient_accumulation=parts, max_grad_norm=1e9, out=str(tmp_path / str(parts))))
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter.add_(0.02)

        def drawn(images: torch.Tensor, labels: torch.Tensor, trainer: Trainer = trainer) -> Problem:
            x = trainer.codec.encode(images.float() / 127.5 - 1)
            return Problem(x, torch.full((len(x),), 0.5), labels.float()[:, None, None, None].expand_as(x), labels)

        images, labels, _ = next(trainer._batches())
        monkeypatch.setattr(trainer.training_step, "problem", drawn)
        monkeypatch.setattr(trainer.state.optimizer, "step", lambda: None)
        monkeypatch.setattr(trainer.state.optimizer, "zero_grad", lambda set_to_none: None)
        losses.append(trainer.train_step(images, labels))
        gradients.append([parameter.grad for parameter in trainer.model.parameters()])
    torch.testing.assert_close(*losses)
    for whole, in_parts in zip(*gradients, strict=True):
        torch.testing.assert_close(whole, in_parts, atol=1e-5, rtol=1e-3)


def test_bad_pictures_are_named_counted_and_skipped(
    quick: Make, photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both where all is decoded before and where worker processes read while the run goes on."""
    for name in ("00", "02"):
        (photos / "dog" / f"{name}.png").write_bytes((photos / "dog" / f"{name}.png").read_bytes()[:300])
    for out, limit in (("in-memory", 2**20), ("while-training", 0)):
        monkeypatch.setattr(pictures, "IN_MEMORY_BYTES", limit)
        trainer = Trainer(quick(data=str(photos), steps=6, out=str(photos.parent / out)))
        assert len(list(trainer.steps())) == 6
        lines = (photos.parent / out / "skipped.jsonl").read_text().splitlines()
        assert len(lines) == 2
        named = {Path(line["picture"]).name: line["reason"] for line in map(json.loads, lines)}
        assert set(named) == {"00.png", "02.png"}
        assert all("trunc" in reason or "broken" in reason for reason in named.values()), named
        said = capsys.readouterr()
        assert "Skipped 2 pictures" in said.out + said.err
        assert "more than 5 %" in said.out + said.err
        again = Trainer(quick(data=str(photos), steps=6, out=str(photos.parent / out)))
        list(again.steps())
        assert (photos.parent / out / "skipped.jsonl").read_text().splitlines() == lines  # each is named once


@pytest.mark.parametrize("in_memory", [True, False])
def test_bad_pictures_of_any_name_are_named(
    quick: Make, photos: Path, in_memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stands before the reason may itself have a colon; read before the run, by its header or in a worker."""
    folder = photos.rename(photos.parent / "holiday: part 1")
    (folder / "dog" / "a: b.png").write_bytes(b"nonsense")
    if not in_memory:
        monkeypatch.setattr(pictures, "IN_MEMORY_BYTES", 0)
    trainer = Trainer(quick(data=str(folder), workers=1, buckets=not in_memory, val_fraction=0))
    list(trainer.steps())
    (line,) = (trainer.folder.path / "skipped.jsonl").read_text().splitlines()
    assert json.loads(line)["picture"] == str(folder / "dog" / "a: b.png")
    again = Trainer(quick(data=str(folder), workers=1, buckets=not in_memory, val_fraction=0))
    list(again.steps())
    assert (trainer.folder.path / "skipped.jsonl").read_text().splitlines() == [line]


@pytest.mark.parametrize("log_every", [1, 100])
def test_a_loss_that_is_no_number_ends_the_run(quick: Make, monkeypatch: pytest.MonkeyPatch, log_every: int) -> None:
    """Before it is saved, also where nothing is logged then."""
    trainer = Trainer(quick(steps=4, log_every=log_every, checkpoint_every=1))
    monkeypatch.setattr(trainer, "train_step", lambda *_: torch.tensor(float("nan")))
    with pytest.raises(UserError, match="no number any more at step 1"):
        trainer.run()
    assert not trainer.checkpoints.all()


def test_weights_that_are_no_numbers_are_not_saved(quick: Make) -> None:
    """A gradient can be infinite where the loss is not; clipping makes no number of it."""
    trainer = Trainer(quick(steps=4, checkpoint_every=1))
    steps = trainer.steps()
    next(steps)
    trainer.save()
    weight = trainer.model.head.weight
    hook = weight.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([0]), torch.inf))
    assert next(steps).loss.isfinite()
    hook.remove()
    with pytest.raises(UserError, match=r"weights are no numbers any more at step 2; nothing was written over"):
        trainer.save()
    assert [path.name for path in trainer.checkpoints.all()] == ["step-000001"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "tiny"}, r"was trained with model nano, not tiny; say --model nano .* or choose another --out"),
        ({"image_size": 32}, "trained with image_size 16, not 32"),
        ({"seed": 1}, "trained with seed 0, not 1"),
        ({"data": "photos"}, "trained with data emoji"),
    ],
)
def test_another_run_is_not_gone_on_with(quick: Make, photos: Path, changes: dict[str, Any], words: str) -> None:
    trainer = Trainer(quick())
    trainer.save()
    before = {path: path.read_bytes() for path in trainer.folder.path.rglob("*") if path.is_file()}
    if "data" in changes:
        changes = {"data": str(photos)}
    with pytest.raises(UserError, match=words):
        Trainer(quick(**changes))
    after = {path: path.read_bytes() for path in trainer.folder.path.rglob("*") if path.is_file()}
    assert after == before


def test_a_run_of_before_an_option_existed_goes_on(quick: Make) -> None:
    """Its configuration lacks the option, whose default is what the run did."""
    Trainer(quick()).save()
    manifest = Path(quick().out or "") / "checkpoints" / "step-000000" / "manifest.json"
    facts = json.loads(manifest.read_text())
    del facts["facts"]["config"]["crop"]
    manifest.write_text(json.dumps(facts))
    assert Trainer(quick()).step == 0
    with pytest.raises(UserError, match="was trained with crop center, not pad"):
        Trainer(quick(crop="pad"))


def test_data_that_changed_is_not_gone_on_with(quick: Make, photos: Path) -> None:
    Trainer(quick(data=str(photos))).save()
    (photos / "dog" / "00.png").unlink()
    with pytest.raises(UserError, match=r"has changed since .* had 22 pictures, now 21"):
        Trainer(quick(data=str(photos)))


def test_pictures_that_were_exchanged_are_not_gone_on_with(quick: Make, photos: Path) -> None:
    """As many of the same classes; a checkpoint of before they were listed can't tell."""
    place = Trainer(quick(data=str(photos))).save()
    (photos / "dog" / "00.png").rename(photos / "dog" / "99.png")
    with pytest.raises(UserError, match=r"has changed since .*: files were added, removed, renamed, or moved between"):
        Trainer(quick(data=str(photos)))
    manifest = json.loads((place / "manifest.json").read_text())
    del manifest["facts"]["listing"]
    (place / "manifest.json").write_text(json.dumps(manifest))
    Trainer(quick(data=str(photos)))


def test_a_class_of_another_name_is_another_class(quick: Make, photos: Path) -> None:
    Trainer(quick(data=str(photos))).save()
    (photos / "dog").rename(photos / "wolf")
    with pytest.raises(UserError, match=r"has changed since .*: its classes were cat, dog, now cat, wolf"):
        Trainer(quick(data=str(photos)))


def test_a_full_disk_is_told_and_leaves_what_was_whole(quick: Make, tmp_path: Path) -> None:
    """Files may not grow beyond what a checkpoint takes, so the system itself refuses to write one."""
    trainer = Trainer(quick(steps=2))
    whole = trainer.save()
    config = (tmp_path / "run" / "config.yaml").read_bytes()
    trainer.train_step(*next(iter(trainer._batches()))[:2])
    trainer.step = 1
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for most in (10_000_000, 10):
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
        try:
            with pytest.raises(
                UserError, match=r"run can't be written to: .*(File too large|file write failed|enforce)"
            ):
                trainer.save()
            if most == 10:
                with pytest.raises(UserError, match="can't be written to"):
                    Trainer(quick(steps=3))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (tmp_path / "run" / "config.yaml").read_bytes() == config
    assert Trainer(quick(steps=2)).checkpoints.all() == [whole]


def test_a_folder_that_was_moved_is_gone_on_with(
    quick: Make, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all that lies around it, or under another name; but not where a class of it is gone."""
    Trainer(quick(data=str(photos))).save()
    (tmp_path / "elsewhere").mkdir()
    moved = photos.rename(tmp_path / "elsewhere" / photos.name)
    monkeypatch.chdir(tmp_path)
    Trainer(quick(data=f"elsewhere/{photos.name}/"))
    moved = moved.rename(tmp_path / "renamed")
    Trainer(quick(data="renamed"))
    shutil.rmtree(moved / "dog")
    with pytest.raises(UserError, match="has changed since"):
        Trainer(quick(data=str(moved)))


def test_cached_latents_are_gone_on_with_where_their_pictures_were_moved(
    quick: Make, photos: Path, vae: Path, tmp_path: Path
) -> None:
    """With the run; but not with another folder of the same name."""

    def make(folder: Path) -> Trainer:
        return Trainer(quick(data=str(folder), codec=str(vae), image_size=32, cache_latents=True))

    trainer = make(photos)
    trainer.save()
    (tmp_path / "elsewhere").mkdir()
    moved = photos.rename(tmp_path / "elsewhere" / photos.name)
    again = make(moved)
    assert len(again.dataset) == len(trainer.dataset)
    assert isinstance(again.dataset, LatentDataset)
    shutil.rmtree(moved / "dog")
    with pytest.raises(UserError, match="has changed since its latents"):
        make(moved)


def test_more_steps_go_on(quick: Make) -> None:
    Trainer(quick(steps=2)).run()
    longer = Trainer(quick(steps=3))
    assert (longer.step, longer.finished) == (2, False)
    assert [result.step for result in longer.steps()] == [3]


def test_somebody_elses_folder_is_left_alone(quick: Make, photos: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "pipeline").mkdir(parents=True)
    for name, text in (("config.yaml", "mine: 1"), ("metrics.jsonl", "{}"), ("pipeline/mine.py", "pass")):
        (run / name).write_text(text)
    with pytest.raises(UserError, match="holds something else than a run"):
        Trainer(quick())
    assert (run / "config.yaml").read_text() == "mine: 1"
    assert (run / "pipeline" / "mine.py").is_file()
    with pytest.raises(UserError, match="would lie among the pictures"):
        Trainer(quick(data=str(photos), out=str(photos / "runs" / "x")))
    assert not (photos / "runs").exists()


def test_a_run_that_never_reached_a_checkpoint_starts_again(quick: Make) -> None:
    list(itertools.islice(Trainer(quick()).steps(), 1))
    assert Trainer(quick()).step == 0


def test_another_machine_is_said_in_words(quick: Make) -> None:
    """Checkpoints hold the state of a device's generators and of a precision's loss scaling."""
    Trainer(quick(precision="auto")).save()
    manifest = Path(quick().out or "") / "checkpoints" / "step-000000" / "manifest.json"
    facts = json.loads(manifest.read_text())
    for name, value in (("device", "cuda"), ("precision", "fp16"), ("processes", 4)):
        changed = json.loads(json.dumps(facts))
        changed["facts"]["machine"][name] = value
        manifest.write_text(json.dumps(changed))
        mend = "say --precision fp16 to resume it" if name == "precision" else "resume it where it was started"
        with pytest.raises(UserError, match=f"was trained with {name} {value}, here it would be .*; {mend}"):
            Trainer(quick(precision="auto"))


def test_the_precision_that_was_chosen_can_be_said(quick: Make) -> None:
    """On a machine where `auto` is another one."""
    chosen = Trainer(quick(precision="auto"))
    chosen.save()
    said = {"no": "fp32"}.get(chosen.accelerator.mixed_precision, chosen.accelerator.mixed_precision)
    Trainer(quick(precision=said))
    other = "bf16" if said == "fp32" else "fp32"
    with pytest.raises(UserError, match=f"say --precision {said} to resume it"):
        Trainer(quick(precision=other))


def test_wrong_size(quick: Make, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"image_size 20 can't be divided by 8.*the next that can is 24"):
        Trainer(quick(image_size=20))
    assert not (tmp_path / "run").exists()


def test_out_that_is_a_file(quick: Make, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(UserError, match="can't be written to"):
        Trainer(quick())
    assert (tmp_path / "run").read_text() == "mine"


def test_gradient_checkpointing_is_switched_on(quick: Make) -> None:
    trainer = Trainer(quick(gradient_checkpointing=True, steps=1))
    assert isinstance(trainer.model, LiquidUNet)
    assert trainer.model.is_gradient_checkpointing
    assert len(list(trainer.steps())) == 1


def test_a_lower_rate_goes_on(quick: Make) -> None:
    """What the run is told to do when its loss is no number any more."""
    Trainer(quick(steps=4, lr=1e-2)).save()
    trainer = Trainer(quick(steps=4, lr=1e-4, warmup_steps=2))
    next(iter(trainer.steps()))
    assert trainer.state.optimizer.param_groups[0]["lr"] == pytest.approx(0.5e-4)


# of dynamo's own, which it expects to be a warning
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_blocks_train_as_they_do(
    quick: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same losses, after a resume too; and where there is no compiler the training goes on without."""

    def losses(name: str, steps: int, **changes: Any) -> list[float]:
        trainer = Trainer(quick(out=str(tmp_path / name), **{"steps": 4, **changes}))
        found = [result.loss.item() for result in itertools.islice(trainer.steps(), steps)]
        trainer.save()
        return found

    torch._dynamo.utils.counters.clear()
    expected = losses("eager", 4)
    assert not capsys.readouterr().out
    found = losses("compiled", 2, compile=True)
    said = capsys.readouterr().out
    assert said.count("Compiling the blocks") == 1
    assert "can't be compiled" not in said
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert found + losses("compiled", 2, compile=True) == pytest.approx(expected, rel=5e-5)  # sums in another order

    torch._dynamo.reset()
    capsys.readouterr()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "kernels"))
    with torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        assert losses("without", 4, compile=True) == expected
    assert "can't be compiled here" in capsys.readouterr().out
    torch._dynamo.reset()


def test_two_processes(tmp_path: Path, on_two_processes: Callable[..., str]) -> None:
    """A real launch on two processes: equal weights, other draws in each; resumed; they stop together."""
    script = """
import sys, torch
from liquid_diffusion import TrainConfig, Trainer
config = dict(out=sys.argv[1], image_size=16, model="nano", batch_size=4, precision="fp32", sample_every=2)
for steps in (2, 3):
    trainer = Trainer(TrainConfig(steps=steps, **config))
    assert trainer.step == (0 if steps == 2 else 2)
    assert trainer.run()
    for tensors in (trainer.model.parameters(), trainer.state.ema.shadow_params):
        total = torch.stack([p.double().sum() for p in tensors]).sum()
        both = trainer.accelerator.gather(total[None])
        assert both[0] == both[1], both
    draws = trainer.accelerator.gather(torch.rand(1, generator=trainer.state.generator))
    assert draws[0] != draws[1]
assert not trainer._anyone(False) and trainer._anyone(trainer.accelerator.process_index == 1)
"""
    on_two_processes(script, tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints" / "step-000003" / "generator-1.pt").is_file()
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    with pytest.raises(UserError, match="trained with processes 2, here it would be 1"):
        Trainer(TrainConfig(out=str(tmp_path / "run"), image_size=16, model="nano", batch_size=4, precision="fp32"))


CACHED = r"""
import torch
from liquid_diffusion import TrainConfig, Trainer
data, codec, out, steps = sys.argv[1:]
trainer = Trainer(TrainConfig(
    data=data, codec=codec, out=out, steps=int(steps), image_size=16, model="nano", batch_size=4, precision="fp32",
    workers=0, cache_latents=True, sample_every=10))
assert trainer.run()
total = torch.stack([p.double().sum() for p in trainer.model.parameters()]).sum()
both = trainer.accelerator.gather(total[None])
assert both[0] == both[1], both
"""


def test_two_processes_encode_once_and_train(
    photos: Path, vae: Path, tmp_path: Path, telling_shards: str, on_two_processes: Callable[..., str]
) -> None:
    """Both processes write latents before the first step; a launch that goes on writes none."""
    said = on_two_processes(telling_shards + CACHED, photos, vae, tmp_path / "run", 2)
    assert said.count("rank 0 writes") > 3
    assert said.count("rank 1 writes") > 3
    said = on_two_processes(telling_shards + CACHED, photos, vae, tmp_path / "run", 3)
    assert "writes" not in said
    checkpoints = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert checkpoints == ["step-000002", "step-000003"]


@pytest.mark.parametrize("changes", [{}, {"buckets": True, "image_size": 32}])
def test_n_and_n_steps_equal_2n_on_cached_latents(
    quick: Make, photos: Path, vae: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """To the bit, with buckets too; and the pictures may be gone."""
    settings = {"data": str(photos), "codec": str(vae), "steps": 6, "workers": 0, **changes}
    straight = Trainer(quick(out=str(tmp_path / "straight"), cache_latents=True, **settings))
    losses = [result.loss.item() for result in straight.steps()]

    first = Trainer(quick(out=str(tmp_path / "halves"), cache_latents=True, **settings))
    halves = [result.loss.item() for result in itertools.islice(first.steps(), 3)]
    first.save()
    for path in photos.rglob("*.png"):
        path.unlink()
    torch.manual_seed(123)
    second = Trainer(quick(out=str(tmp_path / "halves"), cache_latents=True, **settings))
    assert second.step == 3
    halves += [result.loss.item() for result in second.steps()]
    assert halves == losses
    ours, theirs = state(second), state(straight)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_cached_latents_train_as_the_pictures_do(
    quick: Make, photos: Path, vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same losses but for the rounding of the cache, while the autoencoder encodes nothing."""
    settings = {"data": str(photos), "codec": str(vae), "workers": 0, "sample_every": 2, "checkpoint_every": 4}
    pictures = Trainer(quick(out=str(tmp_path / "pictures"), cache_latents=False, **settings))
    cached = Trainer(quick(out=str(tmp_path / "cached"), cache_latents=True, **settings))
    assert isinstance(cached.codec, AutoencoderCodec)
    pictures.codec.set_statistics(cached.codec.mean.tolist(), cached.codec.std.tolist())
    expected = [result.loss.item() for result in pictures.steps()]

    def never(*_: object) -> None:
        raise AssertionError("a picture was encoded")

    monkeypatch.setattr(cached.codec.vae, "encode", never)
    assert [result.loss.item() for result in cached.steps()] == pytest.approx(expected, rel=2e-3)
    cached.draw_samples()
    cached.save()
    again = load_pipeline(str(tmp_path / "cached"))
    assert all(again.config["codec"][name] == cached.codec.state()[name] for name in ("mean", "std"))


def test_the_autoencoder_comes_to_the_device_for_grids_only(
    quick: Make, vae: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(quick(codec=str(vae), image_size=16, cache_latents=True))
    assert isinstance(trainer.codec, AutoencoderCodec)
    moves: list[str] = []

    def to(device: torch.device | None = None, **_: object) -> AutoencoderKL:
        if device is not None:
            moves.append(str(device))
        return autoencoder

    autoencoder = trainer.codec.vae
    monkeypatch.setattr(autoencoder, "to", to)
    list(trainer.steps())
    assert not moves
    trainer.draw_samples()
    assert moves == ["cpu", "cpu"]  # there and back


def test_latents_of_a_folder(quick: Make, photos: Path, vae: Path, tmp_path: Path) -> None:
    """Encoded by the command, used by two runs; what does not match is refused before anything is written."""
    folder = tmp_path / "latents"
    encode(EncodeConfig(str(photos), str(folder), 16, str(vae), workers=0))
    settings = {"data": str(photos), "codec": str(vae), "cache_latents": str(folder), "steps": 1}
    for out in ("a", "b"):
        assert len(list(Trainer(quick(out=str(tmp_path / out), **settings)).steps())) == 1
        assert not (tmp_path / out / "latents").exists()
    with pytest.raises(UserError, match="encoded with image_size 16, but the training has 32"):
        Trainer(quick(**settings, image_size=32))
    with pytest.raises(UserError, match="The codec pixels costs nothing"):
        Trainer(quick(**{**settings, "codec": "pixels"}))
    for there, here in (("cat", "dog"), ("dog", "cat")):  # two that were in the wrong folders
        name = min((photos / there).iterdir()).name
        (photos / there / name).rename(photos / here / f"moved-{name}")
    for changed in (settings, {**settings, "out": str(tmp_path / "a")}):
        with pytest.raises(UserError, match=r"has changed since .*: files were renamed, or moved between classes"):
            Trainer(quick(**changed))
    next((photos / "dog").iterdir()).unlink()
    with pytest.raises(UserError, match=r"has changed since its latents in .* it had 24 pictures, now 23"):
        Trainer(quick(**settings))
    with pytest.raises(UserError, match="There are no latents in"):
        Trainer(quick(**{**settings, "cache_latents": str(tmp_path / "nowhere")}))
    with pytest.raises(UserError, match="no model 'huge'"):
        Trainer(quick(**{**settings, "cache_latents": True, "model": "huge"}))
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="A random crop differs each time"):
        quick(**settings, crop="random")


def test_averages_in_the_computers_memory_are_the_same(quick: Make, tmp_path: Path) -> None:
    trainers = [Trainer(quick(ema_on_cpu=choice, out=str(tmp_path / str(choice)))) for choice in (False, True)]
    for trainer in trainers:
        list(trainer.steps())
    on_device, on_cpu = (trainer.state.ema.shadow_params for trainer in trainers)
    assert all(torch.equal(a, b) for a, b in zip(on_device, on_cpu, strict=True))
    weights = list(trainers[1].model.parameters())
    assert not all(torch.equal(a, b) for a, b in zip(on_cpu, weights, strict=True))


def test_a_card_that_is_too_small_is_told_of(quick: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(quick(gradient_accumulation=2))
    assert trainer.memory_warning() is None  # there is no card
    for free, told in ((2**40, False), (2**26, True)):
        monkeypatch.setattr("liquid_diffusion.training.trainer.free_memory", lambda device, free=free: free)
        assert (trainer.memory_warning() is not None) == told


def test_another_folder_of_the_same_name_is_not_gone_on_with(quick: Make, photos: Path, tmp_path: Path) -> None:
    """Also where it has as many pictures in the same classes."""
    Trainer(quick(data=str(photos))).save()
    shutil.copytree(photos, tmp_path / "others" / photos.name)
    with pytest.raises(UserError, match=r"was trained with data .*/photos, not .*/others/photos"):
        Trainer(quick(data=str(tmp_path / "others" / photos.name)))


def test_a_finished_run_needs_nothing_and_keeps_its_configuration(quick: Make, photos: Path, vae: Path) -> None:
    """Neither pictures nor latents, which may be gone."""
    how = {"data": str(photos), "codec": str(vae), "steps": 1}
    trainer = Trainer(quick(**how))
    assert trainer.run()
    before = trainer.folder.config_file.read_text()
    for gone in (photos, vae, trainer.folder.path / "latents"):
        shutil.rmtree(gone)
    again = Trainer(quick(**how, lr=0.5))
    assert again.finished
    assert again.summary() == f"{again.folder.path} has reached its 1 steps; give more steps to train on."
    assert not list(again.steps())
    assert again.run()
    assert trainer.folder.config_file.read_text() == before
    assert not (trainer.folder.path / "latents").exists()


def test_a_wish_for_nothing_is_told_as_one(quick: Make, photos: Path) -> None:
    trainer = Trainer(quick(data=str(photos), steps=1))
    trainer.save()
    with pytest.raises(UserError, match="leave --label-column out to resume it"):
        check_same_run(
            trainer.folder.path, trainer.checkpoints.latest()[2],  # type: ignore[index]
            replace(trainer.config, label_column="kind"), trainer.accelerator,
        )  # fmt: skip


def test_damaged_files_of_a_checkpoint_are_told(quick: Make, tmp_path: Path) -> None:
    """Of the right size, so that the manifest does not tell."""
    write_parquet(tmp_path / "t/x.parquet", {"image": encoded(range(32))}, Features({"image": ImageFeature()}))
    config = quick(data=str(tmp_path / "t"), streaming=True)
    place = Trainer(config).save()
    for name in ("model.safetensors", "optimizer.bin", "ema.pt", "generator-0.pt", "stream-0.json"):
        whole = (place / name).read_bytes()
        (place / name).write_bytes(bytes(len(whole)))
        with pytest.raises(UserError, match=r"step-000000 is damaged, or .*: delete it"):
            Trainer(config)
        (place / name).write_bytes(whole)
    Trainer(config)


def test_a_checkpoint_of_another_optimiser_is_told(quick: Make) -> None:
    """As one that an older version of the package wrote, with other groups of weights."""
    trainer = Trainer(quick())
    place = trainer.save()
    state = torch.load(place / "optimizer.bin", weights_only=True)
    state["param_groups"].append({**state["param_groups"][0], "params": []})
    torch.save(state, place / "optimizer.bin")
    with pytest.raises(UserError, match="written by another version of this package"):
        trainer.state.load(place)


def test_a_half_written_line_of_skipped_pictures_is_passed_over(quick: Make, photos: Path) -> None:
    (photos / "dog" / "00.png").write_bytes(b"nonsense")
    folder = Trainer(quick(data=str(photos))).folder
    whole = (folder.path / "skipped.jsonl").read_text()
    (folder.path / "skipped.jsonl").write_text(whole + '{"picture": "ca')
    RunFolder(folder.path).note_skipped([BadPicture("new.png", "it is no picture")], 24)
    assert '"new.png"' in (folder.path / "skipped.jsonl").read_text()


def test_thousands_of_bad_pictures_are_told_of_a_dozen_times(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(tmp_path)
    for i in range(2000):
        folder.note_skipped([BadPicture(f"{i}-\udcff.png", "it is no picture")], 10_000)
    assert len((tmp_path / "skipped.jsonl").read_text().splitlines()) == 2000
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 11  # 1, 2, 4, ... 1024
    assert said[-1].startswith("Skipped 1024 pictures that can't be read, e.g. 1023-\\udcff.png: it is no picture.")


def test_a_run_is_one_process_s_alone(quick: Make, tmp_path: Path) -> None:
    """Of a folder that is trained in another process is told before anything is read or written; in one's own it is no
    matter."""
    Trainer(quick()).save()
    code = "import sys; from pathlib import Path; from liquid_diffusion.writing import claim"
    code += "; lock = claim(Path(sys.argv[1])); print('mine', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(tmp_path / "other")]
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        assert other.stdout.readline() == "mine\n"
        before = (tmp_path / "other" / "config.yaml").read_bytes()
        with pytest.raises(UserError, match=r"Another process, .*, trains or encodes in .*other"):
            Trainer(quick(out=str(tmp_path / "other"), steps=9))
        assert (tmp_path / "other" / "config.yaml").read_bytes() == before
        other.stdin.close()
    trainer = Trainer(quick(out=str(tmp_path / "other"), steps=1))
    assert trainer.step == Trainer(quick(out=str(tmp_path / "other"), steps=1)).step
    trainer.run()
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "mine\n"  # a training that has ended keeps nobody out
        other.kill()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EROFS])
def test_a_folder_that_can_not_be_locked(quick: Make, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Of a network without locks, which is trained in all the same; or one that can only be read, of a finished run."""
    Trainer(quick(steps=1)).run()

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert Trainer(quick(steps=1)).finished
    if number == errno.ENOLCK:
        assert Trainer(quick(steps=2)).run()


def test_an_unknown_option_of_a_run_is_named(quick: Make) -> None:
    trainer = Trainer(quick())
    with trainer.folder.config_file.open("a") as file:
        file.write("colour: blue\n")
    with pytest.raises(UserError, match=r"config.yaml has an option that is not known here: colour"):
        Trainer(quick())


def test_mistakes_met_by_a_worker_come_as_one_sentence(
    quick: Make, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "IN_MEMORY_BYTES", 0)
    trainer = Trainer(quick(data=str(photos), workers=1, val_fraction=0))
    for path in photos.rglob("*.png"):
        path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(UserError, match=r"^Not one of the 24 pictures can be read; the first: [^\n]*$"):
        next(trainer.steps())
