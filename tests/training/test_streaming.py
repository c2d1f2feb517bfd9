"""Training on data sets of the Hub, streamed and not."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Features
from datasets import Image as ImageFeature
from hub_sets import build, encoded, write_parquet
from huggingface_hub import constants
from little_hub import LittleHub

from liquid_diffusion.cli import main
from liquid_diffusion.config import TrainConfig
from liquid_diffusion.data import ranged, stream
from liquid_diffusion.data.registry import DATASETS, DatasetFacts
from liquid_diffusion.data.stream import PictureStream
from liquid_diffusion.errors import UserError
from liquid_diffusion.training.trainer import Trainer

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
Make = Callable[..., TrainConfig]
Capture = pytest.CaptureFixture[str]
ON_HUB = [facts for facts in DATASETS if facts.hub_id]


@pytest.fixture
def table(little_hub: LittleHub, monkeypatch: pytest.MonkeyPatch) -> LittleHub:
    """32 pictures in four shards at some/table, two of them unreadable, and somebody who does not wait for long."""
    for shard in range(4):
        rows = {"image": encoded(range(shard * 8, shard * 8 + 8))}
        if shard < 2:
            rows["image"][3] = {"bytes": b"nonsense", "path": None}
        path = little_hub.repo("some/table") / f"data/train-{shard:05d}-of-00004.parquet"
        write_parquet(path, rows, Features({"image": ImageFeature()}), group=4)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
    monkeypatch.setattr(ranged, "_PAUSES", (0.1,))
    monkeypatch.setattr(stream, "_WINDOW", 4)
    return little_hub


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("facts", ON_HUB, ids=lambda facts: facts.name)
def test_two_epochs_of_two_steps(little_hub: LittleHub, quick: Make, facts: DatasetFacts, streaming: bool) -> None:
    """By the registry's name."""
    count = len(build(little_hub, facts))
    half = -(-count // 2)
    how = {"image_size": 8, "batch_size": half, "steps": 4, "val_fraction": 0}
    trainer = Trainer(quick(data=facts.name, streaming=streaming, **how))
    losses = [result.loss.item() for result in trainer.steps()]
    assert len(losses) == 4
    assert trainer.dataset.label_names == list(facts.classes)
    assert isinstance(trainer.dataset, PictureStream) == streaming
    if isinstance(trainer.dataset, PictureStream):
        assert len(trainer.dataset) == count
        assert all(epoch * count / 4 + passed >= count / 2 - 1 for epoch, passed in trainer.dataset.positions)
    assert f"{count} {'streamed ' if streaming else ''}pictures" in trainer.summary()
    assert f"4 steps of {half} ({4 * half / count:.1f} epochs)" in trainer.summary()


@pytest.mark.parametrize("workers", [0, 2])
def test_n_and_n_steps_equal_2n(table: LittleHub, quick: Make, tmp_path: Path, workers: int) -> None:
    """To the bit, in the middle of a window, with another number of workers afterwards."""
    how: dict[str, Any] = {"data": "some/table", "streaming": True, "batch_size": 5, "val_fraction": 0.2}
    straight = Trainer(quick(steps=8, out=str(tmp_path / "straight"), workers=0, **how))
    losses = [result.loss.item() for result in straight.steps()]
    first = Trainer(quick(steps=8, out=str(tmp_path / "halves"), workers=workers, **how))
    halves = [result.loss.item() for result in itertools.islice(first.steps(), 3)]
    first.save()
    second = Trainer(quick(steps=8, out=str(tmp_path / "halves"), workers=2 - workers, **how))
    assert second.step == 3
    halves += [result.loss.item() for result in second.steps()]
    assert halves == losses
    for one, other in zip(straight.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert isinstance(second.dataset, PictureStream)
    assert isinstance(straight.dataset, PictureStream)
    assert second.dataset.positions == straight.dataset.positions


def test_a_source_that_is_gone_ends_with_the_state_saved(
    table: LittleHub, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 2 and one sentence; the same command goes on, and what it makes is what it would have made."""

    def train(out: str) -> int:
        arguments = "train --data some/table --streaming true --image-size 16 --model nano --batch-size 12 --steps 6"
        arguments += " --precision fp32 --warmup-steps 2 --workers 0 --out"
        return main([*arguments.split(), str(tmp_path / out)])

    assert train("straight") == 0
    train_step, calls = Trainer.train_step, itertools.count(1)

    def gone_after_two_steps(trainer: Trainer, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if next(calls) == 2:
            table.fail("*.parquet", status=404, times=None)
        return train_step(trainer, images, labels)

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", gone_after_two_steps)
        assert train("halves") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.match(r"liquid-diffusion: Stopped at step [2-5]; all is saved\. some/table/data/train-", error)
    assert "404" in error
    table.heal()
    assert train("halves") == 0
    assert "resumed from step" in capsys.readouterr().out
    weights = [tmp_path / out / "pipeline/unet/diffusion_pytorch_model.safetensors" for out in ("straight", "halves")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_bad_pictures_of_a_stream_are_named_and_counted(table: LittleHub, quick: Make, capsys: Capture) -> None:
    trainer = Trainer(quick(data="some/table", streaming=True, steps=6, val_fraction=0))
    assert len(list(trainer.steps())) == 6
    lines = [json.loads(line) for line in (trainer.folder.path / "skipped.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    assert all(line["picture"].endswith("row 3") and line["reason"] == "it is no picture" for line in lines)
    assert "Skipped 2 pictures" in (said := "".join(capsys.readouterr()))
    assert "more than 5 %: look at your data" in said


def test_two_processes_divide_an_epoch(tmp_path: Path, on_two_processes: Callable[..., str]) -> None:
    """A real launch, stopped and resumed in the middle: each of 32 pictures is taken once, by one of the two."""
    write_parquet(tmp_path / "t/x.parquet", {"image": encoded(range(32))}, Features({"image": ImageFeature()}), group=4)
    script = """
import sys, torch
from liquid_diffusion import TrainConfig, Trainer
class Watched(Trainer):
    def train_step(self, images, labels):
        ids.extend(images[:, 2, 8, 8].tolist())
        return super().train_step(images, labels)
ids = []
for steps in (2, 4):
    trainer = Watched(TrainConfig(data=sys.argv[1], out=sys.argv[2], steps=steps, streaming=True, val_fraction=0,
        image_size=16, model="nano", batch_size=4, precision="fp32", workers=0))
    assert trainer.step == steps - 2
    for _ in trainer.steps():
        pass
    trainer.save()
assert sorted(trainer.accelerator.gather(torch.tensor(ids)).tolist()) == list(range(32))
"""
    on_two_processes(script, tmp_path / "t", tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints" / "step-000004" / "stream-1.json").is_file()


def test_what_a_stream_can_not_be(quick: Make, photos: Path) -> None:
    for changes in ({"buckets": True}, {"cache_latents": True}):
        with pytest.raises(UserError, match="leave out --streaming"):
            quick(streaming=True, **changes)
    on_disk = Trainer(quick(data=str(photos), streaming=True))  # it is read as it lies in any case
    assert not isinstance(on_disk.dataset, PictureStream)
