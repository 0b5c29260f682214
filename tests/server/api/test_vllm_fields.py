"""vLLM's own fields on the real server: words that may not come, prompts that are cut, prompts that are scored."""

import re
from typing import Any

import httpx
import pytest

from tests.support.servers import Server

TEXT = {"model": "llama-tiny", "prompt": "Hello", "max_tokens": 16, "temperature": 0}
CHAT = {"model": "one", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4, "temperature": 0}
LONG = "".join(chr(97 + i * i % 26) for i in range(3000))


def choice(live: Server, path: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = live.post(path, body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


def tokens(live: Server, text: str) -> list[int]:
    return live.post("/tokenize", {"prompt": text}).json()["tokens"]


@pytest.mark.parametrize("model", ["llama-tiny", "one"])
def test_bad_words_do_not_come(live: Server, model: str) -> None:
    """Words of one token and of several; what does not hold one stays the same."""
    ask = TEXT | {"model": model, "return_token_ids": True, "route": "request"}
    free = choice(live, "/v1/completions", ask)
    letters = "".join(chr(token - 3) if 35 < token < 130 else " " for token in free["token_ids"])
    word = max(re.findall(r"\S{1,2}", letters), key=len)
    held = choice(live, "/v1/completions", ask | {"bad_words": [word]})
    spelled, banned = held["token_ids"], tokens(live, word.lstrip())
    runs = [spelled[i : i + len(banned)] for i in range(len(spelled))]
    assert banned not in runs and spelled != free["token_ids"]
    first = next(i for i in range(len(spelled)) if spelled[i] != free["token_ids"][i])
    assert free["token_ids"][: first + 1][-len(banned) :] == banned
    assert choice(live, "/v1/completions", ask | {"bad_words": ["not in it at all"]}) == free
    assert choice(live, "/v1/chat/completions", CHAT | {"bad_words": [word], "n": 2})


def test_what_an_answer_has_to_match_goes_before_bad_words(live: Server) -> None:
    held = TEXT | {"guided_choice": ["abc"], "bad_words": ["b", "abc"]}
    assert choice(live, "/v1/completions", held)["text"] == "abc"


@pytest.mark.parametrize(("side", "kept"), [(None, LONG[-9:]), ("left", LONG[-9:]), ("right", LONG[:9])])
def test_a_prompt_is_cut(live: Server, side: str | None, kept: str) -> None:
    """As a text and as ids, in completions and in chat: what is computed, echoed and counted is what was kept."""
    for prompt in (LONG, [3 + ord(char) for char in LONG[:1000]]):
        expected = kept if prompt is LONG or side == "right" else LONG[991:1000]
        cut = TEXT | {"prompt": prompt, "truncate_prompt_tokens": 9, "truncation_side": side, "echo": True}
        answer = live.post("/v1/completions", cut).json()
        alone = live.post("/v1/completions", TEXT | {"prompt": expected, "echo": True}).json()
        assert answer["choices"] == alone["choices"] and answer["usage"] == alone["usage"]
    body = CHAT | {
        "messages": [{"role": "user", "content": LONG}],
        "truncate_prompt_tokens": 9,
        "truncation_side": side,
    }
    answer = live.post("/v1/chat/completions", body | {"return_token_ids": True}).json()
    assert answer["usage"]["prompt_tokens"] == 9
    whole = f"user: {LONG}\nassistant:"
    assert answer["choices"][0]["prompt_token_ids"] == tokens(live, whole[:9] if side == "right" else whole[-9:])


def test_a_prompt_is_cut_to_what_fits(live: Server) -> None:
    context = live.get("/v1/models").json()["data"][0]["max_model_len"]
    for asked, prompt_tokens in ((16, context - 16), (None, context - 16), (0, context)):
        body = TEXT | {"prompt": LONG, "truncate_prompt_tokens": -1, "max_tokens": asked}
        assert live.post("/v1/completions", body).json()["usage"]["prompt_tokens"] == prompt_tokens
    short = TEXT | {"truncate_prompt_tokens": 100}
    assert choice(live, "/v1/completions", short) == choice(live, "/v1/completions", TEXT)
    embedded = {"model": "one", "input": [LONG, "Hi"], "truncate_prompt_tokens": 9, "pooling": "last"}
    cut = live.post("/v1/embeddings", embedded).raise_for_status().json()
    alone = live.post("/v1/embeddings", embedded | {"input": [LONG[:9], "Hi"]}).json()
    assert cut["data"] == alone["data"] and cut["usage"]["prompt_tokens"] == 11


def scored(answer: httpx.Response) -> list[dict[str, Any] | None]:
    assert answer.status_code == 200, answer.text
    return answer.json().get("prompt_logprobs") or answer.json()["choices"][0]["prompt_logprobs"]


def test_a_prompt_is_scored(live: Server) -> None:
    """The same numbers as with `echo`, in vLLM's shape; chat has them beside its choices."""
    echoed = choice(live, "/v1/completions", TEXT | {"echo": True, "logprobs": 3, "max_tokens": 0})["logprobs"]
    entries = scored(live.post("/v1/completions", TEXT | {"prompt_logprobs": 3}))
    ids = tokens(live, "Hello")
    assert entries[0] is None and len(entries) == len(ids)
    for i, entry in enumerate(entries[1:], 1):
        assert entry is not None
        own, *others = entry
        assert own == str(ids[i]) and entry[own]["decoded_token"] == echoed["tokens"][i]
        assert entry[own]["logprob"] == pytest.approx(echoed["token_logprobs"][i], abs=1e-5)
        assert [entry[other]["rank"] for other in others] == [r for r in (1, 2, 3) if r != entry[own]["rank"]]
        assert {e["decoded_token"] for e in entry.values()} >= {t for t in echoed["top_logprobs"][i] if t.isascii()} - {
            t for t in echoed["top_logprobs"][i] if t.startswith(("bytes:", "token_id:"))
        }
    messages = scored(live.post("/v1/chat/completions", CHAT | {"prompt_logprobs": 0, "n": 2}))
    rendered = tokens(live, "user: Hello\nassistant:")
    assert [None if e is None else list(e) for e in messages] == [None, *([str(i)] for i in rendered[1:])]
    assert "prompt_logprobs" not in live.post("/v1/chat/completions", CHAT).json()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"bad_words": [""]}, "bad_words"),
        ({"bad_words": [" "]}, "bad_words"),
        ({"bad_words": "word"}, "bad_words"),
        ({"bad_words": ["a"] * 1025}, "bad_words"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": 10**6}, "truncate_prompt_tokens"),
        ({"truncation_side": "middle"}, "truncation_side"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"prompt_logprobs": -2}, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ],
)
def test_what_is_wrong_is_named(live: Server, fields: dict[str, Any], param: str) -> None:
    for path, body in (("/v1/completions", TEXT), ("/v1/chat/completions", CHAT)):
        answer = live.post(path, body | fields)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text
