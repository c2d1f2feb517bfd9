"""To the Hub and back, by the real client against the Hub of the tests; and all that can go wrong on the way."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from little_hub import LittleHub
from PIL import Image

from liquid_diffusion.cli import main
from liquid_diffusion.loading import load_pipeline
from liquid_diffusion.models.unet import LiquidUNet
from liquid_diffusion.pipeline import LiquidDiffusionPipeline
from liquid_diffusion.sampling import make_scheduler
from liquid_diffusion.training.trainer import Trainer

Capture = pytest.CaptureFixture[str]
TRAIN = [
    "train", "--image-size", "16", "--model", "nano", "--batch-size", "8", "--precision", "fp32", "--steps", "1",
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step on the emoji, measured."""
    out = tmp_path_factory.mktemp("runs") / "my-emoji"
    assert main([*TRAIN, "--out", str(out)]) == 0
    figures = {
        "kd": 0.1234,
        "kd_standard_error": 0.0056,
        "fd": 87.6,
        "samples": {"n": 578, "features": "/home/anna/dinov2"},
    }
    (out / "metrics.json").write_text(json.dumps({**figures, "real": {"kd": 0.005, "fd": 50.0}}))
    return out


def test_export_then_sample_by_its_id(little_hub: LittleHub, trained: Path, tmp_path: Path, capsys: Capture) -> None:
    assert main(["export", str(trained), "--to", "hub", "--out", "somebody/my-emoji"]) == 0
    assert f"{little_hub.endpoint}/somebody/my-emoji" in capsys.readouterr().out
    for run, out in ((str(trained), "local.png"), ("somebody/my-emoji", "hub.png")):
        assert main(["sample", run, "--n", "4", "--steps", "2", "--out", str(tmp_path / out)]) == 0
    with Image.open(tmp_path / "local.png") as local, Image.open(tmp_path / "hub.png") as hub:
        np.testing.assert_array_equal(np.asarray(local), np.asarray(hub))
    assert not little_hub.requests("*/resolve/*.py")  # with the package no code is fetched
    little_hub.stop()  # what was fetched once is there without a network
    assert main(["sample", "somebody/my-emoji", "--n", "1", "--steps", "1", "--out", str(tmp_path / "again.png")]) == 0


