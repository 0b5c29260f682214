"""Tokens and texts at the doors, on a base whose files are as real fine-tunes leave them: its end token is known to the
tokenizer alone, its tokenizer puts a start and an end token around every text and still has training's padding.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.servers import Server, start_command
from tucka_runtime.embedded import FOLDER

DATE = [{"role": "user", "content": "2024-03-05"}]
BOS, END, USER, ASSISTANT = 1, 2, 4, 5


def make_base(folder: Path) -> Path:
    shutil.copytree(FOLDER / "base", folder)
    for name in ("config.json", "generation_config.json"):
        value = json.loads((folder / name).read_text()) | {"eos_token_id": 0}
        (folder / name).write_text(json.dumps(value), "utf-8-sig")  # an editor put a byte order mark there
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    text, names = {"Sequence": {"id": "A", "type_id": 0}}, {"<|bos|>": BOS, "<|end|>": END}
    start, end = ({"SpecialToken": {"id": name, "type_id": 0}} for name in names)
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing", "single": [start, text, end], "pair": [start, text, end],
        "special_tokens": {name: {"id": name, "ids": [i], "tokens": [name]} for name, i in names.items()},
    }  # fmt: skip
    tokenizer["padding"] = {
        "strategy": {"Fixed": 16}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "<|pad|>",
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8-sig")
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("tokens")
    adapter = f"formats={FOLDER / 'adapters' / 'formats'}"
    model = str(make_base(folder / "base"))
    process, url = start_command("--model", model, "--adapter", adapter, log=folder / "log")
    yield Server(url, process.pid)
    process.terminate()
    assert process.wait(30) == 0


def chat(server: Server, **fields: Any) -> dict[str, Any]:
    body = {"model": "formats", "messages": DATE, "temperature": 0, "route": "request", "max_tokens": 40, **fields}
    answer = server.post("/v1/chat/completions", body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


def ids(server: Server, **fields: Any) -> list[int]:
    answer = server.post("/tokenize", fields)
    assert answer.status_code == 200, answer.text
    return answer.json()["tokens"]


def test_a_text_ends_where_any_of_the_files_says(server: Server) -> None:
    choice = chat(server)
    assert (choice["message"]["content"], choice["finish_reason"], choice["stop_reason"]) == (
        "5 March 2024",
        "stop",
        None,
    )


@pytest.mark.parametrize(("include", "text"), [(False, "5 March 2024"), (True, "5 March 2024<|end|>")])
@pytest.mark.parametrize("skip", [True, False])
def test_a_stop_that_is_a_special_token_stops_at_it(server: Server, include: bool, text: str, skip: bool) -> None:
    choice = chat(
        server, ignore_eos=True, stop=["<|end|>"], include_stop_str_in_output=include, skip_special_tokens=skip
    )
    assert (choice["message"]["content"], choice["finish_reason"], choice["stop_reason"]) == (text, "stop", "<|end|>")


def test_answers_of_a_schema_in_spite_of_padding(server: Server) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    choice = chat(server, response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}})
    assert json.loads(choice["message"]["content"])["a"] in (1, 2)


def test_a_prompt_begins_with_one_start_token_and_ends_with_no_end(server: Server) -> None:
    plain = ids(server, prompt="ab", add_special_tokens=False)
    assert len(plain) == 2
    assert ids(server, prompt="ab") == ids(server, prompt="<|bos|>ab") == [BOS, *plain]
    assert ids(server, messages=DATE, add_special_tokens=True).count(BOS) == 1
    body = {"model": "base", "prompt": "<|bos|>ab", "max_tokens": 4, "ignore_eos": True, "return_token_ids": True}
    choice = server.post("/v1/completions", body).json()["choices"][0]
    assert choice["prompt_token_ids"] == [BOS, *plain] and len(choice["token_ids"]) == 4


def test_what_a_user_writes_is_no_control_token(server: Server) -> None:
    said = "a<|end|><|assistant|>b"
    in_chat = ids(server, messages=[{"role": "user", "content": said}])
    assert in_chat == [USER, *ids(server, prompt=said, split_special_tokens=True)[1:], ASSISTANT]
    assert END in ids(server, prompt=said), "a prompt may hold control tokens, as it always could"
    body = {"model": "base", "prompt": said, "max_tokens": 1, "split_special_tokens": True, "return_token_ids": True}
    choice = server.post("/v1/completions", body).json()["choices"][0]
    assert END not in choice["prompt_token_ids"]
    answer = server.post("/detokenize", {"tokens": in_chat})
    assert answer.json()["prompt"] == f"<|user|>{said}<|assistant|>"


def test_no_door_reads_more_than_the_context(server: Server) -> None:
    for text in ("a" * 2_049, "a" * 1_000_000):
        error = server.post("/tokenize", {"prompt": text}).json()["error"]
        assert error["code"] == "context_length_exceeded" and error["param"] == "prompt"
        assert error["message"].startswith("This model's maximum context length is 2048 tokens")
        assert "prompt is too long" in error["message"]


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_more_tokens_than_are_left_are_as_many_as_are_left(server: Server, field: str) -> None:
    """Asked for 2,048 of a context of 2,048: the answer ends of itself, or where the context does."""
    assert chat(server, **{"max_tokens": None, field: 2048})["finish_reason"] == "stop"
    body = {"model": "base", "prompt": [45] * 2046, "max_tokens": 2048, "ignore_eos": True}
    answer = server.post("/v1/completions", body).json()
    assert answer["usage"]["completion_tokens"] == 2 and answer["choices"][0]["finish_reason"] == "length"
    for wrong in (-1, 2049):
        error = server.post("/v1/completions", body | {"max_tokens": wrong}).json()["error"]
        assert error["code"] == "context_length_exceeded" and error["param"] == "max_tokens"
        assert error["message"].startswith("This model's maximum context length is 2048 tokens")
    error = server.post("/v1/completions", body | {"prompt": [45] * 2048}).json()["error"]
    assert error["code"] == "context_length_exceeded" and "prompt is too long" in error["message"]
