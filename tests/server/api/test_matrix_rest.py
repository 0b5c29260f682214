"""Rows of the bad-input matrix that need a server of their own: little room, two keys, and its log.

What the engine has freed is shown by what it can take on next: it counts pages and slots itself.
"""

import contextlib
import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.support import GOLDEN
from tests.support.servers import Server, make_base, start_command

ONE, TWO, THREE = (GOLDEN / name / "adapter" for name in ("llama-qv-r8k3t3", "llama-all7-r4k2t2", "llama-odown-r8k1t1"))
PAGES, PAGE = 32, 16


@dataclass
class Small:
    """32 pages, 16 seats, 2 adapters, both taken; `mine` and `other` are the same server for two keys."""

    mine: Server
    other: Server
    log: Path

    def metric(self, name: str) -> float:
        found = re.search(rf"^{name} (\S+)$", self.mine.get("/metrics").text, re.MULTILINE)
        assert found, name
        return float(found[1])


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Small]:
    folder = tmp_path_factory.mktemp("small")
    process, url = start_command(
        "--model", str(make_base(folder / "llama-tiny")),
        "--adapter", f"one={ONE}",
        "--adapter", f"two={TWO}",
        "--adapter-root", str(GOLDEN),
        "--api-key", "mine",
        "--api-key", "other",
        "--kv-cache-tokens", str(PAGES * PAGE),
        "--block-size", str(PAGE),
        "--max-num-seqs", "16",
        "--adapter-slots", "2",
        "--shutdown-timeout", "1",
        log=folder / "log",
    )  # fmt: skip

    def client(key: str) -> httpx.Client:
        return httpx.Client(timeout=60, headers={"Authorization": f"Bearer {key}"})

    mine, other = (Server(url, process.pid, client=client(key)) for key in ("mine", "other"))
    yield Small(mine, other, folder / "log")
    assert process.poll() is None, f"the server died:\n{(folder / 'log').read_text()}"
    process.terminate()
    assert process.wait(30) == 0
    assert "Traceback" not in (folder / "log").read_text()


@pytest.fixture
def slots(small: Small) -> Iterator[None]:
    """Adapters are as they were when the test is over."""
    yield
    for name, path in (("one", ONE), ("two", TWO), ("third", None)):
        if path is None or small.mine.get(f"/v1/adapters/{name}").json().get("tucka", {}).get("pinned"):
            small.mine.client.delete(f"{small.mine.url}/v1/adapters/{name}")
    for name, path in (("one", ONE), ("two", TWO)):
        small.mine.post("/v1/adapters", {"name": name, "path": str(path)}).raise_for_status()


def ask(model: str, prompt: object = "Hello", **fields: object) -> dict[str, object]:
    return {"model": model, "prompt": prompt, "max_tokens": 60, "temperature": 0, "ignore_eos": True} | fields


def text(server: Server, body: dict[str, object]) -> str:
    answer = server.post("/v1/completions", body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


@contextlib.contextmanager
def streaming(server: Server, body: dict[str, object]) -> Iterator[Iterator[str]]:
    """The events of a stream, which has begun; leaving disconnects."""
    with server.client.stream("POST", f"{server.url}/v1/completions", json=body | {"stream": True}) as answer:
        assert answer.status_code == 200
        lines = (line for line in answer.iter_lines() if line)
        next(lines)
        yield lines


def load(server: Server, name: str, path: Path) -> httpx.Response:
    return server.post("/v1/adapters", {"name": name, "path": str(path)})


def test_row_39_a_load_while_every_slot_is_leased(small: Small, slots: None) -> None:
    with contextlib.ExitStack() as stack:
        streams = [
            stack.enter_context(streaming(small.mine, ask(name, max_tokens=200, route="request")))
            for name in ("one", "two")
        ]
        body = {"name": "third", "path": str(THREE), "keep_resident": True}
        refused = small.mine.post("/v1/adapters", body)  # it asks for a slot, and there is none
        assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0
        assert refused.json()["error"]["code"] == "adapter_capacity" and set(refused.json()) == {"error"}
        assert small.mine.post("/v1/completions", ask("third")).status_code == 404
        taken = load(small.mine, "third", THREE)
        assert taken.status_code == 201 and taken.json()["tucka"]["tier"] == "host"
        for lines in streams:  # nobody was thrown out
            *_, last, end = lines
            assert end == "data: [DONE]" and '"finish_reason":"length"' in last
    for name in ("third", "one", "two"):
        assert text(small.mine, ask(name, max_tokens=1))


def test_row_41_unknown_model_names(small: Small) -> None:
    """Long names instead of many: 900 of 15,000 characters weigh as much as 100,000 of 128."""

    def memory() -> int:
        return int(Path(f"/proc/{small.mine.pid}/statm").read_text().split()[1]) * 4096

    def wrong(numbers: range) -> None:
        client = httpx.Client(timeout=60, headers=small.mine.client.headers)
        for i in numbers:
            name = f"{i}".ljust(15_000, "x")
            if i % 2:
                answer = client.post(small.mine.url + "/v1/completions", json=ask(name))
            else:
                answer = client.get(f"{small.mine.url}/v1/models/{name}")
            assert answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found"
            assert len(answer.content) < 1000

    wrong(range(-200, 0))
    before, series = memory(), len(small.mine.get("/metrics").text.splitlines())
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(wrong, (range(450), range(450, 900))))
    assert memory() - before < 5 * 2**20
    assert len(small.mine.get("/metrics").text.splitlines()) - series < 10


