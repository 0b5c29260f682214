"""What a key of the key file opens, sees and uses up, over a socket."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import GOLDEN
from tests.support.api_keys import ask, bearer, write_keys
from tests.support.monitoring import wait_until
from tests.support.server_fixtures import fake_servers
from tests.support.servers import TEMPLATE, Server
from tucka_runtime.adapters.entry import RegistryEntry
from tucka_runtime.server.api.app import create_app
from tucka_runtime.tokenizer import Tokenizer

ADAPTER = str(GOLDEN / "llama-qv-r8k3t3" / "adapter")
ADMIN = (
    "/v1/adapters",
    "/v1/aliases",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/load_lora_adapter",
    "/unload_lora_adapter",
)
ANY = ("/", "/version", "/openapi.json", "/docs")
OPEN = ("/health", "/ping", "/ready", "/console/")
FILES = "/docs/"
"""Below it a name is a file's, for every key."""
TARGETS = {"law-a": 1, "rival-x": 1}
RESTRICTED = {"roles": ("infer", "admin", "metrics"), "adapters": ("law-*",)}


@pytest.fixture(scope="module")
def keys_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys") / "keys.json"


@pytest.fixture(scope="module")
def keys(keys_file: Path) -> dict[str, str]:
    """By name."""
    return write_keys(
        keys_file,
        root={"roles": ("infer", "admin", "metrics")},
        infer={},
        admin={"roles": ("admin",)},
        metrics={"roles": ("metrics",)},
        law=RESTRICTED,
        tenant_a={"tenant": "t"},
        tenant_b={"tenant": "t"},
        named={},
    )


