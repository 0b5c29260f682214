"""Bad input to the real server over a real socket, by the rows of the project's matrix.

Every test also asserts: the process is the same one and answers, the error is our envelope, below 8 KiB, and echoes
none of the input. All the while another client asks something good, and must get the same bytes every time.
"""

import contextlib
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support import GOLDEN
from tests.support.servers import Server, read_all
from tucka_runtime.errors import InvalidRequestError
from tucka_runtime.server.http.body import MAX_ITEMS, parse_json

SECRET = "xyzzyQ"  # marks input; must never come back
GOOD = {"model": "one", "prompt": "Good", "max_tokens": 4, "temperature": 0, "logprobs": 2, "route": "request"}


def good(server: Server) -> list[object]:
    return server.post("/v1/completions", GOOD).json()["choices"]


@pytest.fixture(scope="module")
def before(live: Server) -> list[object]:
    return good(live)


@pytest.fixture(autouse=True)
def goes_on(live: Server, before: list[object]) -> Iterator[None]:
    yield
    os.kill(live.pid, 0)
    assert live.get("/health").status_code == 200


@pytest.fixture(autouse=True, scope="module")
def answers_as_before(live: Server, before: list[object]) -> Iterator[None]:
    """Asked all the while, by another client: what bad input costs others."""
    differing: list[object] = []
    done = threading.Event()

    def ask() -> None:
        client = httpx.Client(timeout=60)
        while not done.wait(0.2):
            choices = client.post(live.url + "/v1/completions", json=GOOD).json().get("choices")
            if choices != before:
                differing.append(choices)

    asking = threading.Thread(target=ask)
    asking.start()
    yield
    done.set()
    asking.join()
    assert not differing
    assert good(live) == before


def check(response: httpx.Response, status: int, code: str | None = None, type: str = "invalid_request_error") -> dict:
    assert response.status_code == status, response.text[:500]
    assert len(response.content) < 8192
    assert SECRET not in response.text
    assert response.headers["x-request-id"]
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == type and (error["message"][0].isupper() or error["message"][0] == "`")
    if code is not None:
        assert error["code"] == code
    return error


def send(server: Server, content: bytes, path: str = "/v1/completions") -> httpx.Response:
    return server.client.post(server.url + path, content=content, headers={"content-type": "application/json"})


def body(**fields: object) -> dict[str, object]:
    return {"model": "llama-tiny", "prompt": "hi", "max_tokens": 2} | fields


def chat(**fields: object) -> dict[str, object]:
    return {"model": "llama-tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2} | fields


POSTS = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/adapters",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/tokenize",
    "/detokenize",
)


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize(
    "content",
    [
        b"", b"[]", b"{", b"null", b'"x"', b"1", b"\xff\xfe{}", b'{"model": "\xc3\x28"}', b"{} x", b"\xef\xbb\xbf{}",
        b"{" + SECRET.encode() + b"}",
    ],
)  # fmt: skip
def test_row_1_malformed_bodies(live: Server, path: str, content: bytes) -> None:
    check(send(live, content, path), 400)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", True), ("n", "3"), ("n", 3.5), ("n", 0), ("n", []), ("temperature", "1"), ("temperature", True),
        ("temperature", -1), ("temperature", 1e300), ("top_p", -0.1), ("top_p", 1.1), ("top_k", 1.5), ("min_p", 2),
        ("max_tokens", "4"), ("max_tokens", True), ("max_tokens", 4.5), ("stream", "true"), ("stream", 1),
        ("echo", 1), ("seed", "a"), ("seed", 2**63), ("presence_penalty", 3), ("frequency_penalty", -3),
        ("repetition_penalty", 0), ("ignore_eos", 0), ("min_tokens", -1), ("min_tokens", 5),
        ("stop_token_ids", ["1"]), ("stop_token_ids", [True]), ("stop_token_ids", {"a": 1}),
        ("route", "pinned"), ("route", SECRET), ("route", 1), ("include_route", "yes"), ("stream_options", {}),
        ("user", 5), ("metadata", []), ("add_special_tokens", 1), ("model", 5),
        ("model", ""), ("model", ["llama-tiny"]), ("prompt", True), ("prompt", 5), ("prompt", {"a": 1}),
    ],
)  # fmt: skip
def test_row_2_wrong_types(live: Server, field: str, value: object) -> None:
    error = check(live.post("/v1/completions", body(**{field: value})), 400)
    assert error["param"] == field


