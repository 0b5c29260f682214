"""Times of a server whose times are known."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.support import GOLDEN
from tests.support.plans import PROFILE
from tests.support.server_fixtures import StartFake
from tests.support.servers import Server
from tucka_runtime.cli.main import main
from tucka_runtime.errors import ConfigError
from tucka_runtime.planning import measure as module
from tucka_runtime.planning import timed_server
from tucka_runtime.planning.profile import Profile, read_profile
from tucka_runtime.planning.timed_server import Window


def loaded(server: Server, names: int, slots: int) -> str:
    """The address of the server, with so many adapters and slots."""
    server.service.adapters.residency.host._limit = 0  # type: ignore[union-attr]
    server.service.adapters.residency._slots = server.service.metrics._max_adapters = slots  # type: ignore[union-attr]
    for number in range(names):
        body = {"name": f"n{number}", "path": str(GOLDEN / "llama-qv-r8k3t3" / "adapter")}
        server.post("/v1/adapters", body).raise_for_status()
    return server.url


def test_what_is_measured(start_fake: StartFake, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake engine takes 20 ms for a token, whoever else asks, and 10 ms for a load."""
    monkeypatch.setattr(timed_server, "MANY", 16)
    monkeypatch.setattr(module, "ROUNDS", 2)
    server = start_fake()
    assert server.engine is not None
    server.engine.seconds_per_token = 0.02
    url = loaded(server, 5, 3)
    said: list[str] = []
    profile = module.measure([url], None, "how", said.append, (1, 4))
    assert said == ["loads", "loads beside a stream", "steps and prompts, 1 of 2", "steps and prompts, 2 of 2"]
    assert profile.rows == [1, 4] and profile.adapters == [1, 3] and profile.measured["command"] == "how"
    for seconds in (*profile.one_adapter, *profile.own_adapters):
        assert 0.015 < seconds < 0.1
    assert 0.009 < profile.load == profile.activate < 0.2
    assert (profile.servers, profile.crowded, profile.step_beside) == (1, 1.0, 1.0)


def test_servers_that_share_a_machine_are_timed_together(
    start_fake: StartFake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two fakes that do not disturb each other."""
    monkeypatch.setattr(timed_server, "MANY", 10)
    monkeypatch.setattr(module, "ROUNDS", 1)
    servers = [start_fake() for _ in range(2)]
    for server in servers:
        assert server.engine is not None
        server.engine.seconds_per_token = 0.05
    profile = module.measure([loaded(server, 5, 3) for server in servers], None, "how", print, (1, 2))
    assert profile.servers == 2 and profile.crowded >= 1.0


def test_what_loads_cost_the_steps_beside_them() -> None:
    """10 loads; alone a step takes 10 ms. Each takes 70 ms more than its request has anyway, in which are 4 steps: of
    these one is like any other, three take twice as long."""
    alone, hits = Window(1.0, 100, 0, 0.0), Window(0.5, 40, 0, 0.0)
    assert module.slower(alone, hits, Window(1.2, 80, 10, 0.05)) == pytest.approx(2.0)
    assert module.slower(alone, hits, Window(0.51, 41, 10, 0.05)) == 1.0  # shorter than a step: nothing is seen
    assert module.slower(alone, hits, hits) == module.slower(Window(1.0, 0, 0, 0.0), hits, alone) == 1.0


def test_a_server_without_loads_to_time_is_told_the_remedy(start_fake: StartFake) -> None:
    server = start_fake()
    with pytest.raises(ConfigError, match="has no adapters"):
        module.measure([server.url], None, "how", print)
    with pytest.raises(ConfigError, match="with fewer --adapter-slots"):
        module.measure([loaded(server, 2, 3)], None, "how", print)


def test_the_command_writes_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(urls: list[str], api_key: str | None, command: str, say: module.Say) -> Profile:
        return replace(PROFILE, measured={"command": command, "key": str(api_key)})

    monkeypatch.setattr(module, "measure", measure)
    out = tmp_path / "p.json"
    assert main(["plan", "--measure", "http://a:1", "http://b:2", "-o", str(out), "--api-key", "secret"]) == 0
    written = read_profile(out)
    assert written.measured == {"command": "tucka plan --measure http://a:1 http://b:2", "key": "secret"}
