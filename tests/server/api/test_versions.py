"""Versions of a name, rollback and aliases, over a socket."""

import asyncio
import threading
from collections import Counter
from pathlib import Path

import httpx
import pytest

from tests.support import GOLDEN
from tests.support.api_keys import ask, bearer, write_keys
from tests.support.fake_engine import FakeEngine
from tests.support.monitoring import wait_until
from tests.support.servers import Server
from tucka_runtime.adapters.registry import AdapterRegistry
from tucka_runtime.cli.main import main
from tucka_runtime.messages import AdapterKey
from tucka_runtime.names import Alias
from tucka_runtime.server.metrics.metrics import Metrics
from tucka_runtime.server.service.adapters import AdapterNames
from tucka_runtime.server.service.aliases import choose

CONTENTS = [
    str(GOLDEN / name / "adapter")
    for name in ("llama-qv-r8k3t3", "llama-all7-r4k2t2", "llama-odown-r8k1t1", "llama-layers13-r8k3t2")
]


@pytest.fixture
def server(start_fake) -> Server:
    return start_fake(adapter_versions=3)


def load(server: Server, name: str, content: int) -> str:
    """The digest of what the name stands for from now on."""
    body = {"name": name, "path": CONTENTS[content], "load_inplace": True}
    return server.post("/v1/adapters", body).raise_for_status().json()["tucka"]["digest"]


def roll_back(server: Server, name: str, **body: str) -> httpx.Response:
    return server.post(f"/v1/adapters/{name}/rollback", body)


def asked(server: Server, model: str, **fields: object) -> httpx.Response:
    return server.post("/v1/completions", {"model": model, "prompt": "Hi", "max_tokens": 2, **fields})


def used(server: Server, model: str, **fields: object) -> str:
    """The digest of what answers; its name in the engine is that of no other."""
    assert server.engine is not None and server.service is not None
    answer = asked(server, model, **fields).raise_for_status().json()
    key = server.engine.requests[-1].adapter
    assert answer["model"] == model and key is not None
    digest = server.service.adapters.get(key.name).digest
    assert answer["system_fingerprint"] == f"fp_{digest[:12]}"
    return digest


def names(server: Server, path: str = "/v1/adapters") -> list[str]:
    return [card["id"] for card in server.get(path).json()["data"]]


def copies(server: Server) -> int:
    assert server.service is not None
    return len(list(server.service.adapters._copies._registry.folder("x").parent.iterdir()))


def test_versions_are_named_by_their_digests(server: Server) -> None:
    digests = [load(server, "law", i) for i in range(3)]
    old = [f"law@{digest[:12]}" for digest in digests[1::-1]]
    assert names(server) == ["law", *old[::-1]] or set(names(server)) == {"law", *old}
    assert set(names(server, "/v1/models")) == {"base", "law", *old}
    card = server.get("/v1/adapters/law").json()["tucka"]
    assert (card["versions"], card["version_of"]) == (old, None)
    card = server.get(f"/v1/adapters/{old[0]}").json()["tucka"]
    assert (card["version_of"], card["digest"], card["tier"]) == ("law", digests[1], "registered")
    for digest in digests:
        for digits in (12, 20, 64):
            assert used(server, f"law@{digest[:digits]}") == digest
    assert used(server, f"base:law@{digests[0]}") == digests[0]
    assert used(server, "law") == digests[2]
    assert server.get(f"/v1/models/{old[0]}").json()["tucka"]["tier"] == "resident"
    assert server.engine is not None
    assert AdapterKey("law", 3) in server.engine.loaded
    assert {key.name for key in server.engine.loaded} == {"law", *old}, "what stands has no second slot"
    for wrong in (f"law@{digests[0][:11]}", "law@" + "0" * 12, f"law@{digests[0][:12]}0", "law@" + digests[0] + "0"):
        error = asked(server, wrong).json()["error"]
        assert error["code"] == "model_not_found"
        assert wrong != "law@" + "0" * 12 or f"There are law, {old[1]}, {old[0]}" in error["message"]


def test_only_the_newest_are_kept(server: Server) -> None:
    digests = [load(server, "law", i) for i in range(4)]
    assert asked(server, f"law@{digests[0]}").status_code == 404
    assert used(server, f"law@{digests[1]}") == digests[1] and copies(server) == 3
    assert f'model="law@{digests[1][:12]}"' in server.get("/metrics").text
    assert load(server, "law", 1) == digests[1], "a content that is loaded again is no version any more"
    assert server.get("/v1/adapters/law").json()["tucka"]["versions"] == [f"law@{d[:12]}" for d in digests[3:1:-1]]
    assert f'model="law@{digests[1][:12]}"' not in server.get("/metrics").text
    server.client.delete(f"{server.url}/v1/adapters/law").raise_for_status()
    assert names(server) == [] and copies(server) == 0