@pytest.mark.parametrize(
    "content",
    [b'{"model": "llama-tiny", "prompt": "a", "prompt": "b"}', b'{"model": "one", "logit_bias": {"5": 1, "5": 2}}'],
)
def test_row_2_duplicate_keys(live: Server, content: bytes) -> None:
    check(send(live, content), 400)


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"model": "llama-tiny", "prompt": ' + b"[" * 70 + b"]" * 70 + b"}",
        b'{"model": "llama-tiny", "prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        b'{"model": "llama-tiny", "prompt": [' + b"9" * 5000 + b"]}",
    ],
)
def test_row_3_depth_and_digits(live: Server, content: bytes) -> None:
    check(send(live, content), 400)


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1e999"])
@pytest.mark.parametrize(
    "field",
    ["temperature", "top_p", "min_p", "presence_penalty", "repetition_penalty", "n", "max_tokens", "seed", "prompt"],
)
def test_row_4_numbers_that_are_none(live: Server, field: str, number: bytes) -> None:
    check(send(live, b'{"model": "llama-tiny", "prompt": "a", "%s": %s}' % (field.encode(), number)), 400)
    check(send(live, b'{"model": "llama-tiny", "prompt": "a", "logit_bias": {"5": %s}}' % number), 400)


@pytest.mark.parametrize(
    "content",
    [
        rb'{"model": "\ud800", "prompt": "a"}',
        rb'{"model": "llama-tiny", "prompt": "a\udfff"}',
        rb'{"model": "llama-tiny", "prompt": ["a", "\ud800"]}',
        rb'{"model": "llama-tiny", "prompt": "a", "stop": ["\ud83d"]}',
        rb'{"model": "llama-tiny", "prompt": "a", "\ud800": 1}',
        rb'{"model": "llama-tiny", "prompt": "a", "metadata": {"x": ["\udc00"]}}',
    ],
)
def test_row_5_lone_surrogates(live: Server, content: bytes) -> None:
    check(send(live, content), 400)


def test_row_5_pairs_are_fine(live: Server) -> None:
    content = rb'{"model": "llama-tiny", "prompt": "\ud83c\udf36", "max_tokens": 0, "echo": true}'
    assert send(live, content).json()["choices"][0]["text"] == "🌶"


def test_row_6_too_large(live: Server) -> None:
    check(live.post("/v1/completions", body(prompt=SECRET * 200_000)), 413, "request_too_large")

    def chunks() -> Iterator[bytes]:
        yield b'{"model": "llama-tiny", "prompt": "'
        for _ in range(20):
            yield b"x" * 100_000

    check(live.client.post(live.url + "/v1/completions", content=chunks()), 413, "request_too_large")


def head(length: object, extra: str = "") -> bytes:
    return f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n{extra}\r\n".encode()


@pytest.mark.parametrize("length", ["-1", "abc", "1e3", "99999999999999999999999", "5\r\nContent-Length: 6"])
def test_row_6_content_length_that_is_none(live: Server, length: str) -> None:
    answer = live.raw(head(length) + b'{"a": 1}')
    assert answer.split()[1] in (b"400", b"413")
    assert b'{"error": ' in answer and b"x-request-id" in answer


def test_row_6_content_length_that_is_wrong(live: Server) -> None:
    content = json.dumps(body()).encode()
    short = live.raw(head(len(content) - 5) + content)
    assert short.split()[1] == b"400"
    with socket.create_connection(live.address, timeout=15) as connection:
        connection.sendall(head(len(content) + 50) + content)
        connection.shutdown(socket.SHUT_WR)
        long = read_all(connection)
    assert long.split()[1] == b"400" and b"Content-Length" in long


