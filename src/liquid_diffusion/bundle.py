"""A class of this package as one file that needs nothing of it: what diffusers calls remote code.

The file is made of the package's own sources: the statement that defines the class, all that it uses, and what that
uses, in the order of the modules, with comments; imports inside the package fall away. There is no second copy of
anything to keep alike.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
from dataclasses import dataclass
from pathlib import Path

from liquid_diffusion import __version__

_PACKAGE = __name__.rpartition(".")[0]


@dataclass(frozen=True)
class _Module:
    """The top level of a module: its statements as text and, for each name in it, what the name stands for."""

    statements: dict[int, tuple[ast.stmt, str]]  # by number, those that define something
    definitions: dict[str, int]  # name -> number of the statement
    internal: dict[str, tuple[str, str]]  # name -> module and name inside the package
    external: dict[str, tuple[str, str]]  # name -> "from x" or nothing, and "y" or "y as name"


def _imports(node: ast.Import | ast.ImportFrom) -> dict[str, tuple[str, str]]:
    """What an import of another package binds, name by name."""
    origin = f"from {node.module}" if isinstance(node, ast.ImportFrom) else ""
    return {
        alias.asname or alias.name.split(".")[0]: (
            origin,
            f"{alias.name} as {alias.asname}" if alias.asname else alias.name,
        )
        for alias in node.names
    }


def _defined(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return [node.name]
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return [node.target.id]
    if isinstance(node, ast.Assign):
        return [name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)]
    return []


@functools.cache
def _read(module: str) -> _Module:
    path = inspect.getsourcefile(importlib.import_module(module))
    assert path is not None
    text = Path(path).read_text(encoding="utf-8")
    lines, tree = text.splitlines(), ast.parse(text)
    found = _Module({}, {}, {}, {})
    end = 0
    for number, node in enumerate(tree.body):
        # from the end of the statement before, so that comments and decorators go with what they are written above
        source, end = "\n".join(lines[end : node.end_lineno]), node.end_lineno or 0
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == _PACKAGE:
            for alias in node.names:
                if alias.asname:
                    raise ValueError(f"{module} renames {alias.name}, which can't be bundled")
                found.internal[alias.name] = (node.module, alias.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found.external.update(_imports(node))
        elif names := _defined(node):
            found.statements[number] = (node, source)
            found.definitions.update(dict.fromkeys(names, number))
    return found


def _collect(module: str, name: str, wanted: dict[str, set[int]], imports: dict[str, tuple[str, str]]) -> None:
    """Add the statement that defines a name, and all that it uses."""
    here = _read(module)
    number = here.definitions[name]
    if number in wanted.setdefault(module, set()):
        return
    wanted[module].add(number)
    node, _ = here.statements[number]
    for inner in ast.walk(node):
        if isinstance(inner, ast.ImportFrom) and (inner.module or "").split(".")[0] == _PACKAGE:
            raise ValueError(f"{module}.{name} imports from {inner.module} inside, which can't be bundled")
    for used in sorted(inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)):
        if used in here.definitions:
            _collect(module, used, wanted, imports)
        elif used in here.internal:
            _collect(*here.internal[used], wanted, imports)
        elif used in here.external and imports.setdefault(used, here.external[used]) != here.external[used]:
            raise ValueError(
                f"{used} is imported as {imports[used]} by one module, as {here.external[used]} by {module}"
            )


def _in_order(module: str, order: list[str]) -> list[str]:
    """The modules behind one and itself, each after those it imports from."""
    if module not in order:
        for used, _ in _read(module).internal.values():
            _in_order(used, order)
        order.append(module)
    return order


@functools.cache
def bundle(cls: type) -> str:
    """The source of one file that defines a class of this package and imports nothing of the package.

    The class there has its own source as `__bundle__`, so that it can be saved again where the package is not.

    Raises:
        ValueError: what it uses can't be put into one file: two modules define the same name, or one renames what
            it imports from the package, or imports from it inside a function.
    """
    wanted: dict[str, set[int]] = {}
    imports = {"Path": ("from pathlib", "Path")}
    _collect(cls.__module__, cls.__name__, wanted, imports)
    parts: list[str] = []
    homes = dict.fromkeys(imports, "an import")
    for module in _in_order(cls.__module__, []):
        for number in sorted(wanted.get(module, ())):
            node, source = _read(module).statements[number]
            parts.append(source)
            for name in _defined(node):
                if homes.setdefault(name, module) != module:
                    raise ValueError(f"{name} is defined in {module} and by {homes[name]}")
    head = (
        f'"""{cls.__name__} in one file, for those who have not installed liquid-diffusion {__version__}.\n\n'
        f'Made by {__name__} from the sources of the package, which are what to change. MIT licence.\n"""\n\n'
        "from __future__ import annotations\n"
    )
    plain = [f"import {what}" for origin, what in imports.values() if not origin]
    members: dict[str, list[str]] = {}
    for origin, what in sorted(imports.values()):
        if origin:
            members.setdefault(origin, []).append(what)
    lines = [*sorted(plain), "", *(f"{origin} import {', '.join(names)}" for origin, names in members.items())]
    foot = f'\n\n{cls.__name__}.__bundle__ = Path(__file__).read_text(encoding="utf-8")\n'
    return "\n".join([head, *lines, "\n", *parts, foot])
