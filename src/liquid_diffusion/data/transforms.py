"""One function brings any picture to RGB, one brings it to shape; between PIL, uint8 and [-1, 1]."""

from __future__ import annotations

import random

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

Shape = tuple[int, int]  # height and width in pixels

# A random crop is at least this part of the largest possible one in each direction: less would cut subjects in half.
_LEAST_CROP = 0.8


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL picture as RGB: turned as its EXIF says, transparency put on white, greyscale and 16 bit converted.

    An animation gives its first frame.

    Raises:
        ValueError: a pixel is not a finite number.
    """
    image = _upright(image)
    if image.mode.startswith(("I", "F")):
        # PIL clips wide integers at 255 when it converts them: a 16-bit picture would come out white
        values = np.array(image, dtype=np.float64)
        if not np.isfinite(values).all():
            raise ValueError("it holds numbers that are no lightness: NaN or infinity")
        # "I;16" is 16 bits by its name; the range of "I" and "F" has to be guessed from what is there, and what goes to
        # 1 may go a little beyond it where it was resampled
        highest, one = values.max(initial=0), 2 if image.mode.startswith("F") else 1
        transparent = image.info.get("transparency")  # one lightness; the 8-bit picture to come knows nothing of it
        scale = 65535.0 if image.mode.startswith("I;16") or highest > 255 else 1.0 if highest <= one else 255.0
        if isinstance(transparent, int):
            values[values == transparent] = scale
        image = Image.fromarray((values / scale * 255).round().clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    """A picture turned as its EXIF says, or as it is where that can't be read."""
    image.load()  # first: that it is damaged is no matter of the EXIF
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # SyntaxError, struct.error, ...
        return image


def to_shape(image: Image.Image, shape: Shape, crop: str = "center", draws: random.Random | None = None) -> Image.Image:
    """An RGB picture of exactly `shape`, by Lanczos.

    Args:
        image: of any size.
        shape: height and width.
        crop: "center" takes the largest part of that aspect ratio from the middle; "random" takes between 0.8 and 1
            of its sides, from anywhere; "pad" keeps the whole picture and puts it in the middle of white, as
            transparency is put on white.
        draws: where "random" takes its numbers from; without it the middle is taken.
    """
    height, width = shape
    if crop == "pad":
        if image.height * width < image.width:  # so thin that Pillow would leave nothing of it
            image = image.resize((width, 1), Image.Resampling.LANCZOS)
        elif image.width * height < image.height:
            image = image.resize((1, height), Image.Resampling.LANCZOS)
        return ImageOps.pad(image, (width, height), Image.Resampling.LANCZOS, color="white")
    if crop == "center" or draws is None:
        return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    largest = min(image.width / width, image.height / height) * draws.uniform(_LEAST_CROP, 1)
    box_width, box_height = largest * width, largest * height
    left, top = draws.uniform(0, image.width - box_width), draws.uniform(0, image.height - box_height)
    box = (left, top, min(left + box_width, image.width), min(top + box_height, image.height))
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box)


def to_uint8(image: Image.Image) -> Tensor:
    """RGB picture -> (3, H, W) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def to_float(images: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1], any shape."""
    return images.float() / 127.5 - 1


def to_pil(images: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [-1, 1] -> B RGB pictures."""
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(picture) for picture in pixels.permute(0, 2, 3, 1).cpu().numpy()]
