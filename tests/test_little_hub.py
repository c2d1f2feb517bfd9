"""The little Hub answers the real clients; where these fail, tests that build on it say nothing."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import urlopen

import pytest
from datasets import Dataset, load_dataset
from diffusers import AutoencoderTiny, UNet2DModel
from huggingface_hub import HfApi, HfFileSystem, ModelCard, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from little_hub import LittleHub


def small_model() -> UNet2DModel:
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )


def test_push_a_model_and_load_it_back(little_hub: LittleHub, tmp_path: Path) -> None:
    model = small_model()
    model.push_to_hub("somebody/model")
    ModelCard("---\nlicense: mit\n---\n# A model").push_to_hub("somebody/model")
    assert set(little_hub.files("models", "somebody/model")) == {
        "README.md",
        "config.json",
        "diffusion_pytorch_model.safetensors",
    }
    loaded = UNet2DModel.from_pretrained("somebody/model")
    for one, other in zip(model.parameters(), loaded.parameters(), strict=True):
        assert one.equal(other)
    assert ModelCard.load("somebody/model").data.license == "mit"
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "notes.txt").write_text("hello")
    (tmp_path / "more" / "x.bin").write_bytes(bytes(range(256)) * 100)
    api = HfApi()
    api.upload_folder(repo_id="somebody/model", folder_path=tmp_path / "more", path_in_repo="more")
    assert (Path(snapshot_download("somebody/model")) / "more" / "x.bin").read_bytes() == bytes(range(256)) * 100
    assert api.whoami()["name"] == "somebody"
    assert api.file_exists("somebody/model", "more/notes.txt")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo("somebody/model")


def test_push_a_table_and_load_it_back(little_hub: LittleHub) -> None:
    Dataset.from_dict({"a": [1, 2, 3]}).push_to_hub("somebody/table")
    assert load_dataset("somebody/table", split="train")["a"] == [1, 2, 3]
    assert [row["a"] for row in load_dataset("somebody/table", split="train", streaming=True)] == [1, 2, 3]
    assert "data/train-00000-of-00001.parquet" in little_hub.files("datasets", "somebody/table")


def test_who_is_not_there(little_hub: LittleHub, monkeypatch: pytest.MonkeyPatch) -> None:
    (little_hub.repo("some/thing", "models") / "there.txt").touch()
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("no/thing", "x")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("some/thing", "x")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download("some/thing", "there.txt", revision="other")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HfHubHTTPError, match="401"):
        HfApi().create_repo("somebody/else")


def test_nobody_answers_when_it_is_closed(little_hub: LittleHub) -> None:
    (little_hub.repo("some/thing", "models") / "there.txt").write_text("here")
    path = hf_hub_download("some/thing", "there.txt")
    little_hub.stop()
    assert hf_hub_download("some/thing", "there.txt") == path  # out of the cache
    with pytest.raises(ConnectionRefusedError), socket.socket() as connection:
        connection.connect(("127.0.0.1", urlsplit(little_hub.endpoint).port or 0))
    little_hub.start()
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("some/thing", "other.txt")


def test_another_process_reaches_it(little_hub: LittleHub) -> None:
    (little_hub.repo("some/thing", "models") / "there.txt").write_text("from afar")
    script = "import sys, huggingface_hub as h; print(open(h.hf_hub_download('some/thing', 'there.txt')).read())"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "from afar"


def test_ranges_and_faults(little_hub: LittleHub) -> None:
    content = bytes(range(256)) * 1000
    (little_hub.repo("some/table") / "x.parquet").write_bytes(content)
    files = HfFileSystem()

    def read(start: int, stop: int) -> bytes:
        with files.open("datasets/some/table/x.parquet", block_size=1024) as file:
            file.seek(start)
            return bytes(file.read(stop - start))

    assert read(1000, 1100) == content[1000:1100]
    little_hub.log.clear()
    little_hub.fail("*x.parquet", status=504, times=1)
    assert read(5000, 5010) == content[5000:5010]
    assert [r.status for r in little_hub.requests("*x.parquet", "GET")] == [504, 206]
    little_hub.log.clear()
    little_hub.fail("*x.parquet", cut=100, times=1)
    assert read(0, 5000) == content[:5000]
    assert little_hub.requests("*x.parquet", "GET")[0].sent == 100
    little_hub.fail("*x.parquet", status=429, retry_after=0, times=1)
    began = time.monotonic()
    assert read(0, 10) == content[:10]
    assert time.monotonic() - began >= 1  # the client adds one second
    little_hub.fail("*x.parquet", damage=(3, b"wrong"), times=1)
    assert read(0, 10) == content[:3] + b"wrong" + content[8:10]
    little_hub.fail("*x.parquet", stall=0.3, times=1)
    with pytest.raises(TimeoutError):
        urlopen(f"{constants.ENDPOINT}/datasets/some/table/resolve/main/x.parquet", timeout=0.1)
    little_hub.fail("*x.parquet", status=404, times=None)
    with pytest.raises(HfHubHTTPError):
        read(0, 10)
    little_hub.heal()
    assert read(0, 10) == content[:10]


def test_sd_vae_is_fetched_once(little_hub: LittleHub, sd_vae_folder: Path) -> None:
    """Only its files here: a model of 84 M parameters is built where it is needed."""
    (little_hub.repo("stabilityai", "models") / "sd-vae-ft-mse").symlink_to(sd_vae_folder)
    config = AutoencoderTiny.load_config("stabilityai/sd-vae-ft-mse")
    assert config["block_out_channels"] == [128, 256, 512, 512]
    hf_hub_download("stabilityai/sd-vae-ft-mse", "diffusion_pytorch_model.safetensors")
    hf_hub_download("stabilityai/sd-vae-ft-mse", "diffusion_pytorch_model.safetensors")
    assert len(little_hub.requests("*/sd-vae-ft-mse/*.safetensors", "GET")) == 1
