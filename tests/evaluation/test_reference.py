from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from liquid_diffusion.data.pictures import PictureDataset
from liquid_diffusion.data.sources import open_source
from liquid_diffusion.evaluation.evaluate import spread_labels
from liquid_diffusion.evaluation.features import FeatureExtractor
from liquid_diffusion.evaluation.memorisation import Nearness
from liquid_diffusion.evaluation.reference import CachedFeatures, cache_folder

CPU = torch.device("cpu")


class MeanColours(FeatureExtractor):
    """A real extractor that is quick, and counts what it is asked."""

    side = 8

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("weight", torch.tensor(weight))
        self.seen = 0

    def forward(self, pictures: Tensor) -> Tensor:
        self.seen += len(pictures)
        return self._resize(pictures).flatten(1) * self.get_buffer("weight")


def test_features_are_computed_once_for_each_content(photos: Path, tmp_path: Path) -> None:
    dataset = PictureDataset(open_source(str(photos)), 16)
    extractor = MeanColours()
    cached = CachedFeatures(extractor, CPU, tmp_path / "cache")
    first = cached.of(dataset)
    assert extractor.seen == len(dataset) == len(first)
    torch.testing.assert_close(cached.of(dataset), first, atol=0, rtol=0)
    assert extractor.seen == 24
    again = CachedFeatures(MeanColours(), CPU, tmp_path / "cache")  # another process with the same weights
    torch.testing.assert_close(again.of(dataset), first, atol=0, rtol=0)
    mirrored = cached.of(dataset, mirrored=True)
    expected = first.unflatten(1, (3, 8, 8)).flip(-1).flatten(1)
    torch.testing.assert_close(mirrored, expected, atol=1e-3, rtol=1e-4)
    assert extractor.seen == 48

    other = MeanColours(2.0)  # other weights, other features
    torch.testing.assert_close(CachedFeatures(other, CPU, tmp_path / "cache").of(dataset), 2 * first)
    assert other.seen == 24
    one = sorted(photos.rglob("*.png"))[5]
    one.write_bytes(sorted(photos.rglob("*.png"))[6].read_bytes())
    cached.of(PictureDataset(open_source(str(photos)), 16))
    assert extractor.seen == 72


def test_a_block_cut_short_is_computed_again(photos: Path, tmp_path: Path) -> None:
    dataset = PictureDataset(open_source(str(photos)), 16)
    extractor = MeanColours()
    cached = CachedFeatures(extractor, CPU, tmp_path / "cache")
    first = cached.of(dataset)
    (path,) = (tmp_path / "cache").iterdir()
    path.write_bytes(path.read_bytes()[:100])
    torch.testing.assert_close(cached.of(dataset), first, atol=0, rtol=0)
    assert extractor.seen == 48


def test_cache_is_where_the_user_wants_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder().is_relative_to(tmp_path)


def test_labels_have_the_proportions_of_the_reference() -> None:
    labels = torch.tensor([0] * 30 + [1] * 10 + [2] * 5)
    once, thrice = spread_labels(labels, 45, 0), spread_labels(labels, 135, 1)
    assert once.bincount().tolist() == [30, 10, 5]
    assert thrice.bincount().tolist() == [90, 30, 15]
    assert once.tolist() != labels.tolist()
    few = spread_labels(labels, 10, 0)
    torch.testing.assert_close(few, once[:10])


def test_nearness_tells_copies_from_strangers() -> None:
    draws = torch.Generator().manual_seed(0)
    held_out = torch.rand(1000, generator=draws) + 1
    strangers = Nearness.of(torch.rand(1000, generator=draws) + 1, held_out)
    assert strangers.share_of_samples_nearer is not None
    assert abs(strangers.share_of_samples_nearer - 0.01) < 0.01
    copies = Nearness.of(torch.cat([torch.zeros(300), torch.rand(700) + 1]), held_out)
    assert copies.share_of_samples_nearer is not None
    assert 0.3 <= copies.share_of_samples_nearer < 0.33
    assert copies.samples_median < (copies.held_out_median or 0)
    assert Nearness.of(torch.ones(3), None).held_out_median is None
