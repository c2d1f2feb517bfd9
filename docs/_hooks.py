"""What mkdocs does not do by itself: files outside docs/, pages that stand at the top, and the command line's help."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = re.compile(r"^    (\w+) {2,}\S", re.MULTILINE)
OUTSIDE = re.compile(r"\[([^]]*)\]\(\.\./([^)#]+)(#[^)]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Files of the repository that pages link to, as figures and tables of benchmarks, become files of the site."""
    linked = set()
    for page in files.documentation_pages():
        linked |= {match[2] for match in OUTSIDE.finditer(page.content_string)}
    for name in sorted(linked):
        if (ROOT / name).is_file():
            files.append(File.generated(config, f"repository/{name}", abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in what is written elsewhere once: `{{ file NAME }}` and `{{ command line }}`."""
    markdown = re.sub(r"\{\{ file (\S+) \}\}", lambda match: _top_level(match[1]), markdown)
    if "{{ command line }}" in markdown:
        markdown = markdown.replace("{{ command line }}", _command_line())
    return OUTSIDE.sub(_inside, markdown)


def _inside(link: re.Match[str]) -> str:
    """A link to a file outside docs/ leads to its copy; one to a folder is words."""
    text, name, anchor = link.groups()
    return text if (ROOT / name).is_dir() else f"[{text}](repository/{name}{anchor or ''})"


def _top_level(name: str) -> str:
    """A page of the repository's top; what it links to in docs/ lies beside it here."""
    return re.sub(r"\]\((docs/|(?=\w+/))", lambda m: "](" if m[1] else "](../", (ROOT / name).read_text())


def _help(*arguments: str) -> str:
    command = [sys.executable, "-m", "liquid_diffusion", *arguments, "--help"]
    environment = {**os.environ, "COLUMNS": "92"}
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout


def _command_line() -> str:
    overview = _help()
    parts = [f"```text\n{overview}```"]
    for name in COMMANDS.findall(overview.split("Available subcommands:")[1].split("\n\nexamples")[0]):
        parts.append(f"## {name}\n\n```text\n{_help(name)}```")
    return "\n\n".join(parts)
