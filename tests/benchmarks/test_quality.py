"""The comparison itself, on a small made-up set in the form of emoji64x3."""

from __future__ import annotations

import copy
import csv
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import figures
import harness
import numpy as np
import pytest
import quality
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from harness import Budget, Training, fit_codec, held_out_loss
from PIL import Image as Pictures
from torch import Tensor, nn

from liquid_diffusion.codecs import PixelCodec
from liquid_diffusion.config import TrainConfig
from liquid_diffusion.data.pictures import PictureDataset
from liquid_diffusion.data.sources import open_source
from liquid_diffusion.data.transforms import to_float
from liquid_diffusion.training.trainer import Trainer


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Data; and results, tables and features that land in the test's own folder."""
    draws = np.random.default_rng(0)
    types = Features({"image": Image(), "label": ClassLabel(names=["a", "b"]), "codepoints": Value("string")})
    for name, count in (("train", 80), ("val", 6)):
        colours = draws.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
        images = [Pictures.fromarray(some).resize((64, 64)) for some in colours]
        table = {
            "image": images,
            "label": [i % 2 for i in range(count)],
            "codepoints": [f"{i // 2:x}" for i in range(count)],
        }
        Dataset.from_dict(table, features=types).to_parquet(tmp_path / f"emoji64x3-{name}.parquet")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    monkeypatch.setattr(harness, "_BATCH", 8)
    for module in (figures, quality):
        monkeypatch.setattr(module, "QUALITY", tmp_path / "quality.csv")
    monkeypatch.setattr(quality, "STEP_TIMES", tmp_path / "step-time.csv")
    document = tmp_path / "ablations.md"
    document.write_text(figures.DOCUMENT.read_text())
    monkeypatch.setattr(figures.write_tables, "__defaults__", (document,))
    return tmp_path


@pytest.fixture(autouse=True)
def _not_compiled() -> Iterator[None]:
    """What compiled blocks compute is tested with the trainer; here it would take minutes."""
    with torch.compiler.set_stance("force_eager"):
        yield


