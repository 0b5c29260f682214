"""The script that mutates files, short."""

from pathlib import Path

import pytest

from tests.chaos import files


def test_mutated_files_are_refused_or_right(tmp_path: Path) -> None:
    counts, _ = files.trial(tmp_path, 400, seed=1)
    assert len(counts) == 4
    for kind, own in counts.items():
        assert own["taken"] and own["refused"], kind


def test_what_reaches_out_is_seen(tmp_path: Path) -> None:
    """So that the trial can fail."""
    watch, outside = files.Watch(), tmp_path / "outside"
    outside.write_text("x")
    (folder := tmp_path / "folder").mkdir()
    (folder / "own").write_text("x")
    with watch.over(folder):
        (folder / "own").read_text()
    for path in (outside, folder / ".." / "outside", Path("/etc/passwd")):
        with pytest.raises(AssertionError), watch.over(folder):
            path.read_text()
    with pytest.raises(AssertionError), watch.over(folder), pytest.raises(ImportError):
        __import__("no_such_module_of_anybody")
