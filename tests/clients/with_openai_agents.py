"""openai-agents: by responses, its default, and by chat."""

import asyncio
import json
from typing import Literal

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)  # fmt: skip
from checks import ASKS, CITIES, URL, answers, check, fits, same
from openai import AsyncOpenAI
from pydantic import BaseModel

set_tracing_disabled(True)
called: list[str] = []


class Ticket(BaseModel):
    """A customer's ticket."""

    kind: Literal["bug", "wish"]
    urgent: bool


@function_tool
def get_weather(city: Literal["Oslo", "Paris"]) -> str:
    """Weather of a city."""
    called.append(city)
    return "rain"


for name, kind in (("chat", OpenAIChatCompletionsModel), ("responses", OpenAIResponsesModel)):

    def agent(model: str, kind: type = kind, tool_choice: str | None = None, **more: object) -> Agent:
        client = AsyncOpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0, timeout=60)
        settings = ModelSettings(temperature=0, max_tokens=300, tool_choice=tool_choice)
        return Agent(
            name="it", instructions=None, model=kind(model=model, openai_client=client), model_settings=settings, **more
        )

    @check(f"{name}: run, base and adapters")
    def _() -> None:
        answers(lambda model, prompt: Runner.run_sync(agent(model), prompt).final_output)

    @check(f"{name}: run_streamed")
    def _() -> None:
        async def streamed() -> tuple[str, str]:
            result = Runner.run_streamed(agent("formats"), "2024-03-05")
            text = ""
            async for event in result.stream_events():
                if event.type == "raw_response_event" and event.data.type == "response.output_text.delta":
                    text += event.data.delta
            return text, result.final_output

        same(asyncio.run(streamed()), (ASKS["formats"]["answer"],) * 2)

    @check(f"{name}: a tool is called and its result sent back")
    def _() -> None:
        called.clear()
        result = Runner.run_sync(
            agent("formats", tools=[get_weather], tool_choice="required"), "Weather in Oslo?", max_turns=4
        )
        assert called and set(called) <= CITIES
        assert "function_call_output" in json.dumps(result.to_input_list()) and isinstance(result.final_output, str)

    @check(f"{name}: output of a pydantic model")
    def _() -> None:
        fits(Runner.run_sync(agent("base", output_type=Ticket), "x").final_output.model_dump())