@pytest.fixture(scope="module")
def server(
    keys: dict[str, str], keys_file: Path, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("access")
    with fake_servers(tokenizer, folder) as start:
        server = start(template=TEMPLATE, api_key_file=str(keys_file), audit_log=str(folder / "audit"))
        for name in ("law-a", "law-b", "rival-x"):
            body = {"name": name, "path": ADAPTER}
            assert server.post("/v1/adapters", body, headers=bearer(keys["root"])).status_code == 201
        lost = RegistryEntry("rival-lost", "0" * 64, "0" * 64, 9, "/nowhere", None, "")
        server.service.adapters._lost["rival-lost"] = lost
        for alias in ({"name": "rival-alias", "targets": {"rival-x": 1}}, {"name": "law-alias", "targets": TARGETS}):
            assert server.post("/v1/aliases", alias, headers=bearer(keys["root"])).status_code == 201
        yield server


def routes(server: Server) -> set[tuple[str, str]]:
    made = create_app(server.service)._app._app._app.routes
    return {(method, route.path.replace(":path", "")) for route in made for method in route.methods - {"HEAD"}}


def test_row_26_every_route_wants_its_role(server: Server, keys: dict[str, str]) -> None:
    """One that has all others gets 403, and one that has it does not."""
    roles = {"infer", "admin", "metrics"}
    for method, route in routes(server):
        path = route.replace("{name}", "law-a")
        if path.startswith(OPEN):
            continue
        wanted = "admin" if path.startswith(ADMIN) else "metrics" if path == "/metrics" else "infer"
        for role in roles:
            answer = server.client.request(method, server.url + path, headers=bearer(keys[role]))
            if path in ANY or path.startswith(FILES) or role == wanted:
                assert answer.status_code not in (401, 403), (method, path, role)
                continue
            assert answer.status_code == 403, (method, path, role)
            error = answer.json()["error"]
            if path.startswith("/v1/messages"):
                assert error["type"] == "permission_error"
            else:
                assert error["code"] == ("admin_key_required" if wanted == "admin" else "role_required")
    body = {"name": "law-a", "path": ADAPTER}  # the walk has unloaded it
    server.post("/v1/adapters", body, headers=bearer(keys["root"])).raise_for_status()


MESSAGES = [{"role": "user", "content": "Hi"}]
NAMING: dict[tuple[str, str], Callable[[str], dict[str, object]]] = {
    ("POST", "/v1/completions"): lambda name: {"model": name, "prompt": "Hi", "max_tokens": 1},
    ("POST", "/v1/chat/completions"): lambda name: {"model": name, "messages": MESSAGES, "max_tokens": 1},
    ("POST", "/v1/responses"): lambda name: {"model": name, "input": "Hi", "max_output_tokens": 1},
    ("POST", "/v1/messages"): lambda name: {"model": name, "messages": MESSAGES, "max_tokens": 1},
    ("POST", "/v1/messages/count_tokens"): lambda name: {"model": name, "messages": MESSAGES},
    ("POST", "/v1/embeddings"): lambda name: {"model": name, "input": "Hi"},
    ("POST", "/tokenize"): lambda name: {"model": name, "prompt": "Hi"},
    ("POST", "/detokenize"): lambda name: {"model": name, "tokens": [10]},
    ("GET", "/v1/models/{name}"): lambda name: {},
    ("GET", "/v1/adapters/{name}"): lambda name: {},
    ("PUT", "/v1/adapters/{name}"): lambda name: {},
    ("POST", "/v1/adapters"): lambda name: {"name": name, "path": ADAPTER},
    ("POST", "/v1/load_lora_adapter"): lambda name: {"lora_name": name, "lora_path": ADAPTER},
    ("POST", "/load_lora_adapter"): lambda name: {"lora_name": name, "lora_path": ADAPTER},
    ("DELETE", "/v1/adapters/{name}"): lambda name: {},
    ("POST", "/v1/adapters/{name}/rollback"): lambda name: {"to": "0" * 12},
    ("POST", "/v1/aliases"): lambda name: {"name": name, "targets": {"law-a": 1}},
    ("GET", "/v1/aliases/{name}"): lambda name: {},
    ("DELETE", "/v1/aliases/{name}"): lambda name: {},
    ("POST", "/v1/unload_lora_adapter"): lambda name: {"lora_name": name},
    ("POST", "/unload_lora_adapter"): lambda name: {"lora_name": name},
}
"""Every route that takes a model's name, and its body with that name."""
GIVING = (("POST", "/v1/adapters"), ("PUT", "/v1/adapters/{name}"), ("POST", "/v1/aliases"))
ABSENT = ("rival-none", "rival-x", "rival-lost", "rival-alias", "base", "base:rival-x", "base:rival-none")
"""For who sees `law-*` alone: a name that is nobody's, a loaded adapter's, a lost one's, an alias, the base's."""


def answered(server: Server, key: str, method: str, route: str, name: str) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body, under one request id."""
    body = NAMING[method, route](name)
    headers = bearer(key) | {"x-request-id": "same"}
    url = server.url + route.replace("{name}", name)
    answer = server.client.request(method, url, headers=headers, json=body or None)
    return answer.status_code, {n: v for n, v in answer.headers.items() if n != "date"}, answer.content


def test_every_route_with_a_name_is_walked(server: Server) -> None:
    bodies = {(method, path) for method, path in routes(server) if method == "POST" and not path.startswith(OPEN)}
    files = (*OPEN, FILES)
    named = {(method, path) for method, path in routes(server) if "{name}" in path and not path.startswith(files)}
    assert bodies | named == set(NAMING)


@pytest.mark.parametrize(("method", "route"), list(NAMING))
def test_anothers_model_is_one_that_does_not_exist(
    server: Server, keys: dict[str, str], method: str, route: str
) -> None:
    """To the byte. Where a name is to be given it is refused, whoever has it."""
    named = "load" not in route.replace("unload", "") and (method, route) not in GIVING
    told = {name: answered(server, keys["law"], method, route, name) for name in ABSENT}
    first = told["rival-none"]
    assert first[0] == (404 if named else 403)
    assert all(answer == first for answer in told.values())
    text = first[2].decode()
    assert "rival" not in text and "base," not in text
    assert ("law-a" in text and "law-b" in text) == named


def test_what_a_key_sees_it_may_use(server: Server, keys: dict[str, str]) -> None:
    """So that the walk above walks into nothing by chance."""
    for method, route in NAMING:
        if method != "DELETE" and "unload" not in route:
            if "aliases" in route or "rollback" in route:  # it is no alias, and nothing is kept of before
                assert answered(server, keys["law"], method, route, "law-a")[0] in (404, 409), route
                continue
            assert answered(server, keys["law"], method, route, "law-a")[0] in (200, 201, 400), route
            assert answered(server, keys["root"], method, route, "rival-x")[0] in (200, 201, 400), route
    assert answered(server, keys["root"], "GET", "/v1/models/{name}", "rival-lost")[0] == 503
    law = answered(server, keys["law"], "DELETE", "/v1/adapters/{name}", "law-b")
    assert law[0] in (200, 202) and b"law-b" in law[2]
    answered(server, keys["law"], "POST", "/v1/adapters", "law-b")


def test_lists_have_what_a_key_sees(server: Server, keys: dict[str, str]) -> None:
    for path in ("/v1/models", "/v1/models/", "/v1/adapters"):
        for key, names in (("law", {"law-a", "law-b"}), ("root", {"law-a", "law-b", "rival-x"})):
            listed = {card["id"] for card in server.get(path, headers=bearer(keys[key])).json()["data"]}
            aliases = {"law": {"law-alias"}, "root": {"law-alias", "rival-alias"}}[key] if "models" in path else set()
            assert listed - {"base"} == names | aliases and ("base" in listed) == (key == "root" and "models" in path)
    body = {"lora_name": "law-c", "lora_path": ADAPTER}
    loaded = server.post("/load_lora_adapter", body, headers=bearer(keys["law"])).json()["loaded_adapters"]
    assert set(loaded) == {"law-a", "law-b", "law-c"}
    server.post("/unload_lora_adapter", body, headers=bearer(keys["law"])).raise_for_status()


def test_an_alias_is_used_by_who_sees_its_name_and_shows_the_targets_that_are_seen(
    server: Server, keys: dict[str, str]
) -> None:
    """It may stand for adapters that its users do not see. Nobody makes one for what they do not see."""
    before = len(server.engine.requests)
    assert {ask(server, keys["law"], model="law-alias", user=f"u{i}").status_code for i in range(20)} == {200}
    used = {request.adapter.name for request in server.engine.requests[before:] if request.adapter}
    assert used == {"law-a", "rival-x"}
    shown = server.get("/v1/aliases", headers=bearer(keys["law"])).json()["data"]
    assert shown == [{"name": "law-alias", "object": "alias", "targets": {"law-a": 1}}]
    body = {"name": "law-mine", "targets": {"rival-x": 1}}
    refused = server.post("/v1/aliases", body, headers=bearer(keys["law"]))
    assert (refused.status_code, refused.json()["error"]["param"]) == (404, "targets")
    assert b"rival" not in refused.content
    assert ask(server, keys["law"], model="rival-x").status_code == 404


def test_metrics_have_the_names_that_a_key_sees(server: Server, keys: dict[str, str]) -> None:
    for model, key in (("rival-x", "root"), ("law-a", "law")):
        assert ask(server, keys[key], model=model).status_code == 200
    whole = server.get("/metrics", headers=bearer(keys["root"])).text
    part = server.get("/metrics", headers=bearer(keys["law"])).text
    assert 'model="rival-x"' in whole and 'key="infer"' in whole and 'adapter_name="rival-x"' in whole
    assert "rival" not in part and 'model="base"' not in part and "vllm:" not in part
    assert set(re.findall(r'key="([\w-]+)"', part)) == {"law"}
    assert 'tucka_adapter_info{model="law-a"' in part and "tucka_requests_total" in part
    assert [line for line in whole.splitlines() if 'model="law-a"' in line] == [
        line for line in part.splitlines() if 'model="law-a"' in line
    ]


def test_keys_of_a_tenant_share_the_cache_and_turns(server: Server, keys: dict[str, str]) -> None:
    for name in ("tenant_a", "tenant_b", "infer", "root"):
        assert ask(server, keys[name]).status_code == 200
    a, b, infer, root = server.engine.requests[-4:]
    assert a.cache_salt == b.cache_salt and a.flow == b.flow
    assert len({a.cache_salt, infer.cache_salt, root.cache_salt}) == 3 == len({a.flow, infer.flow, root.flow})


def test_log_lines_have_the_keys_name_and_no_key(
    server: Server, keys: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="tucka_runtime")
    answers = ask(server, keys["named"]), server.get("/v1/adapters", headers=bearer(keys["named"]))
    assert [answer.status_code for answer in answers] == [200, 403]
    own = {answer.headers["x-request-id"] for answer in answers}

    def lines() -> list[dict[str, Any]]:
        return [record.fields for record in caplog.records if hasattr(record, "fields")]

    def named() -> list[object]:
        """Of these requests: the line of one before may come now."""
        return [line["key"] for line in lines() if line["event"] in ("http", "request") and line["request_id"] in own]

    wait_until(lambda: len(named()) >= 3, 10, lambda: caplog.text)  # they are written after the answer
    assert named() == ["named"] * 3
    assert keys["named"] not in caplog.text and keys["named"].split("_")[2] not in json.dumps(lines())


def test_a_page_may_read_the_limits(start_fake, keys_file: Path, keys: dict[str, str]) -> None:
    server = start_fake(cors_origin=("https://a.example",), api_key_file=str(keys_file))
    answer = server.get("/v1/models", headers=bearer(keys["infer"]) | {"origin": "https://a.example"})
    exposed = {name.strip() for name in answer.headers["access-control-expose-headers"].split(",")}
    assert {
        f"x-ratelimit-{kind}-{of}" for kind in ("limit", "remaining", "reset") for of in ("requests", "tokens")
    } <= exposed
