"""The command line as a person uses it: tiny runs, end to end, and every mistake in one sentence with exit code 2."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL
from little_hub import LittleHub
from PIL import Image

from liquid_diffusion.cli import _parser, main
from liquid_diffusion.data.registry import DATASETS

Capture = pytest.CaptureFixture[str]
TINY = ["--image-size", "16", "--model", "nano", "--batch-size", "8", "--precision", "fp32"]


def run(*arguments: str | Path) -> int:
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps on the emoji."""
    out = tmp_path_factory.mktemp("runs") / "emoji"
    assert run("train", *TINY, "--steps", "2", "--out", out) == 0
    return out


def test_train_writes_what_the_readme_says(trained: Path) -> None:
    for name in ("config.yaml", "metrics.jsonl", "tensorboard", "samples/step-000002.png", "checkpoints/step-000002",
                 "pipeline/model_index.json", "pipeline/unet/diffusion_pytorch_model.safetensors"):  # fmt: skip
        assert (trained / name).exists(), name
    settings = yaml.safe_load((trained / "config.yaml").read_text())
    assert (settings["model"], settings["codec"], settings["flip"]) == ("nano", "pixels", False)


def test_the_saved_configuration_goes_on(trained: Path, tmp_path: Path, capsys: Capture) -> None:
    assert run("train", "--config", trained / "config.yaml") == 0
    assert "has reached its 2 steps" in capsys.readouterr().out
    assert run("train", "--config", trained / "config.yaml", "--out", tmp_path / "again", "--steps", "1") == 0
    assert (tmp_path / "again" / "samples" / "step-000001.png").is_file()


def test_the_saved_configuration_goes_on_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """RUN/config.yaml is that run, from another folder and where it was moved to; but for another --out."""
    monkeypatch.chdir(tmp_path)
    assert run("train", *TINY, "--steps", "1", "--out", "runs/a") == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert run("train", "--config", "../runs/a/config.yaml") == 0
    (tmp_path / "runs" / "a").rename(tmp_path / "moved")
    assert run("train", "--config", "../moved/config.yaml", "--steps", "2") == 0
    assert (tmp_path / "moved" / "checkpoints" / "step-000002").is_dir()
    assert "resumed from step 1" in capsys.readouterr().out
    assert not list((tmp_path / "elsewhere").iterdir())
    assert run("train", "--config", "../moved/config.yaml", "--out", "b", "--steps", "1") == 0
    assert (tmp_path / "elsewhere" / "b" / "checkpoints" / "step-000001").is_dir()


def test_text_is_taken_as_it_is_written() -> None:
    """A class may be called #1, which is a comment in YAML."""
    for text in ("#1", "null", "~", "&a", "1"):
        assert _parser().parse_args(["sample", "--label", text]).sample.label == text
    assert _parser().parse_args(["sample"]).sample.label is None


@pytest.mark.parametrize(
    ("solver", "name"), [("euler", "grid.png"), ("heun", "grid.JPG"), ("unipc", "grid.webp"), ("dpm++", "grid.png")]
)
def test_sample_a_grid(trained: Path, tmp_path: Path, solver: str, name: str, capsys: Capture) -> None:
    out = tmp_path / "new" / name
    assert run("sample", trained, "--n", "4", "--steps", "3", "--solver", solver, "--out", out) == 0
    assert str(out) in capsys.readouterr().out
    with Image.open(out) as grid:
        assert grid.size == (2 * 64 + 2, 2 * 64 + 2)


def test_single_pictures_depend_on_their_seed_alone(trained: Path, tmp_path: Path) -> None:
    one = ["--label", "flags", "--steps", "3", "--guidance", "2"]
    assert run("sample", trained, *one, "--n", "5", "--seed", "3", "--batch-size", "2", "--out", tmp_path / "a") == 0
    assert run("sample", trained, *one, "--n", "1", "--seed", "6", "--out", tmp_path / "b") == 0
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == [f"{i:06d}.png" for i in range(3, 8)]
    with Image.open(tmp_path / "a" / "000006.png") as first, Image.open(tmp_path / "b" / "000006.png") as second:
        difference = np.asarray(first).astype(int) - np.asarray(second).astype(int)
    assert np.abs(difference).max() <= 1


