"""The script that measures what reading a body costs: every door's bodies are read to the end, and by all steps."""

import pytest

from tucka_runtime.server import bench_parse


def test_every_body_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    bench_parse.main(["--rounds", "2"])
    head, *rows = capsys.readouterr().out.splitlines()
    assert len(rows) == len(bench_parse.CASES) and head.split()[:2] == ["bytes", "json.loads"]
    for row in rows:
        figures = list(map(float, row[22:].split()))
        assert len(figures) == 7 and figures[-1] == pytest.approx(sum(figures[2:6]), abs=0.3) and min(figures) > 0
