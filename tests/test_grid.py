from __future__ import annotations

import numpy as np
from PIL import Image

from liquid_diffusion.grid import draw_grid

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
