"""`--adapter-defaults`: adapters' own chat templates and generation defaults, over a socket, with the real registry and
the real process that renders; the engine is a fake one that shows what it was asked."""

import json
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.archives import made
from tests.server.service.test_chat_template import GOOD
from tests.support import GOLDEN
from tests.support.chat_templates import HERMES, THINKS
from tests.support.server_fixtures import StartFake, fake_servers
from tests.support.servers import TEMPLATE, Server
from tucka_runtime.adapters.defaults import parse_defaults
from tucka_runtime.adapters.entry import entry_of
from tucka_runtime.adapters.registry import AdapterRegistry
from tucka_runtime.cli.main import main
from tucka_runtime.errors import InvalidAdapterError, StorageError
from tucka_runtime.messages import SamplingParams
from tucka_runtime.tokenizer import Tokenizer

ONE = GOLDEN / "llama-qv-r8k3t3" / "adapter"
OWN = "{% for m in messages %}[{{ m.role }}|{{ m.content }}]{% endfor %}{{ eos_token }}"
GENERATION = {
    "temperature": 0.25, "top_p": 0.5, "top_k": 7, "min_p": 0.125, "repetition_penalty": 1.5, "max_new_tokens": 5,
    "min_new_tokens": 4, "eos_token_id": [9, 11], "bos_token_id": 1, "transformers_version": "5.0", "num_beams": 4,
}  # fmt: skip
MESSAGES = [{"role": "user", "content": "Hi"}]


def folder(path: Path, **files: object) -> Path:
    """The golden adapter with more files in its folder, by their names up to the dot."""
    shutil.copytree(ONE, path)
    for name, content in files.items():
        suffix = "jinja" if name == "chat_template" else "json"
        text = content if isinstance(content, str) else json.dumps(content)
        (path / f"{name}.{suffix}").write_text(text)
    return path


