"""What a run tells while it goes on: metrics.jsonl, TensorBoard, and the signals that end it."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from liquid_diffusion.writing import write_whole, writing_to


class MetricsLog:
    """RUN/metrics.jsonl and RUN/tensorboard.

    Args:
        run: the run folder.
        step: lines of later steps are dropped: a run that goes on from a checkpoint writes them again.
    """

    def __init__(self, run: Path, step: int) -> None:
        path = self._path = run / "metrics.jsonl"
        kept = []
        if path.is_file():
            for line in path.read_text().splitlines():
                try:
                    if json.loads(line)["step"] <= step:
                        kept.append(line + "\n")
                except (ValueError, KeyError, TypeError):
                    continue  # the last line of a run that was killed while it wrote
        write_whole(path, "".join(kept))
        self._file = path.open("a", buffering=1)
        board = run / "tensorboard"
        # TensorBoard reads the files in the order of their names, which tell the second: a second file of the same
        # second could come first, and its purge then take nothing away.
        while any(board.glob(f"events.out.tfevents.{int(time.time())}.*")):
            time.sleep(0.05)
        self._board = SummaryWriter(str(board), purge_step=step + 1)

    def write(self, step: int, **values: float) -> None:
        """Write the values of a step.

        Raises:
            UserError: the disk is full.
        """
        with writing_to(self._path):
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Close the files.

        Raises:
            UserError: the disk is full.
        """
        with writing_to(self._path):
            self._file.close()
            self._board.close()


class StopRequest:
    """Ctrl-C and SIGTERM as a wish that is looked at between two steps; a second Ctrl-C stops at once.

    Python gives signals to the main thread alone: in another one there is nothing to ask.
    """

    def __init__(self) -> None:
        self.wanted = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        main = threading.current_thread() is threading.main_thread()
        for number in (signal.SIGINT, signal.SIGTERM) if main else ():
            self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.wanted:
            raise KeyboardInterrupt
        self.wanted = True
        # not by print, which may be at work itself when the signal comes
        os.write(2, b"\nStopping after this step, to save it; once more stops at once and saves nothing.\n")
