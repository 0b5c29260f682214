"""The chaos scripts, short: they run, and what they call wrong does not happen."""

import pytest

from tests.chaos import engine_faults, memory_slope


def test_row_48_the_engine_is_killed_and_frozen_under_load(capsys: pytest.CaptureFixture[str]) -> None:
    status = engine_faults.main(["--kills", "1", "--freezes", "1", "--clients", "4"])
    said = capsys.readouterr().out
    assert status == 0, said
    assert "engine_unavailable" in said and "'answer'" in said


def test_the_engines_memory_does_not_grow_with_every_batch_size(capsys: pytest.CaptureFixture[str]) -> None:
    """The default of 1,024 kept primitives grows by a third in this many requests."""
    assert memory_slope.main(["--requests", "600", "--percent", "10"]) == 0, capsys.readouterr().out
