"""The official client against the real server: completions and chat, streamed or not, base and adapters at once."""

import asyncio
import json
from typing import Any

import jsonschema
import openai
import pytest
import torch
from safetensors.torch import load_file

from tests.support import GOLDEN
from tests.support.servers import Server

MODELS = ("llama-tiny", "one", "two")


@pytest.fixture(scope="module")
def client(live: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)


def test_models(client: openai.OpenAI) -> None:
    cards = {card.id: card.model_dump() for card in client.models.list()}
    assert set(cards) >= set(MODELS)
    assert cards["llama-tiny"]["parent"] is None
    assert cards["one"]["parent"] == cards["one"]["root"] == "llama-tiny"
    assert cards["one"]["tucka"]["kind"] == "tucka"
    assert (cards["one"]["tucka"]["r"], cards["one"]["tucka"]["k"], cards["one"]["tucka"]["t"]) == (8, 3, 3)
    assert client.models.retrieve("one").id == "one"


@pytest.mark.parametrize("model", MODELS)
def test_a_streamed_completion_is_the_whole_one(client: openai.OpenAI, model: str) -> None:
    ask = {
        "model": model,
        "prompt": "Hello",
        "max_tokens": 12,
        "temperature": 0,
        "logprobs": 2,
        "extra_body": {"route": "request"},
    }
    whole = client.completions.create(**ask)
    chunks = list(client.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    choice = whole.choices[0]
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == choice.text
    assert [t for chunk in chunks[:-1] for t in chunk.choices[0].logprobs.tokens] == choice.logprobs.tokens
    assert chunks[-2].choices[0].finish_reason == choice.finish_reason == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert whole.usage.prompt_tokens == 5 and whole.usage.completion_tokens == 12
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_every_chunk_has_the_usage_so_far(client: openai.OpenAI) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    ask = {"model": "one", "prompt": "Hello", "max_tokens": 6, "temperature": 0, "stream": True}
    used = [chunk.usage for chunk in client.completions.create(**ask, stream_options=options)]
    assert all(usage.prompt_tokens == 5 for usage in used)
    counts = [usage.completion_tokens for usage in used]
    assert counts == sorted(counts) and counts[0] < counts[-1] == 6
    alone = client.completions.create(**ask, stream_options={"continuous_usage_stats": True})
    assert all(chunk.usage is None for chunk in alone)


@pytest.mark.parametrize("model", MODELS)
def test_answers_of_a_schema(client: openai.OpenAI, model: str) -> None:
    """Whatever a random model would rather say; streamed or not."""
    schema = {
        "type": "object",
        "properties": {"kind": {"enum": ["bug", "wish"]}, "count": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["kind", "count"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "ticket", "schema": schema, "strict": True}}
    ask = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 200, "seed": 1}
    answer = client.chat.completions.create(**ask, response_format=form).choices[0]
    assert answer.finish_reason == "stop"
    jsonschema.validate(json.loads(answer.message.content), schema)
    chunks = client.chat.completions.create(**ask, response_format=form, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == answer.message.content
    one = {"const": [1]}
    for form in (
        {"type": "json_schema", "json_schema": {"name": "one", "schema": one}},
        {"type": "json_object", "value": one},
        {"type": "json_object", "schema": one},
    ):
        answer = client.completions.create(model=model, prompt="x", max_tokens=80, extra_body={"response_format": form})
        assert json.loads(answer.choices[0].text) == [1]


def test_models_differ(client: openai.OpenAI) -> None:
    texts = {
        client.completions.create(model=m, prompt="Hello", max_tokens=12, temperature=0).choices[0].text for m in MODELS
    }
    assert len(texts) == 3


def test_base_and_two_adapters_at_once(live: Server, client: openai.OpenAI) -> None:
    ask = {"prompt": "Some prompt", "max_tokens": 20, "temperature": 0, "extra_body": {"route": "request"}}
    alone = [client.completions.create(model=m, **ask).choices[0].text for m in MODELS]

    async def together() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none") as many:
            answers = await asyncio.gather(*(many.completions.create(model=m, **ask) for m in MODELS * 4))
            return [answer.choices[0].text for answer in answers]

    assert asyncio.run(together()) == alone * 4


def test_chat(client: openai.OpenAI) -> None:
    ask = {
        "model": "one",
        "messages": [
            {"role": "developer", "content": "Be short."},
            {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "there"}]},
        ],
        "max_completion_tokens": 8,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 3,
        "extra_body": {"return_token_ids": True, "include_route": True, "route": "request"},
    }
    whole = client.chat.completions.create(**ask)
    message = whole.choices[0]
    prompt = "system: Be short.\nuser: Hi\nthere\nassistant:"
    assert message.prompt_token_ids == [3 + b for b in prompt.encode()]
    assert len(message.token_ids) == len(message.logprobs.content) == 8
    assert all(len(entry.top_logprobs) == 3 for entry in message.logprobs.content)
    assert message.route["adapter"] == "one" and message.route["scope"] == "request"
    chunks = list(client.chat.completions.create(**ask, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == message.message.content
    assert [e.token for c in chunks for e in c.choices[0].logprobs.content] == [
        e.token for e in message.logprobs.content
    ]
    assert chunks[-1].choices[0].finish_reason == message.finish_reason


def test_chat_may_fill_the_context(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="llama-tiny", messages=[{"role": "user", "content": "a"}], extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None and answer.usage.total_tokens == 256
    assert answer.choices[0].finish_reason == "length"


def test_prompts_in_their_four_forms(client: openai.OpenAI) -> None:
    ids = [3 + b for b in b"abc"]
    texts = [
        [choice.text for choice in client.completions.create(model="llama-tiny", prompt=prompt, temperature=0).choices]
        for prompt in ("abc", ["abc", "abc"], ids, [ids, ids])
    ]
    assert texts[0] == texts[2] and texts[1] == texts[3] == texts[0] * 2


def test_n_answers_by_seed(client: openai.OpenAI) -> None:
    def ask(seed: int) -> list[str]:
        answer = client.completions.create(model="one", prompt=["a", "b"], n=3, seed=seed, max_tokens=8)
        assert [choice.index for choice in answer.choices] == list(range(6))
        return [choice.text for choice in answer.choices]

    assert len(set(ask(5))) > 1


def test_stop_strings(client: openai.OpenAI) -> None:
    ask = {"model": "llama-tiny", "prompt": "Hello", "max_tokens": 24, "temperature": 0}
    text = client.completions.create(**ask).choices[0].text
    stop = text[5:8]
    cut = text[: text.index(stop)]
    for extra, expected in (({}, cut), ({"include_stop_str_in_output": True}, cut + stop)):
        choice = client.completions.create(**ask, stop=["never", stop], extra_body=extra).choices[0]
        assert (choice.text, choice.finish_reason, choice.stop_reason) == (expected, "stop", stop)
        pieces = client.completions.create(**ask, stop=stop, stream=True, extra_body=extra)
        assert "".join(chunk.choices[0].text for chunk in pieces) == expected


def test_stop_token_ids(client: openai.OpenAI) -> None:
    ask = {"model": "llama-tiny", "prompt": "Hello", "max_tokens": 8, "temperature": 0}
    ids = client.completions.create(**ask, extra_body={"return_token_ids": True}).choices[0].token_ids
    answer = client.completions.create(**ask, extra_body={"return_token_ids": True, "stop_token_ids": [ids[0]]})
    assert answer.choices[0].token_ids == ids[:1]
    assert answer.choices[0].text == "" and answer.choices[0].stop_reason == ids[0]


def test_echo_scores_the_prompt_as_recorded(live: Server) -> None:
    """Token-id prompts through HTTP against the official code's logits, base and adapter."""
    case = GOLDEN / "llama-qv-r8k3t3"
    tensors = load_file(case / "expected.safetensors")
    assert json.loads((case / "expected.json").read_text())["base"].endswith("llama-tiny")
    for model, logits in (("one", "fwd.single.logits"), ("llama-tiny", "base.single.logits")):
        ids = tensors["fwd.single.input_ids"][0].tolist()
        answer = live.post(
            "/v1/completions",
            {"model": model, "prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 5, "include_route": True,
             "return_token_ids": True, "return_tokens_as_token_ids": True},
        ).json()  # fmt: skip
        choice = answer["choices"][0]
        expected = torch.log_softmax(tensors[logits][0].double(), -1)
        scores = choice["logprobs"]["token_logprobs"]
        assert scores[0] is None
        for i in range(1, len(ids)):
            assert scores[i] == pytest.approx(float(expected[i - 1, ids[i]]), abs=1e-3)
            best = expected[i - 1].topk(5)
            for value, token in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                assert choice["logprobs"]["top_logprobs"][i][f"token_id:{token}"] == pytest.approx(value, abs=1e-3)
        assert choice["finish_reason"] == "length" and choice["token_ids"] == []
        assert choice["prompt_token_ids"] == ids
        if model == "one":
            assert choice["route"]["group"] == int(tensors["fwd.single.group"])
            assert choice["route"]["weights"] == pytest.approx(tensors["fwd.single.weights"].tolist(), abs=1e-4)
            assert choice["route"]["digest"] and choice["route"]["changes"] == 0
        else:
            assert choice["route"] is None


def test_echo_with_offsets(live: Server) -> None:
    choice = live.post(
        "/v1/completions",
        {"model": "one", "prompt": "aé🌶", "max_tokens": 3, "echo": True, "logprobs": 0, "temperature": 0},
    ).json()["choices"][0]
    assert choice["text"].startswith("aé🌶")
    logprobs = choice["logprobs"]
    sizes = {len(values) for values in logprobs.values()}
    assert sizes == {1 + 2 + 4 + 3}
    assert logprobs["tokens"][:3] == ["a", "bytes:\\xc3", "bytes:\\xa9"]
    assert logprobs["text_offset"] == sorted(logprobs["text_offset"])
    assert logprobs["text_offset"][7] == 3


def test_tokenize_and_back(live: Server) -> None:
    answer = live.post("/tokenize", {"model": "one", "prompt": "aé", "return_token_strs": True}).json()
    assert (answer["count"], answer["max_model_len"], len(answer["token_strs"])) == (3, 256, 3)
    assert live.post("/detokenize", {"tokens": answer["tokens"]}).json() == {"prompt": "aé"}
    chat = live.post("/tokenize", {"messages": [{"role": "user", "content": "a"}]}).json()
    assert chat["count"] == len("user: a\nassistant:")


def test_probes_version_and_metrics(live: Server) -> None:
    assert live.get("/health").json() == live.get("/ping").json() == live.post("/ping", {}).json() == {"status": "ok"}
    assert live.get("/ready").json() == {"status": "ready"}
    assert set(live.get("/version").json()) == {"version", "torch", "transformers"}
    live.post("/v1/completions", {"model": "one", "prompt": "a", "max_tokens": 1})
    for path in ("/v1/random-1", "/v1/random-2"):
        live.get(path)
    text = live.get("/metrics").text
    assert 'tucka_adapter_requests_total{model="one",' in text
    assert 'tucka_http_requests_total{code="404",method="GET",route="unmatched"}' in text
    assert 'route="/v1/completions"' in text and "random" not in text
    assert "tucka_time_to_first_token_seconds_bucket" in text and "tucka_kv_blocks" in text


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("temperature", [0, 1])
def test_only_allowed_tokens_are_chosen(client: openai.OpenAI, model: str, temperature: int) -> None:
    extra = {"allowed_token_ids": [70, 80, 81], "return_token_ids": True}
    answer = client.completions.create(
        model=model, prompt="Hello", max_tokens=20, temperature=temperature, extra_body=extra
    ).choices[0]
    assert set(answer.model_extra["token_ids"]) <= {70, 80, 81} and answer.finish_reason == "length"


@pytest.mark.parametrize(
    "extra",
    [
        {"allowed_token_ids": []},
        {"allowed_token_ids": [10**6]},
        {"allowed_token_ids": [70], "response_format": {"type": "json_object"}},
        {"allowed_token_ids": [70], "stop_token_ids": [70], "min_tokens": 2},
    ],
)
def test_allowed_tokens_that_leave_no_answer_are_refused(client: openai.OpenAI, extra: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="one", prompt="Hello", max_tokens=4, extra_body=extra)
    assert refused.value.param == "allowed_token_ids"
