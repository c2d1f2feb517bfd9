from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from tqdm import tqdm

from liquid_diffusion.data import parallel
from liquid_diffusion.data.parallel import map_in_threads, map_pictures


def test_results_come_in_order_and_few_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "at_most_cores", lambda most: 4)
    asked, most = 0, 0

    def numbers() -> Iterator[int]:
        nonlocal asked
        for number in range(200):
            asked += 1
            yield number

    def square(number: int) -> int:
        time.sleep(0.002 + 0.002 * (number % 3))  # so that some overtake others
        return number**2

    for place, found in enumerate(map_in_threads(square, numbers())):
        assert found == place**2
        most = max(most, asked - place)
    assert asked == 200
    assert 4 * 4 <= most <= 4 * 4 + 1


def test_threads_work_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each waits for the others: one after the other they would wait for ever."""
    monkeypatch.setattr(parallel, "at_most_cores", lambda most: 3)
    meeting = threading.Barrier(3, timeout=30)

    def meet(number: int) -> int:
        time.sleep(0.002)
        return meeting.wait() if number >= parallel._LONG_ONES else number

    assert len(list(map_in_threads(meet, range(parallel._LONG_ONES + 6)))) == parallel._LONG_ONES + 6


def test_what_is_short_is_done_by_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "_WORTH_A_THREAD", 1.0)
    here = threading.get_ident()
    assert set(map_in_threads(lambda _: threading.get_ident(), range(100))) == {here}


def test_an_error_is_raised_where_it_is_met_and_ends_the_work() -> None:
    def invert(number: int) -> float:
        return 1 / (20 - number)

    for slow in (0.0, 0.002):

        def invert_later(number: int, slow: float = slow) -> float:
            time.sleep(slow)
            return invert(number)

        found = map_in_threads(invert_later, range(10**9))
        assert [next(found) for _ in range(20)] == [1 / (20 - number) for number in range(20)]
        with pytest.raises(ZeroDivisionError):
            next(found)


@pytest.mark.parametrize("main", [True, False])
def test_of_several_processes_the_first_has_the_bar(
    main: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def at_once(*args: Any, delay: float, **options: Any) -> tqdm[int]:
        return tqdm(*args, **options)

    monkeypatch.setattr(parallel, "tqdm", at_once)
    monkeypatch.setattr(parallel, "process_state", lambda: SimpleNamespace(is_main_process=main))
    assert list(map_pictures(abs, [-1, -2], "Counting")) == [1, 2]
    assert ("Counting" in capsys.readouterr().err) == main
