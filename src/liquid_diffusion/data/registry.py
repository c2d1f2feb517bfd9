"""The data sets that are known by name."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields


@dataclass(frozen=True)
class DatasetFacts:
    """What a person wants to know before choosing a data set.

    Attributes:
        name: what `--data` takes.
        pictures: how many there are.
        labels: the classes, or a dash.
        size: of the pictures, in pixels.
        licence: of the pictures.
        note: one sentence.
    """

    name: str
    pictures: int
    labels: str
    size: str
    licence: str
    note: str


DATASETS = (
    DatasetFacts(
        "emoji", 1898, "9 categories", "72x72", "CC-BY-4.0 (Twitter)", "Ships with the package; works offline."
    ),
)


def describe(as_json: bool = False) -> str:
    """The known data sets, as a table or as JSON."""
    if as_json:
        return json.dumps([asdict(facts) for facts in DATASETS], indent=2)
    rows = [[field.name for field in fields(DatasetFacts)]]
    rows += [[str(value) for value in asdict(facts).values()] for facts in DATASETS]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    own = "Or your own: --data FOLDER (sub-folders become classes), or the Hub id of a data set with pictures."
    return "\n".join([*lines, "", own])
