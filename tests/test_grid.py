from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFont

from liquid_diffusion.grid import _can_write, _font_for, draw_grid

COLOURS = ["red", "green", "blue", "black", "yellow"]


def test_pictures_stand_row_by_row() -> None:
    images = [Image.new("RGB", (80, 64), colour) for colour in COLOURS]
    sheet = draw_grid(images, columns=2, row_names=["first", "second row"], column_names=["a", "b"])
    left, top = sheet.width - 2 * 80 - 2, sheet.height - 3 * 64 - 2 * 2
    for i, image in enumerate(images):
        centre = (left + i % 2 * 82 + 40, top + i // 2 * 66 + 32)
        assert sheet.getpixel(centre) == image.getpixel((0, 0))
    assert sheet.getpixel((left + 122, top + 2 * 66 + 32)) == (255, 255, 255)
    names = sheet.crop((0, 0, left, sheet.height)).convert("L")
    assert np.asarray(names).min() < 128  # something is written there


def test_small_pictures_are_enlarged_without_blur() -> None:
    image = Image.new("RGB", (16, 16), "white")
    image.putpixel((3, 4), (255, 0, 0))
    sheet = draw_grid([image], columns=1)
    assert sheet.size == (64, 64)
    assert sheet.getpixel((3 * 4, 4 * 4)) == sheet.getpixel((3 * 4 + 3, 4 * 4 + 3)) == (255, 0, 0)


def test_rows_that_belong_together_stand_apart_from_the_next() -> None:
    images = [Image.new("RGB", (64, 64), "red") for _ in range(4)]
    sheet = np.asarray(draw_grid(images, columns=1, rows_together=2))
    white = (sheet[:, 0] == 255).all(axis=1).nonzero()[0]
    assert white.tolist() == [64, 65, *range(130, 140), 204, 205]
    assert len(sheet) == 4 * 64 + 2 + 10 + 2


@pytest.mark.parametrize("name", ["Café", "кошка", "γάτα"])
def test_names_in_other_letters_are_written_or_numbered(name: str) -> None:
    image = Image.new("RGB", (64, 64), "red")
    beside = {text: draw_grid([image], 1, row_names=[text]) for text in (name, "0", "\U0010ffff")}
    assert beside["\U0010ffff"] == beside["0"]  # no font has it: the row's number
    font = _font_for([name])
    if _can_write(font, name):
        assert beside[name].width == int(font.getlength(name)) + 12 + 64
    else:  # a machine without such a font
        assert beside[name] == beside["0"]


def test_a_font_without_a_letter_is_known_by_its_box() -> None:
    own = ImageFont.load_default(13)
    assert isinstance(own, ImageFont.FreeTypeFont)
    assert _can_write(own, "Animals & Nature")
    assert not _can_write(own, "кошка")
