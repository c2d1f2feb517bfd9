"""The demo's HTML, read again by the standard library's parser."""

from __future__ import annotations

import base64
import io
import zipfile
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image, ImageSequence

from liquid_diffusion.demo import page
from liquid_diffusion.demo.drawing import Frame, PathPoint

EVIL = '"><script>alert(1)</script>'


class Reader(HTMLParser):
    """All tags with their attributes, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def download(self, name: str) -> bytes:
        (link,) = [a for a in self.all("a") if a["download"] == name]
        return base64.b64decode(link["href"].split("base64,")[1])


def image_of(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.split("base64,")[1])))


def pictures(count: int, side: int = 16) -> list[Image.Image]:
    draws = np.random.default_rng(0)
    return [Image.fromarray(draws.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(count)]


def test_finished_pictures_can_be_downloaded_as_they_are() -> None:
    images = pictures(3)
    html = Reader(page.drawn(Frame(3, 4, 0.25, images), ["cat", EVIL, ""], [7, 8, 9], "done & dusted"))
    for shown, image in zip(html.all("img"), images, strict=True):
        assert np.array_equal(np.asarray(image_of(shown["src"])), np.asarray(image))
    with zipfile.ZipFile(io.BytesIO(html.download("pictures.zip"))) as archive:
        assert archive.namelist() == ["000007.png", "000008.png", "000009.png"]
        with archive.open("000008.png") as file, Image.open(file) as one:
            assert np.array_equal(np.asarray(one), np.asarray(images[1]))
    assert html.download("000009.png") == base64.b64decode(html.all("img")[2]["src"].split("base64,")[1])
    assert Image.open(io.BytesIO(html.download("grid.png"))).size == (2 * 66 - 2, 2 * 66 - 2)
    assert "done & dusted" in html.text
    assert not html.all("script")
    assert EVIL in html.text


@pytest.mark.parametrize(("side", "kind"), [(16, "png"), (128, "webp")])
def test_pictures_on_the_way_tell_how_far_they_are(side: int, kind: str) -> None:
    html = Reader(page.drawn(Frame(1, 4, 0.75, pictures(2, side)), ["", ""], [0, 1]))
    assert html.all("progress") == [{"value": "2", "max": "4"}]
    assert "step 2 of 4, t = 0.75" in html.text
    assert not html.all("a")
    assert all(shown["src"].startswith(f"data:image/{kind};") for shown in html.all("img"))
    assert any("ld-pixels" in div.get("class", "") for div in html.all("div")) == (kind == "png")


def test_a_path_has_two_rows() -> None:
    images = pictures(6)
    html = Reader(page.path_strip([PathPoint(t, images[i], images[3 + i]) for i, t in enumerate((1, 0.5, 0))], EVIL))
    assert [shown["alt"] for shown in html.all("img")][:2] == ["the state at t = 1.00", "the prediction at t = 1.00"]
    assert np.array_equal(np.asarray(image_of(html.all("img")[3]["src"])), np.asarray(images[4]))
    sheet = Image.open(io.BytesIO(html.download("path.png")))
    assert sheet.width > 3 * 64
    assert sheet.height > 2 * 64
    assert not html.all("script")


def test_a_morph_goes_there_and_back_in_large_pixels() -> None:
    images = [Image.new("RGB", (16, 16), (60 * i, 0, 0)) for i in range(4)]
    html = Reader(page.morph_strip(images, "seed 1 to seed 2"))
    gif = Image.open(io.BytesIO(html.download("morph.gif")))
    reds = [frame.convert("RGB").getpixel((0, 0)) for frame in ImageSequence.Iterator(gif)]
    assert [red[0] for red in reds if isinstance(red, tuple)] == [0, 60, 120, 180, 120, 60]
    assert gif.size == (256, 256)
    assert gif.info["loop"] == 0
    assert len(html.all("img")) == 1 + 4


def test_text_is_escaped_everywhere() -> None:
    for html in (page.head(EVIL, [EVIL]), page.empty(EVIL)):
        assert not Reader(html).all("script")
        assert EVIL in Reader(html).text