def test_equal_images(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(quality, "LEARNING_RATES", {"adamw": (1e-3,)})
    monkeypatch.setattr(quality, "STEPS", 3)
    command = ["quality.py", "--data", str(folder), "--size", "16", "--images", "16", "--fractions", "0.5"]

    def run(models: str, *arguments: str) -> list[dict[str, str]]:
        monkeypatch.setattr(sys, "argv", [*command, "--models", *models.split(), *arguments])
        quality.main()
        with (folder / "quality.csv").open() as file:
            return list(csv.DictReader(file))

    with pytest.raises(SystemExit, match="No learning rate was chosen for liquid"):
        run("liquid plain")
    tuned = run("liquid", "--split", "tune")
    with pytest.raises(SystemExit, match="No learning rate was chosen for liquid"):
        run("liquid", "--optimizer", "muon")  # which another optimiser's rate tells nothing of
    assert [row["kd"] for row in tuned] == ["", ""]  # samples would cost more than they tell
    rows = run("liquid plain")[len(tuned) :]
    assert [(r["model"], r["fraction"], r["steps"], r["images"]) for r in rows] == [
        (model, fraction, steps, images)
        for model in ("liquid", "plain")
        for fraction, steps, images in (("0.5", "1", "8"), ("1", "2", "16"))
    ]
    assert {(r["lr"], r["split"], r["budget"]) for r in rows} == {("0.001", "val", "16 images")}
    assert float(rows[0]["flops"]) > 1e7
    before = (folder / "quality.csv").read_text()
    capsys.readouterr()
    assert run("liquid plain", "--seeds", "0")[-1] == rows[-1]  # nothing is trained twice
    assert capsys.readouterr().out.count("is there already") == 2
    assert (folder / "quality.csv").read_text() == before
    page = (folder / "ablations.md").read_text()
    assert f"{float(rows[1]['kd']):.3f} ± " in page
    assert (folder / "quality-images.png").stat().st_size > 10_000
    choices = ["--split", "tune", "--chosen-rates", "--fractions", "1"]
    for shift in ("1", "3"):  # chosen by pictures, as losses of other times can't be compared
        some = run("liquid", *choices, "--time-shift", shift)
        assert (some[-1]["time_shift"], some[-1]["split"], some[-1]["lr"]) == (shift, "tune", "0.001")
    assert len({row["loss"] for row in some[-2:]}) == 2
    assert "| model | shift 1 | shift 3 |" in (folder / "ablations.md").read_text()


def test_equal_time_by_the_table_of_step_times(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are counted as what was measured once, whatever they take."""
    monkeypatch.setattr(quality, "STEPS", 1)
    command = ["quality.py", "--data", str(folder), "--size", "16", "--lr", "1e-3", "--models", "liquid", "plain"]

    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", [*command, *arguments])
        quality.main()

    with pytest.raises(SystemExit, match="Nobody has measured a step of liquid"):
        run("--seconds", "1", "--clock", "table")
    run("--measure", "3")
    before = (folder / "step-time.csv").read_text()
    run("--measure", "3")  # seeds to come get the steps of those before
    assert (folder / "step-time.csv").read_text() == before
    with (folder / "step-time.csv").open() as file:
        measured = {row["model"]: row for row in csv.DictReader(file)}
    assert list(measured) == ["liquid", "plain"]
    for row in measured.values():
        assert 0 < float(row["least_ms"]) <= float(row["median_ms"]) <= float(row["most_ms"])
    slow = measured["liquid"] | {"median_ms": "400"}  # the newest row counts
    quality.append_rows(folder / "step-time.csv", quality.STEP_TIME_COLUMNS, [slow, slow | {"model": "plain"}])
    quality.append_rows(folder / "step-time.csv", quality.STEP_TIME_COLUMNS, [slow | {"median_ms": "240"}])
    run("--seconds", "1", "--clock", "table", "--fractions", "0.5")
    with (folder / "quality.csv").open() as file:
        rows = [(row["model"], row["clock"], row["steps"], row["seconds"]) for row in csv.DictReader(file)]
    assert rows == [
        ("liquid", "table", "3", "0.72"),
        ("liquid", "table", "5", "1.2"),
        ("plain", "table", "2", "0.8"),
        ("plain", "table", "3", "1.2"),
    ]
    with pytest.raises(SystemExit, match="Nobody has measured a step of liquid"):
        run("--seconds", "1", "--clock", "table", "--table", "other")
    twice = slow | {"median_ms": "600"}
    quality.append_rows(folder / "step-time-other.csv", quality.STEP_TIME_COLUMNS, [twice, twice | {"model": "plain"}])
    run("--seconds", "1", "--clock", "table", "--table", "other", "--fractions", "1")  # none of them is there already
    with (folder / "quality.csv").open() as file:
        rows = [(row["model"], row["clock"], row["steps"], row["seconds"]) for row in csv.DictReader(file)]
    assert rows[4:] == [("liquid", "table other", "2", "1.2"), ("plain", "table other", "2", "1.2")]
    assert "by the table of step times" in (folder / "ablations.md").read_text()


def test_choices_are_made_on_other_code_points(folder: Path) -> None:
    train, held_out = quality.pictures(folder, 16, "tune")
    assert set(train.indices) | set(held_out.indices) == set(range(80))
    assert 0 < len(held_out) < 40
    points = [{i // 2 for i in some.indices} for some in (train, held_out)]  # two pictures share a code point
    assert not points[0] & points[1]


def test_training_is_counted_without_evaluation_and_repeats_to_the_bit(folder: Path) -> None:
    train, _ = quality.pictures(folder, 16, "val")
    codec = fit_codec(PixelCodec(2), train)

    def losses(budget: Budget) -> list[tuple[int, float, float]]:
        torch.manual_seed(0)
        model = quality.build("plain", "nano", 12, 2, 8)
        found = []
        for point in Training(model, train, codec, 1e-3, 3, "uniform").points(budget, (0.5, 1.0)):
            found.append((point.steps, point.loss, point.seconds))
            torch.randn(1)  # what a caller draws changes nothing
        return found

    first, second = losses(Budget(32, "images")), losses(Budget(32, "images", "cpu"))
    assert [row[:2] for row in first] == [row[:2] for row in second]
    assert [row[0] for row in first] == [2, 4]
    seconds = losses(Budget(1e-6, "s"))
    assert seconds[-1][2] >= 1e-6
    assert [row[0] for row in seconds] == [1, 2]  # a point for each share, also where one step passes both


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_training_is_that_of_the_trainer(
    optimizer: str, photos: Path, quick: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under a budget in images, the same model comes out of the package's own trainer, step by step."""
    monkeypatch.setattr(harness, "_BATCH", 8)
    trainer = Trainer(
        quick(
            data=str(photos), steps=5, precision="auto", lr=1e-3, flip=False, val_fraction=0,
            warmup_steps=harness._WARM_UP, seed=3, optimizer=optimizer,
        )
    )  # fmt: skip
    model = copy.deepcopy(trainer.model)
    losses = [step.loss for step in trainer.steps()]
    training = Training(model, trainer.dataset, trainer.codec, 1e-3, 3, "logit-normal", optimizer=optimizer)
    (point,) = training.points(Budget(40, "images"), [1])
    assert point.steps == 5
    assert point.loss == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)
    for ours, theirs in zip(model.parameters(), trainer.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_held_out_loss_of_models_that_are_known(tmp_path: Path) -> None:
    """Where all pictures are one, ``(x - x0) / t`` is the velocity; predicting nothing costs ``1 + mean(x0^2)``."""
    for i in range(24):
        Pictures.new("RGB", (8, 8), (250, 30, 130)).save(tmp_path / f"{i}.png")
    dataset = PictureDataset(open_source(str(tmp_path)), 8)
    codec = PixelCodec(2)  # not fitted: latents are the pixels
    x0 = codec.encode(to_float(dataset.picture(0)["image"][None]))

    class Known(nn.Module):
        def __init__(self, right: bool) -> None:
            super().__init__()
            self.right = nn.Parameter(torch.tensor(float(right)))

        def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
            return self.right * (x - x0) / t[:, None, None, None]

    assert held_out_loss(Known(True), codec, dataset) < 1e-6
    expected = 1 + x0.square().mean().item()
    assert held_out_loss(Known(False), codec, dataset) == pytest.approx(expected, rel=0.02)  # 18,432 draws
    assert held_out_loss(Known(False), codec, dataset) == held_out_loss(Known(False), codec, dataset)


def test_who_joins_the_table_is_brought_to_its_hour(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the table says that a model took a hundred times as long, so it says of one that is measured beside it."""
    command = ["quality.py", "--data", str(folder), "--size", "16", "--measure", "3", "--models", "liquid"]
    monkeypatch.setattr(sys, "argv", command)
    quality.main()

    def read() -> dict[str, dict[str, str]]:
        with (folder / "step-time.csv").open() as file:
            return {row["model"]: row for row in csv.DictReader(file)}

    first = read()["liquid"]
    assert first["scale"] == "1"
    slow = first | {"median_ms": str(100 * float(first["median_ms"]))}
    quality.append_rows(folder / "step-time.csv", quality.STEP_TIME_COLUMNS, [slow])
    monkeypatch.setattr(sys, "argv", [*command, "plain"])
    quality.main()
    found = read()
    assert found["liquid"]["median_ms"] == slow["median_ms"]  # what is known stays
    assert 20 < float(found["plain"]["scale"]) < 500  # a busy machine may be five times slower
    assert 20 < float(found["plain"]["median_ms"]) / float(first["median_ms"]) < 500
