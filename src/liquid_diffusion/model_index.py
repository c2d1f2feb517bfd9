"""model_index.json and the code beside it: what makes a saved pipeline whole for others, and safe for us."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from liquid_diffusion.errors import UserError

INDEX = "model_index.json"
MODEL_FILE = "modeling_liquid_unet"


def without_path(name: str) -> str:
    """The last part of a path, which may tell who somebody is; a Hub id as it is."""
    return Path(name).name if Path(name).is_absolute() or name.startswith((".", "~")) else name


def standalone(cls: type) -> str:
    """A file that defines a class without this package; a class that comes from such a file has it with it."""
    if "__bundle__" in vars(cls):
        return str(vars(cls)["__bundle__"])
    # by name: diffusers looks through remote code for imports, and would ask everybody to install the package
    return str(importlib.import_module("liquid_diffusion.bundle").bundle(cls))


def _change(path: Path, **changes: Any) -> None:
    """Change entries of a JSON file, and forget where the part was loaded from, which is nobody's business."""
    facts = json.loads(path.read_text(encoding="utf-8")) | changes
    facts.pop("_name_or_path", None)
    path.write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def complete(folder: Path, pipeline: type, unet: type, label_names: list[str]) -> None:
    """Add to a folder that diffusers saved what a program without this package needs.

    Args:
        folder: with model_index.json and the parts.
        pipeline, unet: the classes of the pipeline and its model.
        label_names: names of the classes.
    """
    codec = json.loads((folder / INDEX).read_text(encoding="utf-8"))["codec"]
    _change(
        folder / INDEX,
        _class_name=["pipeline", pipeline.__name__],
        unet=[MODEL_FILE, unet.__name__],
        codec={**codec, "name": without_path(codec["name"])},
        # by number: of a list there diffusers believes, on the Hub only, that it names a part and its class
        label_names={str(i): name for i, name in enumerate(label_names)},
    )
    for part in ("unet", "vae"):  # others beside them may be anybody's
        if (folder / part / "config.json").is_file():
            _change(folder / part / "config.json")
    (folder / "unet").mkdir(exist_ok=True)  # where the configuration alone is saved
    (folder / "pipeline.py").write_text(standalone(pipeline), encoding="utf-8")
    (folder / "unet" / f"{MODEL_FILE}.py").write_text(standalone(unet), encoding="utf-8")


def with_own_classes(index: dict[str, Any], pipeline: str, source: str) -> dict[str, Any]:
    """What model_index.json says, with the classes of this package in place of those of the code beside it.

    Args:
        index: as it was read.
        pipeline: the name of the pipeline's class.
        source: where it was read, for people.

    Raises:
        UserError: it is no pipeline of this package, or names classes that are not diffusers'.
    """
    name, unet = index.get("_class_name"), index.get("unet") or [None, None]
    if pipeline not in (name, *(name if isinstance(name, list) else ())) or unet[1] != "LiquidUNet":
        raise UserError(f"{source} is no pipeline of liquid-diffusion, but a {name}.")
    for part in ("scheduler", "vae"):
        library, kind = index.get(part) or [None, None]
        if library not in ("diffusers", None):
            raise UserError(f"The {part} of {source} is no part of diffusers: {kind}.")
    return {**index, "_class_name": pipeline, "unet": ["liquid_diffusion.models.unet", "LiquidUNet"]}
