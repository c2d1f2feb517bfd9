from __future__ import annotations

import io
import random

import numpy as np
import pytest
import torch
from PIL import Image

from liquid_diffusion.data.transforms import to_float, to_pil, to_rgb, to_shape, to_uint8


def stored(image: Image.Image, kind: str, **options: object) -> Image.Image:
    """The picture as it comes back from a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)  # type: ignore[arg-type]
    return Image.open(file)


def colour(image: Image.Image) -> tuple[int, ...]:
    pixel = to_rgb(image).getpixel((1, 1))
    assert isinstance(pixel, tuple)
    return tuple(int(value) for value in pixel)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("RGB", (4, 4), (10, 20, 30)), (10, 20, 30)),
        (Image.new("RGBA", (4, 4), (10, 20, 30, 0)), (255, 255, 255)),
        (Image.new("RGBA", (4, 4), (0, 0, 0, 128)), (127, 127, 127)),
        (Image.new("LA", (4, 4), (100, 0)), (255, 255, 255)),
        (Image.new("L", (4, 4), 77), (77, 77, 77)),
        (Image.new("1", (4, 4), 1), (255, 255, 255)),
        (stored(Image.new("CMYK", (4, 4), (255, 0, 0, 0)), "TIFF"), (0, 255, 255)),
        (stored(Image.fromarray(np.full((4, 4), 65535, np.uint16)), "PNG"), (255, 255, 255)),
        (stored(Image.fromarray(np.full((4, 4), 257 * 51, np.uint16)), "PNG"), (51, 51, 51)),
        (stored(Image.fromarray(np.full((4, 4), 200, np.uint16)), "PNG"), (1, 1, 1)),
        (stored(Image.fromarray(np.full((4, 4), 300, np.uint16)), "PNG", transparency=300), (255, 255, 255)),
        (stored(Image.fromarray(np.full((4, 4), 0.8, np.float32)), "TIFF"), (204, 204, 204)),
        (stored(Image.fromarray(np.full((4, 4), 1.004, np.float32)), "TIFF"), (255, 255, 255)),
        (stored(Image.new("RGB", (4, 4), (10, 20, 30)), "PNG", exif=b"MM\x00garbled"), (10, 20, 30)),
        (stored(Image.new("RGB", (4, 4), (200, 0, 0)).quantize(4), "PNG"), (200, 0, 0)),
        (stored(Image.new("P", (4, 4), 0), "PNG", transparency=0), (255, 255, 255)),
        (stored(Image.new("RGB", (4, 4), (9, 9, 9)), "PNG", transparency=(9, 9, 9)), (255, 255, 255)),
    ],
)
def test_any_picture_becomes_rgb(image: Image.Image, expected: tuple[int, ...]) -> None:
    assert to_rgb(image).mode == "RGB"
    assert colour(image) == pytest.approx(expected, abs=1)


def test_numbers_that_are_no_lightness() -> None:
    values = np.full((4, 4), 0.5, np.float32)
    values[1, 1] = np.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        to_rgb(stored(Image.fromarray(values), "TIFF"))


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[274] = 6  # the camera was turned: the picture has to be turned clockwise
    image = Image.new("RGB", (6, 2), "white")
    image.putpixel((0, 0), (255, 0, 0))
    turned = to_rgb(stored(image, "PNG", exif=exif))
    assert turned.size == (2, 6)
    assert turned.getpixel((1, 0)) == (255, 0, 0)


def test_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (4, 4), name) for name in ("red", "blue")]
    assert colour(stored(frames[0], "GIF", save_all=True, append_images=frames[1:])) == (255, 0, 0)


def test_the_middle_is_taken() -> None:
    image = Image.new("RGB", (90, 30), "red")
    image.paste("blue", (30, 0, 60, 30))
    assert set(to_shape(image, (30, 30)).get_flattened_data()) == {(0, 0, 255)}
    assert to_shape(image, (8, 8)).size == (8, 8)
    assert to_shape(image, (8, 16)).size == (16, 8)


def test_padding_keeps_the_whole_picture_on_white() -> None:
    """Every colour of a 4 x 2 picture in its place, with as much white above as below."""
    image = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(2, 4, 3))
    padded = np.asarray(to_shape(image, (4, 4), "pad"))
    assert np.array_equal(padded[1:3], np.asarray(image))
    assert (padded[[0, 3]] == 255).all()


@pytest.mark.parametrize(
    ("size", "lines"), [((1200, 8), (1, 64)), ((8, 1200), (64, 1)), ((128, 1), (1, 64)), ((1, 1), (64, 64))]
)
def test_padding_keeps_the_thinnest_picture(size: tuple[int, int], lines: tuple[int, int]) -> None:
    """What would come out less than a pixel thick is one pixel thick."""
    pixels = np.asarray(to_shape(Image.new("RGB", size, "black"), (64, 64), "pad"))
    black = (pixels == 0).all(-1)
    assert (black.any(1).sum(), black.any(0).sum()) == lines
    assert (pixels[~black] == 255).all()


def test_random_crops_are_parts_of_the_picture() -> None:
    """A picture whose colours are its coordinates tells what was cut out: 0.8 to 1 of the largest, anywhere in it."""
    height, width = 60, 200
    y, x = np.mgrid[:height, :width]
    image = Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))
    sides, lefts = [], []
    for seed in range(200):
        cut = np.asarray(to_shape(image, (16, 32), "random", random.Random(seed))).astype(float)
        step_y, step_x = (cut[-2, 0, 1] - cut[1, 0, 1]) / 13, (cut[0, -2, 0] - cut[0, 1, 0]) / 29
        assert step_x == pytest.approx(step_y, abs=0.2)  # nothing is stretched
        sides.append(step_x * 32 / 120)
        lefts.append(cut[0, 1, 0])
    assert 0.77 < min(sides) < 0.83
    assert 0.97 < max(sides) < 1.03
    assert min(lefts) < 12
    assert max(lefts) > 85
    again, other = (to_shape(image, (16, 32), "random", random.Random(seed)) for seed in (199, 198))
    assert np.array_equal(np.asarray(again), cut)
    assert not np.array_equal(np.asarray(other), cut)
    assert to_shape(image, (16, 32), "random") == to_shape(image, (16, 32))  # without draws the middle


def test_between_bytes_and_numbers() -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    numbers = to_float(to_uint8(Image.fromarray(pixels)))
    assert numbers.shape == (3, 16, 16)
    assert (numbers.min().item(), numbers.max().item()) == (-1, 1)
    assert np.array_equal(np.asarray(to_pil(numbers[None])[0]), pixels)
    assert np.asarray(to_pil(torch.full((1, 3, 2, 2), 7.0))[0]).max() == 255
