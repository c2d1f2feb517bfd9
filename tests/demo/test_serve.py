"""The demo as people meet it: by gradio's own client, by plain requests for files, and in a browser."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from PIL import Image

from liquid_diffusion.cli import main
from liquid_diffusion.config import TrainConfig
from liquid_diffusion.demo.serve import Demo
from liquid_diffusion.loading import load_pipeline
from liquid_diffusion.pipeline import LiquidDiffusionPipeline
from liquid_diffusion.training.trainer import Trainer

Make = Callable[..., LiquidDiffusionPipeline]
WISH = {"label": "Flags", "seed": 3, "steps": 3, "guidance": 2, "solver": "euler"}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@dataclass
class Served:
    """A demo that runs, its run folder and its address."""

    run: Path
    url: str
    client: Client


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def serving(run: str, place: Path, end: signal.Signals = signal.SIGINT) -> Iterator[str]:
    """`liquid-diffusion demo` as a process of its own, working in a folder, and ended by Ctrl-C or as a service is."""
    port, own = free_port(), place / f"tmp-{run.replace('/', '-')}"
    own.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "liquid_diffusion", "demo", run, "--port", str(port)],
        cwd=place, env={**os.environ, "TMPDIR": str(own)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line == f"http://127.0.0.1:{port}/ shows {run}; Ctrl-C ends it.\n", process.communicate()
        (private,) = own.glob("liquid-diffusion-demo-*")
        assert private.stat().st_mode & 0o077 == 0  # nobody else reads what gradio writes
        yield f"http://127.0.0.1:{port}/"
        process.send_signal(end)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert errors.endswith("liquid-diffusion: stopped.\n"), errors
    assert process.returncode == 130
    assert not private.exists()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps."""
    out = tmp_path_factory.mktemp("place") / "emoji"
    settings: dict[str, Any] = {"image_size": 16, "model": "nano", "batch_size": 8, "steps": 2, "precision": "fp32"}
    Trainer(TrainConfig(out=str(out), log_every=1, **settings)).run()
    return out


@pytest.fixture(scope="module")
def served(run: Path) -> Iterator[Served]:
    """The demo of the run, which lies in the working directory as it would for a person."""
    with serving("emoji", run.parent) as url:
        yield Served(run, url, Client(url, verbose=False, analytics_enabled=False))


def images_in(html: str) -> list[str]:
    return re.findall(r'<img src="data:image/([a-z]+);base64,', html)


def test_the_steps_arrive_one_by_one(served: Served) -> None:
    job = served.client.submit(**WISH, n=2, view="noise turning into pictures", api_name="/draw")
    job.result(timeout=60)
    frames = job.outputs()
    assert [re.findall(r"step \d of 3", frame) for frame in frames] == [["step 1 of 3"], ["step 2 of 3"], []]
    assert all(images_in(frame) == ["png", "png"] for frame in frames)
    assert "seed 4" in frames[-1]
    assert 'download="pictures.zip"' in frames[-1]


def test_path_and_morph(served: Served) -> None:
    strip = served.client.predict(**WISH, api_name="/path")
    assert len(images_in(strip)) == 2 * 4  # three evaluations and the end
    moving = served.client.predict(**WISH, other_seed=8, frames=3, api_name="/morph")
    assert images_in(moving) == ["gif", "png", "png", "png"]
    assert "Flags, seed 3 to seed 8" in moving


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": -3}, "A seed must lie between 0 and 2^32 - 1, not -3."),
        ({"seed": None}, "The seed must be a whole number."),
        ({"n": 65}, "65"),  # gradio's own words about the slider
        ({"n": 1.5}, "The number of pictures must be a whole number."),
        ({"steps": 1000}, "1000"),
        ({"label": "horse"}, "horse"),
        ({"solver": "rk4"}, "rk4"),
        ({"view": "everything"}, "everything"),
    ],
    ids=str,
)
def test_bad_input_is_answered_in_words(served: Served, changes: dict[str, object], words: str) -> None:
    wish = {**WISH, "n": 1, "view": "what the model expects", **changes}
    with pytest.raises(AppError, match=re.escape(words)):
        served.client.predict(**wish, api_name="/draw")


