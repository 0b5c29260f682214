"""langchain-openai: ChatOpenAI, as langchain's and langgraph's agents use it."""

import asyncio
from typing import Literal

from checks import ASKS, CITIES, URL, answers, check, fits, same
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel


def chat(model: str, **more: object) -> ChatOpenAI:
    return ChatOpenAI(
        base_url=f"{URL}/v1", api_key="none", model=model, temperature=0, max_retries=0, timeout=60, **more
    )


class Ticket(BaseModel):
    """A customer's ticket."""

    kind: Literal["bug", "wish"]
    urgent: bool


@tool
def get_weather(city: Literal["Oslo", "Paris"]) -> str:
    """Weather of a city."""
    return "rain"


@check("invoke, base and adapters")
def _() -> None:
    answers(lambda model, prompt: chat(model).invoke(prompt).text)


@check("stream, with usage")
def _() -> None:
    chunks = list(chat("formats", stream_usage=True).stream("2024-03-05"))
    same("".join(chunk.text for chunk in chunks), ASKS["formats"]["answer"])
    same(sum(chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata), 13)


@check("abatch of base and adapters")
def _() -> None:
    asked = [(ASKS[name]["model"], ASKS[name]["prompt"], ASKS[name]["answer"]) for name in ("base", "formats", "words")]

    async def together() -> list[str]:
        return [one.text for one in await asyncio.gather(*(chat(model).ainvoke(prompt) for model, prompt, _ in asked))]

    same(asyncio.run(together()), [answer for _, _, answer in asked])


for method in ("json_schema", "function_calling", "json_mode"):

    @check(f"with_structured_output by {method}")
    def _(method: str = method) -> None:
        model = chat("base", max_tokens=300)
        if method == "json_mode":
            parsed = model.with_structured_output(None, method=method, include_raw=True).invoke("JSON: {}")["raw"].text
            assert parsed.startswith("{")
        else:
            fits(model.with_structured_output(Ticket, method=method).invoke("x").model_dump())


@check("bind_tools: a tool's round trip")
def _() -> None:
    model = chat("formats", max_tokens=200)
    history = [HumanMessage("Weather in Oslo?")]
    answer = model.bind_tools([get_weather], tool_choice="required").invoke(history)
    assert answer.tool_calls and all(call["args"]["city"] in CITIES for call in answer.tool_calls)
    history += [answer, *(get_weather.invoke(call) for call in answer.tool_calls)]
    assert isinstance(history[-1], ToolMessage)
    assert isinstance(model.bind_tools([get_weather]).invoke(history).content, str)


@check("bind_tools: streamed")
def _() -> None:
    model = chat("formats", max_tokens=200).bind_tools([get_weather], tool_choice="get_weather")
    whole, *chunks = model.invoke("Weather in Oslo?"), *model.stream("Weather in Oslo?")
    merged = chunks[0]
    for chunk in chunks[1:]:
        merged += chunk
    same([call["args"] for call in merged.tool_calls], [call["args"] for call in whole.tool_calls])


@check("embeddings (check_embedding_ctx_length=False)")
def _() -> None:
    vectors = [
        OpenAIEmbeddings(
            base_url=f"{URL}/v1", api_key="none", model=name, check_embedding_ctx_length=False
        ).embed_query("2024")
        for name in ("base", "formats")
    ]
    assert len(vectors[0]) == len(vectors[1]) and vectors[0] != vectors[1]
