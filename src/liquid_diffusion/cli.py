"""The command line. It parses and hands over; what it hands to is imported when a command runs."""

from __future__ import annotations

import difflib
import importlib
import io
import os
import re
import shlex
import sys
from argparse import SUPPRESS, Action, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

from liquid_diffusion import __version__
from liquid_diffusion.config import (
    KINDS,
    DemoConfig,
    EncodeConfig,
    EstimateConfig,
    EvaluateConfig,
    ExportConfig,
    SampleConfig,
    ShowConfig,
    TrainConfig,
)
from liquid_diffusion.errors import UserError, is_out_of_memory

_EXAMPLES = """
examples:
  liquid-diffusion train                                       emoji, on any machine, in minutes
  liquid-diffusion train --data ./my_photos --image-size 256   your own pictures
  liquid-diffusion sample runs/emoji-32 --n 16 --out grid.png  pictures from a run
  liquid-diffusion datasets                                    what --data knows by name
"""


def _train(arguments: dict[str, Any]) -> int:
    config = TrainConfig(**arguments)  # before the import, which takes seconds: a mistake is told at once
    from liquid_diffusion.training.trainer import Trainer

    trainer = Trainer(config)
    run, say = trainer.folder, trainer.accelerator.print  # of several processes the first one speaks
    if trainer.finished:
        say(f"{run.path} has reached its {trainer.step} steps; give more --steps to train on.")
        trainer.run()
        return 0
    say(trainer.summary())
    if warning := trainer.memory_warning():
        say(warning)
    if trainer.run():
        say(f"Done: {run.path}/samples. More pictures: {shlex.join(['liquid-diffusion', 'sample', str(run.path)])}")
        return 0
    go_on = shlex.join(["liquid-diffusion", "train", "--config", str(run.config_file)])
    say(f"Stopped at step {trainer.step}; all is saved. Go on by the same command, or: {go_on}")
    return 130


def _stay_in_its_folder(arguments: dict[str, Any], file: Path) -> None:
    """RUN/config.yaml means the run beside it, from whatever folder it is called and wherever it was moved to.

    What it has as `out` was told from the folder of the first call. Another --out goes before it.
    """
    here, out = file.absolute().parent, arguments["out"]
    if out is None or not (here / "checkpoints").is_dir():
        return
    import yaml

    if out == yaml.safe_load(file.read_text()).get("out") and Path(out).expanduser().absolute() != here:
        arguments["out"] = str(here)


def _hand_over(function: str, config: type | None, arguments: dict[str, Any]) -> int:
    """Call a function of the package with RUN and the options, as far as it has them, and print what it says."""
    module, name = function.rsplit(".", maxsplit=1)
    first = [arguments.pop(name) for name in ("run", "show_source") if name in arguments]
    json = {"as_json": arguments.pop("json")} if "json" in arguments else {}
    options = [config(**arguments)] if config else []
    said = getattr(importlib.import_module(f"liquid_diffusion.{module}"), name)(*first, *options, **json)
    if said is not None:
        print(said, flush=True)
    return 0


_COMMANDS: dict[str, tuple[str, type | None, str]] = {
    "train": ("", TrainConfig, "train a generator, or resume a run"),
    "sample": ("generate.generate", SampleConfig, "draw pictures with a trained generator"),
    "evaluate": ("evaluation.evaluate.evaluate", EvaluateConfig, "measure how good a generator's pictures are"),
    "export": ("export.export", ExportConfig, "export a generator: diffusers, ONNX, or the Hub"),
    "demo": ("demo.serve.serve", DemoConfig, "serve a generator as a local web page"),
    "encode": ("data.encode.encode", EncodeConfig, "encode pictures once, for train --cache-latents"),
    "estimate": ("estimate.report", EstimateConfig, "tell how much memory a training will need"),
    "datasets": ("data.show.datasets", ShowConfig, "list the data sets known by name, or draw what one looks like"),
}
_RUN = ("run", "?", "run folder, pipeline folder or Hub id (default: the packaged model)")
_FIRST = {
    **dict.fromkeys(("sample", "evaluate", "export", "demo"), _RUN),
    "encode": ("data", None, "as for train --data"),
    "datasets": (
        "show_source",
        "*",
        "show SOURCE writes a grid of what a model is fed with; SOURCE as for train --data",
    ),
}


class _Formatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """Help as it is written, with the default where there is one; no types, which the texts tell better."""

    def _get_help_string(self, action: Action) -> str:
        silent = any(action.default is value for value in (None, False, SUPPRESS)) or not action.option_strings
        return (action.help or "") + ("" if silent else f" ({action.default})")


