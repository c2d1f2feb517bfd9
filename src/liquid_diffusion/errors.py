"""What went wrong, in words for the person at the terminal."""

from __future__ import annotations


class UserError(ValueError):
    """Something a person did or can mend; the message is one sentence that says what to do."""


def first_line(error: BaseException) -> str:
    """What an error says first, for one sentence of ours; its name where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
