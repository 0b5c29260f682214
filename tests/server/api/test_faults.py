"""What goes wrong behind the door: a fake engine fails on demand, clients leave, the server is full."""

import asyncio
import dataclasses
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.support import GOLDEN
from tests.support.servers import Server
from tucka_runtime.adapters.registry import AdapterRegistry
from tucka_runtime.errors import EngineDeadError, InvalidAdapterError, OverloadedError
from tucka_runtime.server.api import completions
from tucka_runtime.server.api.completions import CompletionBody

ASK = {"model": "base", "prompt": "hi", "max_tokens": 8}


def events(response: httpx.Response) -> list[str]:
    return [line.removeprefix("data: ") for line in response.text.splitlines() if line]


def wait_for(condition, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


@pytest.fixture
def server(start_fake) -> Server:
    return start_fake()


def test_row_11_an_exception_is_a_500_that_tells_nothing(server: Server, monkeypatch, caplog) -> None:
    def explode(*arguments: object) -> None:
        raise RuntimeError("/secret/path at 0xdeadbeef")

    monkeypatch.setattr(completions, "num_sequences", explode)
    answer = server.post("/v1/completions", ASK)
    assert answer.status_code == 500
    error = answer.json()["error"]
    assert error["type"] == "server_error" and answer.headers["x-request-id"] in error["message"]
    assert "secret" not in answer.text and "Traceback" not in answer.text and "0x" not in answer.text
    wait_for(lambda: "/secret/path" in caplog.text)
    assert answer.headers["x-request-id"] in caplog.text
    monkeypatch.undo()
    assert server.post("/v1/completions", ASK).status_code == 200


def test_row_11_an_exception_while_streaming_is_an_error_event(server: Server) -> None:
    server.engine.failure = RuntimeError("/secret/path")
    server.engine.fail_after = 2
    answer = server.post("/v1/completions", ASK | {"stream": True})
    assert answer.status_code == 200
    last = json.loads(events(answer)[-1])
    assert last["error"]["type"] == "server_error" and "secret" not in answer.text
    assert "[DONE]" not in answer.text


def test_engine_death_before_the_first_token_has_a_status(server: Server) -> None:
    server.engine.fail_after = 0
    for stream in (False, True):
        answer = server.post("/v1/completions", ASK | {"stream": stream})
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "engine_unavailable"
        assert answer.headers["retry-after"]


def test_engine_death_after_the_first_token_is_an_event_and_no_end(server: Server) -> None:
    server.engine.fail_after = 3
    answer = server.post("/v1/completions", ASK | {"stream": True})
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
    seen = events(answer)
    assert json.loads(seen[-1])["error"]["code"] == "engine_unavailable"
    assert len(seen) == 4 and "[DONE]" not in seen
    assert server.post("/v1/completions", ASK).status_code == 503


@pytest.mark.parametrize(
    ("error", "status", "seconds"),
    [
        (OverloadedError("The queue is full."), 429, 1),
        (OverloadedError("The queue is full.", retry_after=17), 429, 17),
        (EngineDeadError("The engine is down."), 503, 5),
    ],
)
def test_refused_at_once_with_retry_after(server: Server, error: Exception, status: int, seconds: int) -> None:
    server.engine.submit_error = error
    answer = server.post("/v1/completions", ASK | {"stream": True})
    assert answer.status_code == status and int(answer.headers["retry-after"]) == seconds


def test_not_ready_says_so(server: Server) -> None:
    server.engine.ready = False
    assert server.get("/ready").status_code == 503 and server.get("/health").status_code == 200
    assert server.post("/v1/completions", ASK).status_code == 503
    assert server.post("/v1/completions", ASK | {"model": "nobody"}).status_code == 404
    server.engine.ready = True
    assert server.get("/ready").status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_row_44_a_client_that_leaves_aborts_its_request(server: Server, stream: bool) -> None:
    server.engine.seconds_per_token = 0.05
    content = json.dumps(ASK | {"stream": stream, "max_tokens": 200}).encode()
    with socket.create_connection(server.address) as client:
        client.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(content) + content
        )
        if stream:
            client.recv(1000)
        wait_for(lambda: server.engine.requests)
    wait_for(lambda: server.engine.requests[0].id in server.engine.aborted, seconds=1.0)  # as the row says