def test_without_the_setting_nothing_is_kept(start_fake) -> None:
    server = start_fake()
    first, _ = load(server, "law", 0), load(server, "law", 1)
    assert asked(server, f"law@{first}").status_code == 404 and copies(server) == 1
    assert roll_back(server, "law").status_code == 404


def test_a_version_is_not_a_name(server: Server) -> None:
    """Neither one that is kept, nor that of what the name stands for."""
    digests = load(server, "law", 0), load(server, "law", 1)
    before = names(server)
    for version in (f"law@{digest[:12]}" for digest in digests):
        assert server.client.delete(f"{server.url}/v1/adapters/{version}").status_code == 400
        assert server.post("/v1/unload_lora_adapter", {"lora_name": version}).status_code == 400
        assert roll_back(server, version).status_code == 400
        assert server.post("/v1/adapters", {"name": version, "path": CONTENTS[2]}).status_code == 400
    assert names(server) == before and used(server, "law") == digests[1]
    assert server.post("/v1/adapters", {"name": "other@" + "a" * 12, "path": CONTENTS[2]}).status_code == 400
    assert server.post("/v1/adapters", {"name": "law@v2", "path": CONTENTS[2]}).status_code == 201


def test_rollback(server: Server) -> None:
    digests = [load(server, "law", i) for i in range(3)]
    answer = server.client.post(f"{server.url}/v1/adapters/law/rollback")  # an empty body
    card = answer.json()["tucka"]
    assert (answer.status_code, card["digest"], card["generation"]) == (200, digests[1], 4)
    assert used(server, "law") == digests[1] and used(server, f"law@{digests[2]}") == digests[2]
    assert roll_back(server, "law").json()["tucka"]["digest"] == digests[2], "the one that it stood for before"
    assert roll_back(server, "law", to=digests[0][:12]).json()["tucka"]["digest"] == digests[0]
    generation = server.get("/v1/adapters/law").json()["tucka"]["generation"]
    assert roll_back(server, "law", to=digests[0]).json()["tucka"]["generation"] == generation, "it stands already"
    assert copies(server) == 3
    error = roll_back(server, "law", to="0" * 12).json()["error"]
    assert (error["code"], error["param"]) == ("model_not_found", "to") and f"law@{digests[2][:12]}" in error["message"]
    for wrong in ("0" * 11, "0" * 65, "g" * 12, 5):
        assert roll_back(server, "law", to=wrong).status_code == 400  # type: ignore[arg-type]
    assert roll_back(server, "none").status_code == 404 and roll_back(server, "base").status_code == 404


