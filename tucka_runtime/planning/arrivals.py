"""The requests of a plan: when each comes, of which adapter, and how long its prompt and its answer are."""

import csv
import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tucka_runtime.errors import ConfigError
from tucka_runtime.loadtest.arrivals import open_loop
from tucka_runtime.loadtest.lengths import Lengths
from tucka_runtime.loadtest.popularity import Popularity
from tucka_runtime.loadtest.workload import read_lines

BASE = -1
"""In place of an adapter's number: the base, which needs no slot."""

COLUMNS = {
    "at": ("arrival", "at", "timestamp"),
    "adapter": ("adapter", "model"),
    "prompt": ("prompt_tokens", "contexttokens", "input_length"),
    "output": ("output_tokens", "generatedtokens", "max_tokens", "output_length"),
}
"""What a column may be called, upper or lower case: our own name first, then those of Azure's LLM traces and of the
load tester's."""


@dataclass(frozen=True)
class Arrivals:
    """Requests in the order in which they come; the lists have an entry for each. `at`: seconds after the first one.
    `adapter`: positions in `names`, or BASE. `prompt` and `output`: tokens, at least 1."""

    at: list[float]
    adapter: list[int]
    prompt: list[int]
    output: list[int]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.at)

    def faster(self, times: float) -> "Arrivals":
        """The same requests, so many times as fast."""
        return Arrivals([at / times for at in self.at], self.adapter, self.prompt, self.output, self.names)


@dataclass(frozen=True)
class Drawn:
    """What is drawn from `seed` where no trace says it: adapters by Zipf's law (the i-th of `adapters` has the weight
    1 / i^zipf; None: a trace has to name them), tokens of prompts and of answers."""

    prompt: Lengths
    output: Lengths
    zipf: float | None = None
    adapters: int = 0
    seed: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"adapter-{number}" for number in range(self.adapters))

    def picks(self, count: int) -> list[int]:
        """Adapters of `count` requests, by their numbers."""
        popularity = Popularity(f"zipf:{self.zipf}", self.names)
        rng = random.Random(f"{self.seed}/adapters")
        return rng.choices(range(self.adapters), cum_weights=popularity.cumulated, k=count)

    def lengths(self, what: str, count: int) -> list[int]:
        """Tokens of `count` prompts or outputs."""
        drawn: Lengths = getattr(self, what)
        rng = random.Random(f"{self.seed}/{what}")
        return [drawn.draw(rng) for _ in range(count)]


def synthetic(drawn: Drawn, rate: str, burstiness: float, requests: int | None, seconds: float) -> Arrivals:
    """Requests at a rate as the load tester's --rate has it, until there are `requests` or `seconds` are over. Raises
    ConfigError for a rate that is none, or that brings no request."""
    at = open_loop(rate, seconds, burstiness, random.Random(f"{drawn.seed}/arrivals"), requests)
    if not at:
        raise ConfigError("No request arrives: give more --requests, or a longer --duration.")
    count = len(at)
    start = at[0]
    return Arrivals(
        [t - start for t in at],
        drawn.picks(count),
        drawn.lengths("prompt", count),
        drawn.lengths("output", count),
        drawn.names,
    )


def read_trace(path: Path, drawn: Drawn) -> Arrivals:
    """A CSV with a header (COLUMNS), or the JSONL that `tucka loadtest --trace` replays. What it does not tell is
    drawn.

    Raises ConfigError with the line's number for what cannot be read."""
    rows = list(_lines_of_json(path) if path.suffix == ".jsonl" else _lines_of_csv(path))
    if not rows:
        raise ConfigError(f"{path} has no requests. A header alone is not enough: give a line for each.")
    rows.sort(key=lambda row: row["at"])
    count = len(rows)
    names: dict[str, int] = {}
    if "adapter" in rows[0]:
        adapter = [names.setdefault(row["adapter"], len(names)) if row["adapter"] else BASE for row in rows]
    elif drawn.zipf is not None:
        adapter, names = drawn.picks(count), {name: number for number, name in enumerate(drawn.names)}
    else:
        raise ConfigError(f"{path} names no adapters. Give it a column `adapter`, or --zipf A and --adapters K.")
    prompt, output = (
        [row.get(what, length) for row, length in zip(rows, drawn.lengths(what, count), strict=True)]
        for what in ("prompt", "output")
    )
    start = rows[0]["at"]
    return Arrivals([row["at"] - start for row in rows], adapter, prompt, output, tuple(names))


def _lines_of_csv(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            header = [cell.strip().lower() for cell in next(reader, [])]
            places = {
                what: header.index(found)
                for what, called in COLUMNS.items()
                if (found := next((name for name in called if name in header), None)) is not None
            }
            if "at" not in places:
                raise ConfigError(
                    f"{path}, line 1: no column of arrivals. Name one `arrival` (seconds, or dates and times); others "
                    "are `adapter`, `prompt_tokens` and `output_tokens`."
                )
            for cells in reader:
                if any(cells):
                    yield _row(
                        path, reader.line_num, {w: cells[i] for w, i in places.items() if i < len(cells)}, places
                    )
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path} cannot be read as CSV: {type(error).__name__}.") from None


def _lines_of_json(path: Path) -> Iterator[dict[str, Any]]:
    """The load tester's lines, which may leave lengths out; adapters all or none. null is left out as well."""
    lines = []
    for item in read_lines(str(path)):
        item = {key.lower(): value for key, value in item.items() if value is not None}
        cells = {what: item[name] for what, called in COLUMNS.items() for name in reversed(called) if name in item}
        if "at" in item:  # of both, `timestamp` is in milliseconds
            cells["at"] = item["at"]
        lines.append({what: str(value) for what, value in cells.items()})
    named = {"at", *({"adapter"} if any("adapter" in cells for cells in lines) else ())}
    for number, cells in enumerate(lines, 1):
        yield _row(path, number, cells, named | cells.keys())


def _row(path: Path, line: int, cells: dict[str, str], wanted: Iterable[str]) -> dict[str, Any]:
    """One request of the trace, with all that is `wanted`."""

    def wrong(what: str) -> ConfigError:
        return ConfigError(f"{path}, line {line}: {what} Mend the line, or leave it out.")

    if missing := [what for what in wanted if what not in cells]:
        raise wrong(f"it has no {COLUMNS[missing[0]][0]}, which others have.")
    row: dict[str, Any] = {}
    for what in wanted:
        text = cells[what].strip()
        if what == "adapter":
            row[what] = text
        elif what == "at":
            row[what] = _seconds(text)
            if row[what] is None:
                raise wrong("its arrival is neither seconds nor a date and time.")
        elif text.isascii() and text.isdigit() and 1 <= float(text) < 10**7:
            row[what] = int(text)
        else:
            raise wrong(f"{COLUMNS[what][0]} is not a whole number of at least 1 and below 10,000,000.")
    return row


def _seconds(text: str) -> float | None:
    """Seconds, or a date and time as ISO 8601 has it, in seconds since 1970; in UTC where it names no zone."""
    try:
        value = float(text)
    except ValueError:
        try:
            moment = datetime.fromisoformat(text)
        except ValueError:
            return None
        value = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    return value if math.isfinite(value) else None
