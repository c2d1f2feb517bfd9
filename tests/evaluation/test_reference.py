from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from liquid_diffusion.data.pictures import PictureDataset
from liquid_diffusion.data.sources import open_source
from liquid_diffusion.evaluation.evaluate import spread_labels
from liquid_diffusion.evaluation.features import FeatureExtractor
from liquid_diffusion.evaluation.memorisation import Nearness, class_weights
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


def test_the_ratio_of_medians_has_the_error_that_a_normal_distribution_tells() -> None:
    """The variance of a median of n normal numbers is pi / 2 sigma^2 / n."""
    draws = torch.Generator().manual_seed(1)
    samples, held_out = 8 + torch.randn(900, generator=draws), 10 + torch.randn(400, generator=draws)
    near = Nearness.of(samples, held_out)
    assert near.ratio == pytest.approx(0.8, abs=0.03)
    relative = [math.sqrt(math.pi / 2 / n) / median for n, median in ((900, 8), (400, 10))]
    assert near.ratio_standard_error == pytest.approx(0.8 * math.hypot(*relative), rel=0.25)


def test_held_out_pictures_count_as_often_as_their_class_is_drawn() -> None:
    """Weights say the same as copies of the pictures, and what comes of another mix of classes is taken away."""
    faces, tools = torch.arange(1.0, 6.0), torch.arange(101.0, 104.0)
    labels = torch.tensor([0] * 5 + [1] * 3)
    weights = class_weights(labels, torch.tensor([0] * 10 + [1] * 18))
    torch.testing.assert_close(weights, torch.tensor([2.0] * 5 + [6.0] * 3).double())
    near = Nearness.of(torch.ones(4), torch.cat([faces, tools]), weights)
    copied = torch.cat([faces.repeat(2), tools.repeat(6)])
    assert near.held_out_median == copied.median()
    assert near.held_out_1st_percentile == 1
    assert class_weights(torch.tensor([0]), torch.tensor([1])).tolist() == [1]  # nothing to go by
    assert Nearness.of(torch.rand(5), torch.zeros(3)).ratio is None
    assert Nearness.of(torch.ones(4), torch.tensor([0.0, 0.0, 1.0, 2.0, 3.0])).ratio_standard_error is None

    draws = torch.Generator().manual_seed(0)
    kinds = torch.tensor([0] * 300 + [1] * 700)
    distances = 1 + 4 * kinds + torch.rand(1000, generator=draws)
    some = torch.cat([torch.arange(150), torch.arange(300, 400)])  # more of the near kind than there should be
    assert Nearness.of(distances, distances[some]).ratio == pytest.approx(5.3 / 1.8, rel=0.1)
    same = Nearness.of(distances, distances[some], class_weights(kinds[some], kinds))
    assert same.ratio == pytest.approx(1, abs=0.03)


def test_features_that_can_not_be_kept_are_computed(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    dataset, extractor = PictureDataset(open_source(str(photos)), 16), MeanColours()
    cached = CachedFeatures(extractor, CPU, tmp_path / "file" / "cache")
    torch.testing.assert_close(cached.of(dataset), cached.of(dataset), atol=0, rtol=0)
    assert extractor.seen == 2 * 24
    assert capsys.readouterr().err.count("can't be kept in") == 1