def test_a_stop_string_aborts_the_rest(server: Server) -> None:
    server.engine.seconds_per_token = 0.01
    whole = server.post("/v1/completions", ASK).json()["choices"][0]["text"]
    began = time.monotonic()
    answer = server.post("/v1/completions", ASK | {"max_tokens": 200, "stop": whole[1:4]}).json()
    assert answer["choices"][0]["text"] == whole[:1]
    assert time.monotonic() - began < 1
    assert server.engine.requests[-1].id in server.engine.aborted
    assert answer["usage"]["completion_tokens"] == 4


def restart_engine(server: Server) -> None:
    server.engine.loaded.clear()
    asyncio.run_coroutine_threadsafe(server.engine.on_restart(), server.loop).result(10)


def test_after_an_engine_restart_adapters_come_when_they_are_asked_for(server: Server) -> None:
    """But those that are kept resident are there before the server is ready."""
    path = str(GOLDEN / "llama-qv-r8k3t3" / "adapter")
    for name, keep in (("a", False), ("b", True)):
        server.post("/v1/adapters", {"name": name, "path": path, "keep_resident": keep}).raise_for_status()
    before = dict(server.engine.loaded)
    restart_engine(server)
    assert [key.name for key in server.engine.loaded] == ["b"]
    assert server.get("/ready").status_code == 200
    assert server.post("/v1/completions", ASK | {"model": "a"}).status_code == 200
    assert server.engine.loaded == before


def test_changes_while_the_engine_restarts_are_refused_and_lose_nothing(server: Server) -> None:
    one, two = (str(GOLDEN / folder / "adapter") for folder in ("llama-qv-r8k3t3", "llama-all7-r4k2t2"))
    card = server.post("/v1/adapters", {"name": "a", "path": one}).json()
    server.engine.ready = False
    for answer in (
        server.post("/v1/adapters", {"name": "a", "path": two, "load_inplace": True}),
        server.post("/v1/adapters", {"name": "b", "path": two}),
        server.client.delete(server.url + "/v1/adapters/a"),
    ):
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "engine_unavailable"
    restart_engine(server)
    server.engine.ready = True
    assert server.post("/v1/completions", ASK | {"model": "a"}).status_code == 200
    assert server.get("/v1/adapters").json()["data"] == [card]