def test_row_7_many_tiny_chunks(live: Server) -> None:
    def memory() -> int:
        return int(Path(f"/proc/{live.pid}/statm").read_text().split()[1]) * 4096

    start = memory()
    with socket.create_connection(live.address, timeout=60) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(40):
            connection.sendall(b"1\r\n[\r\n" * 5000)
        connection.sendall(b"0\r\n\r\n")
        answer = connection.recv(65536)
    assert answer.split()[1].startswith(b"4")
    assert memory() - start < 64 * 2**20


def test_row_8_headers(live: Server) -> None:
    giant = b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 2_000_000 + b"\r\n\r\n"
    many = b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"".join(b"a%d: 1\r\n" % i for i in range(5000)) + b"\r\n"
    some = b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"".join(b"a%d: 1\r\n" % i for i in range(200)) + b"\r\n"
    long = b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n"
    for data in (giant, many, some, long):
        with socket.create_connection(live.address, timeout=15) as connection:
            try:
                connection.sendall(data)
            except (BrokenPipeError, ConnectionResetError):
                continue  # refused before all of it was sent
            answer = read_all(connection)
        assert not answer or answer.split()[1] in (b"400", b"431")
        assert not answer or b'"error"' in answer
    assert some and live.raw(some).split()[1] == b"431"


def test_too_many_items_are_refused_before_they_are_parsed() -> None:
    for items in (b"1,", b"[],", b'{"a":1},', b"["):
        with pytest.raises(InvalidRequestError, match="commas and brackets"):
            parse_json(b'{"prompt": [' + items * (MAX_ITEMS + 1))


