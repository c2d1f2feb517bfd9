from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from liquid_diffusion.data import parallel
from liquid_diffusion.data.parallel import map_in_threads


def test_results_come_in_order_and_few_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "at_most_cores", lambda most: 4)
    asked, most = 0, 0

    def numbers() -> Iterator[int]:
        nonlocal asked
        for number in range(200):
            asked += 1
            yield number

    def square(number: int) -> int:
        time.sleep(0.002 * (number % 3))  # so that some overtake others
        return number**2

    for place, found in enumerate(map_in_threads(square, numbers())):
        assert found == place**2
        most = max(most, asked - place)
    assert asked == 200
    assert most <= 4 * 4 + 1


def test_threads_work_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each waits for the others: one after the other they would wait for ever."""
    monkeypatch.setattr(parallel, "at_most_cores", lambda most: 3)
    meeting = threading.Barrier(3, timeout=30)
    assert len(list(map_in_threads(lambda _: meeting.wait(), range(6)))) == 6


def test_an_error_is_raised_where_it_is_met_and_ends_the_work() -> None:
    def invert(number: int) -> float:
        return 1 / (3 - number)

    found = map_in_threads(invert, range(10**9))
    assert [next(found), next(found), next(found)] == [1 / 3, 1 / 2, 1]
    with pytest.raises(ZeroDivisionError):
        next(found)