@pytest.fixture(scope="module")
def server(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One for all: each would start two processes that render."""
    root = str(tmp_path_factory.getbasetemp())
    with fake_servers(tokenizer, tmp_path_factory.mktemp("state")) as start:
        yield start(template=TEMPLATE, adapter_root=(root,), adapter_defaults=True, adapter_versions=3)


def load(server: Server, name: str, path: Path, **more: object) -> dict[str, Any]:
    answer = server.post("/v1/adapters", {"name": name, "path": str(path), "load_inplace": True, **more})
    assert answer.is_success, answer.text
    card: dict[str, Any] = answer.json()["tucka"]
    return card


def refused(server: Server, path: Path) -> str:
    answer = server.post("/v1/adapters", {"name": "bad", "path": str(path)})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_adapter"), answer.text
    message: str = answer.json()["error"]["message"]
    assert len(message) < 600
    return message


def ask(server: Server, tokenizer: Tokenizer, model: str, **more: object) -> tuple[str, SamplingParams]:
    """The prompt that the engine was asked to go on, and how."""
    server.post("/v1/chat/completions", {"model": model, "messages": MESSAGES, **more}).raise_for_status()
    assert server.engine is not None
    request = server.engine.requests[-1]
    return tokenizer.decode(list(request.prompts[0]), False), request.sampling


BASE = "user: Hi\nassistant:"
MINE = "[user|Hi]<eos>"


def test_every_door_uses_the_adapters_own(server: Server, tokenizer: Tokenizer, tmp_path: Path) -> None:
    server.client.delete(f"{server.url}/v1/adapters/own")
    card = load(server, "own", folder(tmp_path / "own", chat_template=OWN, generation_config=GENERATION))
    assert card["defaults"] == [
        "chat_template", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens",
        "min_new_tokens", "eos_token_id",
    ]  # fmt: skip
    assert card == server.get("/v1/models/own").json()["tucka"]
    load(server, "plain", folder(tmp_path / "plain"))
    server.post("/v1/aliases", {"name": "alias", "targets": {"own": 1}}).raise_for_status()

    for model in ("own", "alias", f"own@{card['digest'][:12]}"):
        prompt, p = ask(server, tokenizer, model)
        assert prompt == MINE
        assert (p.temperature, p.top_p, p.top_k, p.min_p, p.repetition_penalty) == (0.25, 0.5, 7, 0.125, 1.5)
        assert (p.max_tokens, p.min_tokens, p.end_token_ids, p.stop_token_ids) == (5, 4, (9, 11), ())
    for model in ("base", "plain"):
        prompt, p = ask(server, tokenizer, model)
        assert prompt == BASE and (p.temperature, p.top_p, p.top_k, p.min_tokens, p.end_token_ids) == (1, 1, 0, 0, ())

    assert server.engine is not None
    server.post("/v1/messages", {"model": "own", "messages": MESSAGES, "max_tokens": 3}).raise_for_status()
    request = server.engine.requests[-1]
    assert tokenizer.decode(list(request.prompts[0]), False) == MINE
    assert (request.sampling.temperature, request.sampling.max_tokens, request.sampling.min_tokens) == (0.25, 3, 3)
    answer = server.post("/v1/responses", {"model": "own", "input": "Hi", "top_p": 0.75}).raise_for_status().json()
    request = server.engine.requests[-1]
    assert tokenizer.decode(list(request.prompts[0]), False) == MINE
    assert (answer["temperature"], answer["top_p"], request.sampling.max_tokens) == (0.25, 0.75, 5)
    server.post("/v1/completions", {"model": "own", "prompt": "Hi"}).raise_for_status()
    assert server.engine.requests[-1].sampling.max_tokens == 5
    for model, text in (("own", MINE), ("alias", MINE), ("base", BASE), ("plain", BASE)):
        ids = server.post("/tokenize", {"model": model, "messages": MESSAGES}).raise_for_status().json()["tokens"]
        assert tokenizer.decode(ids, False) == text
        count = server.post("/v1/messages/count_tokens", {"model": model, "messages": MESSAGES}).json()
        assert count == {"input_tokens": len(ids)}


def test_what_a_request_says_comes_first(server: Server, tokenizer: Tokenizer, tmp_path: Path) -> None:
    load(server, "own", folder(tmp_path / "own", generation_config=GENERATION))
    _, p = ask(server, tokenizer, "own", temperature=1, top_k=0, max_tokens=2, min_tokens=0, stop_token_ids=[12])
    assert (p.temperature, p.top_k, p.max_tokens, p.min_tokens, p.stop_token_ids) == (1, 0, 2, 0, (12,))
    assert (p.top_p, p.end_token_ids) == (0.5, (9, 11))
    p = ask(server, tokenizer, "own", ignore_eos=True)[1]
    assert p.ignore_eos and p.end_token_ids == (9, 11)  # the engine ignores both kinds (tests/engine/test_sampler.py)
    load(server, "greedy", folder(tmp_path / "greedy", generation_config={"do_sample": False, "temperature": 0.7}))
    assert ask(server, tokenizer, "greedy")[1].temperature == 0


def test_of_several_adapters_none_sets_anything(server: Server, tokenizer: Tokenizer, tmp_path: Path) -> None:
    load(server, "own", folder(tmp_path / "own", chat_template=OWN, generation_config=GENERATION))
    load(server, "plain", folder(tmp_path / "plain"))
    both = [{"name": "own"}, {"name": "plain", "weight": 0.5}]
    prompt, p = ask(server, tokenizer, "base", adapters=both)
    assert prompt == BASE and p.temperature == 1 and p.end_token_ids == ()
    assert ask(server, tokenizer, "base", adapters=both[:1])[0] == MINE


def test_new_content_and_rollback_bring_their_own(server: Server, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """What differs in the template alone is other content."""
    source = folder(tmp_path / "1", chat_template=OWN)
    first = load(server, "mine", source)
    body = {"name": "mine", "path": str(source)}
    assert server.post("/v1/adapters", body).status_code == 200
    (source / "chat_template.jinja").write_text("2" + OWN)
    assert server.post("/v1/adapters", body).status_code == 409
    load(server, "mine", source)
    assert ask(server, tokenizer, "mine")[0] == "2" + MINE
    config = json.loads((source / "adapter_config.json").read_text())
    (source / "adapter_config.json").write_text(json.dumps(config | {"alpha": 3}))
    (source / "chat_template.jinja").unlink()
    load(server, "mine", source)
    assert ask(server, tokenizer, "mine")[0] == BASE
    assert ask(server, tokenizer, f"mine@{first['digest'][:12]}")[0] == "2" + MINE
    server.post("/v1/adapters/mine/rollback", {}).raise_for_status()
    assert ask(server, tokenizer, "mine")[0] == "2" + MINE
    assert server.client.delete(f"{server.url}/v1/adapters/mine").status_code == 200


def test_a_copy_that_was_damaged_is_made_again(server: Server, tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = folder(tmp_path / "own", chat_template="3" + OWN)
    load(server, "mended", source)
    assert server.service is not None
    adapters = server.service.adapters
    copy = adapters._copies._registry.folder(adapters.get("mended").entry.blob)
    (copy / "chat_template.jinja").write_text("another")
    assert ask(server, tokenizer, "mended")[0] == "3" + MINE
    assert (copy / "chat_template.jinja").read_text() == "3" + OWN


def test_uploads_carry_them(server: Server, tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = folder(tmp_path / "own", tokenizer_config={"chat_template": OWN, "eos_token": {"content": "z"}})
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    archive = made(list(files.items()), tarfile.PAX_FORMAT)
    named = [("file", item) for item in files.items()]
    assert server.client.put(f"{server.url}/v1/adapters/a", files=named).status_code == 201
    assert server.client.put(f"{server.url}/v1/adapters/b", content=archive).status_code == 201
    for model in "ab":
        prompt, p = ask(server, tokenizer, model)
        assert prompt == "[user|Hi]z" and p.end_token_ids == (3 + ord("z"),)


def test_functions_and_thoughts_are_those_of_the_template(start_fake: StartFake, tmp_path: Path) -> None:
    """Beside a base that has no template."""
    server = start_fake(adapter_root=(str(tmp_path),), adapter_defaults=True)
    load(server, "thinks", folder(tmp_path / "a", chat_template=THINKS))
    load(server, "calls", folder(tmp_path / "b", tokenizer_config={
        "chat_template": [{"name": "default", "template": GOOD}, {"name": "tool_use", "template": HERMES}]
    }))  # fmt: skip
    assert server.engine is not None
    assert server.post("/v1/chat/completions", {"model": "base", "messages": MESSAGES}).status_code == 400
    server.engine.script = "hm</think>yes"
    said = server.post("/v1/chat/completions", {"model": "thinks", "messages": MESSAGES}).json()["choices"][0]
    assert said["message"]["reasoning"] == "hm" and said["message"]["content"] == "yes"
    server.engine.script = '<tool_call>{"name": "look", "arguments": {}}</tool_call>'
    tools = [{"type": "function", "function": {"name": "look"}}]
    body = {"model": "calls", "messages": MESSAGES, "tools": tools}
    said = server.post("/v1/chat/completions", body).raise_for_status().json()["choices"][0]
    assert said["message"]["tool_calls"][0]["function"]["name"] == "look"


def test_without_the_flag_nothing_of_it_is_opened(start_fake: StartFake, tokenizer: Tokenizer, tmp_path: Path) -> None:
    server = start_fake(template=TEMPLATE, adapter_root=(str(tmp_path),))
    bad = folder(tmp_path / "own", chat_template="{% for %}", generation_config="{")
    assert load(server, "own", bad)["defaults"] == []
    prompt, p = ask(server, tokenizer, "own")
    assert prompt == BASE and p.temperature == 1
    files = [("file", (path.name, path.read_bytes())) for path in bad.iterdir()]
    assert server.client.put(f"{server.url}/v1/adapters/own", files=files).status_code == 200


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for %}", "Expected"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", "unsafe"),
        ("{% include '/etc/passwd' %}", "cannot be used"),
        ("{{ nothing.at.all }}", "undefined"),
        ("{{ range(10000000000) | list }}", "cannot be used"),
        ("{{ 'a' * 10000000000 }}", "cannot be used"),
        ("x" * (2**18 + 1), "larger than"),
    ],
)
def test_row_55_templates(server: Server, tmp_path: Path, template: str, said: str) -> None:
    message = refused(server, folder(tmp_path / "bad", chat_template=template))
    assert said in message and ("chat template" in message or "chat_template.jinja" in message)


def test_row_55_a_template_that_never_ends_holds_nobody_up(
    start_fake: StartFake, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start_fake(template=TEMPLATE, adapter_root=(str(tmp_path),), adapter_defaults=True)
    monkeypatch.setattr("tucka_runtime.server.service.chat_template.RENDER_SECONDS", 0.3)
    endless = "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}"
    assert "longer than any" in refused(server, folder(tmp_path / "bad", chat_template=endless))
    assert ask(server, tokenizer, "base")[0] == BASE
    says_no = folder(tmp_path / "own", chat_template="{{ raise_exception('a system message is needed') }}")
    load(server, "own", says_no)
    answer = server.post("/v1/chat/completions", {"model": "own", "messages": MESSAGES})
    assert answer.status_code == 400 and "adapter's chat template refused" in answer.text
    assert "a system message is needed" in answer.text


@pytest.mark.parametrize(
    ("file", "content", "field"),
    [
        ("generation_config", {"temperature": 2.5}, "temperature"),
        ("generation_config", {"temperature": "0.5"}, "temperature"),
        ("generation_config", {"top_p": -0.1}, "top_p"),
        ("generation_config", {"top_k": 1.5}, "top_k"),
        ("generation_config", {"top_k": True}, "top_k"),
        ("generation_config", {"repetition_penalty": 0}, "repetition_penalty"),
        ("generation_config", {"max_new_tokens": 0}, "max_new_tokens"),
        ("generation_config", {"eos_token_id": -1}, "eos_token_id"),
        ("generation_config", {"eos_token_id": [1, "2"]}, "eos_token_id"),
        ("generation_config", {"eos_token_id": 320}, "eos_token_id"),
        ("generation_config", '{"temperature": NaN}', "NaN"),
        ("generation_config", '{"temperature": 1, "temperature": 2}', "duplicate"),
        ("generation_config", "[1]", "no JSON object"),
        ("tokenizer_config", {"chat_template": 3}, "chat_template"),
        ("tokenizer_config", {"chat_template": [{"name": "default"}]}, "chat_template"),
        ("tokenizer_config", {"eos_token": 3}, "eos_token"),
        ("tokenizer_config", {"eos_token": "<|no token|>"}, "eos_token"),
        ("tokenizer_config", "{", "not JSON"),
    ],
)
def test_row_55_generation_defaults(server: Server, tmp_path: Path, file: str, content: object, field: str) -> None:
    message = refused(server, folder(tmp_path / "bad", **{file: content}))
    assert f"{file}.json" in message and field in message


def test_row_55_links_are_not_followed(server: Server, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    bad = folder(tmp_path / "bad")
    (bad / "chat_template.jinja").symlink_to(tmp_path / "secret")
    assert "symbolic link" in refused(server, bad)


def test_copies_are_held_to_their_names_and_come_back(tmp_path: Path) -> None:
    """After a restart, and where the copy's template is not what it was."""
    source = folder(tmp_path / "own", chat_template=OWN, generation_config={"top_k": 3})
    with AdapterRegistry(tmp_path / "state") as registry:
        plain, stored = registry.ingest(source), registry.ingest(source, defaults=True)
        assert plain.digest == stored.digest and stored.blob.startswith(f"{plain.blob}+")
        assert registry.defaults(plain.blob).names == ()
        assert registry.defaults(stored.blob) == parse_defaults(
            {path.name: path.read_bytes() for path in source.iterdir() if "adapter" not in path.name}
        )
        (stored.folder / "chat_template.jinja").write_text("another")
        with pytest.raises(StorageError, match="damaged"):
            registry.defaults(stored.blob)
        assert registry.ingest(source, defaults=True) == stored
        assert registry.defaults(stored.blob).template == OWN
    row = {
        "name": "own", "digest": stored.digest, "blob": stored.blob, "generation": 1, "source": str(source),
        "pinned_route": None, "base_fingerprint": "b", "defaults": ["chat_template", "top_k"],
    }  # fmt: skip
    entry = entry_of(row)
    assert entry.defaults == ("chat_template", "top_k") and entry_of(entry.row()) == entry
    later = entry_of(replace(entry, name="own", digest="f" * 64, blob="f" * 64, defaults=()).after([entry], 2).row())
    assert later.versions[0].defaults == entry.defaults and later.defaults == ()
    with pytest.raises(ValueError, match="defaults"):
        entry_of(row | {"defaults": [1]})


def test_inspect_shows_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = folder(tmp_path / "own", chat_template=OWN, generation_config=GENERATION, tokenizer={})
    assert main(["adapters", "inspect", str(source)]) == 0
    shown = capsys.readouterr().out
    assert "the added tokens of tokenizer.json" in shown
    assert (
        f"a chat template of {len(OWN)} characters" in shown and "temperature 0.25" in shown and "`num_beams`" in shown
    )
    (source / "generation_config.json").write_text('{"top_p": 7}')
    assert main(["adapters", "inspect", str(source)]) == 0
    assert "refused with --adapter-defaults" in capsys.readouterr().out
    with pytest.raises(InvalidAdapterError, match="top_p"):
        parse_defaults({"generation_config.json": b'{"top_p": 7}'})
