"""One function brings any picture to RGB, one brings it to size; between PIL, uint8 and [-1, 1]."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL picture as RGB: turned as its EXIF says, transparency put on white, greyscale and 16 bit converted.

    An animation gives its first frame.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        # PIL clips wide integers at 255 when it converts them: a 16-bit picture would come out white
        values = np.asarray(image, dtype=np.float64)
        # "I;16" is 16 bits by its name; the range of "I" and "F" has to be guessed from what is there
        highest = values.max(initial=0)
        scale = 65535.0 if image.mode.startswith("I;16") or highest > 255 else 1.0 if highest <= 1 else 255.0
        image = Image.fromarray((values / scale * 255).round().clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def resize_and_crop(image: Image.Image, size: int) -> Image.Image:
    """The middle square of an RGB picture, `size` x `size`, by Lanczos."""
    return ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)


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
