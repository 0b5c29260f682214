"""The fairness scenario, against a server that is fair and on figures that are not."""

import asyncio
from collections import Counter
from collections.abc import Callable

import pytest

from tucka_runtime.errors import ConfigError
from tucka_runtime.loadtest import fairness
from tucka_runtime.loadtest.fairness import Fairness, Phase
from tucka_runtime.loadtest.record import Record
from tucka_runtime.loadtest.settings import Settings

QUIET = 16  # arrivals of seed 0 at 20 a second, in what is left of 0.8 s when the others have settled


def test_a_server_without_a_queue_is_fair(fake: Callable[..., str]) -> None:
    url = fake(adapters=dict.fromkeys("abcq", ""))
    test = Fairness(Settings(url=url, concurrency=6, duration=0.8, max_tokens="4", quiet=True), 20.0)
    result = asyncio.run(test.execute())
    assert result["quiet"] == "q" and result["flood"] == "a" and result["concurrency"] == 6
    assert result["ratio"] and result["jain_equals"] > 0.9
    assert set(result["phases"]["flood"]["tokens"]) == {"a", "q"}
    assert set(result["phases"]["even"]["tokens"]) == {"a", "b", "c", "q"}
    assert [phase["failures"] for phase in result["phases"].values()] == [{}, {}]
    assert {phase["quiet_requests"] for phase in result["phases"].values()} == {QUIET}, "however late they were sent"
    assert "flood / even" in fairness.render(result)


def test_what_waited_until_the_flood_ended_counts_as_long_as_it_waited() -> None:
    test = Fairness(Settings(duration=10.0), 1.0)
    test.loud, test.quiet = ["a", "b"], "q"
    late = Record("load", "q", start=3.0, end=11.0, events=[(10.5, 1)])
    flood = [Record("load", "a", start=0.0, events=[(t / 10, 1) for t in range(100)])]
    test.phases["flood"].append(test.counted(flood, [late], 10.0))
    early = Record("load", "q", start=3.0, end=4.0, events=[(3.1, 1)])
    even = [Record("load", name, start=0.0, events=[(5.0, 1)] * n) for name, n in (("a", 30), ("b", 10))]
    test.phases["even"].append(test.counted(even, [early], 10.0))
    result = test.result()
    assert result["ratio"] == pytest.approx(75.0)
    assert result["jain_equals"] == pytest.approx(0.8)
    assert result["phases"]["flood"]["tokens"] == {"a": 80}, "the first two seconds settle"
    assert test.phases["flood"][0] == Phase(8.0, Counter(a=80, q=0), [7.5], Counter())


def test_two_adapters_are_too_few(fake: Callable[..., str]) -> None:
    with pytest.raises(ConfigError, match="three adapters"):
        asyncio.run(Fairness(Settings(url=fake(adapters=dict.fromkeys("aq", "")), quiet=True), 1.0).execute())
