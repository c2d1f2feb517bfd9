"""What is built is whole: a wheel and a source archive, what they hold, and what they say of themselves."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_string
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.metadata import Metadata
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import liquid_diffusion
from liquid_diffusion.cli import main
from liquid_diffusion.models.unet import LiquidUNet
from liquid_diffusion.pipeline import LiquidDiffusionPipeline
from liquid_diffusion.sampling import make_scheduler

# its torchvision has no build beside the pinned torch, so the machines of the suite can not have it
OF_NOBODY = {"torch-fidelity"}
ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a wheel and an sdist, built with the build backend that is installed: no network."""
    out = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out


def test_the_wheel_holds_the_package_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        text = archive.read(next(name for name in names if name.endswith("METADATA"))).decode()
    home = f"liquid_diffusion-{liquid_diffusion.__version__}.dist-info"
    source = ROOT / "src"
    expected = {p.relative_to(source).as_posix() for p in source.rglob("*") if p.is_file() and p.suffix != ".pyc"}
    expected = {name for name in expected if "__pycache__" not in name}
    assert {name for name in names if not name.startswith(home)} == expected
    assert "liquid_diffusion/py.typed" in names
    assert {f"{home}/licenses/LICENSE", f"{home}/licenses/NOTICE", f"{home}/entry_points.txt"} <= names

    facts = Metadata.from_email(text, validate=True)  # as a package index would
    assert (facts.name, str(facts.version)) == ("liquid-diffusion", liquid_diffusion.__version__)
    assert facts.license_expression == "MIT"
    assert facts.description_content_type == "text/markdown"
    assert set(facts.provides_extra or ()) == set(PROJECT["optional-dependencies"])
    assert str(message_from_string(text).get_payload()).startswith("# LiquidDiffusion")


def test_the_source_archive_can_be_tested_and_built(built: Path) -> None:
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    tracked = {"pyproject.toml", "README.md", "CHANGELOG.md", "CITATION.cff", "LICENSE", "NOTICE", "Makefile"}
    assert tracked | {"constraints.txt", "tests/conftest.py", "src/liquid_diffusion/py.typed"} <= names
    assert not [name for name in names if name.split("/")[0] in (".venv", "runs", "dist", "shared")]


def test_every_requirement_is_pinned_and_met() -> None:
    """What the suite runs with is what the constraints say, for all that pyproject.toml asks for."""
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    extras = PROJECT["optional-dependencies"]
    for group in (PROJECT["dependencies"], *extras.values()):
        for requirement in map(Requirement, group):
            name = canonicalize_name(requirement.name)
            if name == "liquid-diffusion":
                assert requirement.extras <= set(extras)
                continue
            if name in OF_NOBODY:
                continue
            assert name in pins, f"constraints.txt does not pin {name}"
            assert pins[name] in requirement.specifier, requirement
    for name in extras["dev"]:
        wanted = Requirement(name)
        if wanted.name != "liquid-diffusion":
            assert metadata.version(wanted.name).split("+")[0] == pins[canonicalize_name(wanted.name)], wanted


@pytest.mark.parametrize(
    ("module", "command", "extra"),
    [
        ("gradio", ["demo", "RUN"], "demo"),
        ("onnxscript", ["export", "RUN", "--to", "onnx", "--out", "OUT"], "onnx"),
        ("efficientnet_lite_pytorch", ["evaluate", "RUN", "--n", "4", "--out", "OUT.json"], "eval"),
    ],
)
def test_a_missing_extra_ends_in_a_sentence(
    module: str, command: list[str], extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    unet = LiquidUNet(in_channels=12, widths=(16, 16), depths=(1, 1))
    LiquidDiffusionPipeline(unet, make_scheduler(), image_size=16).save_pretrained(tmp_path / "RUN")
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)  # what makes an import fail as if it were not there
    monkeypatch.chdir(tmp_path)
    assert main(command) == 2
    error = capsys.readouterr().err
    assert f"pip install 'liquid-diffusion[{extra}]'" in error
    assert "Traceback" not in error


def test_extras_that_are_spoken_of_exist() -> None:
    spoken: set[str] = set()
    for path in (ROOT / "src").rglob("*.py"):
        spoken |= set(re.findall(r"liquid-diffusion\[(\w+)\]", path.read_text()))
    assert "onnx" in spoken
    assert spoken <= set(PROJECT["optional-dependencies"])


def test_the_changelog_knows_this_version() -> None:
    """Keep a Changelog's form, with a section for what was released or is to come."""
    text = (ROOT / "CHANGELOG.md").read_text()
    sections = re.findall(r"^## (?:\[?)(Unreleased|\d+\.\d+\.\d+)", text, re.M)
    assert sections[0] == "Unreleased"
    groups = set(re.findall(r"^### (.+)$", text, re.M))
    assert groups <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert "Added" in groups


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == liquid_diffusion.__version__
    assert citation["license"] == PROJECT["license"]


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda p: p.name)
def test_issue_forms_are_well_formed(path: Path) -> None:
    form = yaml.safe_load(path.read_text())
    if path.name == "config.yml":
        assert set(form) == {"blank_issues_enabled"}
        return
    assert {"name", "description", "body"} <= set(form)
    ids = [field["id"] for field in form["body"] if field["type"] != "markdown"]
    assert len(ids) == len(set(ids)) >= 3
    for field in form["body"]:
        assert field["type"] in ("markdown", "textarea", "input", "dropdown", "checkboxes")
        assert ("value" if field["type"] == "markdown" else "label") in field["attributes"]


def test_the_workflow_does_what_ci_does() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())
    (job,) = workflow["jobs"].values()
    assert {"run": "bash .ci/run"} in job["steps"]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
