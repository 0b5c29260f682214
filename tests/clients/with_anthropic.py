"""anthropic: Anthropic's own client, to /v1/messages."""

import anthropic
from checks import ASKS, CITIES, TOOL, URL, answers, check, same

client = anthropic.Anthropic(base_url=URL, api_key="none", max_retries=0, timeout=60)
TOOLS = [{"name": TOOL["name"], "description": TOOL["description"], "input_schema": TOOL["parameters"]}]


def asked(model: str, prompt: str) -> dict[str, object]:
    messages = [{"role": "user", "content": prompt}]
    return {"model": model, "messages": messages, "max_tokens": 300, "extra_body": {"temperature": 0}}


@check("models")
def _() -> None:
    listed = list(client.models.list())
    assert {"base", "formats", "words"} <= {model.id for model in listed}
    same(client.models.retrieve("words"), next(model for model in listed if model.id == "words"))


@check("messages, base and adapters")
def _() -> None:
    answers(lambda *of: client.messages.create(**asked(*of)).content[0].text)


@check("stream")
def _() -> None:
    with client.messages.stream(**asked("formats", "2024-03-05")) as stream:
        same("".join(stream.text_stream), ASKS["formats"]["answer"])
        final = stream.get_final_message()
    whole = client.messages.create(**asked("formats", "2024-03-05"))
    same((final.stop_reason, final.usage.output_tokens), (whole.stop_reason, whole.usage.output_tokens))


@check("count_tokens")
def _() -> None:
    ask = {name: asked("formats", "2024-03-05")[name] for name in ("model", "messages")}
    used = client.messages.create(**ask, max_tokens=1).usage
    cached = (used.cache_read_input_tokens or 0) + (used.cache_creation_input_tokens or 0)
    same(client.messages.count_tokens(**ask).input_tokens, used.input_tokens + cached)


@check("a tool's round trip, streamed and not")
def _() -> None:
    ask = asked("formats", "Weather in Oslo?") | {"tools": TOOLS}
    answer = client.messages.create(**ask, tool_choice={"type": "any"})
    calls = [block for block in answer.content if block.type == "tool_use"]
    same(answer.stop_reason, "tool_use")
    assert calls and all(call.name == TOOL["name"] and call.input["city"] in CITIES for call in calls)
    with client.messages.stream(**ask, tool_choice={"type": "any"}) as stream:
        streamed = [block.input for block in stream.get_final_message().content if block.type == "tool_use"]
    same(streamed, [call.input for call in calls])
    results = [{"type": "tool_result", "tool_use_id": call.id, "content": "rain"} for call in calls]
    ask["messages"] += [{"role": "assistant", "content": answer.content}, {"role": "user", "content": results}]
    same(client.messages.create(**ask).role, "assistant")


@check("an error is anthropic's")
def _() -> None:
    try:
        client.messages.create(**asked("nobody", "x"))
    except anthropic.NotFoundError as error:
        same(error.body["error"]["type"], "not_found_error")
    else:
        raise AssertionError("a model that is not there answered")
