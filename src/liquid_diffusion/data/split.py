"""Which pictures are held out: a function of a picture's own bytes, so that it is the same however they are read."""

from __future__ import annotations

import hashlib

from liquid_diffusion.data.parallel import map_pictures
from liquid_diffusion.data.sources import BadPictureError, Source
from liquid_diffusion.errors import UserError


def is_held_out(content: bytes, fraction: float) -> bool:
    """Whether a picture belongs to the held-out ones, which a model is never trained on.

    Two copies of a picture are always on the same side.

    Args:
        content: the picture as it is stored, encoded.
        fraction: share of pictures held out, in [0, 1).
    """
    digest = hashlib.blake2b(content, digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def split(source: Source, fraction: float) -> tuple[list[int], list[int]]:
    """Numbers of the pictures to train on, and of those held out.

    What can't be read is left to the training, which names it.

    Raises:
        UserError: nothing is left to train on.
    """
    if fraction == 0:
        return list(range(len(source))), []

    def chosen(index: int) -> bool:
        try:
            return is_held_out(source.content(index), fraction)
        except BadPictureError:
            return False

    train: list[int] = []
    held_out: list[int] = []
    for index, held in enumerate(map_pictures(chosen, range(len(source)), "Splitting")):
        (held_out if held else train).append(index)
    if not train:
        raise UserError(f"All {len(source)} pictures are held out; train with a smaller --val-fraction.")
    return train, held_out
