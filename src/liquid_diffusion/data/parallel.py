"""Pictures read by several cores at once: by threads, and by the workers of a data loader."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from tqdm import tqdm

from liquid_diffusion.errors import UserError
from liquid_diffusion.hardware import at_most_cores, process_state

_MOST_THREADS = 16
_AHEAD = 4  # results for each thread that may wait to be taken
# What takes less than a millisecond is slower in threads, which wait for each other: on two cores 1,898 emoji took
# 0.80 s in place of 0.36, a photograph of 12 megapixels 14 ms in place of 26.
_WORTH_A_THREAD = 1e-3
_LONG_ONES = 8  # in a row, before there are threads: one may only have waited for something

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`map` in as many threads as there are cores, in order; a few results are held ahead of the one that is taken.

    Files are read, Pillow decodes and hashlib digests while other threads of Python go on. It begins in this thread
    alone, where what is short stays.
    """
    items, long_ones = iter(items), 0
    for item in items:
        start = time.perf_counter()
        result = function(item)
        long_ones = long_ones + 1 if time.perf_counter() - start > _WORTH_A_THREAD else 0
        yield result
        if long_ones == _LONG_ONES:
            break
    threads = at_most_cores(_MOST_THREADS)
    waiting: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > _AHEAD * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def map_pictures(function: Callable[[Item], Result], items: Sequence[Item], doing: str) -> Iterator[Result]:
    """`map_in_threads` with a progress bar where it takes long; of several processes the first one has it.

    Args:
        function: what is done with each item.
        items: pictures, or what stands for them.
        doing: what the bar says.
    """
    hidden = not process_state().is_main_process
    every = map_in_threads(function, items)
    yield from tqdm(every, doing, len(items), unit="picture", leave=False, delay=2, disable=hidden)


def leave_ending_to_main_process(_worker: int = 0) -> None:
    """What a worker of a data loader begins with.

    A signal that ends a run goes to the whole group, from a terminal or from `timeout`, or to each of its processes,
    from systemd or SLURM. What it ends is the main process's to decide, which finishes its step with what the workers
    read, saves, and ends them itself.
    """
    if hasattr(os, "setpgrp"):  # not on Windows
        os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    main = multiprocessing.parent_process()  # who asked for this process, also of a server that forks
    if main is not None and hasattr(signal, "sigwaitinfo"):  # not on macOS; only there it is told who sent a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_by_main_process, args=[main.pid], daemon=True).start()


@contextlib.contextmanager
def errors_of_workers() -> Iterator[None]:
    """A `UserError` of a worker, whose text is its traceback, becomes the one that it was."""
    try:
        yield
    except UserError as error:
        said = str(error).strip().splitlines()[-1].partition(f"{type(error).__name__}: ")[-1]
        raise type(error)(said or str(error)) from error


def _end_by_main_process(main: int) -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != main:
        pass
    os._exit(0)
