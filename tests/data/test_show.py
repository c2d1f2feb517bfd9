from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Features
from datasets import Image as ImageFeature
from hub_sets import build, encoded, write_parquet
from little_hub import LittleHub
from PIL import Image

from liquid_diffusion.cli import main
from liquid_diffusion.data.registry import find_facts

Capture = pytest.CaptureFixture[str]


def cells(path: Path, left: int) -> np.ndarray:
    """The colours in the middles of the pictures of a grid of 8 columns, 64 px each: (rows, 8, 3)."""
    with Image.open(path) as sheet:
        pixels = np.asarray(sheet)
    return pixels[32::66, left + 32 :: 66][:, :8]


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_a_row_for_each_class(tmp_path: Path, streaming: str, capsys: Capture) -> None:
    """Each picture under the name of its class, whatever the order they are fed in."""
    rows = {"image": encoded(range(1, 31)), "label": [n % 3 for n in range(1, 31)]}
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["a", "b", "c"])})
    write_parquet(tmp_path / "t/x.parquet", rows, features, group=8)
    out = tmp_path / "new" / "grid.png"
    assert main(["datasets", "show", str(tmp_path / "t"), "--out", str(out), "--streaming", streaming]) == 0
    with Image.open(out) as sheet:
        left = sheet.width - (8 * 66 - 2)
        assert sheet.height == 3 * 66 - 2
    numbers = cells(out, left).astype(int) @ [65536, 256, 1]
    assert numbers.shape == (3, 8)
    for label, row in enumerate(numbers):
        assert {number % 3 for number in row} == {label}
        assert len(set(row)) == 8
    said = capsys.readouterr().out
    assert "24 of 30" in said
    assert "Classes: a, b, c." in said


def test_captions_are_said_to_be_unused(little_hub: LittleHub, tmp_path: Path, capsys: Capture) -> None:
    facts = find_facts("pokemon")
    assert facts is not None
    build(little_hub, facts)
    assert main(["datasets", "show", "pokemon", "--out", str(tmp_path / "g.png"), "--streaming", "true"]) == 0
    said = capsys.readouterr().out
    assert "captions (column text) are not used" in said
    assert "20 of 20 streamed pictures" in said
    numbers = cells(tmp_path / "g.png", 0).astype(int) @ [65536, 256, 1]
    assert sorted(numbers.flatten())[:20] == list(range(20))  # the other cells are white


def test_a_folder_of_the_name_of_a_data_set_has_no_captions(
    photos: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos.rename(photos.parent / "pokemon")
    monkeypatch.chdir(photos.parent)
    assert main(["datasets", "show", "pokemon", "--out", "g.png"]) == 0
    assert "captions" not in (said := capsys.readouterr().out)
    assert "Classes: cat, dog." in said


def test_bad_pictures_are_told(photos: Path, tmp_path: Path, capsys: Capture) -> None:
    (photos / "cat" / "01.png").write_bytes(b"")
    assert main(["datasets", "show", str(photos), "--out", str(tmp_path / "g.png")]) == 0
    assert "1 can't be read, e.g." in capsys.readouterr().out


def test_buckets_are_shown_in_their_shapes(tmp_path: Path, capsys: Capture) -> None:
    """Of about 32 x 32 pixels with sides divisible by 8: 1 : 2 as 24 x 40; the rest of a cell is grey."""
    for name, size in (("wide", (80, 40)), ("upright", (40, 80)), ("square", (60, 60))):
        Image.new("RGB", size, "red").save(tmp_path / f"{name}.png")
    out = tmp_path / "grid.png"
    show = ["datasets", "show", str(tmp_path), "--buckets", "true", "--image-size", "32", "--out", str(out)]
    assert main(show) == 0
    assert "3 pictures of 32 px in 3 shapes" in capsys.readouterr().out
    with Image.open(out) as sheet:  # cells of 40 px, doubled to be seen
        pixels = np.asarray(sheet)[:80]
    found = set()
    for cell in (pixels[:, x : x + 80] for x in (0, 82, 164)):
        red = np.argwhere((cell == (255, 0, 0)).all(2))
        found.add(tuple(np.ptp(red, axis=0) + 1))
        assert (cell[(cell != (255, 0, 0)).any(2)] == 176).all()
    assert found == {(48, 80), (80, 48), (64, 64)}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["show"], "datasets show SOURCE"),
        (["shwo", "emoji"], "datasets show SOURCE"),
        (["show", "./nowhere"], "no folder './nowhere'"),
        (["show", "emoji", "--out", "/proc/x.png"], "/proc/x.png can't be written"),
        (["show", "emoji", "--out", "x.nonsense"], "x.nonsense can't be written"),
        (["show", "emoji", "--image-size", "0"], "image_size must be at least 1"),
        (["show", "emoji", "--buckets", "true", "--image-size", "30"], "image_size 30 can't be divided by 8"),
        (["show", "emoji", "--buckets", "true", "--streaming", "true"], "leave out --streaming"),
    ],
)
def test_mistakes(arguments: list[str], words: str, tmp_path: Path, capsys: Capture) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert main(["datasets", *arguments]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU trains on larger pictures")
def test_pictures_are_as_large_as_train_would_take_them(tmp_path: Path, capsys: Capture) -> None:
    assert main(["datasets", "show", "emoji", "--out", str(tmp_path / "emoji.png")]) == 0
    assert "of 32 px" in capsys.readouterr().out