def test_classes_take_turns_by_default(tmp_path: Path) -> None:
    """Of the packaged model, in whose pictures a class is to be seen."""
    how = ["--steps", "2", "--guidance", "1"]
    assert run("sample", *how, "--n", "2", "--batch-size", "1", "--out", tmp_path / "turns") == 0
    for label in "01":
        assert run("sample", *how, "--n", "1", "--seed", "1", "--label", label, "--out", tmp_path / label) == 0
    turn, other, own = (
        np.asarray(Image.open(tmp_path / folder / "000001.png")).astype(int) for folder in ("turns", "0", "1")
    )
    assert np.abs(turn - own).max() <= 1
    assert np.abs(turn - other).max() > 20


def test_a_run_killed_while_it_put_its_model_in_place_has_the_one_before(trained: Path, tmp_path: Path) -> None:
    run_folder = tmp_path / "run"
    shutil.copytree(trained, run_folder)
    (run_folder / "pipeline").rename(run_folder / "pipeline.old")
    assert run("sample", run_folder, "--n", "1", "--steps", "1", "--out", tmp_path / "grid.png") == 0


def test_nearest_training_pictures(trained: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "nearest.png"
    assert run("sample", trained, "--n", "9", "--steps", "2", "--nearest", "true", "--out", out) == 0
    assert "nearest training picture" in capsys.readouterr().out
    assert run("sample", trained, "--n", "1", "--steps", "1", "--nearest", "true", "--out", tmp_path / "one.jpg") == 0
    with Image.open(out) as sheet:
        assert sheet.height == 4 * 66 + 6  # 9 samples in two rows, each over its row of nearest pictures


def test_own_folder_in_classes(photos: Path, tmp_path: Path, capsys: Capture) -> None:
    (photos / "cat" / "01.png").write_bytes((photos / "cat" / "01.png").read_bytes()[:200])
    assert run("train", *TINY, "--data", photos, "--val-fraction", "0", "--steps", "2", "--out", tmp_path / "run") == 0
    said = capsys.readouterr()
    assert "23 pictures in 2 classes" in said.out
    assert "Skipped 1 picture that" in said.out + said.err
    assert "01.png" in (tmp_path / "run" / "skipped.jsonl").read_text()
    assert run("sample", tmp_path / "run", "--label", "cat", "--n", "2", "--out", tmp_path / "cats.png") == 0


def test_pictures_that_are_not_square(photos: Path, tmp_path: Path, capsys: Capture) -> None:
    """Trained in their own shapes; grids and samples come in the usual one, or as they are wanted."""
    for path in photos.rglob("*.png"):  # wide, but for two of each class
        with Image.open(path) as image:
            size = (30, 60) if path.stem in ("00", "01", "02", "03") else (60, 40)
            image.resize(size).save(path)
    out = tmp_path / "run"
    assert (
        run("train", *TINY, "--image-size", "32", "--data", photos, "--buckets", "true", "--steps", "2", "--out", out)
        == 0
    )
    assert "pictures in 2 classes (cat, dog) of 32 px in 2 shapes" in capsys.readouterr().out
    with Image.open(out / "samples" / "step-000002.png") as grid:
        assert grid.height == 2 * 24 * 2 + 2  # 24 x 40, enlarged twice, in two rows
    for name, wanted, size in (("usual", [], (40, 24)), ("own", ["--width", "16", "--height", "40"], (16, 40))):
        assert run("sample", out, "--n", "1", "--steps", "2", *wanted, "--out", tmp_path / name) == 0
        with Image.open(tmp_path / name / "000000.png") as image:
            assert image.size == size
    assert run("sample", out, "--n", "4", "--steps", "2", "--nearest", "true", "--out", tmp_path / "near.png") == 0
    assert run("sample", out, "--width", "20", "--out", tmp_path / "x.png") == 2
    assert "must be divisible by 8, not 24 x 20" in capsys.readouterr().err


def test_datasets(capsys: Capture) -> None:
    assert run("datasets") == 0
    table = capsys.readouterr().out
    assert run("datasets", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in facts] == [entry.name for entry in DATASETS]
    assert all(entry["name"] in table and entry["licence"] in table for entry in facts)


def test_encode_says_how_to_train_on_it(photos: Path, tmp_path: Path, capsys: Capture) -> None:
    AutoencoderKL(
        block_out_channels=[8, 16], norm_num_groups=4,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
    ).save_pretrained(tmp_path / "vae")  # fmt: skip
    settings = ["--image-size", "16", "--codec", str(tmp_path / "vae"), "--val-fraction", "0", "--crop", "pad"]
    assert run("encode", photos, *settings, "--workers", "0", "--out", tmp_path / "my latents") == 0
    said = capsys.readouterr().out
    assert "Encoding 24 pictures of 16 px (0 held out)" in said
    command = shlex.split(said.split("Train on it: liquid-diffusion ")[1])
    assert run(*command, *TINY[2:], "--steps", "1", "--out", tmp_path / "run") == 0
    assert "24 pictures in 2 classes (cat, dog) of 16 px" in capsys.readouterr().out
    assert run("encode", photos, "--codec", "pixels") == 2
    assert "there is nothing to cache" in capsys.readouterr().err


def test_sd_vae_of_the_hub_is_fetched_once(little_hub: LittleHub, photos: Path, tmp_path: Path) -> None:
    """The exact 83.7 M parameters of stabilityai/sd-vae-ft-mse with random weights; with the Hub gone it trains on."""
    vae = AutoencoderKL(
        block_out_channels=[128, 256, 512, 512], down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4, latent_channels=4, layers_per_block=2, norm_num_groups=32,
        sample_size=256,
    )  # fmt: skip
    assert sum(parameter.numel() for parameter in vae.parameters()) == 83_653_863
    repo = little_hub.repo("stabilityai/sd-vae-ft-mse", "models")
    vae.save_pretrained(repo)
    common = ["--image-size", "32", "--model", "nano", "--batch-size", "2", "--data", str(photos), "--codec", "sd-vae"]
    assert run("train", *common, "--steps", "1", "--out", tmp_path / "run") == 0
    weights = [request for request in little_hub.log if request.sent and request.path.endswith(".safetensors")]
    assert sum(request.sent for request in weights) == next(repo.glob("*.safetensors")).stat().st_size
    little_hub.stop()
    assert run("train", *common, "--steps", "2", "--out", tmp_path / "run") == 0
    out = tmp_path / "samples"
    assert run("sample", tmp_path / "run", "--n", "2", "--steps", "2", "--out", out) == 0
    for path in out.iterdir():
        with Image.open(path) as image:
            assert image.size == (32, 32)
            assert np.asarray(image).std() > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "./no/such/folder"], "no data set and no folder './no/such/folder'"),
        (["--data", "emojy"], "no data set and no folder 'emojy'"),
        (["--data", "EMPTY"], "no pictures in"),
        (["--data", "FILE"], "is one file: give the folder that holds the pictures"),
        (["--data", "someone/some-pictures"], "Hub can't be reached for 'someone/some-pictures'"),
        (["--model", "huge"], "no model 'huge'; choose from nano, tiny, small, base"),
        (["--image-size", "20"], "image_size 20 can't be divided by 8"),
        (["--image-size", "0"], "image_size must be at least 1"),
        (["--codec", "./no/vae"], "codec './no/vae' can't be had"),
        (["--codec", "sd-vae"], "codec 'sd-vae' can't be had"),
        (["--lr", "-1"], "lr, max_grad_norm and time_shift must be above 0"),
        (["--time-shift", "0"], "lr, max_grad_norm and time_shift must be above 0"),
        (["--seed", "-1"], "seed must lie between 0 and 2^32 - 1"),
        (["--precision", "fp16"], "fp16 needs a GPU"),
        (["--batch-size", "6", "--gradient-accumulation", "4"], "can't be computed in 4 equal parts"),
        (["--out", "FILE/run"], "can't be written to"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_in_training(arguments: list[str], words: str, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    places = {"EMPTY": str(tmp_path / "empty"), "FILE": str(tmp_path / "file")}
    places["FILE/run"] = str(tmp_path / "file" / "run")
    arguments = [places.get(argument, argument) for argument in arguments]
    if "--out" not in arguments:
        arguments = [*arguments, "--out", str(tmp_path / "run")]
    assert run("train", *TINY[2:], *arguments) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("liquid-diffusion:") == 1
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("imge_size: 16", "does not accept option 'imge_size'"),
        ("image_size: large", "--image-size must be a whole number, not large"),
        ("a: [", ""),
        ("data: caf\xe9", "is not UTF-8"),
    ],
)
def test_mistakes_in_yaml(text: str, words: str, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "my.yaml").write_text(text, encoding="latin-1")
    with pytest.raises(SystemExit) as stop:
        run("train", "--config", tmp_path / "my.yaml", "--out", tmp_path / "run")
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["./nowhere"], "no run './nowhere'"),
        (["RUN", "--label", "horse"], "no class 'horse'; the model knows Activities, Animals & Nature"),
        (["RUN", "--solver", "rk4"], "no solver 'rk4'; choose from unipc"),
        (["RUN", "--n", "0"], "n must be at least 1"),
        (["RUN", "--seed", "18446744073709551616"], "seed must lie between 0 and 2^32 - 1"),
        (["RUN/pipeline", "--nearest", "true"], "does not say what it was trained on"),
        (["RUN", "--nearest", "true", "--out", "RUN/new"], "ends in .png"),
        (["my runs/x"], "no run folder 'my runs/x'"),
        (["someone/some-model"], "no model of that id on the Hub, or no network"),
        (["RUN", "--out", "RUN/config.yaml/x.png"], "can't be written to"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_in_sampling(arguments: list[str], words: str, trained: Path, tmp_path: Path, capsys: Capture) -> None:
    arguments = [argument.replace("RUN", str(trained)) for argument in arguments]
    if "--out" not in arguments:
        arguments = [*arguments, "--out", str(tmp_path / "x.png")]
    assert run("sample", *arguments) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error
    assert not (tmp_path / "x.png").exists()


def test_a_mistyped_run_leaves_no_folder(tmp_path: Path) -> None:
    assert run("sample", "./nowhere", "--out", tmp_path / "flags") == 2
    assert not (tmp_path / "flags").exists()


def test_resuming_wrongly(trained: Path, capsys: Capture) -> None:
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    assert run("train", *TINY, "--steps", "3", "--out", trained, "--model", "tiny") == 2
    assert "was trained with model nano, not tiny" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()} == before


