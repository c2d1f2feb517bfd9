"""What the demo draws, against the pipeline's own pictures, scipy's slerp and the convention of the path."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.spatial import geometric_slerp

from liquid_diffusion.config import SampleConfig
from liquid_diffusion.demo.drawing import check, draw, morph, most_pictures, path, slerp
from liquid_diffusion.demo.serve import Demo
from liquid_diffusion.errors import UserError
from liquid_diffusion.generate import draw_pictures
from liquid_diffusion.pipeline import LiquidDiffusionPipeline

Make = Callable[..., LiquidDiffusionPipeline]
WISH = SampleConfig(n=3, steps=4, seed=5, guidance=2.0)


def array(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("with_vae", [False, True])
@pytest.mark.parametrize("classes", [0, 2])
def test_the_last_frame_is_what_sample_draws(make_pipeline: Make, classes: int, with_vae: bool) -> None:
    pipeline = make_pipeline(classes, with_vae)
    pipeline.set_progress_bar_config(disable=True)
    config = replace(WISH, label="dog" if classes else None, steps=7)
    frames = list(draw(pipeline, config))
    pixels = ((torch.cat(list(draw_pictures(pipeline, config))) + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()
    for image, expected in zip(frames[-1].pictures, pixels, strict=True):
        assert np.abs(array(image) - expected).max() <= 1
    assert [frame.last for frame in frames] == [False] * (len(frames) - 1) + [True]
    # each step of pixels is seen, of 7 steps through an autoencoder every second one and the last
    assert [frame.index for frame in frames] == ([1, 3, 5, 6] if with_vae else list(range(7)))


def test_pictures_that_are_not_square(make_pipeline: Make) -> None:
    """A model of buckets tells the shape of most of its pictures, and draws it."""
    pipeline = make_pipeline(image_size=[16, 32])
    *_, last = draw(pipeline, replace(WISH, n=2, steps=1))
    assert [image.size for image in last.pictures] == [(32, 16)] * 2
    assert "32 x 16 px" in Demo(pipeline, "runs/wide").head()
    assert most_pictures(make_pipeline(image_size=[1024, 1024])) == 1
    with pytest.raises(UserError, match=r"up to 1024 px, and this model's have 2048 x 1024"):
        most_pictures(make_pipeline(image_size=[1024, 2048]))


def test_the_two_views_agree_at_the_end_alone(make_pipeline: Make) -> None:
    pipeline = make_pipeline()
    states, predictions = (list(draw(pipeline, WISH, view)) for view in ("state", "prediction"))
    assert np.abs(array(states[0].pictures[0]) - array(predictions[0].pictures[0])).max() > 20
    assert np.array_equal(array(states[-1].pictures[0]), array(predictions[-1].pictures[0]))


@pytest.mark.parametrize("solver", ["euler", "heun", "unipc", "dpm++"])
def test_a_path_goes_from_noise_to_the_picture(make_pipeline: Make, solver: str) -> None:
    """Times fall from 1 to 0; the first state is the seed's own noise, the last one the seed's picture."""
    pipeline = make_pipeline()
    config = replace(WISH, solver=solver, steps=6, label="dog")
    points = path(pipeline, config, columns=4)
    assert len(points) == 4
    assert points[0].t == pytest.approx(1, abs=0.002)  # the multistep ones begin at 0.999
    assert points[-1].t == 0
    times = [point.t for point in points]
    assert times == sorted(times, reverse=True)
    noise = torch.randn(1, 12, 8, 8, generator=torch.Generator().manual_seed(config.seed))
    pixels = torch.nn.functional.pixel_shuffle(noise, 2)[0].clamp(-1, 1)  # the codec of this model scales nothing
    assert np.abs(array(points[0].state) - ((pixels + 1) * 127.5).permute(1, 2, 0).numpy()).max() <= 1
    *_, last = draw(pipeline, replace(config, n=1))
    for image in (points[-1].state, points[-1].prediction):
        assert np.abs(array(image) - array(last.pictures[0])).max() <= 1


def test_a_path_of_one_step(make_pipeline: Make) -> None:
    """Euler's only step goes straight to what is predicted from the noise."""
    points = path(make_pipeline(), replace(WISH, steps=1, solver="euler"))
    assert [point.t for point in points] == [1.0, 0.0]
    assert np.abs(array(points[0].prediction) - array(points[1].state)).max() <= 1


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_slerp_is_scipys(share: float) -> None:
    a, b = (torch.nn.functional.normalize(torch.randn(12, dtype=torch.float64), dim=0) for _ in range(2))
    expected = geometric_slerp(a.numpy(), b.numpy(), share)
    np.testing.assert_allclose(slerp(a.view(3, 2, 2), b.view(3, 2, 2), share).flatten().numpy(), expected, atol=1e-12)


def test_slerp_keeps_the_length_of_noise() -> None:
    """Half way on the straight line it would be about 0.71 of it."""
    a, b = torch.randn(1, 12, 32, 32), torch.randn(1, 12, 32, 32)
    middle = slerp(a, b, 0.5)
    assert math.isclose(middle.norm().item(), a.norm().item(), rel_tol=0.02)
    torch.testing.assert_close(slerp(a, a, 0.3), a)


@pytest.mark.parametrize("classes", [0, 2])
def test_a_morph_begins_and_ends_at_its_seeds(make_pipeline: Make, classes: int) -> None:
    pipeline = make_pipeline(classes)
    config = replace(WISH, label="dog" if classes else None)
    frames = morph(pipeline, config, other_seed=9, frames=5)
    assert len(frames) == 5
    for seed, end in ((5, frames[0]), (9, frames[-1])):
        *_, last = draw(pipeline, replace(config, n=1, seed=seed))
        assert np.abs(array(end) - array(last.pictures[0])).max() <= 1
    steps = [np.abs(array(b) - array(a)).mean() for a, b in itertools.pairwise(frames)]
    assert max(steps) < np.abs(array(frames[-1]) - array(frames[0])).mean()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n": 65}, "At most 64 pictures"),
        ({"steps": 101}, "At most 100 steps"),
        ({"guidance": float("nan")}, "guidance must lie between 0 and 20"),
        ({"guidance": -1.0}, "guidance must lie between 0 and 20"),
        ({"seed": -1}, "seed must lie between"),
        ({"seed": 2**32}, "seed must lie between"),
        ({"label": "horse"}, "no class 'horse'"),
    ],
)
def test_too_much_is_refused(make_pipeline: Make, changes: dict[str, float], words: str) -> None:
    pipeline = make_pipeline()
    with pytest.raises(UserError, match=words):
        next(draw(pipeline, replace(WISH, **changes)))  # type: ignore[arg-type]  # of any field
    with pytest.raises(UserError, match="at least 2 pictures"):
        morph(pipeline, WISH, 1, 1)
    with pytest.raises(UserError, match="seed must lie between"):
        morph(pipeline, WISH, -1, 4)


def test_the_number_of_pictures_falls_with_their_size(make_pipeline: Make) -> None:
    assert [most_pictures(make_pipeline(image_size=side)) for side in (16, 128, 256, 512, 1024)] == [64, 64, 16, 4, 1]
    with pytest.raises(UserError, match="up to 1024 px"):
        most_pictures(make_pipeline(image_size=2048))
    with pytest.raises(UserError, match="At most 4 pictures"):
        check(make_pipeline(image_size=512), replace(WISH, n=5))