_KINDS = KINDS | {str: f"{KINDS[str]}, in quotes where YAML would read something else"}


def _in_words(mistake: str, options: Sequence[str]) -> str:
    """What jsonargparse says of a value of the wrong type, in its terms and many lines, or of an unknown option."""
    if match := re.match(r"Parser key \"(\w+)\":.*(?:Given|Got) value: (.*)", mistake, re.DOTALL):
        expected = mistake.partition("Given value type")[0]
        kinds = [words for kind, words in _KINDS.items() if f"<class '{kind.__name__}'>" in expected]
        if choices := re.search(r"Literal\[(.*?)\]", mistake):
            kinds.append("one of " + choices[1].replace("'", ""))
        if kinds:
            return f"--{match[1].replace('_', '-')} must be {' or '.join(kinds)}, not {match[2]}."
    if re.match(r"Unexpected config: (#|$)", mistake):
        return "a file of --config holds no option"
    if match := re.match(r"unrecognized arguments: (--[\w-]+)", mistake):
        near = difflib.get_close_matches(match[1], options, n=1)
        return f"There is no option {match[1]}{f'; did you mean {near[0]}?' if near else '.'}"
    return mistake


class _Parser(ArgumentParser):
    """Tells mistakes in words."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        options = [option for action in self._actions for option in action.option_strings]
        super().error(_in_words(message, options), ex)


def _parser() -> ArgumentParser:
    parser = _Parser(
        prog="liquid-diffusion",
        usage="liquid-diffusion COMMAND [options]",
        formatter_class=_Formatter,
        description="Train and run small image generators without attention.",
        epilog=_EXAMPLES,
        version=__version__,
    )
    commands = parser.add_subcommands(required=True, dest="command", metavar="COMMAND")
    for name, (_, config, text) in _COMMANDS.items():
        first, count, what = _FIRST.get(name, ("", None, ""))
        named = "show SOURCE" if name == "datasets" else first.upper()
        place = f"[{named}] " if count else f"{named} " if first else ""
        usage = f"liquid-diffusion {name} {place}[options]"
        command = _Parser(usage=usage, description=text[0].upper() + text[1:] + ".", formatter_class=_Formatter)
        if config is not None:
            command.add_argument(
                "--config", action="config", help="YAML file of options; those after it take precedence"
            )
            hints = get_type_hints(config)
            for field in (field for field in fields(config) if field.name != first):
                flag, hint = "--" + field.name.replace("_", "-"), hints[field.name]
                # of `str | None` jsonargparse reads what is typed as YAML, in which "#1" is a comment, and "~" nothing
                kind = str if hint == str | None else hint
                command.add_argument(flag, type=kind, default=field.default, help=field.metadata["help"])
        if first:
            command.add_argument(first, type=str, nargs=count, help=what)
        if name in ("datasets", "estimate", "evaluate"):
            command.add_argument("--json", action="store_true", help="print JSON")
        commands.add_subcommand(name, command, help=text)
        command.prog = f"liquid-diffusion {name}"  # else its mistakes name a command "liquid-diffusion COMMAND ..."
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code is 0, 2 for what a person can mend, 130 after Ctrl-C, 141 where nobody reads on."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that the terminal has no letters for is no reason to stop
        sys.stdout.reconfigure(errors="backslashreplace")
    parser = _parser()
    try:
        parsed: Namespace = parser.parse_args(argv)
    except UnicodeDecodeError as error:
        parser.error(f"a file of --config is not UTF-8: {error}")
    command = parsed.command
    arguments = parsed[command].as_dict()
    files = arguments.pop("config", None) or []
    try:
        if command == "train" and files:
            _stay_in_its_folder(arguments, Path(str(files[-1])))
        return _train(arguments) if command == "train" else _hand_over(*_COMMANDS[command][:2], arguments)
    except UserError as error:
        print(f"liquid-diffusion: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("liquid-diffusion: stopped.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would try to write the rest
        return 128 + 13  # as if SIGPIPE had ended it
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        way_out = {
            "train": "a smaller --batch-size or --image-size, or --gradient-checkpointing true",
            "encode": "a smaller --batch-size",
            "evaluate": "a smaller --batch-size",
        }.get(command, "fewer or smaller pictures")
        print(f"liquid-diffusion: the memory is full; take {way_out}.", file=sys.stderr)
        return 2
