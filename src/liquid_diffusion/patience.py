"""What a person hears while the Hub does not answer: one sentence, and not the client's line for every try."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator

_CLIENT = "huggingface_hub.utils._http"  # whose log has two lines for every request that it makes again


class _SaidOnce(logging.Filter):
    """Lets no line through, and says at the first one what is going on."""

    said = False

    def filter(self, record: logging.LogRecord) -> bool:
        del record
        if not self.said:
            self.said = True
            print("The Hub does not answer; trying again for half a minute.", file=sys.stderr)
        return False


@contextlib.contextmanager
def patiently() -> Iterator[None]:
    """Within it requests to the Hub that are made again are told in one sentence."""
    client, said_once = logging.getLogger(_CLIENT), _SaidOnce()
    client.addFilter(said_once)
    try:
        yield
    finally:
        client.removeFilter(said_once)
