"""What went wrong, in words for the person at the terminal."""

from __future__ import annotations


class UserError(ValueError):
    """Something a person did or can mend; the message is one sentence that says what to do."""


def first_line(error: BaseException) -> str:
    """What an error says first, for one sentence of ours; its name where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch says that the memory of a device is full: each kind of device has its own error or words."""
    return "out of memory" in str(error) or "can't allocate memory" in str(error)
