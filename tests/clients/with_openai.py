"""openai: OpenAI's own client for Python."""

import json

import openai
import pydantic
from checks import ASKS, CITIES, SCHEMA, TOOL, URL, answers, check, fits, same

client = openai.OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0, timeout=60)
TOOLS = [{"type": "function", "function": TOOL}]


def asked(model: str, prompt: str) -> dict[str, object]:
    return {"model": model, "messages": [{"role": "user", "content": prompt}], "temperature": 0}


@check("models")
def _() -> None:
    assert {"base", "formats", "words"} <= {model.id for model in client.models.list()}
    same(client.models.retrieve("formats").id, "formats")


@check("chat, base and adapters")
def _() -> None:
    answers(lambda *of: client.chat.completions.create(**asked(*of)).choices[0].message.content)


@check("streamed chat with usage")
def _() -> None:
    chunks = list(
        client.chat.completions.create(
            **asked("formats", "2024-03-05"), stream=True, stream_options={"include_usage": True}
        )
    )
    same("".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices), ASKS["formats"]["answer"])
    whole = client.chat.completions.create(**asked("formats", "2024-03-05"))
    same(chunks[-1].usage.total_tokens, whole.usage.total_tokens)


@check("completions, streamed and not")
def _() -> None:
    ask = {"model": "words", "prompt": "Hello", "temperature": 0, "max_tokens": 12}
    whole = client.completions.create(**ask).choices[0].text
    same("".join(chunk.choices[0].text for chunk in client.completions.create(**ask, stream=True)), whole)
    assert whole


@check("parse into a pydantic model")
def _() -> None:
    class Ticket(pydantic.BaseModel):
        kind: str
        urgent: bool

    parsed = client.chat.completions.parse(**asked("base", "x"), max_tokens=200, response_format=Ticket)
    assert isinstance(parsed.choices[0].message.parsed, Ticket)
    form = {"type": "json_schema", "json_schema": {"name": "ticket", "schema": SCHEMA, "strict": True}}
    answer = client.chat.completions.create(**asked("formats", "x"), response_format=form)
    fits(json.loads(answer.choices[0].message.content))


@check("a tool's round trip")
def _() -> None:
    messages = [{"role": "user", "content": "Weather in Oslo?"}]
    answer = client.chat.completions.create(
        model="formats", messages=messages, tools=TOOLS, tool_choice="required", temperature=0
    )
    same(answer.choices[0].finish_reason, "tool_calls")
    message = answer.choices[0].message
    for call in message.tool_calls:
        assert call.function.name == TOOL["name"] and json.loads(call.function.arguments)["city"] in CITIES
    messages += [
        message,
        *({"role": "tool", "tool_call_id": call.id, "content": "rain"} for call in message.tool_calls),
    ]
    after = client.chat.completions.create(model="formats", messages=messages, tools=TOOLS, max_tokens=16)
    assert after.choices[0].finish_reason in ("stop", "length", "tool_calls")


@check("a streamed tool call")
def _() -> None:
    ask = asked("base", "Weather in Oslo?") | {
        "tools": TOOLS,
        "tool_choice": {"type": "function", "function": {"name": TOOL["name"]}},
    }
    whole = client.chat.completions.create(**ask).choices[0].message.tool_calls[0].function
    with client.chat.completions.stream(**ask) as stream:
        call = stream.get_final_completion().choices[0].message.tool_calls[0].function
    same((call.name, call.arguments), (whole.name, whole.arguments))


@check("embeddings")
def _() -> None:
    same(
        [len(one.embedding) for one in client.embeddings.create(model="formats", input=["a", "b"]).data],
        [
            len(one.embedding)
            for one in client.embeddings.create(model="base", input=["a", "b"], encoding_format="float").data
        ],
    )
    one, other = (
        client.embeddings.create(model=model, input="2024").data[0].embedding for model in ("base", "formats")
    )
    assert one != other and abs(sum(x * x for x in one) - 1) < 1e-3


@check("an error is openai's")
def _() -> None:
    try:
        client.chat.completions.create(**asked("nobody", "x"))
    except openai.NotFoundError as error:
        same(error.code, "model_not_found")
    else:
        raise AssertionError("a model that is not there answered")
