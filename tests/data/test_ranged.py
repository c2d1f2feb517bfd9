from __future__ import annotations

import io
from pathlib import Path

import pytest
from little_hub import LittleHub

from liquid_diffusion.data import ranged
from liquid_diffusion.data.ranged import RangedFile, SourceLostError, short_address

CONTENT = bytes(range(256)) * 40


def test_reads_what_a_file_reads_in_pieces(little_hub: LittleHub, monkeypatch: pytest.MonkeyPatch) -> None:
    (little_hub.repo("some/table") / "x.parquet").write_bytes(CONTENT)
    monkeypatch.setattr(ranged, "_PIECE", 1000)
    known = io.BytesIO(CONTENT)
    with RangedFile("hf://datasets/some/table/x.parquet") as file:
        assert file.size == len(CONTENT)
        for place, whence, size in ((0, 0, 10), (5, 1, 2500), (-100, 2, 50), (0, 1, 999), (0, 1, 5), (10, 0, -1)):
            assert file.seek(place, whence) == known.seek(place, whence)
            assert file.read(size) == known.read(size)
            assert file.tell() == known.tell()
    sent = [request.sent for request in little_hub.requests("*x.parquet", "GET")]
    assert max(sent) == 1000
    assert sum(sent) == 10 + 2500 + 50 + 50 + len(CONTENT) - 10  # nothing but what was asked for


@pytest.mark.parametrize("status", [403, 404])
def test_an_answer_that_there_is_nothing_is_not_waited_for(
    little_hub: LittleHub, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (little_hub.repo("some/table") / "x.parquet").write_bytes(CONTENT)
    file = RangedFile("hf://datasets/some/table/x.parquet")
    little_hub.fail("*x.parquet", status=status, times=None)

    def never(_: float) -> None:
        raise AssertionError("it waited")

    monkeypatch.setattr("liquid_diffusion.data.ranged.time.sleep", never)
    with pytest.raises(SourceLostError, match=rf"some/table/x.parquet can't be read any more .*{status}"):
        file.read(10)
    little_hub.heal()
    file.close()


def test_what_comes_back_in_time_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that loses the end of a file, and has it again after two pauses; for good is too long."""
    path = tmp_path / "x.parquet"
    path.write_bytes(CONTENT)
    pauses = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 2:
            path.write_bytes(CONTENT)

    monkeypatch.setattr("liquid_diffusion.data.ranged.time.sleep", pause)
    with RangedFile(str(path)) as file:
        path.write_bytes(CONTENT[:100])
        assert file.read() == CONTENT
        assert pauses == list(ranged._PAUSES[:2])
        path.write_bytes(CONTENT[:100])
        file.seek(0)
        with pytest.raises(SourceLostError, match="100 of 10240 bytes came"):
            file.read()
    with pytest.raises(SourceLostError):
        RangedFile(str(tmp_path / "none.parquet"))


def test_addresses_in_words() -> None:
    assert short_address("hf://datasets/some/table@0123abc/data/x.parquet") == "some/table/data/x.parquet"
    assert short_address("/home/me/x.parquet") == "/home/me/x.parquet"
