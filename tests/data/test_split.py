from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest

from liquid_diffusion.data.sources import EmojiSource, open_source
from liquid_diffusion.data.split import is_held_out, split
from liquid_diffusion.errors import UserError


def test_share_and_sides() -> None:
    """Over 20,000 contents the share is binomial: five standard deviations of it are .0077."""
    held_out = [i for i in range(20_000) if is_held_out(b"%d" % i, 0.05)]
    assert abs(len(held_out) / 20_000 - 0.05) < 0.0077
    assert held_out == [
        i for i in range(20_000) if int(hashlib.blake2b(b"%d" % i, digest_size=8).hexdigest(), 16) / 2**64 < 0.05
    ]
    assert set(held_out) < {i for i in range(20_000) if is_held_out(b"%d" % i, 0.1)}


def test_emoji_split_has_no_picture_on_both_sides() -> None:
    source = EmojiSource()
    train, held_out = split(source, 0.05)
    assert sorted(train + held_out) == list(range(len(source)))
    assert not {source.content(i) for i in train} & {source.content(i) for i in held_out}
    assert 70 <= len(held_out) <= 120
    assert split(source, 0) == (list(range(len(source))), [])


def test_names_and_order_do_not_matter(photos: Path, tmp_path: Path) -> None:
    source = open_source(str(photos))
    other = tmp_path / "other"
    for i in range(len(source)):
        (other / "all").mkdir(parents=True, exist_ok=True)
        shutil.copy(source.name(i), other / "all" / f"{100 - i}.png")
    copies = open_source(str(other))
    sides = [{s.content(i) for i in split(s, 0.3)[1]} for s in (source, copies)]
    assert sides[0] == sides[1]
    assert sides[0]


def test_unreadable_is_left_to_the_training_and_nothing_left_is_an_error(photos: Path) -> None:
    source = open_source(str(photos))
    Path(source.name(0)).unlink()
    train, held_out = split(source, 0.999999)
    assert train == [0]
    assert len(held_out) == 23
    with pytest.raises(UserError, match="--val-fraction"):
        split(open_source(str(photos)), 0.999999)
