"""`tucka batch`: a file of requests, answered as the server answers them; killed and gone on with."""

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT
from tests.support.batch_runs import answer_all
from tests.support.fake_engine import FakeEngine
from tests.support.servers import Server, make_base
from tucka_runtime.cli.main import main
from tucka_runtime.errors import ConfigError, EngineDeadError, OverloadedError
from tucka_runtime.server.batch_file import AnswerFile, read_items

ASK = {"model": "base", "prompt": "hello", "max_tokens": 3, "temperature": 0}


def line(custom_id: str, body: dict[str, Any] | None = None, url: str = "/v1/completions") -> str:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": ASK | (body or {})})


def answers(path: Path) -> dict[str | None, dict[str, Any]]:
    read = [json.loads(text) for text in path.read_text().splitlines()]
    found = {answer["custom_id"]: answer for answer in read}
    assert len(found) == len(read)
    return found


def test_what_is_wrong_with_a_line_is_named(tmp_path: Path) -> None:
    lines = [
        line("good"),
        "",
        "{'custom_id': 'python'}",
        "[1]",
        json.dumps({"url": "/v1/completions", "body": {}}),
        line("good"),
        line("get").replace("POST", "GET"),
        line("elsewhere", url="/v1/files"),
        json.dumps({"custom_id": "bodiless", "url": "/v1/completions"}),
        line("stream", {"stream": True}),
        '{"custom_id": "twice", "url": "/v1/completions", "url": "/v1/completions", "body": {}}',
        line("é\u2028"),
    ]
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b"\n" + b'{"custom_id": "\xff"}')
    items = list(read_items(source))
    assert [item.code for item in items] == [
        None, "invalid_json_line", "invalid_json_line", "missing_custom_id", "duplicate_custom_id", "invalid_method",
        "invalid_url", "invalid_body", "invalid_body", "invalid_json_line", None, "invalid_json_line",
    ]  # fmt: skip
    numbers = [int(item.id.split("_")[2]) for item in items]
    assert numbers == [1, *range(3, 14)] and len({item.id for item in items}) == len(items)
    for item, number in zip(items, numbers, strict=True):
        assert item.message is None or f"Line {number}" in item.message
    assert "line 1 has the same" in items[4].message
    assert items[10].custom_id == "é\u2028" and json.loads(items[10].body) == ASK


