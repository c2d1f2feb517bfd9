"""The floors of the package: an import may only go down."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import liquid_diffusion

SOURCE = Path(liquid_diffusion.__file__).parent
FLOORS = {
    "": 0,
    "errors": 0,
    "writing": 0,
    "config": 0,
    "columns": 0,
    "bundle": 0,
    "model_index": 0,
    "presets": 0,
    "resolve": 0,
    "class_names": 0,
    "codecs": 0,
    "flow": 0,
    "sampling": 0,
    "convolution": 0,
    "grid": 0,
    "history": 0,
    "hardware": 0,
    "patience": 0,
    "models": 0,
    "data": 1,
    "compile": 1,
    "estimate": 1,
    "pipeline": 2,
    "loading": 2,
    "generate": 3,
    "export": 3,
    "demo": 3,
    "notebook": 3,
    "publish": 3,
    "model_card": 3,
    "training": 3,
    "evaluation": 3,
    "cli": 4,
    "__main__": 5,
}


def imports(path: Path) -> set[str]:
    """Modules of the package that a file imports anywhere, inside functions too, as names below the package."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {n.removeprefix("liquid_diffusion").strip(".") for n in names if n.startswith("liquid_diffusion")}
    return found


def room(module: str) -> str:
    return module.split(".", maxsplit=1)[0]


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_down(path: Path) -> None:
    module = ".".join(path.relative_to(SOURCE).with_suffix("").parts)
    if module == "__init__":
        return  # its names are lazy
    here = room(module.removesuffix(".__init__"))
    for target in imports(path):
        assert FLOORS[room(target)] <= FLOORS[here], f"{module} imports {target}"
        assert room(target) != "cli" or here == "__main__"
        if here in ("flow", "sampling", "codecs"):
            assert room(target) != "models", f"{module} imports {target}"
        if here == "models":
            order = ["depthwise", "layers", "liquid", "unet"]
            name = target.removeprefix("models.")
            assert name not in order or order.index(name) < order.index(module.removeprefix("models."))


def test_fresh_interpreter_holds_the_floors() -> None:
    """What is really loaded, by libraries' hooks too, when each floor is imported after the one below."""
    modules = [
        ".".join(path.relative_to(SOURCE).with_suffix("").parts)
        for path in SOURCE.rglob("*.py")
        if path.name not in ("__init__.py", "__main__.py")
    ]
    script = f"""
import importlib, sys
floors, modules = {FLOORS!r}, {modules!r}
room = lambda module: module.split(".")[0]
for floor in sorted(set(floors.values())):
    for module in modules:
        if floors[room(module)] == floor:
            importlib.import_module("liquid_diffusion." + module)
    loaded = [m.removeprefix("liquid_diffusion").strip(".") for m in sys.modules if m.startswith("liquid_diffusion")]
    above = [m for m in loaded if floors[room(m)] > floor]
    assert not above, (floor, above)
"""
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["estimate", "--help"], ["datasets"]])
def test_help_does_not_import_torch(arguments: list[str]) -> None:
    """What keeps `--help` under a second, as a fact and not as a time."""
    script = f"""
import sys
from liquid_diffusion.cli import main
try:
    main({arguments!r})
except SystemExit:
    pass
heavy = {{"torch", "numpy", "diffusers", "datasets", "PIL"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_public_names_exist() -> None:
    for name in liquid_diffusion.__all__:
        assert getattr(liquid_diffusion, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = liquid_diffusion.nonsense
