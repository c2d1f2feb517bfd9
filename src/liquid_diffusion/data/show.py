"""What `liquid-diffusion datasets` does: the table of known data sets, or a grid of what a model would be fed."""

from __future__ import annotations

import itertools
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from liquid_diffusion.config import ShowConfig, TrainConfig
from liquid_diffusion.data.registry import describe
from liquid_diffusion.errors import UserError
from liquid_diffusion.resolve import FACTORS, check_size, resolve
from liquid_diffusion.writing import save_picture, writing_to

if TYPE_CHECKING:  # the table of data sets comes at once
    from torch import Tensor

_COLUMNS = 8
_ROWS = 4  # where there are no classes
_MOST_CLASSES = 10
_LOOKED_AT = 400  # pictures in which each class is looked for
_GREY = 176


def _on_grey(image: Tensor, height: int, width: int) -> Tensor:
    """A picture (3, H, W) uint8 in the middle of a grey one of `height` and `width`, which are no smaller."""
    sheet = image.new_full((3, height, width), _GREY)
    top, left = (height - image.shape[1]) // 2, (width - image.shape[2]) // 2
    sheet[:, top : top + image.shape[1], left : left + image.shape[2]] = image
    return sheet


def datasets(show_source: list[str] | None, config: ShowConfig, as_json: bool = False) -> str:
    """The table of data sets where nothing is said; [show, SOURCE] writes a grid and says what is on it.

    Raises:
        UserError: it is something else, or the source can't be had.
    """
    if not show_source:
        return describe(as_json)
    if as_json:
        raise UserError("--json goes with `liquid-diffusion datasets` alone: a grid is a picture.")
    if len(show_source) != 2 or show_source[0] != "show":
        raise UserError("Say `liquid-diffusion datasets`, or `liquid-diffusion datasets show SOURCE --out grid.png`.")
    return show(show_source[1], config)


def show(source: str, config: ShowConfig) -> str:
    """Write the first pictures of a training to `config.out`, cropped and mirrored as the model would get them.

    A row for each class, of the first ten that are met; without classes as they come.

    Returns:
        In words: where the grid is, and what was met on the way.
    """
    from liquid_diffusion.data.feed import describe as describe_feed
    from liquid_diffusion.data.feed import open_batches, open_pictures
    from liquid_diffusion.data.sources import known_facts
    from liquid_diffusion.data.transforms import to_float, to_pil
    from liquid_diffusion.grid import draw_grid
    from liquid_diffusion.hardware import process_state

    run = resolve(TrainConfig(**{**asdict(config), "data": source, "val_fraction": 0.0}), process_state().device.type)
    multiple = check_size(run.image_size, run.codec, FACTORS[run.codec]) if run.buckets else 1
    feed, held_out = open_pictures(run, multiple)
    rows: dict[int, list[Tensor]] = {}
    most = min(len(feed.label_names), _MOST_CLASSES) or _ROWS
    skipped = list(feed.skipped)
    limit = min(_LOOKED_AT, len(feed))
    for taken, (images, labels, bad) in enumerate(open_batches(feed, 1, 0, workers=0)):
        skipped += bad
        row = int(labels[0]) if feed.label_names else taken // _COLUMNS
        if row in rows or len(rows) < most:
            rows.setdefault(row, [])
            rows[row] += [images[0]] if len(rows[row]) < _COLUMNS else []
        if taken + 1 == limit or sum(map(len, rows.values())) == most * _COLUMNS:
            break
    shapes = [image.shape[1:] for row in rows.values() for image in row]
    height, width = max(shape[0] for shape in shapes), max(shape[1] for shape in shapes)
    numbers = sorted(rows)
    on_grey = [[_on_grey(image, height, width) for image in rows[number]] for number in numbers]
    shown = [row + [row[0].new_full(row[0].shape, 255)] * (_COLUMNS - len(row)) for row in on_grey]
    kept = [feed.label_names[number] for number in numbers] if feed.label_names else []
    sheet = draw_grid([to_pil(to_float(image)[None])[0] for image in itertools.chain(*shown)], _COLUMNS, kept)
    out = Path(config.out).expanduser()
    with writing_to(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    save_picture(sheet, out)
    lines = [f"{out}: {sum(map(len, rows.values()))} of {describe_feed(feed, run, held_out)}."]
    if feed.label_names:
        lines.append(f"Classes: {', '.join(feed.label_names)}.")
    facts = known_facts(source)
    if facts is not None and facts.captions:
        lines.append(f"Its captions (column {facts.captions}) are not used: models are conditioned on classes.")
    if skipped:
        lines.append(f"{len(skipped)} can't be read, e.g. {skipped[0]}.")
    return "\n".join(lines)
