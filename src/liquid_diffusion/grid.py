"""Many pictures on one sheet."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

_GAP = 2
_LINE = 16


def draw_grid(
    images: Sequence[Image.Image],
    columns: int,
    row_names: Sequence[str] = (),
    column_names: Sequence[str] = (),
    least_side: int = 64,
) -> Image.Image:
    """Pictures of one size in rows, on white.

    Args:
        images: the pictures, row by row.
        columns: pictures in a row.
        row_names: written at the left of each row, if any.
        column_names: written above each column, if any.
        least_side: smaller pictures are enlarged by a whole number of times, pixel by pixel, to be seen at all.
    """
    side = images[0].size
    scale = max(1, -(-least_side // max(side)))
    width, height = side[0] * scale, side[1] * scale
    rows = -(-len(images) // columns)
    font = ImageFont.load_default(13)
    left = max((int(font.getlength(name)) + 12 for name in row_names), default=0)
    top = _LINE + 4 if column_names else 0
    sheet = Image.new("RGB", (left + columns * (width + _GAP) - _GAP, top + rows * (height + _GAP) - _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        place = (left + i % columns * (width + _GAP), top + i // columns * (height + _GAP))
        sheet.paste(image.resize((width, height), Image.Resampling.NEAREST), place)
    for row, name in enumerate(row_names):
        draw.text((4, top + row * (height + _GAP) + height // 2), name, "black", font, anchor="lm")
    for column, name in enumerate(column_names):
        draw.text((left + column * (width + _GAP) + width // 2, 2), name, "black", font, anchor="mt")
    return sheet