def test_row_9_slow_clients(live: Server) -> None:
    """Silent, slow in the head, slow in the body: closed within 10 s, while probes and requests go on."""

    def silent(connection: socket.socket) -> None:
        pass

    def slow_head(connection: socket.socket) -> None:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n")
        for i in range(30):
            connection.sendall(b"A%d: x\r\n" % i)
            time.sleep(0.5)

    def slow_body(connection: socket.socket) -> None:
        connection.sendall(head(1000))
        for _ in range(30):
            connection.sendall(b" ")
            time.sleep(0.5)

    def stalled_body(connection: socket.socket) -> None:
        connection.sendall(head(1000) + b"{")

    lasted: dict[str, float] = {}

    def measure(kind) -> None:
        with socket.create_connection(live.address, timeout=20) as connection:
            began = time.monotonic()
            sender = threading.Thread(target=lambda: _until_broken(kind, connection))
            sender.start()
            read_all(connection)
            lasted[kind.__name__] = time.monotonic() - began
            sender.join()

    def _until_broken(kind, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            kind(connection)

    threads = [threading.Thread(target=measure, args=(kind,)) for kind in (silent, slow_head, slow_body, stalled_body)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert live.get("/ready").status_code == 200
        time.sleep(0.5)
    assert len(lasted) == 4 and all(seconds <= 10 for seconds in lasted.values()), lasted


@pytest.mark.parametrize(
    ("path", "request_body"),
    [
        ("/v1/completions", body(prompt=[True] * 100_000)),
        ("/v1/completions", body(prompt=[[SECRET]] * 50_000)),
        ("/v1/completions", body(prompt=["a"] * 10 + [1] * 100_000)),
        ("/v1/completions", body(stop=[1] * 100_000)),
        ("/v1/completions", body(stop_token_ids=["x"] * 100_000)),
        ("/v1/completions", body(logit_bias={f"{SECRET}{i}": 1 for i in range(20_000)})),
        ("/v1/chat/completions", chat(messages=[{"role": SECRET}] * 20_000)),
        ("/v1/chat/completions", chat(messages=[{"role": "user", "content": [{"type": SECRET}] * 20_000}])),
        ("/detokenize", {"tokens": ["x"] * 100_000}),
    ],
)
def test_row_10_thousands_of_faults_are_one_error(live: Server, path: str, request_body: dict) -> None:
    assert len(check(live.post(path, request_body), 400)["message"]) < 300


@pytest.mark.parametrize("n", [10**9, 2**63, 65])
def test_row_12_n(live: Server, n: int) -> None:
    assert check(live.post("/v1/completions", body(n=n)), 400)["param"] == "n"
    assert check(live.post("/v1/chat/completions", chat(n=n)), 400)["param"] == "n"


def test_row_12_prompts_times_n_and_best_of(live: Server) -> None:
    check(live.post("/v1/completions", body(prompt=["a"] * 33, n=2)), 400)
    for n, best_of in ((1, 2), (3, 1), (None, 10**9), (None, True)):
        assert check(live.post("/v1/completions", body(n=n, best_of=best_of)), 400)["param"] == "best_of"
    for n, best_of in ((None, 1), (2, 2)):
        assert live.post("/v1/completions", body(n=n, best_of=best_of)).status_code == 200


@pytest.mark.parametrize("max_tokens", [-1, 2**63, 257, 10**19])
def test_row_13_max_tokens(live: Server, max_tokens: int) -> None:
    check(live.post("/v1/completions", body(max_tokens=max_tokens)), 400, "context_length_exceeded")
    check(live.post("/v1/chat/completions", chat(max_tokens=max_tokens)), 400, "context_length_exceeded")
    check(
        live.post("/v1/chat/completions", chat(max_tokens=None, max_completion_tokens=max_tokens)),
        400,
        "context_length_exceeded",
    )


@pytest.mark.parametrize("prompt", ["a" * 257, [5] * 257, [5] * 256, "a" * 500_000])
def test_row_13_prompts_past_the_context(live: Server, prompt: object) -> None:
    check(live.post("/v1/completions", body(prompt=prompt, max_tokens=None)), 400, "context_length_exceeded")


def test_row_13_says_how_long_the_prompt_is(live: Server) -> None:
    error = check(live.post("/v1/completions", body(prompt="a" * 300)), 400)
    assert "300 tokens" in error["message"] and "256" in error["message"] and error["param"] == "prompt"
    error = check(live.post("/v1/completions", body(prompt="a" * 50_000)), 400)
    assert "50000 characters" in error["message"] and error["param"] == "prompt"
    for length in (300, 256 - len("user: \nassistant:")):
        messages = [{"role": "user", "content": "a" * length}]
        error = check(live.post("/v1/chat/completions", chat(messages=messages, max_tokens=None)), 400)
        assert error["param"] == "messages" and "256" in error["message"]


@pytest.mark.parametrize("logprobs", [-1, 21, 2**62, True, "5", 1.5])
def test_row_14_logprobs(live: Server, logprobs: object) -> None:
    check(live.post("/v1/completions", body(logprobs=logprobs)), 400)
    check(live.post("/v1/completions", body(logprobs=logprobs, echo=True)), 400)
    check(live.post("/v1/chat/completions", chat(logprobs=True, top_logprobs=logprobs)), 400)


def test_row_14_top_logprobs_without_logprobs(live: Server) -> None:
    check(live.post("/v1/chat/completions", chat(top_logprobs=2)), 400)


@pytest.mark.parametrize("stop", [["x"] * 100_000, [""], ["a", ""], "x" * 1_000_000, ["x" * 1025], 5, {"a": 1}])
def test_row_15_stops(live: Server, stop: object) -> None:
    assert check(live.post("/v1/completions", body(stop=stop)), 400)["param"] == "stop"


@pytest.mark.parametrize("token", [-1, 320, 2**31, 2**63, -(2**63)])
def test_row_16_tokens_outside_the_vocabulary(live: Server, token: int) -> None:
    check(live.post("/v1/completions", body(prompt=[5, token])), 400)
    check(live.post("/v1/completions", body(prompt=[[5], [token]])), 400)
    check(live.post("/v1/completions", body(logit_bias={str(token): 1})), 400)
    check(live.post("/v1/completions", body(stop_token_ids=[token])), 400)
    check(live.post("/detokenize", {"tokens": [token]}), 400)


@pytest.mark.parametrize("key", ["", " 5", "5 ", "+5", "5.0", "1_0", "٣", SECRET, "0x5", "9" * 5000, "0" * 5000 + "1"])
def test_row_16_logit_bias_keys(live: Server, key: str) -> None:
    check(live.post("/v1/completions", body(logit_bias={key: 1})), 400)


@pytest.mark.parametrize("bias", [101, -101, "1", True, None, [1]])
def test_row_16_logit_bias_values(live: Server, bias: object) -> None:
    check(live.post("/v1/completions", body(logit_bias={"5": bias})), 400)


@pytest.mark.parametrize(
    "prompt", ["", [], [[]], [""], ["a", ""], [[5], []], None, [None], [[5], "a"], ["a", [5]], [5, "a"]]
)
def test_row_17_empty_and_mixed_prompts(live: Server, prompt: object) -> None:
    assert check(live.post("/v1/completions", body(prompt=prompt)), 400)["param"] == "prompt"


@pytest.mark.parametrize(
    "messages",
    [
        [], None, "hi", {}, [None], ["hi"], [{}], [{"role": "user"}], [{"content": "x"}], [{"role": 5, "content": "x"}],
        [{"role": "user", "content": None}], [{"role": "user", "content": 5}], [{"role": SECRET, "content": "x"}],
        [{"role": "user", "content": [{"type": "text", "text": "x"}, {}]}], [{"role": "tool", "content": 5}],
        [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}], [{"role": ["user"], "content": "x"}],
        [{"role": "user", "content": "x"}, {"role": "system", "content": "late"}],
    ],
)  # fmt: skip
def test_row_17_messages(live: Server, messages: object) -> None:
    assert check(live.post("/v1/chat/completions", chat(messages=messages)), 400)["param"] == "messages"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("chat_template", "{{ 1 }}"), ("chat_template_kwargs", {"messages": 1}), ("tools", [{"type": "function"}]),
        ("tool_choice", "required"), ("tool_choice", {"type": "function"}), ("guided_regex", "(a+"),
        ("guided_json", 5), ("structured_outputs", {"whitespace_pattern": " "}), ("functions", [{}]),
        ("modalities", ["audio"]), ("parallel_tool_calls", 1),
        ("audio", {"voice": "x"}), ("reasoning_effort", 1), ("store", "yes"), ("prediction", {}),
        ("service_tier", "flex"),        ("logits_processors", ["os.system"]), ("use_beam_search", True),
        ("lora_path", "one"), ("echo", True),
    ],
)  # fmt: skip
def test_rows_18_20_fields_that_are_not_supported(live: Server, field: str, value: object) -> None:
    assert check(live.post("/v1/chat/completions", chat(**{field: value})), 400)["param"] == field


