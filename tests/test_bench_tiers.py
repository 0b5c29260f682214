"""The script that measures more adapters than slots, on a fake server."""

from argparse import Namespace

import pytest

from tests.support import GOLDEN
from tests.support.servers import Server
from tucka_runtime.bench_tiers import FEW, measure, show


def test_what_is_printed(start_fake, capsys: pytest.CaptureFixture[str]) -> None:
    server: Server = start_fake()
    server.engine.on_restart.__self__.residency._slots = FEW
    names = [f"n{number}" for number in range(FEW + 4)]
    for name in names:
        body = {"name": name, "path": str(GOLDEN / "llama-qv-r8k3t3" / "adapter")}
        server.post("/v1/adapters", body).raise_for_status()
    few, everyone = measure(server.url, names, Namespace(rounds=1, clients=2, seconds=0.5, vocab=300))
    assert set(few.firsts) == {"resident"} and not few.failed + everyone.failed
    assert few.tokens == 32 * len(few.firsts["resident"]) > 0
    show(few, everyone)
    said = capsys.readouterr().out
    assert "8 adapters" in said and "it was resident" in said and "failed requests: 0" in said