def test_every_line_has_its_answer_or_its_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    many = [line(f"n{i}", {"prompt": f"hello {i}"}) for i in range(300)]
    bad = ["{", line("no model", {"model": "other"}), line("no field", {"max_tokens": -1})]
    pooled = json.dumps({"custom_id": "pooled", "url": "/v1/embeddings", "body": {"model": "base", "input": "x"}})
    source.write_text("\n".join([*many[:100], *bad, pooled, *many[100:]]))
    made = asyncio.run(answer_all(source, target, FakeEngine()))
    found = answers(target)
    assert made.errors == 3 and len(found) == 304
    assert found[None]["response"] is None and found[None]["error"]["code"] == "invalid_json_line"
    assert found["no model"]["response"]["status_code"] == 404 and found["no model"]["error"] is None
    assert found["no field"]["response"]["body"]["error"]["param"] == "max_tokens"
    assert len(found["pooled"]["response"]["body"]["data"][0]["embedding"]) == 64
    good = found["n7"]["response"]
    assert good["status_code"] == 200 and good["request_id"] and len(good["body"]["choices"][0]["text"]) == 3
    assert "304 lines" in (said := capsys.readouterr().err) and "3 with an error" in said and "tokens/s" in said


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    source, target, whole = (tmp_path / name for name in ("in.jsonl", "out.jsonl", "whole.jsonl"))
    source.write_text("\n".join(line(f"n{i}", {"prompt": f"hello {i}"}) for i in range(400)))
    command = [sys.executable, "-m", "tests.support.batch_runs", str(source), str(target), "0.05"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and (not target.exists() or target.read_bytes().count(b"\n") < 130):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    process.kill()
    process.wait()
    before = target.read_bytes()
    done = before.count(b"\n")
    assert 130 <= done < 400
    target.write_bytes(before + b'{"id":"batch_req_399_0123456789abcdef","custom_id":"n398","resp')

    engine = FakeEngine()
    asyncio.run(answer_all(source, target, engine))
    assert target.read_bytes().startswith(before) and len(engine.requests) == 400 - done
    asyncio.run(answer_all(source, whole, FakeEngine()))
    texts = {name: a["response"]["body"]["choices"][0]["text"] for name, a in answers(whole).items()}
    assert {name: a["response"]["body"]["choices"][0]["text"] for name, a in answers(target).items()} == texts


def test_a_full_queue_and_a_restarted_engine_are_waited_for(tmp_path: Path) -> None:
    errors = [OverloadedError("full"), OverloadedError("full"), EngineDeadError("down"), EngineDeadError("down")]

    class Engine(FakeEngine):
        def submit(self, request):
            self.submit_error = errors.pop() if errors else None
            return super().submit(request)

    source = tmp_path / "in.jsonl"
    source.write_text(line("a"))
    made = asyncio.run(answer_all(source, tmp_path / "out.jsonl", Engine()))
    assert not made.errors and not errors
    always = FakeEngine()
    always.submit_error = EngineDeadError("a request that ends every engine")
    made = asyncio.run(answer_all(source, tmp_path / "dead.jsonl", always))
    assert made.errors == 1 and answers(tmp_path / "dead.jsonl")["a"]["response"]["status_code"] == 503


def test_an_output_that_is_not_this_runs(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    held = AnswerFile(path)
    with pytest.raises(ConfigError, match="another run"):
        AnswerFile(path)
    held.close()
    path.write_text('{"id": "batch_req_1_0"}\n{"mine": 1}\n')
    with pytest.raises(ConfigError, match="line 2"):
        AnswerFile(path)
    with pytest.raises(ConfigError, match="cannot be written"):
        AnswerFile(tmp_path / "nowhere" / "out.jsonl")
    with pytest.raises(ConfigError, match="cannot be read"):
        list(read_items(tmp_path / "nowhere"))
    for device in (read_items, AnswerFile):  # a device may never end
        with pytest.raises(ConfigError, match="no regular file"):
            list(device(Path("/dev/zero")))


def test_a_full_disk_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join(line(f"n{i}") for i in range(200)))
    opened = AnswerFile.__init__

    def on_a_full_disk(self: AnswerFile, path: Path) -> None:
        opened(self, path)
        self._file.close()
        self._file = Path("/dev/full").open("wb")  # noqa: SIM115  AnswerFile closes it

    monkeypatch.setattr(AnswerFile, "__init__", on_a_full_disk)
    with pytest.raises(ConfigError, match="No space left"):
        asyncio.run(answer_all(source, tmp_path / "out.jsonl", FakeEngine()))


def test_the_command_answers_as_the_server_does(
    live: Server, tmp_path: Path, golden: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    chat = {"messages": [{"role": "user", "content": "hello"}], "route": "request"}
    bodies = {
        "text": ("/v1/completions", {"model": "llama-tiny", "prompt": "hello"}),
        "routed": ("/v1/completions", {"model": "one", "prompt": ["hello", "there"], "n": 2, "route": "request"}),
        "chat": ("/v1/chat/completions", {"model": "two", **chat}),
        "pooled": ("/v1/embeddings", {"model": "llama-tiny", "input": "hello"}),
        "refused": ("/v1/chat/completions", {"model": "one", "messages": []}),
    }
    limits = {"max_tokens": 6, "temperature": 0, "cache_salt": "batch"}  # nobody has asked the server this before
    asked = {n: (url, body if n == "pooled" else body | limits) for n, (url, body) in bodies.items()}
    lines = [{"custom_id": n, "method": "POST", "url": url, "body": body} for n, (url, body) in asked.items()]
    source.write_text("\n".join(map(json.dumps, lines)))
    flags = ["--model", str(make_base(tmp_path / "llama-tiny")), "--num-threads", "1"]
    for name, folder in (("one", "llama-qv-r8k3t3"), ("two", "llama-all7-r4k2t2")):
        flags += ["--adapter", f"{name}={golden / folder / 'adapter'}"]

    assert main(["batch", str(source), str(target), *flags]) == 0
    found = answers(target)
    varying = ("id", "created")
    for name, (url, body) in asked.items():
        reference, own = live.post(url, body), found[name]["response"]
        assert own["status_code"] == reference.status_code
        assert {k: v for k, v in own["body"].items() if k not in varying} == {
            k: v for k, v in reference.json().items() if k not in varying
        }
    assert "5 lines" in capsys.readouterr().err

    assert main(["batch", str(source), str(target), *flags]) == 0  # nothing is left: no model is loaded for it
    assert "5 of 5 are there already" in capsys.readouterr().err
    source.write_text(line("another"))
    assert main(["batch", str(source), str(target), *flags]) == 1
    assert "5 answers to other lines" in capsys.readouterr().err
    assert main(["batch", str(source), str(source), *flags]) == 1
    assert "the same one" in capsys.readouterr().err
