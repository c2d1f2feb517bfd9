from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from little_hub import LittleHub

from liquid_diffusion.codecs import AutoencoderCodec, PixelCodec, load_vae, make_codec
from liquid_diffusion.errors import UserError


def tiny_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=[8, 16], norm_num_groups=4,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
    )  # fmt: skip


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_pixels_come_back_to_the_bit(factor: int) -> None:
    """All 256 values in all three channels, through fitted statistics, as they are saved: uint8 in, uint8 out."""
    pixels = torch.randint(0, 256, (4, 3, 16, 24), dtype=torch.uint8)
    pixels.view(-1)[:256] = torch.arange(256)
    images = pixels.float() / 127.5 - 1
    codec = PixelCodec(factor)
    codec.fit([images])
    latents = codec.encode(images)
    assert latents.shape == (4, 3 * factor**2, 16 // factor, 24 // factor)
    again = ((codec.decode(latents) + 1) * 127.5).round().to(torch.uint8)
    assert torch.equal(again, pixels)


def test_space_to_depth_keeps_neighbours_together() -> None:
    codec = PixelCodec(2)
    images = torch.arange(3 * 4 * 4).reshape(1, 3, 4, 4).float() / 48
    latents = codec.encode(images)
    assert set(latents[0, :4, 1, 0].tolist()) == set(images[0, 0, 2:, :2].flatten().tolist())


@pytest.mark.parametrize("codec", [PixelCodec(2), AutoencoderCodec(tiny_vae(), "x")], ids=["pixels", "vae"])
def test_latents_are_normalised(codec: PixelCodec | AutoencoderCodec) -> None:
    batches = [torch.rand(8, 3, 16, 16) * torch.tensor([0.2, 0.5, 1.0])[:, None, None] for _ in range(4)]
    codec.fit(batches)
    latents = codec.encode(torch.cat(batches), torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(codec.channels).double(), atol=0.05, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(codec.channels).double(), atol=0.05, rtol=0)


@pytest.mark.usefixtures("exact_codec")
def test_autoencoder_is_frozen_and_its_own_scaling_is_undone() -> None:
    vae = tiny_vae().train()
    codec = AutoencoderCodec(vae, "x")
    assert codec.factor == 2
    assert not vae.training
    assert not any(parameter.requires_grad for parameter in vae.parameters())
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    codec.fit([images])
    latents = codec.encode(images, torch.Generator().manual_seed(1))
    assert not latents.requires_grad
    raw = vae.encode(images).latent_dist.sample(torch.Generator().manual_seed(1))
    torch.testing.assert_close(codec.decode(latents), vae.decode(raw).sample.clamp(-1, 1), atol=1e-5, rtol=1e-5)


def test_posterior_is_drawn_from_the_generator() -> None:
    codec = AutoencoderCodec(tiny_vae(), "x")
    images = torch.rand(2, 3, 16, 16)
    first, again, other = (codec.encode(images, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.usefixtures("exact_codec")
def test_decoding_goes_on_in_tiles_when_the_memory_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = AutoencoderCodec(tiny_vae(), "x")
    decode, fails, tiled = codec.vae.decode, [True], []

    def full(z: torch.Tensor) -> object:
        if fails.pop() if fails else False:
            raise torch.OutOfMemoryError("CUDA out of memory")
        tiled.append(codec.vae.use_tiling)
        return decode(z)

    monkeypatch.setattr(codec.vae, "decode", full)
    latents = torch.randn(2, 4, 8, 8)
    images = codec.decode(latents)
    assert tiled == [True]
    assert not codec.vae.use_tiling  # or pictures would be encoded in tiles from now on
    assert not codec.vae.use_slicing
    torch.testing.assert_close(images, decode(latents).sample.clamp(-1, 1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["kl", "tiny"])
def test_codec_from_a_folder_and_its_state(tmp_path: Path, kind: str) -> None:
    vae = tiny_vae() if kind == "kl" else AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1),
    )  # fmt: skip
    vae.save_pretrained(tmp_path)
    codec = make_codec(str(tmp_path))
    codec.fit([torch.rand(4, 3, 16, 16)])
    again = make_codec(**codec.state())
    images = torch.rand(1, 3, 16, 16)
    first, second = (c.encode(images, torch.Generator().manual_seed(0)) for c in (codec, again))
    torch.testing.assert_close(first, second)
    assert codec.decode(first).shape == images.shape


def test_codec_of_a_folder_in_a_repository_of_the_hub(little_hub: LittleHub) -> None:
    """As the autoencoders of whole pipelines lie there."""
    vae = tiny_vae()
    vae.save_pretrained(little_hub.repo("somebody/pipeline", "models") / "parts" / "vae")
    loaded = load_vae("somebody/pipeline/parts/vae").state_dict()
    torch.testing.assert_close(loaded, dict(vae.state_dict()), rtol=0, atol=0)


def test_codecs_that_can_not_be_had(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no folder here, and the Hub.*--codec pixels"):
        load_vae(str(tmp_path / "nowhere"))
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    (tmp_path / "nameless").mkdir()
    (tmp_path / "nameless" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="is a None; only AutoencoderKL"):
        load_vae(str(tmp_path / "nameless"))
    with pytest.raises(UserError, match="can't be had: it is no folder here"):
        load_vae("my vae/x")
    tiny_vae().save_pretrained(tmp_path / "cut")
    weights = tmp_path / "cut" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(UserError, match=r"codec in .*cut is damaged"):
        load_vae(str(tmp_path / "cut"))
    tiny_vae().save_pretrained(tmp_path / "pickled", safe_serialization=False)
    with pytest.raises(UserError, match=r"pickled is damaged, or has no safetensors"):
        load_vae(str(tmp_path / "pickled"))
    with pytest.raises(UserError, match="is a UNet2DModel; only AutoencoderKL and AutoencoderTiny"):
        load_vae(str(tmp_path / "unet"))


def test_bfloat16_where_it_is_fast_is_near_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    codec, images = AutoencoderCodec(tiny_vae(), "x"), torch.rand(2, 3, 32, 32) * 2 - 1
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr("liquid_diffusion.codecs.fastest_dtype", lambda device, dtype=dtype: dtype)
        mean, std = codec.posterior(images)
        results.append((mean, std, codec.decode(mean)))
    for exact, half in zip(*results, strict=True):
        assert half.dtype == torch.float32
        assert 0 < (half - exact).std() < 0.05 * exact.std()
    assert codec.vae.dtype == torch.float32  # what is saved stays exact


def test_an_autoencoder_that_overflows_in_float16() -> None:
    """It says so of itself; its float16 weights are float32 while it computes."""
    vae = tiny_vae()
    with torch.no_grad():
        vae.encoder.conv_in.weight *= 3e5
        vae.decoder.conv_in.weight *= 3e5
    codec = AutoencoderCodec(vae, "large")
    images = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    wide, latents = codec.encode(images, torch.Generator().manual_seed(0)), torch.randn(1, codec.channels, 8, 8)
    exact = codec.decode(latents)
    vae.half()
    assert not vae.decode(latents.half()).sample.isfinite().all()
    torch.testing.assert_close(codec.decode(latents), exact, atol=0.05, rtol=0)
    torch.testing.assert_close(codec.encode(images, torch.Generator().manual_seed(0)), wide, atol=0.1, rtol=0.05)
    assert vae.dtype == torch.float16