def test_a_load_that_the_engine_outlived_by_little_is_brought_back(server: Server, monkeypatch) -> None:
    """The old process has loaded it, the disk is still writing; the new process must get it when it is asked for."""
    put = AdapterRegistry.put
    writing, go_on = threading.Event(), threading.Event()

    def slow_put(*arguments: object) -> None:
        writing.set()
        assert go_on.wait(10)
        put(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(AdapterRegistry, "put", slow_put)
    body = {"name": "a", "path": str(GOLDEN / "llama-qv-r8k3t3" / "adapter")}
    loading = threading.Thread(target=server.post, args=("/v1/adapters", body))
    loading.start()
    assert writing.wait(10)
    restart_engine(server)
    go_on.set()
    loading.join()
    assert server.post("/v1/completions", ASK | {"model": "a"}).status_code == 200
    assert [key.name for key in server.engine.loaded] == ["a"]


def test_refused_loads_leave_no_copies(server: Server, tmp_path: Path) -> None:
    server.engine.load_error = InvalidAdapterError("no")
    for folder in ("llama-qv-r8k3t3", "llama-all7-r4k2t2"):
        body = {"name": "a", "path": str(GOLDEN / folder / "adapter")}
        assert server.post("/v1/adapters", body).status_code == 400
    assert not list((tmp_path / "state0" / "blobs").iterdir())


def test_a_token_beyond_the_models_vocabulary_is_refused(server: Server) -> None:
    server.engine.info = dataclasses.replace(server.engine.info, vocab_size=3 + ord("h"))
    answer = server.post("/v1/completions", ASK)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "prompt"
    assert server.post("/v1/completions", ASK | {"prompt": "abc"}).status_code == 200


def test_the_number_of_prompts_is_checked_before_they_are_read(start_fake) -> None:
    server = start_fake(max_n=2)
    answer = server.post("/v1/completions", ASK | {"prompt": [[5], [6], [10**9]]})
    assert answer.status_code == 400 and "more than 2 prompts" in answer.json()["error"]["message"]


def test_without_tokenizer_ids_are_served(start_fake) -> None:
    server = start_fake(with_tokenizer=False)
    answer = server.post(
        "/v1/completions",
        {"model": "base", "prompt": [5, 6], "max_tokens": 3, "return_token_ids": True, "echo": True},
    ).json()
    assert answer["choices"][0]["text"] == ""
    assert len(answer["choices"][0]["token_ids"]) == 3 and answer["choices"][0]["prompt_token_ids"] == [5, 6]
    plain = {"model": "base", "prompt": [5], "max_tokens": 1, "response_format": {"type": "text"}}
    assert server.post("/v1/completions", plain).status_code == 200
    for body, param in (
        ({"model": "base", "prompt": "text"}, "prompt"),
        ({"model": "base", "prompt": [5], "stop": "x"}, "stop"),
        ({"model": "base", "prompt": [5], "response_format": {"type": "json_object"}}, "response_format"),
        ({"model": "base", "prompt": [5], "structured_outputs": {"regex": "a"}}, "structured_outputs"),
    ):
        error = server.post("/v1/completions", body).json()["error"]
        assert error["param"] == param and "tokenizer" in error["message"]
    chat = server.post("/v1/chat/completions", {"model": "base", "messages": [{"role": "user", "content": "a"}]})
    assert chat.status_code == 400


def test_a_model_without_chat_template_says_so(server: Server) -> None:
    answer = server.post("/v1/chat/completions", {"model": "base", "messages": [{"role": "user", "content": "a"}]})
    assert answer.status_code == 400 and "chat template" in answer.json()["error"]["message"]


def test_every_field_of_a_completion_reaches_the_engine_or_the_answer() -> None:
    """A field that is declared but forgotten would be silently ignored: what has no effect is declared as such."""
    import inspect

    from tucka_runtime.server.api import answer, door, fields, sampling, structured

    text = "".join(map(inspect.getsource, (answer, completions, door, fields, sampling, structured)))
    for name in CompletionBody.model_fields.keys() - CompletionBody.ignored:
        assert f"body.{name}" in text or f"_body.{name}" in text, name


@pytest.mark.parametrize("lost", [False, True])
def test_what_is_unloaded_while_the_engine_restarts_stays_away(server: Server, monkeypatch, lost: bool) -> None:
    """Its copy is there, or gone too. The engine died when the unloading had begun."""
    body = {"name": "a", "path": str(GOLDEN / "llama-qv-r8k3t3" / "adapter"), "keep_resident": True}
    server.post("/v1/adapters", body).raise_for_status()
    names = server.service.adapters  # type: ignore[union-attr]
    begun, go_on = threading.Event(), threading.Event()
    forget, missing = names._copies.forget, names._copies.missing

    async def slow(name: str) -> None:
        begun.set()
        await asyncio.to_thread(go_on.wait, 10)
        await forget(name)

    async def found(entries):
        return list(entries) if lost else await missing(entries)

    monkeypatch.setattr(names._copies, "forget", slow)
    monkeypatch.setattr(names._copies, "missing", found)
    with ThreadPoolExecutor(1) as pool:
        unloading = pool.submit(server.client.delete, server.url + "/v1/adapters/a")
        assert begun.wait(10)
        restarted = asyncio.run_coroutine_threadsafe(server.engine.on_restart(), server.loop)
        time.sleep(0.2)  # it waits for the name by then
        go_on.set()
        restarted.result(10)
        assert unloading.result().status_code == 200
    assert server.get("/v1/adapters").json()["data"] == [] and "a" not in names._lost
    assert [entry.name for entry in names._copies._registry.names()] == []
