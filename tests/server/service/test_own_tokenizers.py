"""Adapters that bring the tokens that they add (`--adapter-defaults`), over a socket: text as transformers and peft
have it with the adapter's own tokenizer, at every door."""

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AddedToken, AutoModelForCausalLM, AutoTokenizer

from tests.server.service.test_defaults import folder, load, refused
from tests.support import GOLDEN
from tests.support.server_fixtures import fake_servers
from tests.support.servers import TEMPLATE, Server, make_base, start_command
from tucka_runtime.adapters.files import DEFAULTS_LIMITS
from tucka_runtime.tokenizer import Tokenizer

VOCAB = 320
NAMES = ["<law>", "<tax>", "<|call|>", "<|over|>"]
PROMPT = "The <law> says: <|call|>x"
TOKENS = 24
END = "<|over|>"


def resized() -> Any:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / "bases" / "llama-tiny", dtype=torch.float32)
    model.resize_token_embeddings(VOCAB + len(NAMES))
    return model


def grown_tokenizer() -> Any:
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "bases" / "llama-tiny")
    tokenizer.add_tokens([AddedToken(name, special=name.startswith("<|"), normalized=False) for name in NAMES])
    return tokenizer


def likeliest(peft: Any, ids: list[int], answer: list[int]) -> list[int]:
    """What peft would choose at each place of an answer."""
    with torch.inference_mode():
        logits = peft(torch.tensor([ids + answer[:-1]])).logits[0, len(ids) - 1 :]
    return list(map(int, logits.argmax(-1)))


@pytest.fixture(scope="module")
def peft(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """An adapter whose answers are of what it adds, and the folder that it was saved to with its tokenizer."""
    model = resized()
    made = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for table in (model.get_input_embeddings(), model.get_output_embeddings()):
            table.weight[VOCAB:] = 0.6 * torch.randn(len(NAMES), table.weight.shape[1])
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    path = tmp_path_factory.mktemp("roots") / "grown"
    made.save_pretrained(path, save_embedding_layers=True)
    grown_tokenizer().save_pretrained(path)
    return PeftModel.from_pretrained(resized(), path), path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, peft: tuple[Any, Path]) -> Iterator[Server]:
    work, path = tmp_path_factory.mktemp("own"), peft[1]
    ended = shutil.copytree(path, path.parent / "ended")
    tokenizer = grown_tokenizer()
    tokenizer.eos_token = END
    tokenizer.save_pretrained(ended)
    process, url = start_command(
        "--model", str(make_base(work / "llama-tiny")), "--adapter-root", str(path.parent), "--adapter-defaults",
        "--adapter", f"grown={path}", "--adapter", f"ended={ended}", "--shutdown-timeout", "2",
        log=work / "log",
    )  # fmt: skip
    yield Server(url, process.pid, log=work / "log")
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    assert "Traceback" not in (work / "log").read_text()


def ask(server: Server, path: str = "/v1/completions", **fields: Any) -> dict[str, Any]:
    body = {"model": "grown", "max_tokens": TOKENS, "temperature": 0, "return_token_ids": True, **fields}
    if path == "/v1/completions":
        body = {"prompt": PROMPT} | body
    choice: dict[str, Any] = server.post(path, body).raise_for_status().json()["choices"][0]
    return choice


