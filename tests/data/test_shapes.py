from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageOps

from liquid_diffusion.data.shapes import bucket_shapes, nearest_shape, size_of


@pytest.mark.parametrize(("side", "multiple", "count"), [(256, 32, 5), (512, 32, 9), (64, 8, 5), (32, 32, 1)])
def test_shapes_of_about_equal_area(side: int, multiple: int, count: int) -> None:
    shapes = bucket_shapes(side, multiple)
    assert len(shapes) == count
    assert (side, side) in shapes
    for height, width in shapes:
        assert height % multiple == width % multiple == 0
        assert 0.5 <= width / height <= 2
        assert abs(height * width - side**2) <= multiple / 2 * max(height, width)  # the rounding of one side
        assert (width, height) in shapes


def test_nearest_shape_crops_least() -> None:
    """The chosen shape is the one that keeps most of the picture, computed from areas and not from ratios."""
    shapes = bucket_shapes(256, 32)
    draws = np.random.default_rng(0)
    for width, height in draws.integers(100, 1000, (200, 2)):
        kept = [min(width / w, height / h) ** 2 * w * h for h, w in shapes]
        assert kept[nearest_shape((width, height), shapes)] == pytest.approx(max(kept))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_size_is_that_of_the_turned_picture(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = io.BytesIO()
    Image.new("RGB", (6, 2)).save(stored, kind, exif=exif)
    with Image.open(stored) as image:
        assert size_of(stored.getvalue()) == ImageOps.exif_transpose(image).size


def with_orientation(kind: int, count: int, value: bytes) -> bytes:
    """The EXIF of a picture whose orientation has any TIFF type, and four bytes of value."""
    return b"Exif\0\0MM\0*" + struct.pack(">IHHHI", 8, 1, 0x0112, kind, count) + value + bytes(4)


@pytest.mark.parametrize(
    "exif",
    [
        with_orientation(3, 1, struct.pack(">HH", 9, 0)),
        with_orientation(3, 1, struct.pack(">HH", 6 << 8, 0)),  # 6 in the other order of bytes
        with_orientation(2, 2, b"6\0\0\0"),
    ],
    ids=["9", "1536", "text"],
)
def test_an_orientation_that_is_none_turns_nothing(exif: bytes) -> None:
    stored = io.BytesIO()
    Image.new("RGB", (6, 2)).save(stored, "JPEG", exif=exif)
    with Image.open(stored) as image:
        assert image.getexif()[0x0112] in (9, 1536, "6")
        assert size_of(stored.getvalue()) == ImageOps.exif_transpose(image).size == (6, 2)


def test_only_the_header_is_needed() -> None:
    stored = io.BytesIO()
    Image.effect_noise((300, 200), 50).save(stored, "PNG")
    assert size_of(stored.getvalue()[:1000]) == (300, 200)


def test_what_is_no_exif_turns_nothing() -> None:
    stored = io.BytesIO()
    Image.new("RGB", (6, 2)).save(stored, "PNG", exif=b"MM\x00garbled")
    assert size_of(stored.getvalue()) == (6, 2)
