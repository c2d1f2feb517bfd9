from __future__ import annotations

import errno
import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from PIL import Image, ImageOps
from safetensors.torch import load_file

from liquid_diffusion.codecs import AutoencoderCodec, PixelCodec, make_codec
from liquid_diffusion.config import EncodeConfig
from liquid_diffusion.data import encode as module
from liquid_diffusion.data.encode import MANIFEST, Encoding, _Batches, encode, is_whole
from liquid_diffusion.data.ranged import SourceLostError
from liquid_diffusion.errors import UserError
from liquid_diffusion.hardware import process_state
from liquid_diffusion.writing import LOCK


def tiny_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=[8, 16], norm_num_groups=4,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    tiny_vae().save_pretrained(folder)
    return folder


@pytest.fixture
def configure(photos: Path, vae: Path, tmp_path: Path) -> Callable[..., EncodeConfig]:
    """Makes configurations of encodings of 24 pictures of 16 px by a small autoencoder of factor 2."""

    def make(**changes: Any) -> EncodeConfig:
        given = {"data": str(photos), "out": str(tmp_path / "latents"), "image_size": 16, "codec": str(vae)}
        return EncodeConfig(**{**given, "flip": True, "val_fraction": 0.0, "workers": 0, **changes})

    return make


Configure = Callable[..., EncodeConfig]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def latents(folder: Path) -> dict[str, torch.Tensor]:
    """All shards as one."""
    files = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    return {name: torch.cat([file[name] for file in files]) for name in files[0]}


@pytest.mark.usefixtures("exact_codec")
@pytest.mark.parametrize("crop", ["center", "pad"])
def test_posteriors_are_those_of_diffusers(configure: Configure, vae: Path, photos: Path, crop: str) -> None:
    """Every picture, mirrored too, sized by PIL's own functions and put through the autoencoder one at a time."""
    encode(configure(crop=crop))
    found = latents(Path(configure().out or ""))
    model = AutoencoderKL.from_pretrained(vae)
    size = ImageOps.fit if crop == "center" else functools.partial(ImageOps.pad, color="white")
    for i, path in enumerate(sorted(photos.rglob("*.png"))):
        picture = size(Image.open(path), (16, 16), Image.Resampling.LANCZOS)
        assert found["label"][i] == (path.parent.name == "dog")
        for ending, seen in (("", picture), ("_flipped", ImageOps.mirror(picture))):
            x = torch.tensor(np.asarray(seen) / 127.5 - 1, dtype=torch.float32).permute(2, 0, 1)[None]
            with torch.no_grad():
                posterior = model.encode(x).latent_dist
            torch.testing.assert_close(found["mean" + ending][i].float(), posterior.mean[0], atol=2e-4, rtol=1e-3)
            torch.testing.assert_close(found["std" + ending][i].float(), posterior.std[0], atol=2e-4, rtol=1e-3)


