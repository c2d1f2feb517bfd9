from __future__ import annotations

import errno
import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from liquid_diffusion.errors import UserError
from liquid_diffusion.training.tracking import MetricsLog, StopRequest


def test_lines_after_the_checkpoint_are_written_again(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    for step in (1, 2, 3):
        log.write(step, loss=float(step))
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # killed while writing
    (events,) = (tmp_path / "tensorboard").iterdir()
    events.rename(events.with_name(events.name.replace(f".{os.getpid()}.", ".99999999.")))  # of a process sorted last
    log = MetricsLog(tmp_path, 2)
    log.write(3, loss=30.0)
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}, {"step": 3, "loss": 30.0}]
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_in_another_thread_there_is_nothing_to_ask() -> None:
    def stand() -> bool:
        with StopRequest() as stop:
            return stop.wanted

    before = signal.getsignal(signal.SIGTERM)
    with ThreadPoolExecutor() as pool:
        assert pool.submit(stand).result() is False
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_asks_second_one_stops(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.wanted
        os.kill(os.getpid(), number)
        assert stop.wanted
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where TensorBoard meets it first; a real one is met by a thread of its own, whenever that writes."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    log = MetricsLog(tmp_path, 0)
    with monkeypatch.context() as patch:
        for name in ("add_scalar", "close"):
            patch.setattr(SummaryWriter, name, full)
        with pytest.raises(UserError, match=r"metrics\.jsonl can't be written to: No space left on device"):
            log.write(1, loss=1.0)
        with pytest.raises(UserError, match=r"metrics\.jsonl can't be written to: No space left on device"):
            log.close()
    log.close()
