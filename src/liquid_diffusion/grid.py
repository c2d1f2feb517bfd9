"""Many pictures on one sheet."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

_GAP = 2
_LINE = 16
_FONT_SIZE = 13
# of Linux, Windows and macOS, for names in letters that Pillow's own font does not have; Pillow knows where they lie
_OTHER_FONTS = (
    "DejaVuSans.ttf",
    "NotoSansCJK-Regular.ttc",
    "NotoSansArabic-Regular.ttf",
    "NotoSansDevanagari-Regular.ttf",
    "segoeui.ttf",
    "msgothic.ttc",
    "msyh.ttc",
    "malgun.ttf",
    "Arial Unicode.ttf",
)
_NO_LETTER = "\U0010ffff"  # a code point that will never be a letter


def draw_grid(
    images: Sequence[Image.Image],
    columns: int,
    row_names: Sequence[str] = (),
    column_names: Sequence[str] = (),
    least_side: int = 64,
    rows_together: int = 1,
) -> Image.Image:
    """Pictures of one size in rows, on white.

    Args:
        images: the pictures, row by row.
        columns: pictures in a row.
        row_names: written at the left of each row, if any; its number where no font of the machine has the letters.
        column_names: written above each column, if any.
        least_side: smaller pictures are enlarged by a whole number of times, pixel by pixel, to be seen at all.
        rows_together: so many rows belong together, and stand apart from the next ones.
    """
    side = images[0].size
    scale = max(1, -(-least_side // max(side)))
    width, height = side[0] * scale, side[1] * scale
    rows = -(-len(images) // columns)
    font = _font_for([*row_names, *column_names])
    row_names = [name if _can_write(font, name) else f"{row}" for row, name in enumerate(row_names)]
    left = max((int(font.getlength(name)) + 12 for name in row_names), default=0)
    tops = [_LINE + 4 if column_names else 0]
    apart = _GAP if rows_together == 1 else 5 * _GAP
    for row in range(1, rows + 1):
        tops.append(tops[-1] + height + (_GAP if row % rows_together else apart))
    size = (left + columns * (width + _GAP) - _GAP, tops[rows - 1] + height)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        place = (left + i % columns * (width + _GAP), tops[i // columns])
        sheet.paste(image.resize((width, height), Image.Resampling.NEAREST), place)
    for row, name in enumerate(row_names):
        draw.text((4, tops[row] + height // 2), name, "black", font, anchor="lm")
    for column, name in enumerate(column_names):
        draw.text((left + column * (width + _GAP) + width // 2, 2), name, "black", font, anchor="mt")
    return sheet


def _font_for(names: Sequence[str]) -> ImageFont.FreeTypeFont:
    """The font that can write most of the names: Pillow's own, or one of the machine's."""
    own = ImageFont.load_default(_FONT_SIZE)
    assert isinstance(own, ImageFont.FreeTypeFont)
    best = own
    for file in _OTHER_FONTS:
        if all(_can_write(best, name) for name in names):
            break
        with contextlib.suppress(OSError):  # not on this machine
            font = ImageFont.truetype(file, _FONT_SIZE)
            best = max(best, font, key=lambda font: sum(_can_write(font, name) for name in names))
    return best


def _can_write(font: ImageFont.FreeTypeFont, name: str) -> bool:
    """Whether a font has a shape for every letter, and not only the box that stands for those which it has not."""
    box = bytes(font.getmask(_NO_LETTER))
    return all(bytes(font.getmask(letter)) != box for letter in set(name) - {" "})
