from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from liquid_diffusion.config import EncodeConfig, TrainConfig
from liquid_diffusion.data.sources import same_setting
from liquid_diffusion.resolve import resolve, resolve_encoding


def test_a_gpu_gets_more_than_a_cpu() -> None:
    cpu, gpu = (resolve(TrainConfig(), device) for device in ("cpu", "cuda"))
    assert (cpu.model, cpu.image_size, cpu.codec, cpu.flip) == ("nano", 32, "pixels", False)
    assert (gpu.model, gpu.image_size, gpu.codec, gpu.flip) == ("tiny", 64, "pixels", False)


@pytest.mark.parametrize(
    ("changes", "device", "expected"),
    [
        ({}, "cpu", True),
        ({"steps": 300}, "cpu", False),  # it would take longer than it saves
        ({"buckets": True}, "cpu", False),
        ({}, "cuda", True),
        ({}, "mps", False),
        ({"compile": True}, "mps", True),
        ({"compile": False}, "cpu", False),
    ],
)
def test_blocks_are_compiled_where_it_pays(changes: dict[str, Any], device: str, expected: bool) -> None:
    assert resolve(TrainConfig(**changes), device).compile is expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"image_size": 256}, True),
        ({"image_size": 64}, False),  # pixels
        ({"image_size": 256, "crop": "random"}, False),
        ({"image_size": 256, "streaming": True}, False),
        ({"image_size": 256, "cache_latents": False}, False),
        ({"image_size": 256, "cache_latents": "there"}, str(Path("there").absolute())),
    ],
)
def test_latents_are_encoded_once_where_they_can_be(changes: dict[str, Any], expected: bool | str) -> None:
    assert resolve(TrainConfig(**changes), "cpu").cache_latents == expected


def test_what_lies_here_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pets").mkdir()
    monkeypatch.chdir(tmp_path)
    for said, expected in (
        ("pets/", tmp_path / "pets"),
        ("../" + tmp_path.name + "/pets", tmp_path / "pets"),
        ("pets/*.parquet", tmp_path / "pets/*.parquet"),
        ("someone/pets", "someone/pets"),  # an id of the Hub
        ("emoji", "emoji"),
    ):
        assert resolve(TrainConfig(data=said), "cpu").data == str(expected)
        assert resolve_encoding(EncodeConfig(data=said)).data == str(expected)


def test_an_autoencoder_here_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("vae", "taesd"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for said, expected in (
        ("vae", tmp_path / "vae"),
        ("./vae/", tmp_path / "vae"),
        ("~/vae", tmp_path / "vae"),
        ("taesd", "taesd"),  # a name, whatever lies here
        ("someone/vae", "someone/vae"),  # an id of the Hub
    ):
        assert resolve(TrainConfig(codec=said), "cpu").codec == str(expected)
        assert resolve_encoding(EncodeConfig(codec=said)).codec == str(expected)
        assert same_setting("codec", said, str(expected))  # of a run of before, whose was kept as it was typed
    assert not same_setting("codec", "vae", "someone/vae")
    assert resolve(TrainConfig(cache_latents="~/latents"), "cpu").cache_latents == str(tmp_path / "latents")


@pytest.mark.parametrize(
    ("model", "optimizer", "expected"),
    [
        ("nano", None, ("muon", 8e-3)),
        ("nano", "adamw", ("adamw", 2e-3)),
        ("tiny", None, ("muon", 4e-3)),
        ("small", None, ("adamw", 3e-4)),
    ],
)
def test_the_learning_rate_is_that_of_the_optimizer(model: str, optimizer: Any, expected: tuple[str, float]) -> None:
    config = resolve(TrainConfig(model=model, optimizer=optimizer), "cpu")
    assert (config.optimizer, config.lr) == expected


def test_own_pictures() -> None:
    config = resolve(TrainConfig(data="/a/my_photos", image_size=256), "cuda")
    assert (config.codec, config.flip, config.out) == ("sd-vae", True, "runs/my_photos-256")


def test_runs_of_tables_have_their_names(tmp_path: Path) -> None:
    for data in (
        "pets.parquet",
        "pets/*.parquet",
        "pets/**/*.parquet",
        "pets/train-0000[0-3].parquet",
        "pets/t-?.parquet",
    ):
        out = "runs/pets-64"
        assert resolve(TrainConfig(data=f"/a/{data}", image_size=64), "cpu").out == out
    (tmp_path / "pets [2020]").mkdir()
    assert resolve(TrainConfig(data=str(tmp_path / "pets [2020]"), image_size=64), "cpu").out == "runs/pets [2020]-64"


def test_what_was_said_stays() -> None:
    said = TrainConfig(
        image_size=64, codec="taesd", model="base", steps=7, batch_size=3, flip=True, out="x", lr=0.5, compile=True,
        cache_latents="/there", optimizer="muon",
    )  # fmt: skip
    config = resolve(said, "cpu")
    for name, value in vars(said).items():
        assert getattr(config, name) == value
