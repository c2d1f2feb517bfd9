"""One file from many: what it holds, what it may import, and what it refuses."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from liquid_diffusion import bundle as bundler
from liquid_diffusion.bundle import bundle
from liquid_diffusion.models.unet import LiquidUNet
from liquid_diffusion.pipeline import LiquidDiffusionPipeline

OF_DIFFUSERS = {"torch", "diffusers", "numpy", "PIL", "huggingface_hub"}  # which install one another
Load = Callable[[str, str], type]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Runs a source as a module of its own and gives a class of it."""

    def load(source: str, name: str) -> type:
        path = tmp_path / f"bundled_{name.lower()}.py"
        path.write_text(source)
        monkeypatch.syspath_prepend(str(tmp_path))
        cls: type = getattr(__import__(path.stem), name)
        monkeypatch.delitem(sys.modules, path.stem)
        return cls

    return load


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., type]:
    """Makes a package `small` of the given modules, with a class `Root` in the module `root`."""

    def make(**modules: str) -> type:
        (tmp_path / "small").mkdir()
        for name, text in {"__init__": "", **modules}.items():
            (tmp_path / "small" / f"{name}.py").write_text(text)
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setattr(bundler, "_PACKAGE", "small")
        bundler._read.cache_clear()
        for name in [name for name in sys.modules if name.split(".")[0] == "small"]:
            del sys.modules[name]
        root: type = __import__("small.root").root.Root
        return root

    return make


@pytest.mark.parametrize("cls", [LiquidUNet, LiquidDiffusionPipeline])
def test_imports_nothing_but_what_diffusers_brings(cls: type) -> None:
    imported = set()
    for node in ast.walk(ast.parse(bundle(cls))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add((node.module or "").split(".")[0])
    assert imported - sys.stdlib_module_names <= OF_DIFFUSERS


def test_the_model_of_the_file_is_the_model(load: Load) -> None:
    other = load(bundle(LiquidUNet), "LiquidUNet")
    assert other is not LiquidUNet
    model = LiquidUNet(in_channels=3, num_classes=2, widths=(16, 32), depths=(1, 1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    twin = other.from_config(model.config)  # type: ignore[attr-defined]
    twin.load_state_dict(model.state_dict())
    inputs = torch.randn(2, 3, 8, 8), torch.tensor([0.2, 0.9]), torch.tensor([0, 2])
    first, second = model(*inputs).sample, twin(*inputs).sample
    torch.testing.assert_close(second, first, atol=0, rtol=0)
    first.square().mean().backward()
    second.square().mean().backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, msg=name)


def test_a_bundle_knows_its_own_source(load: Load) -> None:
    source = bundle(LiquidUNet)
    assert load(source, "LiquidUNet").__bundle__ == source  # type: ignore[attr-defined]


def test_only_what_is_used_in_the_order_of_use(package: Callable[..., type], load: Load) -> None:
    root = package(
        deep="import math\n\n# why two\nTWO = 2\nUNUSED = math.pi\n\n\ndef double(x):\n    return TWO * x\n",
        root="from small.deep import double\nimport os\n\n\nclass Root:\n    value = double(21)  # at import\n",
    )
    source = bundle(root)
    assert load(source, "Root").value == 42  # type: ignore[attr-defined]
    assert "# why two\nTWO = 2" in source
    for left_out in ("UNUSED", "import math", "import os", "small"):
        assert left_out not in source


@pytest.mark.parametrize(
    ("modules", "words"),
    [
        ({"deep": "a = 1", "root": "from small.deep import a as b\nclass Root:\n    x = b\n"}, "renames a"),
        ({"deep": "a = 1", "root": "class Root:\n    def f(self):\n        from small.deep import a\n"},
         "imports from small.deep inside"),
        ({"deep": "_A = 1\na = _A", "root": "from small.deep import a\n_A = 2\nclass Root:\n    x = a + _A\n"},
         "_A is defined in small.root and by small.deep"),
        ({"deep": "import math as m\na = m.pi", "root": "import os as m\nfrom small.deep import a\n"
          "class Root:\n    x = (a, m.name)\n"}, "m is imported as"),
    ],
    ids=["renamed", "inside", "twice", "imports"],
)  # fmt: skip
def test_what_can_not_be_bundled_is_refused(modules: dict[str, str], words: str, package: Callable[..., type]) -> None:
    root = package(**modules)
    with pytest.raises(ValueError, match=words):
        bundle(root)
