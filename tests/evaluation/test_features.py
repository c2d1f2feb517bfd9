from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import Dinov2Config, Dinov2Model

from liquid_diffusion.data.transforms import to_shape, to_uint8
from liquid_diffusion.errors import UserError
from liquid_diffusion.evaluation.features import FeatureExtractor, Lite0Features, extract, make_features

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def lite0() -> FeatureExtractor:
    return make_features("lite0", CPU)


def test_lite0_sees_what_is_there(lite0: FeatureExtractor) -> None:
    """Photographs that a package ships, through our resizing and its own classifier: ImageNet's classes 291 and 293."""
    assert isinstance(lite0, Lite0Features)
    spec = importlib.util.find_spec("gradio")  # found and not imported, which takes seconds
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "media_assets" / "images"
    pictures = torch.stack(
        [to_uint8(to_shape(Image.open(folder / f"{name}.jpg"), (224, 224))) for name in ("lion", "cheetah1")]
    )
    seen = lite0(pictures)
    assert seen.shape == (2, 1280)
    assert seen.dtype == torch.float32
    assert lite0.network._fc(seen).argmax(1).tolist() == [291, 293]


def test_features_do_not_depend_on_batches_but_on_pictures(lite0: FeatureExtractor) -> None:
    pictures = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    together = extract(lite0, [pictures], CPU)
    alone = extract(lite0, pictures.split(2), CPU)
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    assert (together[0] - together[1]).abs().max() > 0.1


def test_identity_changes_with_the_weights() -> None:
    first, second = make_features("lite0", CPU), make_features("lite0", CPU)
    assert first.identity() == second.identity()
    with torch.no_grad():
        next(second.parameters())[0, 0, 0, 0] += 1e-3
    assert first.identity() != second.identity()


def test_dinov2_of_a_folder_equals_transformers(tmp_path: Path) -> None:
    """The architecture with random weights: the class token behind the last norm, of ImageNet-normalised pictures."""
    model = Dinov2Model(
        Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=224, patch_size=56)
    ).eval()
    model.save_pretrained(tmp_path)
    pictures = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    found = extract(make_features(str(tmp_path), CPU), [pictures], CPU)
    scaled = (pictures.double().numpy() / 255 - np.reshape([0.485, 0.456, 0.406], (3, 1, 1))) / np.reshape(
        [0.229, 0.224, 0.225], (3, 1, 1)
    )
    with torch.no_grad():
        expected = model(torch.from_numpy(scaled).float()).last_hidden_state[:, 0]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    wide = F.interpolate(pictures[:, :, ::2, ::2].float(), size=(224, 224), mode="nearest")
    assert extract(make_features(str(tmp_path), CPU), [wide.to(torch.uint8)], CPU).shape == (2, 32)


def test_features_that_can_not_be_had(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no features 'vgg'; choose lite0, inception, dinov2"):
        make_features("vgg", CPU)
    with pytest.raises(UserError, match="features dinov2 can't be loaded"):
        make_features(str(tmp_path), CPU)


@pytest.mark.skipif(importlib.util.find_spec("torch_fidelity") is not None, reason="would download its weights")
def test_inception_without_its_extra_says_what_to_install() -> None:
    with pytest.raises(UserError, match=r"pip install 'liquid-diffusion\[inception\]'"):
        make_features("inception", CPU)


def test_missing_extras() -> None:
    """An interpreter in which the packages can't be imported."""
    script = """
import sys
for name in ("efficientnet_lite_pytorch", "transformers", "torchmetrics"):
    sys.modules[name] = None
import torch
from liquid_diffusion.errors import UserError
from liquid_diffusion.evaluation.features import make_features
from liquid_diffusion.evaluation.metrics import kernel_distance
for call in (
    lambda: make_features("lite0", torch.device("cpu")),
    lambda: make_features("dinov2", torch.device("cpu")),
    lambda: kernel_distance(torch.randn(5, 2), torch.randn(5, 2)),
):
    try:
        call()
    except UserError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    said = done.stdout.splitlines()
    assert len(said) == 3, done.stderr
    for line, extra in zip(said, ("eval", "dinov2", "eval"), strict=True):
        assert f"pip install 'liquid-diffusion[{extra}]'" in line