def test_a_stranger_loads_it_from_the_hub(little_hub: LittleHub, trained: Path) -> None:
    assert main(["export", str(trained), "--to", "hub", "--out", "somebody/my-emoji"]) == 0
    plain = LiquidUNet(in_channels=12, widths=(16, 16), depths=(1, 1))
    LiquidDiffusionPipeline(plain, make_scheduler(), image_size=(8, 16)).push_to_hub("somebody/without-classes")
    script = """
import sys
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("somebody/my-emoji", trust_remote_code=True)
assert pipe(1, "flags", 1).images[0].size == (16, 16)
pipe = DiffusionPipeline.from_pretrained("somebody/without-classes", trust_remote_code=True)
assert pipe(1, num_inference_steps=1).images[0].size == (16, 8)
assert "liquid_diffusion" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert little_hub.requests("*/resolve/*/pipeline.py")


def test_the_card_tells_what_the_run_was(little_hub: LittleHub, trained: Path) -> None:
    assert main(["export", str(trained), "--to", "hub", "--out", "somebody/my-emoji"]) == 0
    files = little_hub.files("models", "somebody/my-emoji")
    assert {"README.md", "samples.png", "model_index.json", "pipeline.py", "unet/config.json"} <= set(files)
    assert files["samples.png"].read_bytes() == (trained / "samples" / "step-000001.png").read_bytes()
    card = ModelCard.load("somebody/my-emoji")
    card.validate()
    assert (card.data.get("library_name"), card.data.get("license")) == ("diffusers", "cc-by-4.0")
    assert card.data.get("datasets") is None  # the emoji are not on the Hub
    for words in (
        "16 x 16 pixels", "CC-BY-4.0", "| kernel distance | 0.1234 ± 0.0056 | 0.005 |", "n 578", "| batch_size | 8 |",
        'DiffusionPipeline.from_pretrained("somebody/my-emoji", trust_remote_code=True)', "sample somebody/my-emoji",
        "(samples.png)", "Activities", "## Limits",
    ):  # fmt: skip
        assert words in card.text, words
    assert "not measured" not in card.text
    everything = "".join(path.read_text() for name, path in files.items() if path.suffix in (".md", ".json", ".py"))
    assert str(trained.parent) not in everything
    assert "features dinov2" in everything
    assert "anna" not in everything  # whose folder it lay in


def test_the_card_of_a_data_set_on_the_hub_and_of_a_folder(trained: Path, tmp_path: Path) -> None:
    from liquid_diffusion.model_card import model_card

    pipeline = load_pipeline(str(trained))
    settings = yaml.safe_load((trained / "config.yaml").read_text())
    for data, ids, name in (
        ("huggan/AFHQv2", ["huggan/AFHQv2"], "[huggan/AFHQv2]("),
        ("/home/me/holiday", None, "pictures from a folder called `holiday`"),
        ("/home/me/holiday/*.parquet", None, "pictures from a folder called `holiday`"),
        ("/home/me/holiday.parquet", None, "a parquet file called `holiday.parquet`"),
    ):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({**settings, "data": data}))
        card = model_card(pipeline, tmp_path, "me/it")
        assert card.data.get("datasets") == ids
        assert card.data.get("license") is None
        assert "/home/me" not in card.text
        assert "Its quality was not measured" in card.text
        assert "samples.png" not in card.text
        assert f"Trained on {name}" in card.text


def test_figures_of_a_model_that_was_trained_further_are_left_out(trained: Path, tmp_path: Path) -> None:
    from liquid_diffusion.model_card import model_card

    pipeline = load_pipeline(str(trained))
    figures = json.loads((trained / "metrics.json").read_text())
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1}\n{"step": 3, "loss": 1}\n')
    for step, told in ((3, True), (1, False)):
        (tmp_path / "metrics.json").write_text(json.dumps({**figures, "step": step}))
        assert ("0.1234" in model_card(pipeline, tmp_path, "me/it").text) == told


def test_a_folder_with_a_card_of_its_own_keeps_it(little_hub: LittleHub, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "pipeline", tmp_path / "packed")
    (tmp_path / "packed" / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# Written by hand\n")
    assert main(["export", str(tmp_path / "packed"), "--to", "hub", "--out", "somebody/packed"]) == 0
    assert "# Written by hand" in ModelCard.load("somebody/packed").content
    assert main(["export", "--to", "hub", "--out", "somebody/emoji"]) == 0  # what comes with the package is one too
    assert "copyright Twitter" in ModelCard.load("somebody/emoji").content


@pytest.mark.parametrize("steps", ["1", "2"])
def test_train_pushes_at_the_end(
    little_hub: LittleHub, trained: Path, tmp_path: Path, capsys: Capture, steps: str
) -> None:
    """Of a run that began without such a wish, which does not make it another run; or that has no step to go."""
    shutil.copytree(trained, tmp_path / "run")
    assert main([*TRAIN[:-1], steps, "--out", str(tmp_path / "run"), "--push-to-hub", "somebody/new"]) == 0
    assert f"On the Hub: {little_hub.endpoint}/somebody/new" in capsys.readouterr().out
    assert load_pipeline("somebody/new").config["image_size"] == 16
    assert f"| steps | {steps} |" in ModelCard.load("somebody/new").text


def test_a_training_that_can_not_be_pushed_does_not_begin(
    little_hub: LittleHub, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    assert main([*TRAIN, "--out", str(tmp_path / "run"), "--push-to-hub", "somebody/new"]) == 2
    assert "log in by `hf auth login`" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_hub_goes_away_during_the_training(
    little_hub: LittleHub, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer.train_step

    def stop(self: Trainer, *batch: object) -> object:
        little_hub.stop()
        return step(self, *batch)  # type: ignore[arg-type]

    monkeypatch.setattr(Trainer, "train_step", stop)
    assert main([*TRAIN, "--out", str(tmp_path / "run"), "--push-to-hub", "somebody/new"]) == 2
    error = capsys.readouterr().err
    assert "is trained and saved, but not on the Hub. The Hub can't be reached" in error
    again = error.strip().splitlines()[-1].split("Then: liquid-diffusion ")[1].split()
    monkeypatch.undo()
    assert (tmp_path / "run" / "pipeline" / "model_index.json").is_file()
    assert again == ["export", str(tmp_path / "run"), "--to", "hub", "--out", "somebody/new"]


@pytest.mark.parametrize(
    ("repo", "status", "words"),
    [
        ("exported", 0, "'exported' is no Hub id: say OWNER/NAME"),
        ("./out/put", 0, "'./out/put' is no Hub id"),
        ("some body/x", 0, "'some body/x' is no Hub id"),
        ("somebody/x", 403, "You may not write to somebody/x"),
        ("somebody/x", 401, "log in by `hf auth login`"),
        ("somebody/x", 400, "does not take somebody/x now"),
    ],
)
def test_mistakes_in_exporting(
    repo: str, status: int, words: str, little_hub: LittleHub, trained: Path, capsys: Capture
) -> None:
    if status:
        little_hub.fail("/api/repos/create", status=status, methods=("POST",), times=None)
    assert main(["export", str(trained), "--to", "hub", "--out", repo]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error


def test_no_network(trained: Path, capsys: Capture) -> None:
    assert main(["export", str(trained), "--to", "hub", "--out", "somebody/x"]) == 2
    assert "The Hub can't be reached for somebody/x" in capsys.readouterr().err


def test_models_that_can_not_be_had(little_hub: LittleHub, tmp_path: Path, capsys: Capture) -> None:
    assert main(["sample", "somebody/nothing", "--out", str(tmp_path / "x.png")]) == 2
    assert "no model of that id on the Hub that you may see; if it is private, log in" in capsys.readouterr().err
    (little_hub.repo("somebody/other", "models") / "config.json").write_text("{}")
    assert main(["sample", "somebody/other", "--out", str(tmp_path / "x.png")]) == 2
    assert "somebody/other is no pipeline: it has no model_index.json" in capsys.readouterr().err
    large = little_hub.repo("somebody/large", "models")
    (large / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    (large / "model.safetensors").write_bytes(bytes(1000))
    assert main(["sample", "somebody/large", "--out", str(tmp_path / "x.png")]) == 2
    assert "somebody/large is no pipeline of liquid-diffusion, but a StableDiffusion" in capsys.readouterr().err
    assert not little_hub.requests("*.safetensors")
