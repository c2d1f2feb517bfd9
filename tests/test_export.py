from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from liquid_diffusion.cli import main
from liquid_diffusion.loading import load_pipeline
from liquid_diffusion.models.liquid import LiquidBlock
from liquid_diffusion.models.unet import LiquidUNet
from liquid_diffusion.pipeline import LiquidDiffusionPipeline
from liquid_diffusion.sampling import make_scheduler


def save(folder: Path, classes: int) -> LiquidUNet:
    model = LiquidUNet(12, classes, widths=(32, 64, 352), depths=(1, 1, 1))  # one as wide as the larger presets have
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    names = [str(i) for i in range(classes)]
    LiquidDiffusionPipeline(model, make_scheduler(), label_names=names, image_size=16).save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("classes", [0, 3])
def test_onnx_equals_the_model_at_any_batch_and_size(tmp_path: Path, classes: int) -> None:
    model = save(tmp_path / "run", classes)
    assert main(["export", str(tmp_path / "run"), "--to", "onnx", "--out", str(tmp_path / "onnx")]) == 0
    session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / "model.onnx"), providers=["CPUExecutionProvider"])
    for batch, height, width in ((1, 8, 8), (2, 16, 16), (5, 8, 20)):
        x, t, y = torch.randn(batch, 12, height, width), torch.rand(batch), torch.arange(batch) % (classes + 1)
        feed = {"sample": x.numpy(), "timestep": t.numpy()}
        if classes:
            feed["class_labels"] = y.numpy()
        with torch.no_grad():
            expected = model(x, t, y if classes else None).sample.numpy()
        np.testing.assert_allclose(session.run(None, feed)[0], expected, atol=1e-4, rtol=1e-3)
    facts = json.loads((tmp_path / "onnx" / "model.json").read_text())
    assert facts["null_label"] == (classes or None)
    assert facts["codec"]["name"] == "pixels"
    graph = onnx.load(tmp_path / "onnx" / "model.onnx").graph
    blocks = sum(isinstance(module, LiquidBlock) for module in model.modules())
    depthwise = [node for node in graph.node if any(a.name == "group" and a.i > 1 for a in node.attribute)]
    assert len(depthwise) == blocks
    weights = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    assert all(node.input[1] in weights for node in depthwise)  # nothing is merged when it is run
    assert "Pad" not in {node.op_type for node in graph.node}


def test_diffusers_folder_and_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save(tmp_path / "run", 3)
    out = tmp_path / "out"
    assert main(["export", str(tmp_path / "run"), "--to", "diffusers", "--out", str(out)]) == 0
    again = load_pipeline(str(out)).unet.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())
    capsys.readouterr()
    assert main(["export", str(tmp_path / "run"), "--out", str(out)]) == 2
    assert "is not empty; choose another --out" in capsys.readouterr().err
    assert main(["export", "./nowhere", "--out", str(tmp_path / "new")]) == 2
    assert "no run './nowhere'" in capsys.readouterr().err
