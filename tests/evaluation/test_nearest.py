from __future__ import annotations

from pathlib import Path

import pytest
import torch

from liquid_diffusion.data.pictures import PictureDataset
from liquid_diffusion.data.sources import open_source
from liquid_diffusion.data.transforms import to_float
from liquid_diffusion.evaluation import nearest
from liquid_diffusion.evaluation.nearest import nearest_pictures, nearest_places


def test_copies_are_found_mirrored_ones_too(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest, "_PART_BYTES", 5 * 4 * 3 * 32 * 32)  # five pictures
    dataset = PictureDataset(open_source(str(photos)), 32, flip=True)
    pictures = to_float(torch.stack([dataset.picture(i)["image"] for i in range(24)]))
    samples = torch.stack([pictures[7], pictures[20].flip(-1), pictures[3] + 0.1])
    found, distances = nearest_pictures(samples, dataset)
    torch.testing.assert_close(distances, torch.tensor([0.0, 0.0, 0.1]), atol=1e-5, rtol=0)
    torch.testing.assert_close(found, samples - torch.tensor([0, 0, 0.1])[:, None, None, None])


def test_distances_equal_a_direct_search(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest, "_AT_ONCE", 2)
    monkeypatch.setattr(nearest, "_PART_BYTES", 5 * 4 * 3 * 32 * 32)  # five pictures, of samples and of the set
    dataset = PictureDataset(open_source(str(photos)), 32)
    pictures = to_float(torch.stack([dataset.picture(i)["image"] for i in range(24)])).double()
    samples = torch.rand(6, 3, 32, 32) * 2 - 1
    found, distances = nearest_pictures(samples, dataset)
    direct = (samples.double()[:, None] - pictures[None]).square().mean((2, 3, 4)).sqrt()
    torch.testing.assert_close(distances.double(), direct.min(1).values, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.double(), pictures[direct.argmin(1)])


def test_samples_in_bytes_are_as_near_as_in_floats(photos: Path) -> None:
    dataset = PictureDataset(open_source(str(photos)), 32)
    samples = torch.randint(256, (6, 3, 32, 32), dtype=torch.uint8)
    for mine, other in zip(nearest_places(samples, dataset), nearest_places(to_float(samples), dataset), strict=True):
        assert torch.equal(mine, other)