@pytest.mark.parametrize(
    "value",
    [
        "json", {"type": "xml"}, {"type": "json_schema"}, {"type": "json_schema", "json_schema": {}},
        {"type": "json_schema", "json_schema": {"name": "a", "schema": "{}"}}, {"type": 5}, {},
        {"type": "json_schema", "json_schema": {"schema": {"type": SECRET}}},
        {"type": "json_schema", "json_schema": {"schema": {"$ref": "http://127.0.0.1:1/x"}}},
        {"type": "json_schema", "json_schema": {"schema": {"not": {}}}},
        {"type": "json_schema", "json_schema": {"schema": {"enum": ["x" * 70_000]}}},
    ],
)  # fmt: skip
def test_row_18_response_formats(live: Server, value: object) -> None:
    assert check(live.post("/v1/chat/completions", chat(response_format=value)), 400)["param"] == "response_format"


def test_what_has_another_name_here(live: Server) -> None:
    assert "`model`" in check(live.post("/v1/completions", body(adapter_id="one")), 400)["message"]
    error = check(live.post("/v1/completions", body(model="")), 400)
    assert error["message"] == "`model` is empty. GET /v1/models lists what it can be."


def test_row_21_pickled_fields(live: Server) -> None:
    assert check(live.post("/v1/completions", body(prompt_embeds="gASVAAAA")), 400)["param"] == "prompt_embeds"


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": f"http://169.254.169.254/{SECRET}"}},
        {"type": "video_url", "video_url": {"url": "file:///etc/passwd"}},
        {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}},
        {"type": "text", "text": 5},
        {"type": "text"},
        {"type": "text", "text": "a", "image_url": "b"},
        "text",
        None,
    ],
)
def test_row_22_parts_that_are_no_text(live: Server, part: object) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}, part]}]
    check(live.post("/v1/chat/completions", chat(messages=messages)), 400)


