"""litellm: its two providers for such servers."""

import json

import litellm
from checks import ASKS, CITIES, SCHEMA, TOOL, URL, answers, check, fits, same

TOOLS = [{"type": "function", "function": TOOL}]


def asked(provider: str, model: str, prompt: str) -> dict[str, object]:
    return {
        "model": f"{provider}/{model}", "api_base": f"{URL}/v1", "api_key": "none", "temperature": 0, "timeout": 60,
        "messages": [{"role": "user", "content": prompt}], "max_retries": 0,
    }  # fmt: skip


for provider in ("openai", "hosted_vllm"):

    @check(f"{provider}: completion, base and adapters")
    def _(provider: str = provider) -> None:
        answers(lambda *of: litellm.completion(**asked(provider, *of)).choices[0].message.content)

    @check(f"{provider}: streamed")
    def _(provider: str = provider) -> None:
        chunks = list(litellm.completion(**asked(provider, "formats", "2024-03-05"), stream=True))
        same("".join(chunk.choices[0].delta.content or "" for chunk in chunks), ASKS["formats"]["answer"])

    @check(f"{provider}: a JSON schema")
    def _(provider: str = provider) -> None:
        form = {"type": "json_schema", "json_schema": {"name": "ticket", "schema": SCHEMA, "strict": True}}
        answer = litellm.completion(**asked(provider, "base", "x"), response_format=form)
        fits(json.loads(answer.choices[0].message.content))

    @check(f"{provider}: a tool's round trip")
    def _(provider: str = provider) -> None:
        ask = asked(provider, "formats", "Weather in Oslo?") | {"tools": TOOLS, "max_tokens": 200}
        message = litellm.completion(**ask, tool_choice="required").choices[0].message
        assert all(json.loads(call.function.arguments)["city"] in CITIES for call in message.tool_calls)
        ask["messages"] += [
            message,
            *({"role": "tool", "tool_call_id": call.id, "content": "rain"} for call in message.tool_calls),
        ]
        same(litellm.completion(**ask).choices[0].message.role, "assistant")


@check("embedding")
def _() -> None:
    one, other = (
        litellm.embedding(model=f"openai/{name}", api_base=f"{URL}/v1", api_key="none", input=["2024"]).data[0][
            "embedding"
        ]
        for name in ("base", "formats")
    )
    assert len(one) == len(other) and one != other
