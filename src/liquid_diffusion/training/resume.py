"""Whether a run may resume from a checkpoint: what it is now against what it was then."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from liquid_diffusion.config import RunConfig, TrainConfig
from liquid_diffusion.data.feed import Feed
from liquid_diffusion.data.sources import same_setting
from liquid_diffusion.errors import UserError

# What a run that goes on may change; all else would make it another run. The precision that `auto` stands for is one of
# the machine's facts: saying it is how a run begun in fp16 goes on where bf16 would be chosen.
_FREE = frozenset(
    ("out", "steps", "lr", "checkpoint_every", "sample_every", "log_every", "workers", "cache_latents", "ema_on_cpu")
) | {"gradient_checkpointing", "compile", "precision", "push_to_hub", "hub_private"}


def machine_facts(accelerator: Accelerator) -> dict[str, Any]:
    """What a run that goes on must find again: the states of its generators and of its loss scaling."""
    return {
        "device": accelerator.device.type,
        "precision": accelerator.mixed_precision,
        "processes": accelerator.num_processes,
    }


def check_same_run(folder: Path, before: dict[str, Any], config: RunConfig, accelerator: Accelerator) -> None:
    """Look whether this is the run that a checkpoint was written by.

    Args:
        folder: of the run, for the words.
        before: the facts of the checkpoint.
        config: the run as it is wanted now.
        accelerator: the machine now.

    Raises:
        UserError: an option or the machine is another one.
    """
    first = {field.name: field.default for field in fields(TrainConfig)} | {"optimizer": "adamw"}
    settings = first | before["config"]  # which may be older than some options
    for name, value in asdict(config).items():
        if name not in _FREE and not same_setting(name, settings[name], value):
            raise UserError(
                f"{folder} was trained with {name} {settings[name]}, not {value}; "
                f"{_wish(name, settings[name])} to resume it, or choose another --out."
            )
    for name, value in machine_facts(accelerator).items():
        then = before["machine"][name]
        if then != value:
            flag = {"no": "fp32"}.get(then, then)  # accelerate's word for it
            mend = f"say --precision {flag} to resume it" if name == "precision" else "resume it where it was started"
            raise UserError(
                f"{folder} was trained with {name} {then}, here it would be {value}; {mend}, or choose another --out."
            )


def _wish(name: str, value: Any) -> str:
    flag = f"--{name.replace('_', '-')}"
    return f"leave {flag} out" if value is None else f"say {flag} {value}"


def data_facts(feed: Feed) -> dict[str, Any]:
    """What a run that goes on must find again: as many pictures, of the same classes and names."""
    return {"label_names": feed.label_names, "pictures": len(feed), "listing": feed.listing}


def check_same_data(checkpoint: Path, before: dict[str, Any], data: str, feed: Feed) -> None:
    """Look whether the data are those that a checkpoint was trained on.

    Args:
        checkpoint: for the words.
        before: its facts.
        data: what a person calls the data.
        feed: the data now.

    Raises:
        UserError: they are others.
    """
    now = data_facts(feed)
    listings = {before.get("listing"), now["listing"]} - {None}  # one side may not know: an older run, or a table
    if before["pictures"] != now["pictures"]:
        what = f"it had {before['pictures']} pictures, now {now['pictures']}"
    elif before["label_names"] != now["label_names"]:
        what = f"its classes were {_listed(before['label_names'])}, now {_listed(now['label_names'])}"
    elif len(listings) > 1:
        what = "files were added, removed, renamed, or moved between classes"
    else:
        return
    raise UserError(
        f"{data} has changed since {checkpoint} was written: {what}; choose another --out to train on what is there "
        "now."
    )


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "none"
