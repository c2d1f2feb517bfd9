from __future__ import annotations

import itertools
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from scipy import stats

from liquid_diffusion.codecs import AutoencoderCodec, PixelCodec, make_codec
from liquid_diffusion.config import EncodeConfig, RunConfig, TrainConfig
from liquid_diffusion.data import encode as encoding
from liquid_diffusion.data.encode import encode, encoding_of
from liquid_diffusion.data.feed import open_latents
from liquid_diffusion.data.latents import LatentDataset
from liquid_diffusion.data.pictures import PictureDataset
from liquid_diffusion.data.sources import open_source
from liquid_diffusion.data.transforms import to_float
from liquid_diffusion.errors import UserError
from liquid_diffusion.resolve import resolve


@pytest.fixture
def run(photos: Path, vae: Path) -> Callable[..., RunConfig]:
    def make(**changes: Any) -> RunConfig:
        given = {"data": str(photos), "image_size": 16, "codec": str(vae), "val_fraction": 0.0, "seed": 3}
        return resolve(TrainConfig(**{**given, **changes}), "cpu")

    return make


@pytest.fixture
def folder(photos: Path, vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The latents of 24 pictures of 16 px in five files."""
    monkeypatch.setattr(encoding, "_SHARD", 5)
    out = tmp_path / "latents"
    config = EncodeConfig(str(photos), str(out), 16, str(vae), val_fraction=0.0, workers=0)
    encode(config)
    return out


Run = Callable[..., RunConfig]


def codec_of(config: RunConfig) -> AutoencoderCodec:
    codec = make_codec(config.codec)
    assert isinstance(codec, AutoencoderCodec)
    return codec


@pytest.mark.usefixtures("exact_codec")
def test_an_epoch_is_the_pictures_own(folder: Path, run: Run) -> None:
    """Order, labels and mirroring are those of training on the pictures; the posteriors too, but for rounding."""
    config = run()
    codec = codec_of(config)
    pictures = PictureDataset(open_source(config.data), 16, True, config.seed)
    latents = LatentDataset(folder, config, codec)
    assert (len(latents), latents.label_names) == (24, ["cat", "dog"])
    assert latents.groups == pictures.groups
    assert latents.usual_shape == (16, 16)
    assert latents.classes_met == pictures.classes_met == {0, 1}
    for epoch, index in itertools.product(range(4), range(24)):
        item, picture = latents[epoch, index], pictures[epoch, index]
        assert item["label"] == picture["label"]
        mean, std = codec.posterior(to_float(picture["image"][None]))
        assert std is not None
        torch.testing.assert_close(item["image"].float(), torch.cat([mean, std]), atol=2e-4, rtol=1e-3)


def test_fresh_latents_have_the_posterior_of_diffusers(folder: Path, run: Run, photos: Path) -> None:
    """Draws of one picture in many epochs against `DiagonalGaussianDistribution`: standardised, they are normal."""
    config = run(flip=False)
    codec = codec_of(config)
    latents = LatentDataset(folder, config, codec)
    latents.fit_codec(codec, 0, 0)
    image = to_float(PictureDataset(open_source(config.data), 16).picture(7)["image"])[None]
    with torch.no_grad():
        posterior = codec.vae.encode(image).latent_dist
    assert isinstance(posterior, DiagonalGaussianDistribution)
    generator = torch.Generator().manual_seed(0)
    epochs = torch.stack([latents[epoch, 7]["image"] for epoch in range(400)])
    drawn = latents.to_latents(epochs, codec, generator)
    raw = drawn * codec.std[:, None, None] + codec.mean[:, None, None]
    standard = ((raw - posterior.mean) / posterior.std).double()
    assert stats.kstest(standard.flatten().numpy(), "norm").pvalue > 0.01
    of_each = standard.mean(0) * 400**0.5  # the mean of every single number is right, not only that of all
    assert stats.kstest(of_each.flatten().numpy(), "norm").pvalue > 0.01
    assert not torch.equal(drawn[0], drawn[1])
    again = latents.to_latents(epochs, codec, torch.Generator().manual_seed(0))
    assert torch.equal(again, drawn)


@pytest.mark.parametrize(("batch_size", "parts", "at_once"), [(16, 1, 8), (8, 1, 8), (2, 1, 2), (16, 8, 2)])
def test_a_small_batch_encodes_few_at_once(run: Run, tmp_path: Path, batch_size: int, parts: int, at_once: int) -> None:
    """Whose memory holds few pictures of a step may not hold eight in the autoencoder."""
    config = run(batch_size=batch_size, gradient_accumulation=parts)
    assert encoding_of(config, tmp_path).batch_size == at_once


def test_latents_are_normalised_over_the_set(folder: Path, run: Run) -> None:
    config = run()
    codec = codec_of(config)
    latents = LatentDataset(folder, config, codec)
    latents.fit_codec(codec, 0, 0)
    batch = torch.stack([latents[epoch, i]["image"] for epoch in range(20) for i in range(24)])
    drawn = latents.to_latents(batch, codec, torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(drawn.mean((0, 2, 3)), torch.zeros(4).double(), atol=0.02, rtol=0)
    torch.testing.assert_close(drawn.std((0, 2, 3)), torch.ones(4).double(), atol=0.02, rtol=0)


def test_a_deterministic_autoencoder(tmp_path: Path, run: Run, photos: Path) -> None:
    AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1),
    ).save_pretrained(tmp_path / "taesd")  # fmt: skip
    config = run(codec=str(tmp_path / "taesd"), flip=False)
    out = tmp_path / "of-taesd"
    encode(EncodeConfig(config.data, str(out), 16, config.codec, flip=False, val_fraction=0.0, workers=0))
    codec = codec_of(config)
    latents = LatentDataset(out, config, codec)
    latents.fit_codec(codec, 0, 0)
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    drawn = latents.to_latents(latents[0, 5]["image"][None], codec, generator)
    image = PictureDataset(open_source(config.data), 16).picture(5)["image"]
    torch.testing.assert_close(drawn, codec.encode(to_float(image[None])), atol=5e-3, rtol=0)
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_size": 32}, "encoded with image_size 16, but the training has 32"),
        ({"crop": "pad"}, "encoded with crop center, but the training has pad"),
        ({"buckets": True}, "encoded with buckets False, but the training has True"),
        ({"val_fraction": 0.1}, "encoded with val_fraction 0.0, but the training has 0.1"),
        ({"data": "emoji"}, "but the training has emoji"),
    ],
)
def test_others_than_wanted_are_refused(folder: Path, run: Run, changes: dict[str, Any], words: str) -> None:
    for own, advice in ((str(folder), "change one of them, or encode"), (True, "choose another --out, or delete that")):
        config = run(cache_latents=own, **changes)
        with pytest.raises(UserError, match=f"{words}; {advice}"):
            LatentDataset(folder, config, codec_of(config))


def test_a_worker_that_is_started_anew_maps_the_files_itself(folder: Path, run: Run) -> None:
    """What is handed over to it are no latents; nor is more than labels read to tell which classes there are."""
    config = run()
    latents = LatentDataset(folder, config, codec_of(config))
    handed_over = pickle.dumps(latents)
    assert latents.classes_met == {0, 1}
    assert not latents._mapped
    images = [latents[0, i]["image"] for i in range(24)]
    assert len(latents._mapped) == 5
    assert pickle.dumps(latents) == handed_over
    copy = pickle.loads(handed_over)
    assert all(torch.equal(copy[0, i]["image"], image) for i, image in enumerate(images))


def test_mirror_images_may_be_left_unused_but_not_missing(folder: Path, run: Run, tmp_path: Path) -> None:
    config = run(flip=False)
    unused = LatentDataset(folder, config, codec_of(config))
    assert all(torch.equal(unused[epoch, 3]["image"], unused[0, 3]["image"]) for epoch in range(9))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["settings"]["flip"] = False
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="encoded with flip False, but the training has True"):
        LatentDataset(folder, run(), codec_of(config))


def test_another_autoencoder_of_the_same_name(folder: Path, run: Run) -> None:
    codec = codec_of(run())
    with torch.no_grad():
        codec.vae.encoder.conv_in.bias.add_(0.1)
    with pytest.raises(
        UserError, match=r"encoded by another autoencoder of the same name, .*vae; choose another --out"
    ):
        LatentDataset(folder, run(), codec)


def test_what_is_missing_or_damaged(folder: Path, run: Run, tmp_path: Path) -> None:
    config = run(cache_latents=str(folder))
    codec = codec_of(config)
    with pytest.raises(UserError, match=r"There are no latents in .*nowhere; write them with `liquid-diffusion encode"):
        LatentDataset(tmp_path / "nowhere", config, codec)
    with pytest.raises(UserError, match="The codec pixels costs nothing"):
        LatentDataset(folder, run(codec="pixels"), PixelCodec())
    shard = folder / "shard-00000-of-00005.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"shard-00000-of-00005.safetensors is damaged; run .* encode. again"):
        _ = LatentDataset(folder, config, codec)[0, 0]
    with pytest.raises(UserError, match=r"shard-00000-of-00005.safetensors is damaged; the same command encodes it"):
        _ = LatentDataset(folder, run(), codec)[0, 0]
    shard.unlink()
    with pytest.raises(UserError, match=r"shard-00000-of-00005.safetensors is missing; run .* encode. again"):
        LatentDataset(folder, config, codec)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["shards"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"The latents in .* are incomplete; write them with"):
        LatentDataset(folder, config, codec)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="are damaged"):
        LatentDataset(folder, config, codec)


def test_a_run_encodes_again_what_it_lost_of_its_own(
    run: Run, tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard that is missing or cut short, and that one alone; the source is opened, and remarked on, once."""
    monkeypatch.setattr(encoding, "_SHARD", 5)
    for old, new in (("cat", "train"), ("dog", "test")):
        (photos / old).rename(photos / new)
    config = run(out=str(tmp_path / "run"))
    codec = codec_of(config)
    begun: list[bool] = []

    def opened() -> LatentDataset:
        return open_latents(config, codec, lambda: begun.append(True))[0]

    opened()
    assert capsys.readouterr().err.count("The classes of") == 1
    files = sorted((tmp_path / "run" / "latents").glob("*.safetensors"))
    whole = [(path.read_bytes(), path.stat().st_mtime_ns) for path in files]
    for lost in (files[1], files[3]):
        if lost == files[1]:
            lost.unlink()
        else:
            lost.write_bytes(lost.read_bytes()[:-1])
        latents = opened()
        assert [latents[0, i]["label"] for i in range(24)] == [0] * 12 + [1] * 12
    assert [path.read_bytes() for path in files] == [content for content, _ in whole]
    assert [path.stat().st_mtime_ns == then for path, (_, then) in zip(files, whole, strict=True)] == [
        True, False, True, False, True,
    ]  # fmt: skip
    assert capsys.readouterr().err.count("The classes of") == 2
    opened()
    assert len(begun) == 3


def test_latents_of_a_former_version_name_bad_pictures_too(folder: Path, run: Run) -> None:
    """Each as one text."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["unreadable"] = ["a: b.png: it is no picture", ["c: d.png", "it is no picture"]]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    latents = LatentDataset(folder, run(), codec_of(run()))
    assert list(map(str, latents.skipped)) == ["a: b.png: it is no picture", "c: d.png: it is no picture"]
    assert latents.skipped[1].name == "c: d.png"