def test_memory_may_be_saved_when_a_run_goes_on(trained: Path, tmp_path: Path) -> None:
    """By what is advised where the memory is full."""
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    assert run("train", *TINY, "--steps", "3", "--out", out, "--gradient-checkpointing", "true") == 0
    assert (out / "checkpoints" / "step-000003").is_dir()


def test_checkpoint_cut_short(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "run"
    assert run("train", *TINY, "--steps", "1", "--out", out) == 0
    weights = out / "checkpoints" / "step-000001" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert run("train", *TINY, "--steps", "2", "--out", out) == 2
    assert "step-000001 is cut short" in capsys.readouterr().err
    assert not (out / "checkpoints" / "step-000002").exists()


def test_full_memory_is_said_in_one_sentence(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr("liquid_diffusion.training.trainer.Trainer.train_step", full)
    assert run("train", *TINY, "--steps", "1", "--out", tmp_path / "run") == 2
    assert "take a smaller --batch-size" in capsys.readouterr().err


def signal_group(process: subprocess.Popen[str], number: signal.Signals) -> None:
    """What a terminal and `timeout` do."""
    os.killpg(process.pid, number)


def signal_each(process: subprocess.Popen[str], number: signal.Signals) -> None:
    """What systemd and SLURM do; the workers before the process, which is the harder order."""
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert workers
    for worker in workers:
        os.kill(int(worker), number)
    time.sleep(0.5)
    process.send_signal(number)


@pytest.mark.parametrize(
    ("number", "send"),
    [
        (signal.SIGINT, signal_group),
        (signal.SIGTERM, signal_group),
        pytest.param(signal.SIGTERM, signal_each, marks=pytest.mark.skipif(sys.platform != "linux", reason="/proc")),
    ],
)
def test_ctrl_c_saves_and_says_how_to_go_on(
    tmp_path: Path, number: signal.Signals, send: Callable[[subprocess.Popen[str], signal.Signals], None]
) -> None:
    """A real process with workers that read, and a real signal to all of them; afterwards the printed command goes on
    from the very step."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "liquid_diffusion"]
    process = subprocess.Popen(
        [*command, "train", *TINY, "--steps", "100000", "--compile", "false", "--log-every", "1", "--out", str(out),
         "--crop", "random"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
        start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        metrics = out / "metrics.jsonl"
        while not (metrics.is_file() and len(metrics.read_text().splitlines()) >= 2):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        send(process, number)
        said, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert errors.count("Stopping after this step") == 1
    step = int(said.split("Stopped at step ")[1].split(";")[0])
    assert (out / "checkpoints" / f"step-{step:06d}" / "manifest.json").is_file()
    go_on = said.strip().splitlines()[-1].split("or: liquid-diffusion ")[1].split()
    assert run(*go_on, "--steps", str(step + 1)) == 0
    assert (out / "checkpoints" / f"step-{step + 1:06d}").is_dir()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--stepz", "5"], "There is no option --stepz; did you mean --steps?"),
        (["--xyzzy"], "There is no option --xyzzy.\n"),
        (["--steps", "2.5"], "--steps must be a whole number, not 2.5.\n"),
        (["--config", "my.yaml"], "--steps must be a whole number, not 2.5.\n"),
        (["--compile", "maybe"], "--compile must be true or false, not maybe.\n"),
        (["--crop", "middle"], "--crop must be one of center, random, pad, not middle.\n"),
    ],
)
def test_what_the_parser_finds_is_told_in_words(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text("steps: 2.5")
    with pytest.raises(SystemExit) as stop:
        run("train", *arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert words in error
    assert "liquid-diffusion train --help" in error


def test_a_value_that_was_left_empty(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "my.yaml").write_text("steps: 2\nwarmup_steps:\n")
    assert run("train", "--config", tmp_path / "my.yaml", "--out", tmp_path / "run") == 2
    assert "warmup_steps is empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("label: 1\n", "--label must be text, in quotes where YAML would read something else, not 1."),
        ("# label: cat\n", "a file of --config holds no option"),
        ("", "a file of --config holds no option"),
    ],
)
def test_a_config_that_says_something_else_or_nothing(text: str, words: str, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "my.yaml").write_text(text)
    with pytest.raises(SystemExit) as stop:
        run("sample", "--config", tmp_path / "my.yaml")
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


def test_names_that_the_terminal_has_no_letters_for(tmp_path: Path) -> None:
    for name in ("caf\xe9", "tea"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16), "red").save(tmp_path / "photos" / name / "a.png")
    command = [sys.executable, "-m", "liquid_diffusion", "datasets", "show", "photos", "--out", "grid.png"]
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii:strict"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path, env=ascii_only)
    assert done.returncode == 0, done.stderr
    assert "caf\\xe9" in done.stdout


def test_a_reader_who_has_seen_enough() -> None:
    """`liquid-diffusion datasets | head -1`, with the pipe closed before anything is written: no traceback."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        command = [sys.executable, "-m", "liquid_diffusion", "datasets"]
        done = subprocess.run(command, check=False, stdout=writing, stderr=subprocess.PIPE, text=True)
    finally:
        os.close(writing)
    assert done.returncode == 141
    assert done.stderr == ""