def test_no_file_of_the_machine_is_reachable(served: Served, tmp_path: Path) -> None:
    """Neither by gradio's routes for files, nor by an upload, nor by a file in place of a widget's value."""
    (tmp_path / "mine.txt").write_text("mine")
    checkpoint = served.run / "checkpoints" / "step-000002" / "model.safetensors"
    assert checkpoint.is_file()
    targets = [
        "/etc/passwd", str(checkpoint), "emoji/checkpoints/step-000002/model.safetensors", "emoji/config.yaml",
        "../place/emoji/config.yaml", str(served.run / "samples" / "step-000002.png"), str(tmp_path / "mine.txt"),
        str(Path(sys.modules["liquid_diffusion"].__file__ or "")), "file:///etc/passwd",
    ]  # fmt: skip
    with httpx.Client(base_url=served.url, timeout=20) as http:
        for target in targets:
            for route in ("gradio_api/file=", "gradio_api/file/", "file=", "static/", "assets/", "gradio_api/proxy=",
                          "gradio_api/stream/"):  # fmt: skip
                for spelt in (target, quote(target, safe=""), "../" * 12 + target, quote("../" * 12 + target, safe="")):
                    answer = http.get(f"{served.url}{route}{spelt}")
                    assert 400 <= answer.status_code < 500, (route, spelt, answer.text[:80])
        answer = http.post("/gradio_api/upload", files={"files": ("x.bin", b"x" * 4096)})
        assert answer.status_code == 413, answer.text
        for path in ("/monitoring", "/gradio_api/monitoring/summary", "/gradio_api/runs"):
            assert http.get(path).status_code >= 400, path
        # a file in place of a widget's value, as a client of one's own could send it
        file = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}
        event = http.post("/gradio_api/call/path", json={"data": [file, 0, 2, 1, "euler"]}).json()["event_id"]
        said = http.get(f"/gradio_api/call/path/{event}").text
        assert said.startswith("event: error")
        assert "root:" not in said


def test_a_model_alone_without_classes_on_latents(
    make_pipeline: Callable[..., LiquidDiffusionPipeline], tmp_path: Path
) -> None:
    make_pipeline(classes=0, with_vae=True).save_pretrained(tmp_path / "model")
    with serving("model", tmp_path, signal.SIGTERM) as url:
        config = httpx.get(f"{url}config", timeout=20).json()
        assert "this is a model alone" in str(config)
        hidden = [c["props"]["label"] for c in config["components"] if c["props"].get("visible") is False]
        assert hidden == ["Class", "Guidance"]
        client = Client(url, verbose=False, analytics_enabled=False)
        job = client.submit(seed=1, steps=10, n=2, api_name="/draw")
        job.result(timeout=60)
        assert [len(images_in(frame)) for frame in job.outputs()] == [2] * 5  # not all steps: decoding takes longer


def test_it_ends_while_it_draws(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "emoji")
    with serving("emoji", tmp_path, signal.SIGTERM) as url:
        client = Client(url, verbose=False, analytics_enabled=False)
        job = client.submit(seed=1, steps=100, n=16, api_name="/draw")
        while not job.outputs():
            time.sleep(0.05)
        assert not job.done()


def test_what_a_run_tells_of_its_training(run: Path) -> None:
    demo = Demo(load_pipeline(str(run)), str(run))
    pictures, curve = demo.history()
    assert [caption for _, caption in pictures] == ["step 2"]
    with Image.open(run / "samples" / "step-000002.png") as grid:
        assert pictures[0][0].size == grid.size
    assert list(curve["step"]) == [1, 2]
    assert "5.5 M parameters · 16 px · 9 classes · trained on emoji · 2 steps" in demo.head()


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["demo", "somewhere", "--port", str(taken.getsockname()[1])]) == 2
    assert "(Address already in use); choose another --port" in capsys.readouterr().err


def test_a_host_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "somewhere", "--host", "no such host"]) == 2
    assert "can't be used (Name or service not known)" in capsys.readouterr().err


def test_a_missing_extra_is_one_sentence(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["demo", "somewhere"]) == 2
    assert (
        capsys.readouterr().err == "liquid-diffusion: The demo needs an extra: pip install 'liquid-diffusion[demo]'.\n"
    )


def test_mistakes_of_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "./nowhere"]) == 2
    assert "no run './nowhere'" in capsys.readouterr().err
    assert main(["demo", "./nowhere", "--port", "70000"]) == 2
    assert "port must lie between 1 and 65535" in capsys.readouterr().err


@pytest.mark.skipif(CHROMIUM is None, reason="NO CHROMIUM HERE: the demo was not tried in a browser")
def test_in_a_browser(served: Served) -> None:
    from playwright.sync_api import expect, sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        requests: list[str] = []
        problems: list[str] = []
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(served.url)
        page.locator("#draw").click()
        page.wait_for_selector("#pictures a[download='pictures.zip']", timeout=60_000)
        images = page.locator("#pictures img")
        expect(images).to_have_count(16)
        seen = images.first.evaluate("i => [i.naturalWidth, i.clientWidth, getComputedStyle(i).imageRendering]")
        assert seen[0] == 16
        assert seen[1] >= 100  # enlarged, and not blurred
        assert seen[2] == "pixelated"
        with page.expect_download() as download:
            page.locator("#pictures a[download='pictures.zip']").click()
        with zipfile.ZipFile(io.BytesIO(download.value.path().read_bytes())) as archive:
            assert len(archive.namelist()) == 16
        page.locator("#seed input").fill("-3")
        page.locator("#draw").click()
        expect(page.get_by_text("A seed must lie between 0 and 2^32 - 1, not -3.")).to_be_visible(timeout=20_000)
        page.get_by_role("tab", name="Training").click()
        expect(page.locator("#grids img").first).to_be_visible(timeout=20_000)
        expect(page.locator("#loss canvas, #loss svg").first).to_be_visible(timeout=20_000)
        browser.close()
    assert not problems
    assert [url for url in requests if not url.startswith((served.url, "data:", "blob:"))] == []
