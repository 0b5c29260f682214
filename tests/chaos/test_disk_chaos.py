"""The disk's chaos script, short: it runs, and what it calls wrong does not happen."""

import pytest

from tests.chaos import disk


def test_row_49_the_disk_fails_in_every_way(capsys: pytest.CaptureFixture[str]) -> None:
    status = disk.main(["--rounds", "1"])
    said = capsys.readouterr().out
    assert status == 0, said
    assert "storage_unavailable" in said and "flipped: the same answer" in said
