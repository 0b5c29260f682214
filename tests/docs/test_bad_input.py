"""docs/bad-input.md says of every row whether a test holds it, and is right."""

import re

from tests.support import ROOT

ROW = re.compile(r"^\| (\d+) \|", re.MULTILINE)


def test_rows() -> None:
    named = {
        int(row)
        for path in (ROOT / "tests").rglob("test_*.py")
        for rows in re.findall(r"def test_rows?_((?:\d+_)+)", path.read_text("utf-8"))
        for row in rows.strip("_").split("_")
    }
    held, _, open_rows = (ROOT / "docs" / "bad-input.md").read_text("utf-8").partition("## Not held yet")
    assert named == set(map(int, ROW.findall(held)))
    assert not named & set(map(int, ROW.findall(open_rows)))
