from __future__ import annotations

import contextlib
import socket

import pytest
from httpx2 import ConnectError
from huggingface_hub.utils import http_backoff  # type: ignore[attr-defined]

from liquid_diffusion.patience import patiently


def test_requests_that_are_made_again_are_told_in_one_sentence(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]  # nobody listens there any more when it is asked
    for within in (True, False):
        with pytest.raises(ConnectError), patiently() if within else contextlib.nullcontext():
            http_backoff("GET", f"http://127.0.0.1:{port}", max_retries=3, base_wait_time=0.01)
        said = capsys.readouterr().err.count("The Hub does not answer")
        lines = sum("Retry" in record.message for record in caplog.records)
        assert (said, lines) == ((1, 0) if within else (0, 3))