def test_a_rollback_that_fails_changes_nothing(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = [load(server, "law", i) for i in range(2)]
    before = server.get("/v1/adapters").json()
    assert server.service is not None

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        assert roll_back(server, "law").status_code == 503
    assert server.get("/v1/adapters").json() == before
    assert used(server, "law") == digests[1]
    assert roll_back(server, "law").status_code == 200


def test_a_lost_name_is_rolled_back(server: Server) -> None:
    digests = [load(server, "law", i) for i in range(2)]
    assert server.service is not None
    adapters = server.service.adapters
    adapters._lose(adapters.get("law").entry)
    assert asked(server, "law").status_code == 503 == asked(server, f"law@{digests[1]}").status_code
    assert used(server, f"law@{digests[0]}") == digests[0] and adapters.lost == 1
    card = roll_back(server, "law").raise_for_status().json()["tucka"]
    assert (card["digest"], card["versions"], adapters.lost) == (digests[0], [], 0)
    assert used(server, "law") == digests[0] and copies(server) == 1


def test_in_flight_finishes_on_the_old_and_new_ones_get_the_new(server: Server) -> None:
    first = load(server, "law", 0)
    assert server.engine is not None
    engine = server.engine
    engine.seconds_per_token = 0.05
    answers: list[dict] = []
    thread = threading.Thread(target=lambda: answers.append(asked(server, "law", max_tokens=1000).json()))
    thread.start()
    wait_until(lambda: len(engine.requests) == 1, 30, lambda: "no request came")
    second = load(server, "law", 1)
    roll_back(server, "law").raise_for_status()
    assert load(server, "law", 1) == second and used(server, "law") == second
    assert AdapterKey("law", 1) in engine.loaded, "it is in use"
    engine.seconds_per_token = 0.0
    thread.join()
    assert answers[0]["system_fingerprint"] == f"fp_{first[:12]}"
    wait_until(lambda: AdapterKey("law", 1) not in engine.loaded, 30, lambda: str(engine.loaded))


def restarted(server: Server, versions: int = 3, base: str = "fake") -> AdapterNames:
    """The names as another process would have them on this one's disk."""
    assert server.service is not None
    registry: AdapterRegistry = server.service.adapters._copies._registry
    registry._entries, registry._aliases = registry._load()  # as it stands there
    brought = AdapterNames(FakeEngine(), registry, "base", Metrics(), versions=versions)  # type: ignore[arg-type]
    asyncio.run(brought.restore(base))
    return brought


def test_versions_aliases_and_rollbacks_survive_a_restart(server: Server) -> None:
    digests = [load(server, "law", i) for i in range(3)]
    roll_back(server, "law").raise_for_status()
    targets = {"law": 1, f"law@{digests[0][:12]}": 1}
    assert server.post("/v1/aliases", {"name": "canary", "targets": targets}).status_code == 201
    brought = restarted(server)
    assert brought.get("law").digest == digests[1]
    for digest in digests:
        assert brought.get(f"law@{digest}").digest == digest
    assert brought.alias_of("canary").targets == tuple(targets.items())
    fewer = restarted(server, versions=2)
    assert {adapter.key.name for adapter in fewer.all()} == {"law", f"law@{digests[2][:12]}"} and copies(server) == 2
    fewer.close()
    brought.close()


@pytest.fixture
def two(server: Server) -> Server:
    """With the adapters law-a and law-b, and the alias law: 90 of 100 get the first."""
    for i, name in enumerate(("law-a", "law-b")):
        load(server, name, i)
    answer = server.post("/v1/aliases", {"name": "law", "targets": {"law-a": 90, "law-b": 10}})
    assert answer.status_code == 201
    return server


def test_an_alias_answers_by_its_weights_and_each_user_alike(two: Server, caplog: pytest.LogCaptureFixture) -> None:
    a, b = (two.get(f"/v1/adapters/{name}").json()["tucka"]["digest"] for name in ("law-a", "law-b"))
    caplog.set_level("INFO", logger="tucka_runtime")
    first = [used(two, "law", user=f"user {i}") for i in range(60)]
    assert set(first) == {a, b} and first == [used(two, "law", user=f"user {i}") for i in range(60)]
    line = next(r.fields for r in caplog.records if getattr(r, "fields", {}).get("event") == "request")
    assert (line["asked"], line["model"], line["digest"]) == ("law", {a: "law-a", b: "law-b"}[first[0]], first[0])
    assert "x-tucka-ignored" not in asked(two, "law", user="me").headers
    body = {"name": "law", "targets": {"law-b": 1}}
    answer = two.post("/v1/aliases", body)
    assert (answer.status_code, answer.json()) == (200, {**body, "object": "alias"})
    assert {used(two, "law", user=f"user {i}") for i in range(20)} == {b}
    chat = {"model": "base:law", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    assert two.post("/v1/chat/completions", chat).status_code == 400, "the fake base has no template"
    assert two.post("/tokenize", {"model": "law", "prompt": "Hi"}).status_code == 200
    assert used(two, "base:law") == b


def test_adaptersand_aliases_are_one_namespace(two: Server) -> None:
    def alias(name: str, **targets: object) -> tuple[int, str | None]:
        answer = two.post("/v1/aliases", {"name": name, "targets": targets})
        return answer.status_code, answer.json().get("error", {}).get("param")

    assert alias("law-a", **{"law-b": 1}) == (409, "name") == alias("base", **{"law-b": 1})
    assert two.post("/v1/adapters", {"name": "law", "path": CONTENTS[0]}).status_code == 409
    assert two.client.delete(f"{two.url}/v1/adapters/law").status_code == 400
    assert roll_back(two, "law").status_code == 404
    assert alias("x", none=1) == (404, "targets")
    assert alias("x", law=1) == (400, "targets") == alias("x", base=1)
    for weight in (0, -1, 1.5, True, "1", 10**9):
        assert alias("x", **{"law-a": weight})[0] == 400
    assert alias("x")[0] == 400 and alias("a b", **{"law-a": 1})[0] == 400
    assert alias("y@" + "a" * 12, **{"law-a": 1}) == (400, "name")
    assert two.post("/v1/aliases", {"name": "x", "targets": {f"n{i}": 1 for i in range(17)}}).status_code == 400


def test_a_target_that_disappears_leaves_its_share_to_the_others(two: Server) -> None:
    b = two.get("/v1/adapters/law-b").json()["tucka"]["digest"]
    before = {i: used(two, "law", user=str(i)) for i in range(20)}
    two.client.delete(f"{two.url}/v1/adapters/law-a").raise_for_status()
    assert {used(two, "law", user=str(i)) for i in range(20)} == {b}
    two.client.delete(f"{two.url}/v1/adapters/law-b").raise_for_status()
    error = asked(two, "law").json()["error"]
    assert (error["code"], error["param"]) == ("model_not_found", "model") and "alias" in error["message"]
    assert load(two, "law-a", 0) and load(two, "law-b", 1) == b
    assert before == {i: used(two, "law", user=str(i)) for i in range(20)}
    listed = two.get("/v1/aliases").json()["data"]
    assert listed == [{"name": "law", "object": "alias", "targets": {"law-a": 90, "law-b": 10}}]
    assert two.get("/v1/aliases/law").json() == listed[0]
    assert "law" in names(two, "/v1/models") and two.get("/v1/models/law").json()["parent"] == "base"
    assert two.client.delete(f"{two.url}/v1/aliases/law").json()["deleted"]
    assert two.get("/v1/aliases/law").status_code == 404 == asked(two, "law").status_code


def test_without_a_user_a_key_is_answered_alike(start_fake, tmp_path: Path) -> None:
    keys = write_keys(tmp_path / "keys", **{f"k{i}": {"roles": ("infer", "admin")} for i in range(12)})
    server = start_fake(api_key_file=str(tmp_path / "keys"), audit_log=str(tmp_path / "audit"), adapter_versions=2)
    root = bearer(keys["k0"])
    for i, name in enumerate(("law-a", "law-b")):
        server.post("/v1/adapters", {"name": name, "path": CONTENTS[i]}, headers=root).raise_for_status()
    body = {"name": "law", "targets": {"law-a": 1, "law-b": 1}}
    server.post("/v1/aliases", body, headers=root).raise_for_status()
    answers = []
    for key in keys.values():
        (one,) = {ask(server, key, model="law").json()["system_fingerprint"] for _ in range(3)}
        answers.append(one)
    assert len(set(answers)) == 2
    server.client.delete(f"{server.url}/v1/aliases/law", headers=root).raise_for_status()
    server.post("/v1/adapters/law-a/rollback", {}, headers=root)
    told = (tmp_path / "audit").read_text()
    for action, adapter in (("alias", "law"), ("unalias", "law"), ("rollback", "law-a")):
        assert f'"action": "{action}", "adapter": "{adapter}"' in told


def test_shares_are_the_weights_and_a_change_moves_as_few_as_it_can() -> None:
    alias = Alias("law", (("a", 70), ("b", 20), ("c", 10)))
    users = [f"user:{i}" for i in range(4000)]

    def chosen(alias: Alias, gone: str = "") -> list[str | None]:
        return [choose(alias, user, lambda name: name != gone) for user in users]

    before = chosen(alias)
    share = Counter(before)
    for name, weight in alias.targets:  # 5 standard deviations
        assert abs(share[name] / 4000 - weight / 100) < 5 * (weight / 100 * (1 - weight / 100) / 4000) ** 0.5
    assert all(new == old for new, old in zip(chosen(alias, "c"), before, strict=True) if old != "c")
    more = chosen(Alias("law", (("a", 70), ("b", 20), ("c", 30))))
    assert all(new in (old, "c") for new, old in zip(more, before, strict=True))
    assert chosen(Alias("other", alias.targets)) != before, "who has the canary of one alias need not have another's"
    assert len({choose(alias, None, lambda name: True) for _ in range(200)}) > 1
    assert choose(alias, "x", lambda name: False) is None


def test_the_commands(two: Server, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = load(two, "tax", 2), load(two, "tax", 3)
    url = ["--url", two.url]
    assert main(["adapters", "versions", "tax", *url]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"tax@{new[:12]}  generation 4  now",
        f"tax@{old[:12]}  generation 3",
    ]
    assert main(["adapters", "rollback", "tax", *url]) == 0
    assert f"tax is loaded: generation 5, digest {old[:12]}" in capsys.readouterr().out
    assert main(["adapters", "rollback", "tax", "--to", new[:12], *url]) == 0
    assert main(["adapters", "rollback", "tax", "--to", "0" * 12, *url]) == 1
    assert "No such earlier content" in capsys.readouterr().err
    assert main(["adapters", "alias", "all", "law-a=1", "tax=3", *url]) == 0
    assert main(["adapters", "aliases", *url]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == ["law  law-a=90 law-b=10", "all  law-a=1 tax=3"]
    assert main(["adapters", "alias", "all", "law-a", *url]) == 0, "a weight of 1"
    assert main(["adapters", "alias", "all", "law-a=x", *url]) == 1
    assert "WEIGHT" in capsys.readouterr().err
    assert main(["adapters", "unalias", "all", *url]) == 0
    assert main(["adapters", "unalias", "all", *url]) == 1