def test_text_is_that_of_peft_with_the_adapters_tokenizer(server: Server, peft: tuple[Any, Path]) -> None:
    model, path = peft
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = tokenizer(PROMPT).input_ids
    answer = ask(server, ignore_eos=True)["token_ids"]
    assert answer == likeliest(model, ids, answer) and len(answer) == TOKENS
    assert {VOCAB, VOCAB + 2} <= set(ids) and max(answer) >= VOCAB
    for skips in (True, False):
        choice = ask(server, ignore_eos=True, skip_special_tokens=skips, logprobs=2)
        assert choice["prompt_token_ids"] == ids and choice["token_ids"] == answer
        assert choice["text"] == tokenizer.decode(answer, skip_special_tokens=skips)
        spelled = [NAMES[id_ - VOCAB] for id_ in answer if id_ >= VOCAB]
        assert [text for text in choice["logprobs"]["tokens"] if text in NAMES] == spelled
    assert ask(server, logit_bias={str(VOCAB): 100}, max_tokens=3)["text"] == "<law><law><law>"
    body = {"model": "grown", "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    lines = server.post("/v1/completions", body | {"stream": True}).text.splitlines()
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == tokenizer.decode(
        answer, skip_special_tokens=True
    )
    assert ask(server, echo=True, ignore_eos=True)["text"].startswith(PROMPT)
    scored = ask(server, prompt_logprobs=0, max_tokens=1)["prompt_logprobs"]
    said = [next(iter(entry.values()))["decoded_token"] for entry in scored[1:]]
    assert [text for text in said if text in NAMES] == [name for name in NAMES if name in PROMPT]


def test_an_added_end_token_ends_answers(server: Server, peft: tuple[Any, Path]) -> None:
    """The end token is one that its greedy answer has, as peft's does."""
    tokenizer, over = AutoTokenizer.from_pretrained(peft[1].parent / "ended"), VOCAB + NAMES.index(END)
    assert tokenizer.eos_token_id == over
    whole = ask(server, ignore_eos=True)["token_ids"]
    assert over in whole
    choice = ask(server, model="ended")
    assert choice["token_ids"] == whole[: whole.index(over) + 1] and choice["finish_reason"] == "stop"
    assert choice["text"] == tokenizer.decode(choice["token_ids"], skip_special_tokens=True)
    assert ask(server, model="ended", ignore_eos=True)["token_ids"] == whole
    card = server.get("/v1/models/ended").json()["tucka"]
    assert card["defaults"] == ["tokenizer", "eos_token"]


def test_stop_strings_and_words_are_found_in_its_text(server: Server) -> None:
    whole = ask(server, ignore_eos=True, skip_special_tokens=False)
    name = next(name for name in NAMES if name in whole["text"])
    cut = ask(server, ignore_eos=True, skip_special_tokens=False, stop=[name])
    assert cut["text"] == whole["text"].partition(name)[0] and cut["stop_reason"] == name
    skipped = ask(server, ignore_eos=True, stop=["<|call|>"], logit_bias={str(VOCAB + 2): 100})
    assert (skipped["token_ids"], skipped["stop_reason"], skipped["text"]) == ([VOCAB + 2], "<|call|>", "")
    without = ask(server, ignore_eos=True, bad_words=[name])["token_ids"]
    assert VOCAB + NAMES.index(name) in whole["token_ids"] and VOCAB + NAMES.index(name) not in without


def test_what_messages_say_is_no_control_token(server: Server, peft: tuple[Any, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(peft[1])
    messages = [{"role": "user", "content": "a <law> <|call|>"}]
    text = "user: a <law> <|call|>\nassistant:"
    assert VOCAB + 2 in tokenizer(text).input_ids, "whoever does not tell them apart makes one"
    counted = server.post("/tokenize", {"model": "grown", "messages": messages, "return_token_strs": True}).json()
    ids = counted["tokens"]
    assert "<law>" in counted["token_strs"] and "<|call|>" not in counted["token_strs"]
    assert tokenizer.decode(ids) == text and VOCAB in ids and VOCAB + 2 not in ids
    chat = ask(server, "/v1/chat/completions", messages=messages, logprobs=True, ignore_eos=True)
    assert chat["prompt_token_ids"] == ids
    assert chat["message"]["content"] == tokenizer.decode(chat["token_ids"], skip_special_tokens=True)
    assert [entry["token"] for entry in chat["logprobs"]["content"]] == [
        tokenizer.decode([id_]) if id_ >= VOCAB else entry["token"]
        for id_, entry in zip(chat["token_ids"], chat["logprobs"]["content"], strict=True)
    ]
    number = server.post("/v1/messages/count_tokens", {"model": "grown", "messages": messages}).json()["input_tokens"]
    assert number == len(ids)


def test_the_tokenizer_over_http_and_embeddings(server: Server, peft: tuple[Any, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(peft[1])
    ids = tokenizer(PROMPT).input_ids
    assert server.post("/tokenize", {"model": "grown", "prompt": PROMPT}).json()["tokens"] == ids
    assert server.post("/detokenize", {"model": "grown", "tokens": ids}).json() == {"prompt": PROMPT}
    plain = server.post("/tokenize", {"prompt": PROMPT}).json()["tokens"]
    assert max(plain) < VOCAB and server.post("/detokenize", {"tokens": plain}).json() == {"prompt": PROMPT}
    text, same = (
        server.post("/v1/embeddings", {"model": "grown", "input": given}).raise_for_status().json()["data"]
        for given in (PROMPT, ids)
    )
    assert text == same


def test_formats_are_of_the_bases_tokens(server: Server) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["<law>", "<tax>"]}}}
    for model in ("grown", "ended"):
        choice = ask(server, model=model, response_format=schema, max_tokens=60, logit_bias={str(VOCAB): 100})
        assert choice["text"] in ('"<law>"', '"<tax>"') and max(choice["token_ids"]) < VOCAB
        assert choice["finish_reason"] == "stop"


@pytest.fixture(scope="module")
def fake(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = str(tmp_path_factory.getbasetemp())
    with fake_servers(tokenizer, tmp_path_factory.mktemp("state")) as start:
        yield start(template=TEMPLATE, adapter_root=(root,), adapter_defaults=True, adapter_versions=2)


def saved(path: Path, *names: str, **files: object) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "bases" / "llama-tiny")
    tokenizer.add_tokens(list(names))
    return folder(path, tokenizer=tokenizer.backend_tokenizer.to_str(), **files)


def tokens(server: Server, model: str) -> list[int]:
    found: list[int] = (
        server.post("/tokenize", {"model": model, "prompt": "a<law>"}).raise_for_status().json()["tokens"]
    )
    return found


def test_a_tokenizer_comes_and_goes_with_its_content(fake: Server, tmp_path: Path) -> None:
    """One that adds nothing is the base's; the ids have no rows here, so that their text makes the 400 of such ids."""
    assert load(fake, "same", saved(tmp_path / "same"))["defaults"] == []
    assert fake.service is not None
    source = saved(tmp_path / "own")
    load(fake, "own", source)
    plain = tokens(fake, "own")
    path = source / "tokenizer.json"
    path.write_text(saved(tmp_path / "more", "<law>").joinpath("tokenizer.json").read_text())
    assert fake.post("/v1/adapters", {"name": "own", "path": str(source)}).status_code == 409, "it is other content"
    assert load(fake, "own", source)["defaults"] == ["tokenizer"]
    past = fake.post("/tokenize", {"model": "own", "prompt": "a<law>"})
    assert past.status_code == 400 and "does not have" in past.json()["error"]["message"]
    load(fake, "other", saved(tmp_path / "other", "<law>", chat_template="{{ eos_token }}"))
    adapters = fake.service.adapters
    first, second = (adapters._own_defaults.known(adapters.get(name).entry.blob) for name in ("own", "other"))
    assert first is not None and second is None, "made when it is first asked for"
    fake.post("/tokenize", {"model": "other", "prompt": "a"}).raise_for_status()
    second = adapters._own_defaults.known(adapters.get("other").entry.blob)
    assert second is not None and second.tokenizer is first.tokenizer, "the same file is one tokenizer"
    load(fake, "own", saved(tmp_path / "again"))
    assert tokens(fake, "own") == plain == tokens(fake, "base")


def test_what_cannot_be_used_refuses_the_adapter(fake: Server, tmp_path: Path) -> None:
    contradicting = saved(tmp_path / "a")
    text = (contradicting / "tokenizer.json").read_text()
    (contradicting / "tokenizer.json").write_text(text.replace('"<x260>"', '"<law>"'))
    assert "contradicts this base's tokenizer, of which the token 260" in refused(fake, contradicting)
    assert "cannot be read" in refused(fake, folder(tmp_path / "b", tokenizer="{"))
    bomb = folder(tmp_path / "c", tokenizer='{"added_tokens": [' + "[]," * (20 * 2**20) + "[]]}")
    assert "more time or memory" in refused(fake, bomb)
    with (bomb / "tokenizer.json").open("ab") as file:
        os.truncate(file.fileno(), DEFAULTS_LIMITS["tokenizer.json"] + 1)
    assert "larger than" in refused(fake, bomb)
    for name, more in (("d", ()), ("e", ("<tax>",))):
        unknown = saved(tmp_path / name, *more, tokenizer_config={"eos_token": "<law>"})
        assert "nor added by the adapter's tokenizer.json" in refused(fake, unknown)
    past = saved(tmp_path / "f", "<law>", generation_config={"eos_token_id": [VOCAB, VOCAB + 1]})
    assert "no token that the adapter's tokenizer.json adds" in refused(fake, past)


def test_end_tokens_without_a_row_never_come(fake: Server, tmp_path: Path) -> None:
    """The engine is not told of ids that it does not have."""
    path = saved(
        tmp_path / "a", "<law>", tokenizer_config={"eos_token": "<law>"}, generation_config={"eos_token_id": 9}
    )
    load(fake, "rowless", path)
    fake.post("/v1/completions", {"model": "rowless", "prompt": "a"}).raise_for_status()
    assert fake.engine is not None and fake.engine.requests[-1].sampling.end_token_ids == (9,)