def test_unknown_models_and_paths(live: Server) -> None:
    check(live.post("/v1/completions", body(model=SECRET)), 404, "model_not_found")
    check(live.post("/v1/chat/completions", chat(model=SECRET)), 404, "model_not_found")
    check(live.get(f"/v1/models/{SECRET}"), 404, "model_not_found")
    check(live.get(f"/v1/{SECRET}"), 404, "not_found")
    check(live.get("/v1/completions"), 405, "method_not_allowed")
    check(live.post("/health", {}), 405, "method_not_allowed")
    assert live.get("/v1/models/").json() == live.get("/v1/models").json()


def test_not_http_at_all(live: Server) -> None:
    for data in (b"\x16\x03\x01\x02\x00\x01\x00", b"GARBAGE\r\n\r\n", b"GET  / HTTP/1.1\r\n\r\n"):
        answer = live.raw(data + b"\r\n\r\n")
        assert answer.split()[1] == b"400" and b'{"error": ' in answer


def test_request_ids_are_taken_only_if_they_are_plain(live: Server) -> None:
    assert live.get("/health", headers={"x-request-id": "mine-1_A"}).headers["x-request-id"] == "mine-1_A"
    for id_ in ("a b", "a" * 129, "é".encode().decode("latin-1"), "\x1b[31m"):
        answer = live.raw(
            f"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-Request-Id: {id_}\r\n\r\n".encode("latin-1")
        )
        assert id_.encode("latin-1") not in answer


def load(live: Server, path: object, name: object = "bad") -> httpx.Response:
    return live.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})


@pytest.mark.parametrize(
    "path",
    [
        "../../etc", "/etc", "/", "", "llama-qv-r8k3t3/../../../../etc", "llama-qv-r8k3t3/adapter\x00", "~", "a" * 5000,
        f"/nowhere/{SECRET}", "link", 5, None, ["a"],
    ],
)  # fmt: skip
def test_row_27_paths_outside_the_roots(live: Server, roots: Path, path: object) -> None:
    link = roots / "link"
    if not link.is_symlink():
        link.symlink_to(GOLDEN.parent)
    assert check(load(live, path), 400)["param"] == "lora_path"
    assert check(live.post("/v1/adapters", {"name": "bad", "path": path}), 400)["param"] == "path"


@pytest.mark.parametrize(
    "path",
    [
        "http://169.254.169.254/latest", "https://example.com/a", "s3://bucket/a", "file:///etc", "169.254.169.254",
        "\\\\host\\share", "//host/share", "host:path", "[::1]/a", "hf://org/repo", "git@host:repo",
    ],
)  # fmt: skip
def test_row_28_paths_that_name_hosts(live: Server, path: str) -> None:
    began = time.monotonic()
    check(load(live, path), 400)
    assert time.monotonic() - began < 5


@pytest.fixture
def copy(roots: Path) -> Iterator[Path]:
    """A golden adapter to spoil, below a root."""
    folder = roots / "spoilt"
    shutil.copytree(GOLDEN / "llama-qv-r8k3t3" / "adapter", folder)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "adapter_model.pkl"])
def test_row_29_weights_of_other_kinds(live: Server, copy: Path, name: str) -> None:
    (copy / "adapter_model.safetensors").rename(copy / name)
    check(load(live, str(copy)), 400)


def edit(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"auto_mapping": {"base_model_class": "os", "parent_library": "os", "loader": "os"}},
        {"auto_mapping": "os.system"},
        {"auto_map": {"AutoModel": "evil.Model"}},
        {"trust_remote_code": True},
        {"custom_modules_path": "evil"},
    ],
)
def test_row_30_configs_that_name_code(live: Server, copy: Path, changes: dict) -> None:
    edit(copy, **changes)
    check(load(live, str(copy)), 400, "invalid_adapter")


