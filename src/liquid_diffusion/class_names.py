"""The classes of a model as a person writes them, and the numbers that the model has for them."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence


class ClassNames:
    """Names of classes, in the order of their numbers.

    Blanks around a name do not count, nor the form of its accents, of which macOS writes another one; its case counts
    where two differ by nothing else.

    Args:
        names: as the model has them.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        written = [self._plain(name) for name in names]
        self._numbers = {name.lower(): number for number, name in reversed(list(enumerate(written)))}
        self._numbers |= {name: number for number, name in enumerate(written)}

    @staticmethod
    def _plain(name: str) -> str:
        return unicodedata.normalize("NFC", name.strip())

    def number(self, name: str) -> int | None:
        """The number of the class of that name; None where there is none."""
        name = self._plain(name)
        return self._numbers.get(name, self._numbers.get(name.lower()))

    def number_or_own(self, label: str | int) -> int | None:
        """The same for what may be a number already: what is a name is that class, also where names are numbers."""
        found = self.number(label) if isinstance(label, str) else None
        text = self._plain(str(label))
        if found is None and text.isdecimal() and int(text) < len(self.names):
            return int(text)
        return found
