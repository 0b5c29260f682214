"""Requests of a plan: read from traces of several kinds, or drawn."""

import json
import time
from collections import Counter
from pathlib import Path

import pytest

from tucka_runtime.errors import ConfigError
from tucka_runtime.loadtest.lengths import Lengths
from tucka_runtime.loadtest.settings import Settings
from tucka_runtime.loadtest.workload import TokenScale, Workload
from tucka_runtime.planning.arrivals import BASE, Arrivals, Drawn, read_trace, synthetic

DRAWN = Drawn(Lengths("fixed", 64), Lengths("uniform", 1, 9), zipf=1.0, adapters=5)
NOTHING_DRAWN = Drawn(Lengths("fixed", 64), Lengths("fixed", 32))


def read(folder: Path, text: str, drawn: Drawn = NOTHING_DRAWN, name: str = "trace.csv") -> Arrivals:
    (folder / name).write_text(text)
    return read_trace(folder / name, drawn)


def test_our_csv(tmp_path: Path) -> None:
    """In any order; an empty adapter is the base, blank lines are none."""
    text = "Arrival,adapter,prompt_tokens,output_tokens\n12.5,law,10,3\n\n11.0,,20,4\n13.0,law,5,6\n14,fin,7,8\n"
    found = read(tmp_path, text)
    assert found == Arrivals([0.0, 1.5, 2.0, 3.0], [BASE, 0, 0, 1], [20, 10, 5, 7], [4, 3, 6, 8], ("law", "fin"))
    assert found.faster(2).at == [0.0, 0.75, 1.0, 1.5]


def test_azures_traces_have_dates_and_no_adapters(tmp_path: Path) -> None:
    text = (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:05.0,3180,8\n"
    )
    found = read(tmp_path, text, DRAWN)
    assert found.at == pytest.approx([0.0, 1.02004], abs=1e-5)
    assert found.prompt == [4808, 3180] and found.output == [10, 8]
    assert len(found.names) == 5 and set(found.adapter) <= set(range(5))
    with pytest.raises(ConfigError, match=r"names no adapters\. Give it a column `adapter`, or --zipf"):
        read(tmp_path, text)


def test_what_the_load_tester_replays_is_read_as_it_does(tmp_path: Path) -> None:
    lines = [
        {"at": 3.0, "model": "law", "prompt_tokens": 10, "max_tokens": 3},
        {"at": 1.0, "model": "fin", "prompt_tokens": 20, "max_tokens": 4},
    ]
    found = read(tmp_path, "\n".join(map(json.dumps, lines)), name="trace.jsonl")
    replay = Workload(
        Settings(trace=str(tmp_path / "trace.jsonl")), ["fin", "law"], None, TokenScale()
    ).plan()  # fmt: skip
    assert found.at == [one.at for one in replay]
    assert [found.names[adapter] for adapter in found.adapter] == [one.model for one in replay]
    assert found.output == [one.turns[0].max_tokens for one in replay]
    assert found.prompt == [len(one.turns[0].text.split()) for one in replay]


def test_mooncakes_traces_have_milliseconds(tmp_path: Path) -> None:
    lines = [{"timestamp": at, "input_length": 100, "output_length": 7} for at in (1000, 1500)]
    found = read(tmp_path, "\n".join(map(json.dumps, lines)), DRAWN, "trace.jsonl")
    assert found.at == [0.0, 0.5] and found.prompt == [100, 100] and found.output == [7, 7]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "line 1: no column of arrivals. Name one `arrival`"),
        ("adapter\nlaw\n", "line 1: no column of arrivals"),
        ("arrival\n", "has no requests"),
        ("arrival,adapter\n1,law\n2\n", "line 3: it has no adapter, which others have. Mend the line"),
        ("arrival\n1\nsoon\n", "line 3: its arrival is neither seconds nor a date and time. Mend the line, or leave"),
        ("arrival\nnan\n", "line 2: its arrival"),
        ("at,prompt_tokens\n1,5\n2,0\n", "line 3: prompt_tokens is not a whole number of at least 1"),
        ("at,max_tokens\n1,5\n2,\n", "line 3: output_tokens is not a whole number"),
        ("at,max_tokens\n1,1.5\n", "line 2: output_tokens is not"),
        (f"at,max_tokens\n1,{'1' * 5000}\n", "line 2: output_tokens is not"),
    ],
)
def test_a_wrong_line_is_named_with_the_remedy(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        read(tmp_path, text, DRAWN)
    assert said in error.value.message and "soon" not in error.value.message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_trace(tmp_path / "none.csv", DRAWN)
    (tmp_path / "bytes.csv").write_bytes(b"arrival\n\xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_trace(tmp_path / "bytes.csv", DRAWN)
    with pytest.raises(ConfigError, match="line 2: it has no adapter"):
        read(tmp_path, '{"at": 1, "model": "law"}\n{"at": 2}\n', name="half.jsonl")


def test_adapters_are_in_all_lines_or_in_none(tmp_path: Path) -> None:
    """null is none."""
    with pytest.raises(ConfigError, match="line 1: it has no adapter"):
        read(tmp_path, '{"at": 5, "model": null}\n{"at": 0, "adapter": "a"}\n', name="later.jsonl")
    found = read(tmp_path, '{"at": 5, "model": null}\n{"at": 0}\n', DRAWN, "none.jsonl")
    assert found.names == DRAWN.names


@pytest.mark.parametrize("zone", ["UTC", "Europe/Berlin"])
def test_dates_are_utc_unless_they_say_otherwise(zone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An hour that clocks here leave out or have twice is one like any other."""
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        rows = ("2023-10-29 00:59:59", "2023-10-29 02:00:01", "2023-10-29T04:00:01+01:00")
        found = read(tmp_path, "\n".join(["at,model", *(f"{row},a" for row in rows)]))
        assert found.at == [0, 3602, 7202]
        lines = "\n".join(json.dumps({"timestamp": row, "model": "a"}) for row in rows)
        assert read(tmp_path, lines, name="dates.jsonl") == found
    finally:
        monkeypatch.undo()
        time.tzset()


def test_lengths_that_a_line_leaves_out_are_drawn(tmp_path: Path) -> None:
    lines = '{"at": 1, "model": "law"}\n{"at": 2, "model": "law", "max_tokens": 500}\n'
    found = read(tmp_path, lines, DRAWN, "some.jsonl")
    assert found.prompt == [64, 64] and found.output[0] < 10 and found.output[1] == 500


def test_drawn_requests_are_as_many_and_as_frequent_as_asked_for() -> None:
    found = synthetic(DRAWN, "50", 1.0, 20_000, float("inf"))
    assert len(found) == 20_000 and found.at[0] == 0.0 and found.at == sorted(found.at)
    assert found.at[-1] == pytest.approx(400, rel=0.05)
    counts = Counter(found.adapter)
    assert counts[0] / counts[1] == pytest.approx(2, rel=0.1) and counts[0] / counts[4] == pytest.approx(5, rel=0.1)
    assert set(found.prompt) == {64} and set(found.output) == set(range(1, 10))
    assert synthetic(DRAWN, "50", 1.0, 20_000, float("inf")) == found
    assert len(synthetic(DRAWN, "50", 1.0, None, 10.0)) == pytest.approx(500, rel=0.2)
    with pytest.raises(ConfigError, match="No request arrives"):
        synthetic(DRAWN, "0.001", 1.0, None, 1.0)