def test_manifest(configure: Configure, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics are those of drawn latents; bad pictures are named and left out; the held-out ones are not there."""
    monkeypatch.setattr(module, "_SHARD", 5)
    damaged = photos / "dog" / "04.png"
    damaged.write_bytes(damaged.read_bytes()[:300])
    folder = Path(configure().out or "")
    encode(configure(val_fraction=0.3))
    manifest = json.loads((folder / "manifest.json").read_text())
    found = latents(folder)
    assert manifest["label_names"] == ["cat", "dog"]
    assert len(manifest["unreadable"]) == 1
    assert manifest["unreadable"][0][0] == str(damaged)
    assert 2 <= manifest["held_out"] <= 12
    assert manifest["pictures"] + manifest["held_out"] == 24
    assert len(found["label"]) == sum(shard["pictures"] for shard in manifest["shards"]) == manifest["pictures"] - 1
    draws = [
        found[f"mean{ending}"].double() + found[f"std{ending}"].double() * torch.randn(200, *found["mean"].shape)
        for ending in ("", "_flipped")
    ]
    drawn = torch.stack(draws)
    torch.testing.assert_close(torch.tensor(manifest["statistics"]["mean"]), drawn.mean((0, 1, 2, 4, 5)).float(),
                               atol=5e-3, rtol=0)  # fmt: skip
    torch.testing.assert_close(torch.tensor(manifest["statistics"]["std"]), drawn.std((0, 1, 2, 4, 5)).float(),
                               atol=0, rtol=0.01)  # fmt: skip


def test_a_deterministic_autoencoder_has_no_deviation(configure: Configure, tmp_path: Path) -> None:
    AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1),
    ).save_pretrained(tmp_path / "taesd")  # fmt: skip
    encode(configure(codec=str(tmp_path / "taesd"), flip=False))
    assert set(latents(tmp_path / "latents")) == {"mean", "label"}


def test_shards_hold_one_shape(configure: Configure, photos: Path) -> None:
    for i, path in enumerate(sorted(photos.rglob("*.png"))):
        Image.effect_noise((60, 30 + 2 * i), 90).convert("RGB").save(path)
    encode(configure(buckets=True, image_size=64))
    folder = Path(configure().out or "")
    manifest = json.loads((folder / "manifest.json").read_text())
    shapes = {(shard["height"], shard["width"]) for shard in manifest["shards"]}
    assert len(shapes) > 3
    for shard in manifest["shards"]:
        tensors = load_file(folder / shard["file"])
        assert tensors["std_flipped"].shape == (shard["pictures"], 4, shard["height"] // 2, shard["width"] // 2)
    assert sum(shard["pictures"] for shard in manifest["shards"]) == 24


KILLED = """
import json, os, random, signal, sys, time
from pathlib import Path
import liquid_diffusion.data.encode as module
from liquid_diffusion.config import EncodeConfig

data, folder, codec, kills = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
module._SHARD = 2
write, draws, seen = module.save_file, random.Random(0), set()

def slow(tensors, path, metadata):  # long enough for a kill to hit a half-written and a whole but not renamed file
    path.write_bytes(b"half")
    time.sleep(0.02)
    write(tensors, path, metadata)
    time.sleep(0.02)

def attempt(out, seconds):
    child = os.fork()  # what takes long, the imports, is done
    if not child:
        module.encode(EncodeConfig(data=data, out=str(out), image_size=16, codec=codec, flip=True, workers=0))
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

module.save_file = slow
since = time.perf_counter()
assert attempt(folder / "whole", None) == 0
takes = time.perf_counter() - since
while kills:
    if attempt(folder / "parts", draws.uniform(0, takes)) == 0:
        for path in (folder / "parts").iterdir():  # it came to its end before it was killed: from the beginning
            path.unlink()
        continue
    kills -= 1
    seen.add(len(list((folder / "parts").glob("*.safetensors"))))
assert attempt(folder / "parts", None) == 0
print(json.dumps(sorted(seen)))
"""


def test_killed_at_random_20_times_it_ends_with_the_same_bytes(photos: Path, vae: Path, tmp_path: Path) -> None:
    """SIGKILL to real processes at random times, in which the encoding was at different places."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(photos), str(tmp_path), str(vae), "20"],
        check=False, capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert len(contents(tmp_path / "whole")) > 8
    assert len(json.loads(done.stdout.splitlines()[-1])) >= 3  # places at which it was stopped


TWO = r"""
from liquid_diffusion.config import EncodeConfig
data, out, codec = sys.argv[1:]
module.encode(EncodeConfig(data=data, out=out, image_size=16, codec=codec, flip=True, workers=0))
"""


def test_two_processes_write_what_one_writes(
    configure: Configure,
    photos: Path,
    vae: Path,
    tmp_path: Path,
    telling_shards: str,
    on_two_processes: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A real launch on two processes, which share the shards; one of them speaks."""
    said = on_two_processes(telling_shards + TWO, photos, tmp_path / "two", vae)
    assert said.count("held out) by") == said.count("Done:") == 1
    assert [said.count(f"rank {rank} writes") for rank in (0, 1)] == [6, 5]
    monkeypatch.setattr(module, "_SHARD", 2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    encode(configure(out=str(tmp_path / "one"), val_fraction=0.05))
    torch.set_num_threads(threads)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_it_says_what_it_needs_and_goes_on(
    configure: Configure, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SHARD", 10)
    config = configure()
    folder = Path(config.out or "")
    encode(config)
    assert "Encoding 24 pictures of 16 px (0 held out)" in capsys.readouterr().out
    before = contents(folder)
    encode(config)
    assert "held out" not in capsys.readouterr().out  # there was nothing to do
    shard = folder / "shard-00001-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    plan = Encoding(config, make_codec(config.codec), process_state())
    assert not plan.finished
    assert "going on after 2 of 3 shards" in plan.summary()
    assert plan.bytes_to_write == pytest.approx(len(before[shard.name]), rel=0.1)
    encode(config)
    assert contents(folder) == before
    capsys.readouterr()


def test_a_full_disk_is_said_before_anything_is_written(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    """24 pictures, 2 kinds, mirrored too, 4 channels of 8 x 8 in 2 bytes, and a label of 8 bytes."""
    config = configure()
    need = 24 * (2 * 2 * 4 * 64 * 2 + 8)
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=need - 1))
    with pytest.raises(UserError, match=r"take 0\.0 MB more, but .*/latents has 0\.0 MB free; choose .* --out"):
        encode(config)
    assert not Path(config.out or "").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=need))
    encode(config)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_size": 32}, "with image_size 16, not 32"),
        ({"crop": "pad"}, "with crop center, not pad"),
        ({"flip": False}, "with flip True, not False"),
        ({"val_fraction": 0.5}, "with val_fraction 0.0, not 0.5"),
        ({"batch_size": 4}, "with batch_size 8, not 4"),
        ({"data": "emoji"}, "not emoji"),
    ],
)
def test_other_latents_are_left_alone(configure: Configure, changes: dict[str, Any], words: str) -> None:
    encode(configure())
    folder = Path(configure().out or "")
    before = contents(folder)
    with pytest.raises(UserError, match=f"{words}.*; choose another folder, or delete this one"):
        encode(configure(**changes))
    assert contents(folder) == before


def test_a_smaller_batch_after_a_full_memory(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is advised then; nothing was encoded by the larger one."""

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(Encoding, "_posteriors", full)
        with pytest.raises(torch.OutOfMemoryError):
            encode(configure())
    assert {path.name for path in Path(configure().out or "").iterdir()} == {LOCK, MANIFEST}
    encode(configure(batch_size=2))
    assert is_whole(Path(configure().out or ""))


def test_pictures_that_were_moved_are_gone_on_with(configure: Configure, photos: Path, tmp_path: Path) -> None:
    """An encoding that lacks a shard takes it from where they lie now."""
    encode(configure())
    whole = contents(Path(configure().out or ""))
    lost = next(name for name in whole if name.startswith("shard"))
    (Path(configure().out or "") / lost).unlink()
    (tmp_path / "elsewhere").mkdir()
    moved = photos.rename(tmp_path / "elsewhere" / photos.name)
    encode(configure(data=str(moved)))
    assert contents(Path(configure().out or ""))[lost] == whole[lost]


def test_pictures_that_changed_are_noticed(configure: Configure, photos: Path, vae: Path) -> None:
    encode(configure())
    (photos / "dog" / "00.png").unlink()
    with pytest.raises(UserError, match="with pictures 24, not 23"):
        encode(configure())
    Image.new("RGB", (50, 50)).save(photos / "dog" / "00.png")
    with torch.no_grad():
        weights = AutoencoderKL.from_pretrained(vae)
        weights.encoder.conv_in.bias.add_(0.1)
    other = AutoencoderCodec(weights, str(vae))
    with pytest.raises(UserError, match=rf"holds latents by another autoencoder of the same name, {vae}; choose"):
        Encoding(configure(), other, process_state())


def test_mistakes(configure: Configure, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="codec pixels costs nothing"):
        Encoding(configure(codec="pixels"), PixelCodec(), process_state())
    with pytest.raises(UserError, match=r"image_size 20 can't be divided by 8.*the next that can is 24"):
        encode(configure(image_size=20))
    with pytest.raises(UserError, match="holds something else than latents"):
        encode(configure(out=str(photos)))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="can't be written to"):
        encode(configure(out=str(tmp_path / "file" / "latents")))
    for path in photos.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="Not one of the 24 pictures can be read"):
        encode(configure())


@pytest.mark.parametrize("error", [SourceLostError("The Hub is gone."), OSError(errno.EIO, "Input/output error")])
def test_what_a_worker_can_not_read_is_not_the_folders_fault(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def lost(*_: object) -> None:
        raise error

    monkeypatch.setattr(_Batches, "__getitem__", lost)
    with pytest.raises(type(error)) as told:
        encode(configure(workers=1))
    assert "can't be written" not in str(told.value)
    assert isinstance(error, OSError) or str(told.value) == "The Hub is gone."


def test_numbers_that_are_none(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = torch.full((8, 4, 8, 8), torch.nan)
    monkeypatch.setattr(AutoencoderCodec, "posterior", lambda *_: (nothing, nothing))
    with pytest.raises(UserError, match="gives latents that are no numbers"):
        encode(configure())
