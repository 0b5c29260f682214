"""The script that holds a fleet on paper to a real one, short, with servers whose engines are fakes: what finds its
adapter in a slot is the same on paper, and a paper that is wrong is found."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.chaos import plan_against_real
from tests.support import GOLDEN
from tests.support.plans import PROFILE
from tests.support.server_fixtures import StartFake

ADAPTERS, SLOTS = 12, 3


@pytest.fixture
def urls(start_fake: StartFake) -> list[str]:
    servers = [start_fake() for _ in range(2)]
    for server in servers:
        assert server.service is not None
        server.service.adapters.residency._slots = SLOTS
        for name in plan_against_real.names(ADAPTERS):
            body = {"name": name, "path": str(GOLDEN / "llama-qv-r8k3t3" / "adapter")}
            server.post("/v1/adapters", body).raise_for_status()
    return [server.url for server in servers]


def rows(said: str, figure: str) -> list[list[str]]:
    """What was printed of a figure: real, on paper, the ratio."""
    return [line.split()[-3:] for line in said.splitlines() if line.strip().startswith(figure)]


def test_hits_on_paper_are_real_ones_and_a_wrong_paper_is_found(
    urls: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_against_real, "HOST_MIB", 0)
    replace(PROFILE, load=9000.0).write(tmp_path / "p.json")
    flags = ["--seconds", "1.2", "--rate", "50", "--prompt-tokens", "8", "--output-tokens", "2", "--one-by-one"]
    flags += ["--adapters", str(ADAPTERS), "--slots", str(SLOTS), "--profile", str(tmp_path / "p.json")]
    monkeypatch.setattr(plan_against_real, "APART", 10_000.0)
    off = plan_against_real.hold(urls, plan_against_real.arguments(flags))
    said = capsys.readouterr().out
    hits = rows(said, "hit rate")
    assert len(hits) == 2 and all(real == paper and 10 < float(real) < 90 for real, paper, _ in hits), said
    assert off == len(rows(said, "first token")) == 4 and "4 figures off by more than 15%" in said, said
