"""`liquid-diffusion evaluate` on a small run of a folder, as a person types it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image, PngImagePlugin

from liquid_diffusion.cli import main
from liquid_diffusion.codecs import PixelCodec
from liquid_diffusion.config import EvaluateConfig, TrainConfig
from liquid_diffusion.data.split import is_held_out
from liquid_diffusion.data.transforms import to_float
from liquid_diffusion.evaluation.evaluate import draw_samples
from liquid_diffusion.evaluation.reference import pictures_of_run
from liquid_diffusion.models.unet import LiquidUNet
from liquid_diffusion.pipeline import LiquidDiffusionPipeline
from liquid_diffusion.sampling import make_scheduler
from liquid_diffusion.training.trainer import Trainer

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 noisy pictures in two classes, dark and bright."""
    folder = tmp_path_factory.mktemp("data") / "pictures"
    draws = np.random.default_rng(0)
    for i in range(24):
        path = folder / ("bright" if i % 2 else "dark") / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = draws.integers(0, 100, (20, 20, 3)) + 150 * (i % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def run(pictures: Path) -> Iterator[Path]:
    """A run of two steps, some pictures held out; features are kept beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(pictures.parent / "cache"))
        trainer = Trainer(
            TrainConfig(
                data=str(pictures), out=str(pictures.parent / "run"), image_size=16, model="nano", batch_size=8,
                steps=2, precision="fp32", warmup_steps=2, val_fraction=0.35, flip=True,
            )
        )  # fmt: skip
        trainer.run()
        assert 4 <= (trainer.held_out or 0) <= 12
        yield trainer.folder.path


def test_evaluate(run: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "new" / "figures.json"
    arguments = ["evaluate", str(run), "--n", "10", "--steps", "2", "--batch-size", "4"]
    assert main([*arguments, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    facts = json.loads(out.read_text())
    assert facts["samples"]["n"] == 10
    held_out, trained = facts["memorisation"]["held_out_pictures"], facts["memorisation"]["training_pictures"]
    assert held_out + trained == 24
    assert (facts["reference_pictures"], facts["fd_pictures"]) == (held_out, min(10, held_out))
    assert facts["kd_standard_error"] > 0
    assert facts["kd"] > facts["real"]["kd"]
    assert facts["fd"] > facts["real"]["fd"]
    assert 0 <= facts["class_agreement"] <= 1
    assert facts["class_accuracy_held_out"] == 1
    assert facts["memorisation"]["pixel_distance"]["samples_median"] > 0
    assert facts["memorisation"]["held_out_weighted_by_class"]
    assert f"{facts['memorisation']['pixel_distance']['ratio']:.2f} +- " in said
    assert f"{facts['kd']:.4f}" in said
    with Image.open(facts["nearest_pairs"]) as pairs:
        assert pairs.height == 4 * 66 + 6  # ten pairs in two double rows of 16 px, four times enlarged

    assert main([*arguments, "--out", str(out), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again == facts  # the same to the last digit: all draws are seeded
    assert main([*arguments, "--out", str(out), "--json", "--reference", "all"]) == 0
    everything = json.loads(capsys.readouterr().out)
    assert everything["reference_pictures"] == 24
    assert "real" not in everything


@pytest.mark.parametrize(
    ("names", "known"), [(("Dark", "bright"), True), (("dark", "green"), False), (("0", "1"), False)]
)
def test_samples_have_the_classes_of_the_reference(
    run: Path, pictures: Path, tmp_path: Path, names: tuple[str, str], known: bool,
    monkeypatch: pytest.MonkeyPatch, capsys: Capture,
) -> None:  # fmt: skip
    """In its proportions, whatever the case of their names; equally often, which is said, where it has others."""
    for name, own, count in zip(names, ("dark", "bright"), (9, 3), strict=True):
        (tmp_path / "other" / name).mkdir(parents=True)
        for path in sorted((pictures / own).iterdir())[:count]:
            shutil.copy(path, tmp_path / "other" / name)
    wanted: list[torch.Tensor | None] = []

    def drawn(pipeline: LiquidDiffusionPipeline, labels: torch.Tensor | None, config: EvaluateConfig) -> torch.Tensor:
        wanted.append(labels)
        return draw_samples(pipeline, labels, config)

    monkeypatch.setattr("liquid_diffusion.evaluation.evaluate.draw_samples", drawn)
    arguments = ["--n", "12", "--steps", "1", "--reference", str(tmp_path / "other"), "--out", str(tmp_path / "f.json")]
    assert main(["evaluate", str(run), *arguments]) == 0
    assert wanted[0] is not None
    assert wanted[0].bincount().tolist() == ([3, 9] if known else [6, 6])  # bright, dark
    assert ("tells no classes that the model knows" in capsys.readouterr().out) is not known


def test_figures_lie_where_the_model_card_looks_for_them(run: Path, capsys: Capture) -> None:
    assert main(["evaluate", str(run), "--n", "10", "--steps", "1"]) == 0
    assert f"Written to {run}/metrics.json." in capsys.readouterr().out
    for name in ("metrics.json", "metrics-nearest.png"):
        (run / name).unlink()


def test_a_run_that_knows_its_pictures_by_heart(run: Path, tmp_path: Path, capsys: Capture) -> None:
    """A model whose samples are training pictures: the decoder is made to return them."""
    known = pictures_of_run(run, 16, 16)
    assert known is not None
    copies = to_float(torch.stack([known.train.picture(i)["image"].flip(-1) for i in range(8)]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PixelCodec, "decode", lambda self, latents: copies)
        out = tmp_path / "figures.json"
        assert main(["evaluate", str(run), "--n", "8", "--steps", "1", "--out", str(out), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    memory = facts["memorisation"]
    assert memory["pixel_distance"]["samples_median"] == pytest.approx(0, abs=1e-6)
    assert memory["feature_distance"]["samples_median"] == pytest.approx(0, abs=1e-2)
    assert memory["pixel_distance"]["share_of_samples_nearer"] == 1
    with Image.open(facts["nearest_pairs"]) as sheet:
        pixels = np.asarray(sheet).astype(int)
    left = sheet.width - 8 * 66 + 2
    assert np.abs(pixels[:64, left:] - pixels[66:130, left:]).max() <= 1  # each over itself, mirrored as it was found


def test_a_held_out_picture_that_was_trained_on_is_not_unseen(
    run: Path, pictures: Path, tmp_path: Path, capsys: Capture
) -> None:
    """The same pixels in another file, which the split holds out by its bytes."""
    shutil.copytree(pictures, tmp_path / "pictures")
    other = tmp_path / "other"
    shutil.copytree(run / "pipeline", other / "pipeline")
    settings = yaml.safe_load((run / "config.yaml").read_text())
    (other / "config.yaml").write_text(yaml.safe_dump({**settings, "data": str(tmp_path / "pictures")}))
    trained = next(path for path in sorted(pictures.rglob("*.png")) if not is_held_out(path.read_bytes(), 0.35))
    copy = tmp_path / "pictures" / trained.relative_to(pictures).with_name("copy.png")
    with Image.open(trained) as picture:
        for number in range(100):
            note = PngImagePlugin.PngInfo()
            note.add_text("number", str(number))
            picture.save(copy, pnginfo=note)
            if is_held_out(copy.read_bytes(), 0.35):
                break
    memories = []
    for folder in (run, other):
        out = tmp_path / "figures.json"
        assert main(["evaluate", str(folder), "--n", "4", "--steps", "1", "--out", str(out)]) == 0
        memories.append(json.loads(out.read_text())["memorisation"])
    before, memory = memories
    assert memory["held_out_pictures"] == before["held_out_pictures"] + 1
    assert (before["held_out_seen"], memory["held_out_seen"]) == (0, 1)
    for space in ("pixel_distance", "feature_distance"):  # as if it were not there
        for figure in ("held_out_median", "held_out_1st_percentile"):
            assert memory[space][figure] == pytest.approx(before[space][figure], rel=1e-4)
    assert "are the same as a picture that was trained on" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--features", "vgg"], "no features 'vgg'"),
        (["--reference", "./nowhere"], "no data set and no folder './nowhere'"),
        (["--n", "0"], "n must be at least 1"),
        (["--n", "2"], "at least 4 samples, not 2"),
        (["--solver", "rk4"], "no solver 'rk4'"),
        (["--out", "FILE/x.json"], "can't be written to"),
        (["--out", "."], "can't be written to: Is a directory"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes(run: Path, arguments: list[str], words: str, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "file").write_text("mine")
    arguments = [argument.replace("FILE", str(tmp_path / "file")) for argument in arguments]
    arguments += [] if "--out" in arguments else ["--out", str(tmp_path / "x.json")]
    assert main(["evaluate", str(run), "--steps", "1", "--n", "4", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error
    assert not (tmp_path / "x.json").exists()  # a model card would read it


def test_runs_without_known_or_held_out_pictures(run: Path, pictures: Path, tmp_path: Path, capsys: Capture) -> None:
    common = ["--n", "4", "--steps", "1", "--out", str(tmp_path / "x.json")]
    assert main(["evaluate", str(run / "pipeline"), *common]) == 2
    assert "does not say what it was trained on" in capsys.readouterr().err
    assert main(["evaluate", str(run / "pipeline"), *common, "--reference", str(pictures), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["reference_pictures"] == 24
    assert "memorisation" not in facts
    plain = LiquidDiffusionPipeline(LiquidUNet(12, widths=(16, 16), depths=(1, 1)), make_scheduler(), image_size=16)
    plain.save_pretrained(tmp_path / "plain")
    assert main(["evaluate", str(tmp_path / "plain"), *common, "--reference", str(pictures), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"]["guidance"] == 1  # it has no classes
    other = tmp_path / "other"
    shutil.copytree(run / "pipeline", other / "pipeline")
    (other / "config.yaml").write_text((run / "config.yaml").read_text().replace("fraction: 0.35", "fraction: 0.0"))
    assert main(["evaluate", str(other), *common]) == 2
    assert "No pictures were held out" in capsys.readouterr().err