def cached(server: Server, model: str, prompt: list[int], **fields: object) -> int:
    answer = server.post("/v1/completions", ask(model, prompt, max_tokens=1, **fields)).json()
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_row_42_a_prefix_is_never_reused_for_another_key(small: Small, slots: None) -> None:
    pinned = {"name": "one", "path": str(ONE), "load_inplace": True, "pinned": {"group": 1, "weights": [0.5, 0.6, 0.4]}}
    small.mine.client.delete(f"{small.mine.url}/v1/adapters/two").raise_for_status()  # a slot for the new generation
    small.mine.post("/v1/adapters", pinned).raise_for_status()
    prompt = [7 + i % 200 for i in range(100)]
    for model in ("llama-tiny", "one"):  # the second's prompt is in the cache already, under another model
        assert cached(small.mine, model, prompt) == 0
        assert cached(small.mine, model, prompt) == 96
        assert cached(small.other, model, prompt) == 0
        assert cached(small.other, model, prompt) == cached(small.mine, model, prompt) == 96
    assert cached(small.mine, "one", prompt, cache_salt="a") == 0, "nor for another salt"
    assert cached(small.mine, "one", prompt, cache_salt="b") == 0
    assert cached(small.mine, "one", prompt, cache_salt="a") == 96
    pinned["pinned"] = {"group": 2, "weights": [0.5, 0.6, 0.4]}
    small.mine.post("/v1/adapters", pinned).raise_for_status()
    assert cached(small.mine, "one", prompt) == 0  # row 37: not for another generation either


def test_row_43_a_mixed_batch_with_preemption(small: Small) -> None:
    """12 sequences of 5 or 6 pages in 32: each says what it says alone."""
    bodies = [
        ask(model, f"{model} {i} " + "abcdefghi" * i, max_tokens=56, route="request", **sampling)
        for i in range(2)
        for model in ("llama-tiny", "one", "two")
        for sampling in ({}, {"temperature": 1.0, "seed": i, "repetition_penalty": 1.3})
    ]
    alone = [text(small.mine, body) for body in bodies]
    before = small.metric("tucka_preemptions_total")
    with ThreadPoolExecutor(len(bodies)) as pool:
        together = list(pool.map(lambda body: text(small.mine, body), bodies))
    assert small.metric("tucka_preemptions_total") > before
    assert together == alone


def test_row_44_a_disconnect_frees_pages_and_lease_within_a_second(small: Small, slots: None) -> None:
    """64 sequences take every seat for seconds. Then a prompt of 13 pages and another adapter find room at once."""
    with streaming(small.mine, ask("two", n=64, max_tokens=240, route="request", temperature=1.0)) as lines:
        for _ in range(200):
            assert '"finish_reason":null' in next(lines)
        assert small.metric("tucka_requests_waiting") >= 48
        assert small.metric("tucka_kv_blocks_used") > 12
    left = time.monotonic()
    assert text(small.mine, ask("llama-tiny", [9] * 200, max_tokens=1))
    assert time.monotonic() - left < 1
    assert small.metric("tucka_requests_waiting") == small.metric("tucka_requests_running") == 0
    assert small.metric("tucka_kv_blocks_used") == 0
    assert small.mine.client.delete(f"{small.mine.url}/v1/adapters/two").status_code == 200
    assert load(small.mine, "third", THREE).status_code == 201


EVIL = "x\r\n00:00:00 INFO forged \x1b[31m\x1b]0;title\x07 \x9b2J \u2028 forged"


def test_row_45_nothing_forges_a_log_line_or_a_header(small: Small) -> None:
    size = small.log.stat().st_size
    posts = [
        ("/v1/completions", ask(EVIL)),
        ("/v1/completions", ask("llama-tiny", EVIL, user=EVIL, max_tokens=1)),
        ("/v1/completions", ask("llama-tiny", **{EVIL: 1})),
        ("/v1/completions", ask("llama-tiny", route=EVIL)),
        ("/v1/adapters", {"name": EVIL, "path": str(ONE)}),
        ("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": EVIL}),
        ("/v1/unload_lora_adapter", {"lora_name": EVIL}),
    ]
    for path, body in posts:
        answer = small.mine.post(path, body)
        assert answer.status_code in (200, 400, 404)
        assert "forged" not in str(answer.headers) and (answer.status_code == 200 or "forged" not in answer.text)
    evil = EVIL.encode()
    quoted = b"".join(b"%%%02x" % byte for byte in evil)
    for line, id in [
        (b"GET /v1/models/" + quoted, b"ok"),
        (b"GET /health?" + quoted, b"a\x1b[31mforged"),
        (b"GET /health", b"a\rforged"),
        (b"GET /health", b"a\x0bforged\xff"),
        (b"GET /health", b"a\r\n forged: continued"),
        (b"GET /health", b"a\r\nforged: 1"),
        (b"FORGED\x1b[31m /health", b"ok"),
        (b"FORGED /health", b"ok"),
        (b"DELETE /v1/adapters/" + quoted, b"ok"),
    ]:
        head = b" HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer mine\r\nConnection: close\r\nX-Request-Id: "
        answer = small.mine.raw(line + head + id + b"\r\n\r\n")
        assert answer.split()[1] in (b"200", b"400", b"404", b"405")
        assert b"forged" not in answer and b"\x1b" not in answer
        assert re.search(rb"\r\nx-request-id: [A-Za-z0-9_-]{1,128}\r\n", answer)
    time.sleep(0.1)
    written = small.log.read_bytes()[size:]
    assert b"forged" not in re.sub(rb" unmatched /[!-~]*", b"", written.lower())  # that path is percent-encoded
    assert written and all(re.fullmatch(rb"\d\d:\d\d:\d\d [A-Z]+ [ -~]*", line) for line in written.splitlines())
    assert json.loads(small.mine.get("/v1/models").text)["data"]
