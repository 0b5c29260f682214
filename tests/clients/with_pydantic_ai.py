"""pydantic-ai: agents with typed output, tools, and a model's own schema."""

import asyncio
from typing import Literal

from checks import ASKS, CITIES, URL, answers, check, fits, same
from pydantic import BaseModel
from pydantic_ai import Agent, ModelSettings, NativeOutput, RunContext, Tool, ToolDefinition
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

PROVIDER = OpenAIProvider(base_url=f"{URL}/v1", api_key="none")
SETTINGS = ModelSettings(temperature=0, max_tokens=300)


class Ticket(BaseModel):
    """A customer's ticket."""

    kind: Literal["bug", "wish"]
    urgent: bool


def chat(name: str) -> OpenAIChatModel:
    return OpenAIChatModel(name, provider=PROVIDER, settings=SETTINGS)


@check("run, base and adapters")
def _() -> None:
    answers(lambda model, prompt: Agent(chat(model)).run_sync(prompt).output)


@check("run_stream")
def _() -> None:
    async def streamed() -> str:
        async with Agent(chat("formats")).run_stream("2024-03-05") as result:
            return "".join([part async for part in result.stream_text(delta=True)])

    same(asyncio.run(streamed()), ASKS["formats"]["answer"])


@check("output of a pydantic model by its tool")
def _() -> None:
    fits(Agent(chat("base"), output_type=Ticket).run_sync("x").output.model_dump())


@check("NativeOutput")
def _() -> None:
    fits(Agent(chat("base"), output_type=NativeOutput(Ticket)).run_sync("x").output.model_dump())


@check("a tool is called and its result sent back")
def _() -> None:
    called = []

    def get_weather(city: Literal["Oslo", "Paris"]) -> str:
        """Weather of a city."""
        called.append(city)
        return "rain"

    async def only_once(context: RunContext[None], tool: ToolDefinition) -> ToolDefinition | None:
        """A tool has to be called, so that the first call is this one's, and the second the output's."""
        return None if called else tool

    agent = Agent(chat("formats"), output_type=Ticket, tools=[Tool(get_weather, prepare=only_once)], retries=3)
    result = agent.run_sync("Weather in Oslo?")
    fits(result.output.model_dump())
    assert all(city in CITIES for city in called)


@check("OpenAIResponsesModel")
def _() -> None:
    answers(
        lambda model, prompt: (
            Agent(OpenAIResponsesModel(model, provider=PROVIDER, settings=SETTINGS)).run_sync(prompt).output
        )
    )
