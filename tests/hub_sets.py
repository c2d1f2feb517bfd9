"""The six Hub data sets, laid out as the real ones and filled with small pictures that can be told apart."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Features, Value
from datasets import Image as ImageFeature
from little_hub import LittleHub
from PIL import Image

from liquid_diffusion.data.registry import DatasetFacts


def picture(number: int, size: tuple[int, int] = (16, 16), kind: str = "PNG") -> bytes:
    """A picture of one colour, which is its number: it can be read after any crop, resizing or mirroring."""
    file = io.BytesIO()
    Image.new("RGB", size, (number >> 16, number >> 8 & 255, number & 255)).save(file, kind)
    return file.getvalue()


def number_of(pixels: Any) -> int:
    """The number of a picture (3, H, W) uint8, see `picture`."""
    red, green, blue = (int(value) for value in pixels[:, pixels.shape[1] // 2, pixels.shape[2] // 2])
    return red << 16 | green << 8 | blue


def write_parquet(path: Path, rows: dict[str, Any], features: Features, group: int = 100, **how: Any) -> None:
    """A parquet file as `datasets` writes it to the Hub: features in its metadata, small row groups."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(rows, schema=features.arrow_schema), path, row_group_size=group, **how)


def encoded(numbers: Any, **how: Any) -> list[dict[str, Any]]:
    return [{"bytes": picture(number, **how), "path": None} for number in numbers]


def build(hub: LittleHub, facts: DatasetFacts) -> list[int]:
    """Make the repository of a data set and return the numbers of its pictures; `facts` says which.

    Shards have the names that the real ones have. Labels of AFHQv2 are the number modulo 3.
    """
    assert facts.hub_id is not None
    folder = hub.repo(facts.hub_id)
    image = {"image": ImageFeature()}
    if facts.name == "afhq":
        features = Features({**image, "label": ClassLabel(names=["cat", "dog", "wild"])})
        for shard in range(13):
            numbers = range(shard * 5, shard * 5 + 5)
            rows = {"image": encoded(numbers), "label": [n % 3 for n in numbers]}
            write_parquet(folder / f"data/train-{shard:05d}-of-00013.parquet", rows, features, group=2)
        return list(range(65))
    if facts.name == "celeba-faces":
        for shard in range(3):
            rows = {"image": encoded(range(shard * 8, shard * 8 + 8), size=(18, 22))}
            write_parquet(folder / f"data/train-{shard:05d}-of-00003.parquet", rows, Features(image), group=3)
        return list(range(24))
    if facts.name == "anime-faces":
        return _anime_faces(folder)
    rows = {"image": encoded(range(20))}
    if facts.captions:
        rows["text"] = [f"a drawing of number {n}" for n in range(20)]
        image["text"] = Value("string")
        card = "---\nlicense: cc-by-nc-sa-4.0\n---\n# Captions\n"
        (folder / "README.md").write_text(card)
    write_parquet(folder / "data/train-00000-of-00001.parquet", rows, Features(image), group=7)
    return list(range(20))


def _anime_faces(folder: Path) -> list[int]:
    """data.zip, in which three pictures lie twice, beside the same pictures loose, and once more in a folder."""
    contents = {f"{n:05d}.png": picture(n, (64, 64)) for n in range(20)}
    copies = {f"copy-{n:05d}.png": contents[f"{n:05d}.png"] for n in (3, 4, 5)}
    with zipfile.ZipFile(folder / "data.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data/", "")
        for name, content in (contents | copies).items():
            archive.writestr(f"data/{name}", content)
    for place in ("images", "images/data"):
        (folder / place).mkdir(parents=True)
        for name, content in contents.items():
            (folder / place / name).write_bytes(content)
    (folder / "README.md").write_text("---\nlicense: cc0-1.0\n---\n# Anime faces\n")
    return list(range(20))
