"""A trained model for others: a diffusers pipeline folder, the Hub, or ONNX with its configuration beside it."""

from __future__ import annotations

import copy
import json
import logging
import warnings
from pathlib import Path

import torch
from diffusers.utils.logging import disable_progress_bar
from torch import Tensor, nn
from torch.export import Dim

from liquid_diffusion.config import ExportConfig
from liquid_diffusion.errors import UserError
from liquid_diffusion.loading import load_pipeline
from liquid_diffusion.models.liquid import MultiScaleSpatialMix
from liquid_diffusion.models.unet import LiquidUNet
from liquid_diffusion.pipeline import LiquidDiffusionPipeline
from liquid_diffusion.publish import publish
from liquid_diffusion.writing import writing_to


class _Velocity(nn.Module):
    """The model with tensors in and a tensor out, which is all that ONNX knows."""

    def __init__(self, model: LiquidUNet) -> None:
        super().__init__()
        self.model = model

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> Tensor:
        return self.model(sample, timestep, class_labels, return_dict=False)[0]


def _with_one_kernel(model: LiquidUNet) -> LiquidUNet:
    """A copy in float32 on the CPU, whose depthwise kernels are one each: the exporter merges small ones only."""
    model = copy.deepcopy(model).eval().float().cpu()
    for part in model.modules():
        if isinstance(part, MultiScaleSpatialMix):
            part.merge_scales()
    return model


@torch.no_grad()
def export_onnx(pipeline: LiquidDiffusionPipeline, folder: Path) -> None:
    """Write model.onnx, the velocity v(sample, timestep, class_labels), and model.json, what belongs to it.

    The batch and the size of the sample are free; the size must be divisible as the model wants it. The depthwise
    kernels are merged into one. Only the model is exported, not the codec nor the solver.

    Raises:
        UserError: the extra `onnx` is not installed.
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError("ONNX needs an extra: pip install 'liquid-diffusion[onnx]'.") from error
    model = _with_one_kernel(pipeline.unet)
    channels, classes = model.config["in_channels"], model.config["num_classes"]
    side = 4 * model.downscale
    inputs = {"sample": torch.randn(2, channels, side, side), "timestep": torch.rand(2)}
    free = {"sample": {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}, "timestep": {0: Dim.DYNAMIC}}
    if classes:
        inputs["class_labels"] = torch.tensor([0, classes])
        free["class_labels"] = {0: Dim.DYNAMIC}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it tells of torchvision, which nobody needs here
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own deprecations
        program = torch.onnx.export(
            _Velocity(model),
            tuple(inputs.values()),
            input_names=list(inputs),
            output_names=["velocity"],
            dynamic_shapes=free,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    program.save(str(folder / "model.onnx"))
    facts = {
        "path": "x_t = (1 - t) x0 + t eps; velocity = eps - x0; timestep = t in [0, 1], 0 is data",
        "null_label": classes if classes else None,
        "size_divisible_by": model.downscale,
        **{name: pipeline.config[name] for name in ("codec", "label_names", "image_size")},
    }
    (folder / "model.json").write_text(json.dumps(facts, indent=2))


def export(run: str | None, config: ExportConfig) -> str:
    """Export a run to `config.out`; says in words where it is.

    Raises:
        UserError: the run can't be loaded, the place holds something already, an extra is missing, or the Hub refuses.
    """
    disable_progress_bar()  # of the parts being loaded
    if config.to == "hub":
        return publish(run, config.out, config.private)
    pipeline = load_pipeline(run)
    folder = Path(config.out).expanduser()
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UserError(f"{folder} is not empty; choose another --out.")
        if config.to == "onnx":
            export_onnx(pipeline, folder)
            return f"{folder}/model.onnx, and what belongs to it in model.json"
        pipeline.save_pretrained(str(folder))
    return f"{folder}: LiquidDiffusionPipeline.from_pretrained('{folder}')"
