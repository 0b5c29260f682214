"""What a key may use up, over a socket: every limit, its headers, and whatever may end a request."""

import re
import time
from pathlib import Path

import httpx
import pytest

from tests.support.api_keys import PROMPT, ask, bearer, write_keys
from tests.support.servers import TEMPLATE, Server
from tucka_runtime.errors import EngineDeadError, OverloadedError

MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, str]:
    """By name, in tmp_path / "keys"."""
    return write_keys(
        tmp_path / "keys",
        free={"roles": ("infer", "metrics")},
        few={"requests_per_minute": 2},
        tokens={"tokens_per_minute": 100},
        more={"tokens_per_minute": 1000},
        many={"tokens_per_minute": 10_000},
        single={"concurrent_requests": 1},
    )


@pytest.fixture
def server(start_fake, tmp_path: Path, keys: dict[str, str]) -> Server:
    return start_fake(template=TEMPLATE, api_key_file=str(tmp_path / "keys"))


def left(answer: httpx.Response, of: str) -> int:
    return int(answer.headers[f"x-ratelimit-remaining-{of}"])


def test_requests_a_minute(server: Server, keys: dict[str, str]) -> None:
    """What fails counts too; what only looks does not."""
    key = keys["few"]
    first = ask(server, key)
    assert (first.status_code, left(first, "requests")) == (200, 1)
    assert first.headers["x-ratelimit-limit-requests"] == "2"
    assert re.fullmatch(r"(29\.\d+|30)s", first.headers["x-ratelimit-reset-requests"])
    assert "x-ratelimit-limit-tokens" not in first.headers
    wrong = server.post("/v1/chat/completions", {"model": "base"}, headers=bearer(key))
    assert (wrong.status_code, left(wrong, "requests")) == (400, 0)
    for path in ("/v1/completions", "/v1/embeddings", "/v1/messages", "/v1/responses", "/tokenize"):
        refused = server.post(path, {}, headers=bearer(key))
        assert refused.status_code == 429 and left(refused, "requests") == 0
        assert 25 <= int(refused.headers["retry-after"]) <= 30
        assert refused.json()["error"].get("code", "rate_limit_exceeded") == "rate_limit_exceeded"
    for _ in range(3):
        listed = server.get("/v1/models", headers=bearer(key))
        assert listed.status_code == 200 and "x-ratelimit-limit-requests" not in listed.headers


def test_tokens_a_minute_count_prompt_and_answer(server: Server, keys: dict[str, str]) -> None:
    key = keys["tokens"]
    answer = ask(server, key, 40)
    assert answer.json()["usage"]["total_tokens"] == 50 and 50 <= left(answer, "tokens") <= 60
    refused = ask(server, key, 80)
    assert refused.status_code == 429 and refused.json()["error"]["code"] == "rate_limit_exceeded"
    missing = 90 - left(refused, "tokens")
    assert missing * 0.6 - 1 <= int(refused.headers["retry-after"]) <= missing * 0.6 + 1
    assert left(refused, "tokens") >= 50, "what is refused takes nothing"
    server.engine.script = "ab"
    early = ask(server, key, 40)
    assert early.json()["usage"]["total_tokens"] == 12 and 38 <= left(early, "tokens") <= 55


def test_a_client_that_leaves_pays_for_what_it_had(server: Server, keys: dict[str, str]) -> None:
    key, engine = keys["more"], server.engine
    engine.seconds_per_token = 0.02
    body = {"model": "base", "prompt": PROMPT, "max_tokens": 900, "ignore_eos": True, "stream": True}
    with server.client.stream("POST", server.url + "/v1/completions", json=body, headers=bearer(key)) as stream:
        assert left(stream, "tokens") <= 95, "all that it may need is reserved while it runs"
        lines = stream.iter_lines()
        for _ in range(4):
            next(lines)
    deadline = time.monotonic() + 10
    while left(answer := server.post("/tokenize", {"prompt": "Hi"}, headers=bearer(key)), "tokens") < 700:
        assert time.monotonic() < deadline and answer.status_code == 200
        time.sleep(0.02)
    assert left(answer, "tokens") <= 988


def test_an_answer_that_only_the_context_bounds_reserves_less(server: Server, keys: dict[str, str]) -> None:
    server.engine.script, server.engine.seconds_per_token = "ab", 0.01
    body = {"model": "base", "messages": MESSAGES, "stream": True}
    with server.client.stream(
        "POST", server.url + "/v1/chat/completions", json=body, headers=bearer(keys["many"])
    ) as s:
        assert s.status_code == 200 and 10_000 - 1024 - 50 <= left(s, "tokens") < 10_000 - 1024
        s.read()


def test_a_request_that_fails_before_its_first_token_takes_none(server: Server, keys: dict[str, str]) -> None:
    key, engine = keys["tokens"], server.engine
    engine.submit_error = OverloadedError("full", retry_after=7)
    refused = ask(server, key, 80)
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "7")
    engine.submit_error = None
    engine.fail_after, engine.failure = 0, EngineDeadError("dead")
    assert ask(server, key, 80).status_code == 503
    engine.fail_after = None
    answer = ask(server, key, 80)
    assert answer.status_code == 200 and 10 <= left(answer, "tokens") <= 20


def test_requests_at_once(server: Server, keys: dict[str, str]) -> None:
    key, engine = keys["single"], server.engine
    engine.seconds_per_token = 0.02
    body = {"model": "base", "prompt": PROMPT, "max_tokens": 500, "ignore_eos": True, "stream": True}
    with server.client.stream("POST", server.url + "/v1/completions", json=body, headers=bearer(key)) as stream:
        next(stream.iter_lines())
        refused = ask(server, key)
        assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
        assert ask(server, keys["free"]).status_code == 200
    deadline = time.monotonic() + 10
    while ask(server, key, 1).status_code == 429:  # until the server has seen that its client left
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_key_is_counted_by_its_name(server: Server, keys: dict[str, str]) -> None:
    key = keys["more"]
    assert ask(server, key, 7).status_code == 200
    assert ask(server, key, 990).status_code == 429
    assert server.get("/metrics", headers=bearer(key)).status_code == 403
    found = server.get("/metrics", headers=bearer(keys["free"])).text
    for series in (
        'tucka_key_requests_total{key="more"} 1',
        'tucka_key_prompt_tokens_total{key="more"} 10',
        'tucka_key_generation_tokens_total{key="more"} 7',
        'tucka_key_refusals_total{key="more",reason="tokens"} 1',
        'tucka_key_refusals_total{key="more",reason="role"} 1',
        'tucka_key_refusals_total{key="more",reason="requests"} 0',
    ):
        assert f"\n{series}\n" in found
