"""Shapes of pictures that are not square: a few of about equal area, and the one that suits a picture best."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

from PIL import Image
from PIL.TiffImagePlugin import IMAGELENGTH, IMAGEWIDTH, TiffImageFile

from liquid_diffusion.data.transforms import Shape

_MOST_ASPECT = 2.0  # long side to short side; a picture that is longer still is cropped or padded to it
_EXIF_ORIENTATION, _ON_ITS_SIDE = 0x0112, (5, 6, 7, 8)  # there may be anything else, which turns nothing


def bucket_shapes(side: int, multiple: int) -> list[Shape]:
    """Shapes of about side x side pixels, whose sides are divisible by `multiple`: from upright to wide, up to 1 : 2.

    Args:
        side: of the square among them, divisible by `multiple`.
        multiple: the codec's factor times the model's.
    """
    shapes = set()
    for short in range(multiple, side + 1, multiple):
        long = round(side**2 / short / multiple) * multiple
        if long <= _MOST_ASPECT * short:
            shapes |= {(short, long), (long, short)}
    return sorted(shapes, key=lambda shape: shape[1] / shape[0])


def nearest_shape(size: tuple[int, int], shapes: Sequence[Shape]) -> int:
    """Number of the shape whose aspect ratio is nearest to a picture's, by their quotient.

    Args:
        size: width and height of the picture, as PIL has them.
        shapes: heights and widths.
    """
    aspect = math.log(size[0] / size[1])
    return min(range(len(shapes)), key=lambda i: abs(math.log(shapes[i][1] / shapes[i][0]) - aspect))


def size_of(content: bytes) -> tuple[int, int]:
    """Width and height of an encoded picture when it is turned as its EXIF says; only its header is decoded.

    Raises:
        Exception: whatever a decoder raises at damaged bytes.
    """
    with Image.open(io.BytesIO(content)) as image:
        width, height = image.size
        if isinstance(image, TiffImageFile):  # whose size newer versions of Pillow turn as they open it
            width, height = image.tag_v2[IMAGEWIDTH], image.tag_v2[IMAGELENGTH]
        try:  # not image.getexif(), which decodes a whole PNG to look behind its pixels
            orientation = Image.Image.getexif(image).get(_EXIF_ORIENTATION, 1)
        except Exception:  # what can't be read as EXIF turns nothing, see `transforms.to_rgb`
            orientation = 1
        return (height, width) if orientation in _ON_ITS_SIDE else (width, height)
