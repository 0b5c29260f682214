"""Log lines: what each request leaves behind, and that nothing it brings can forge one (row 45)."""

import json
import logging
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import GOLDEN
from tests.support.servers import Server, make_base, start_command
from tucka_runtime.logs import JSONFormatter, PlainFormatter, fields

ASK = {"prompt": "Hello \x1b[2J\r\nforged: \u2028 line \u9b54", "max_tokens": 4, "temperature": 0, "ignore_eos": True}
TRACE = "0af7651916cd43dd8448eb211c80319c"


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    """A real server's JSON log after a few requests, with prompts."""
    folder = tmp_path_factory.mktemp("logs")
    base = make_base(folder / "llama")
    process, url = start_command(
        "--model", str(base), "--adapter", f"fin={GOLDEN / 'llama-qv-r8k3t3' / 'adapter'}",
        "--log-format", "json", "--log-prompts", "--adapter-root", str(GOLDEN), log=folder / "log",
    )  # fmt: skip
    server = Server(url, process.pid)
    context = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}
    server.post(
        "/v1/completions", ASK | {"model": "fin", "n": 2, "seed": 1}, headers={"x-request-id": "mine", **context}
    )
    server.post("/v1/completions", ASK | {"model": "llama"}, headers={"x-request-id": "bad\tid"})
    server.post("/v1/completions", ASK | {"model": 'x\r\n{"level": "forged"}\x1b[31m'})
    body = b'{"model": "llama"}'
    head = b"POST /v1/completions?%1b[2J HTTP/1.1\r\nHost: x\r\nX-Request-Id: a\xc2\x9b2Jb\r\nConnection: close\r\n"
    server.raw(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    server.get("/no%0d%0asuch%1b[31m \u9b54/path?secret=1" + "x" * 300)
    adapter = {"name": "guest", "path": "llama-qv-r8k3t3/adapter"}
    server.post("/v1/adapters", adapter)
    server.client.delete(url + "/v1/adapters/guest")
    server.post("/v1/adapters", adapter | {"path": "/etc"})
    server.post("/v1/adapters", adapter | {"name": "x\r\nforged"})
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    raw = (folder / "log").read_bytes()
    assert not [byte for byte in raw if byte < 32 and byte != 10] and raw.isascii()
    return [json.loads(line) for line in raw.decode().splitlines()]


def test_ready_is_a_whole_sentence(lines: list[dict[str, object]]) -> None:
    (ready,) = [str(line["message"]) for line in lines if str(line["message"]).startswith("ready at ")]
    assert re.fullmatch(r"ready at http://127\.0\.0\.1:\d+", ready)


def events(lines: list[dict[str, object]], event: str) -> list[dict[str, object]]:
    return [line for line in lines if line.get("event") == event]


def test_every_line_is_an_object_of_ours(lines: list[dict[str, object]]) -> None:
    assert {line["process"] for line in lines} == {"server", "engine", "reader"}
    assert all(line["level"] in ("info", "warning") for line in lines), lines


def test_a_finished_request(lines: list[dict[str, object]]) -> None:
    fin, base = events(lines, "request")
    assert (fin["request_id"], fin["model"], fin["adapter"]) == ("mine", "fin", "fin")
    assert (fin["outcome"], fin["finish_reasons"], fin["sequences"]) == ("ok", ["length", "length"], 2)
    assert fin["generation_tokens"] == 8 and fin["prompt_tokens"] == len(ASK["prompt"].encode())
    assert len(str(fin["digest"])) == 64 and fin["generation"] == 1 and fin["route_scope"] == "batch"
    assert fin["trace_id"] == TRACE
    assert 0 < fin["queue_seconds"] + fin["prefill_seconds"] <= fin["first_token_seconds"] < fin["seconds"]
    assert fin["prompt"] == ASK["prompt"]
    assert (base["model"], base["adapter"], base["digest"], base["trace_id"]) == ("llama", None, None, None)


def test_the_http_lines(lines: list[dict[str, object]]) -> None:
    seen = [(line["route"], line["code"], line["error"]) for line in events(lines, "http")]
    assert seen == [
        ("/v1/completions", 200, None),
        ("/v1/completions", 200, None),
        ("/v1/completions", 404, "model_not_found"),
        ("/v1/completions", 400, "invalid_request_error"),
        ("unmatched", 404, "not_found"),
        ("/v1/adapters", 201, None),
        ("/v1/adapters/{name:path}", 200, None),
        ("/v1/adapters", 400, "invalid_adapter"),
        ("/v1/adapters", 400, "invalid_request_error"),
    ]
    assert all(str(line["request_id"]).isalnum() for line in events(lines, "http"))


def test_a_path_that_leads_nowhere_is_shown_in_part(lines: list[dict[str, object]]) -> None:
    paths = [line["path"] for line in events(lines, "http")]
    assert [path for path in paths if path] == [paths[4]]
    assert str(paths[4]).startswith("/no%0D%0Asuch%1B%5B31m%20%E9%AD%94/path") and len(str(paths[4])) <= 100
    assert f"GET unmatched {paths[4]} 404 not_found " in str(events(lines, "http")[4]["message"])


def test_what_happens_to_adapters(lines: list[dict[str, object]]) -> None:
    loaded = events(lines, "adapter_loaded")
    assert [(line["adapter"], line["generation"]) for line in loaded] == [("fin", 1), ("guest", 2)]
    (unloaded,) = events(lines, "adapter_unloaded")
    assert (unloaded["adapter"], unloaded["generation"]) == ("guest", 2)
    refused = events(lines, "adapter_refused")
    assert [(line["adapter"], line["error"]) for line in refused] == [
        ("guest", "invalid_adapter"), ("?", "invalid_request_error")
    ]  # fmt: skip


def record(message: str, *arguments: object, **values: object) -> logging.LogRecord:
    made = logging.getLogger("test").makeRecord("test", logging.INFO, "f", 1, message, arguments, None)
    made.__dict__.update(fields(**values))
    return made


@pytest.mark.parametrize("bad", ["a\r\nb", "a\x1b[31mb", "a\u2028b", "a\x9bb", "a\x7fb", '"}\n{"a": "'])
def test_no_formatter_lets_control_characters_pass(bad: str) -> None:
    plain = PlainFormatter().format(record("%s", bad))
    assert "\n" not in plain and plain.isprintable()
    line = JSONFormatter("server").format(record("%s", bad, model=bad))
    assert line.isascii() and line.isprintable()
    assert json.loads(line)["model"] == json.loads(line)["message"] == bad


def test_fields_cannot_hide_an_exception() -> None:
    made = record("failed")
    try:
        raise ValueError("x")
    except ValueError as error:
        made.exc_info = (ValueError, error, error.__traceback__)
    assert "ValueError: x" in json.loads(JSONFormatter("engine").format(made))["exception"]


def test_prompts_stay_out_unless_asked_for(start_fake, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "tucka_runtime"):
        start_fake().post("/v1/completions", {"model": "base", "prompt": "a secret", "max_tokens": 2})
    assert "secret" not in repr([made.__dict__ for made in caplog.records])
    assert [made.fields["outcome"] for made in caplog.records if made.name.endswith("requests")] == ["ok"]


def test_a_log_that_cannot_be_written_is_no_traceback(tmp_path: Path) -> None:
    """As where the disk is full, and has room again before logging has told of its own failure."""
    program = """
import logging, resource, signal
from tucka_runtime.logs import StderrHandler, set_up_logging
set_up_logging("plain", "server")
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
told, limits = StderrHandler.handleError, iter([0, hard])
def tell(handler, record):
    resource.setrlimit(resource.RLIMIT_FSIZE, (next(limits), hard))
    told(handler, record)
StderrHandler.handleError = tell
log = logging.getLogger("tucka_runtime.x")
log.info("before")
resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
log.info("lost")
log.info("lost too")
log.info("after")
"""
    with (tmp_path / "log").open("wb") as file:
        subprocess.run([sys.executable, "-c", program], stderr=file, check=True)
    said = [line[9:] for line in (tmp_path / "log").read_text().splitlines()]
    assert said == ["INFO before", "WARNING 2 lines of this log could not be written", "INFO after"]