def test_row_30_the_class_that_peft_names_is_ignored(live: Server, copy: Path) -> None:
    edit(copy, auto_mapping={"base_model_class": "system", "parent_library": "os"})
    assert load(live, str(copy)).status_code == 200
    assert live.post("/v1/unload_lora_adapter", {"lora_name": "bad"}).is_success


@pytest.mark.parametrize(
    "changes", [{"r": True}, {"r": "8"}, {"r": 0}, {"r": 1_000_000_000}, {"r": -1}, {"peft_type": "X"}]
)
def test_row_31_configs_with_wrong_values(live: Server, copy: Path, changes: dict) -> None:
    edit(copy, **changes)
    check(load(live, str(copy)), 400, "invalid_adapter")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"peft_type": "TUCKA", "r": NaN}', "\x00"])
def test_row_31_configs_that_are_no_json(live: Server, copy: Path, text: str) -> None:
    (copy / "adapter_config.json").write_text(text)
    check(load(live, str(copy)), 400, "invalid_adapter")


def test_row_32_other_bases(live: Server, copy: Path) -> None:
    error = check(load(live, str(GOLDEN / "gpt2-all-r8k2t2" / "adapter")), 400, "base_model_mismatch")
    assert error["param"] == "lora_path"
    edit(copy, target_modules=["no_such_module"])
    check(load(live, str(copy)), 400, "base_model_mismatch")


def test_row_33_spoilt_safetensors(live: Server, copy: Path) -> None:
    weights = copy / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for spoilt in (
        b"",
        whole[:100],
        whole[:-1],
        whole + b"\x00",
        (2**64 - 1).to_bytes(8, "little") + whole[8:],
        (2**40).to_bytes(8, "little") + whole[8:],
        (0).to_bytes(8, "little") + whole[8:],
        b"\x80\x04\x95" + whole[3:],
    ):
        weights.write_bytes(spoilt)
        check(load(live, str(copy)), 400, "invalid_adapter")


def test_row_34_spoilt_tensors(live: Server, copy: Path) -> None:
    weights = copy / "adapter_model.safetensors"
    whole = weights.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])

    def write(tensors: dict, data: bytes) -> None:
        text = json.dumps(tensors).encode()
        weights.write_bytes(len(text).to_bytes(8, "little") + text + data)

    data = whole[8 + size :]
    name = next(key for key in header if key.endswith("tucka_g"))
    start = header[name]["data_offsets"][0]
    write(header, data[:start] + b"\x00\x00\xc0\x7f" + data[start + 4 :])
    check(load(live, str(copy)), 400, "invalid_adapter")
    write({key: value for key, value in header.items() if key != name}, data)
    check(load(live, str(copy)), 400)
    write(header | {name: header[name] | {"shape": [0, 2**40]}}, data)
    check(load(live, str(copy)), 400)
    write(header | {f"x{i}": header[name] for i in range(30_000)}, data)
    check(load(live, str(copy)), 400, "invalid_adapter")


@pytest.mark.parametrize("name", ["", "a b", "../x", "a\nb", "x" * 129, "é", "llama-tiny", "one", 5, None])
def test_adapter_names(live: Server, name: object) -> None:
    path = str(GOLDEN / "llama-all7-r4k2t2" / "adapter")
    status = 409 if name in ("llama-tiny", "one") else 400
    assert check(load(live, path, name), status)["param"] == "lora_name"
    assert check(live.post("/v1/adapters", {"name": name, "path": path}), status)["param"] == "name"


def test_unload_what_is_not_loaded(live: Server) -> None:
    unload, adapters = "/v1/unload_lora_adapter", f"{live.url}/v1/adapters"
    assert check(live.post(unload, {"lora_name": SECRET}), 404, "model_not_found")["param"] == "lora_name"
    assert check(live.client.delete(f"{adapters}/{SECRET}"), 404, "model_not_found")["param"] == "name"
    assert check(live.client.get(f"{adapters}/{SECRET}"), 404, "model_not_found")["param"] == "name"
    for answer in (live.post(unload, {"lora_name": "llama-tiny"}), live.client.delete(f"{adapters}/llama-tiny")):
        error = check(answer, 400)
        assert "is the base model" in error["message"] and error["param"] in ("lora_name", "name")
