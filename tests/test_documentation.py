"""What the documentation says can be typed: every command is parsed, every block is run that does not say why not.

A block under `<!-- not run: REASON -->` is only parsed. What is run keeps its words, with a few options added at the
end that make it small (`SMALL`); lines that install something are looked at, not run.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import pytest

from liquid_diffusion.cli import _parser, main
from liquid_diffusion.config import TrainConfig
from liquid_diffusion.training.trainer import Trainer

ROOT = Path(__file__).parent.parent
PAGES = {page.relative_to(ROOT).as_posix(): page.read_text() for page in (
    ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))}  # fmt: skip
BLOCK = re.compile(r"(?:<!-- not run: ([^>]*?) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SMALL = {
    "train": "--steps 2 --model nano --batch-size 4 --precision fp32",
    "sample": "--steps 2",
    "estimate": "--model nano --codec pixels --image-size 16 --batch-size 2 --gpu-memory 0.2",
}
INSTALLS = ("pip install", "python3 -m venv", "source .venv")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and why it is not run, if it is not."""

    language: str
    text: str
    reason: str


def blocks(page: str) -> list[Block]:
    return [Block(language, text, reason or "") for reason, language, text in BLOCK.findall(PAGES[page])]


def lines(text: str) -> list[str]:
    return [line.strip() for line in text.replace("\\\n", " ").splitlines() if line.strip()]


def commands(page: str) -> list[str]:
    """The arguments of `liquid-diffusion` wherever a page has it: in blocks, indented, and within a sentence."""
    text = PAGES[page]
    found = [line for block in blocks(page) for line in lines(block.text) if block.language == "bash"]
    found += [line.strip() for line in text.splitlines() if line.startswith("    liquid-diffusion ")]
    found += [" ".join(code.split()) for code in re.findall(r"`(liquid-diffusion [^`]+)`", text)]
    launched = r"(?:accelerate launch|torchrun) .*?-m liquid_diffusion"
    starts = re.compile(rf"^(?:[A-Z_]+=\S+ )?(?:{launched}|liquid-diffusion) ")
    return [starts.sub("", line) for line in found if starts.match(line)]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_spelt_right(page: str) -> None:
    for command in commands(page):
        if "--help" not in command:
            try:
                _parser().parse_args(shlex.split(command, comments=True))
            except SystemExit:
                pytest.fail(f"{page}: liquid-diffusion {command}")


def test_commands_are_found() -> None:
    """That the test above looks at something, at each of the three places."""
    assert "sample runs/first --n 16 --out grid.png" in commands("docs/first-picture.md")
    assert any(
        command.startswith("train --data ./my_photos --image-size 256 --out")
        for command in commands("docs/several-gpus.md")
    )
    assert "sample runs/quickstart --n 16 --out grid.png" in commands("README.md")
    assert "sample RUN --width 352 --height 192" in commands("README.md")


def test_targets_and_extras_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    for name, text in PAGES.items():
        for target in re.findall(r"(?:^    |`)make ([\w-]+)", text, re.MULTILINE):
            assert target in targets, f"{name}: make {target}"
        for extra in re.findall(r"pip\s+install[^`\n]*\[(\w+)\]", text):
            assert extra in extras, f"{name}: [{extra}]"


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run that the README trains first, of two steps."""
    place = tmp_path_factory.mktemp("documentation")
    out = place / "runs" / "quickstart"
    Trainer(TrainConfig(out=str(out), image_size=32, model="nano", batch_size=4, steps=2, precision="fp32")).run()
    return place


@pytest.mark.parametrize("page", [page for page in PAGES if any(not block.reason for block in blocks(page))])
def test_every_block_runs(page: str, quickstart: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(photos.parent)
    photos.rename("my_photos")
    Path("runs").mkdir()
    Path("runs/quickstart").symlink_to(quickstart / "runs" / "quickstart")
    names: dict[str, object] = {}
    run: dict[str, Callable[[str], None]] = {
        "bash": _run_commands, "python": lambda text: exec(text, names), "text": lambda _: None,
    }  # fmt: skip
    for block in blocks(page):
        if not block.reason:
            run[block.language](block.text)


def _run_commands(text: str) -> None:
    for line in lines(text):
        if line.startswith(INSTALLS):
            continue
        program, *arguments = shlex.split(line, comments=True)
        assert program == "liquid-diffusion", f"nothing is known about {line!r}"
        assert main([*arguments, *SMALL.get(arguments[0], "").split()]) == 0, line


class _Resources(HTMLParser):
    """What a page fetches as it is opened."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.found += [given.get(name) or "" for name in ("src", "href") if tag in ("script", "link", "img")]


def test_the_site_builds_without_a_warning_and_fetches_nothing_from_elsewhere(tmp_path: Path) -> None:
    """`mkdocs build --strict` fails for a broken link or anchor, a page outside the navigation, a name without docs."""
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) >= 14
    for page in pages:
        resources = _Resources()
        resources.feed(page.read_text())
        assert not [url for url in resources.found if url.startswith(("http", "//"))], page
    help_page = (tmp_path / "command-line" / "index.html").read_text()
    assert all(f'id="{command}"' in help_page for command in ("train", "sample", "evaluate", "demo", "datasets"))
