"""smolagents: its model class, which its agents call."""

from checks import ASKS, URL, answers, check, same
from smolagents import ChatMessage, OpenAIModel, Tool


def model(name: str, **more: object) -> OpenAIModel:
    return OpenAIModel(model_id=name, api_base=f"{URL}/v1", api_key="none", temperature=0, **more)


class Weather(Tool):
    name = "get_weather"
    description = "Weather of a city"
    inputs = {"city": {"type": "string", "description": "Its name", "enum": ["Oslo", "Paris"]}}  # noqa: RUF012
    output_type = "string"

    def forward(self, city: str) -> str:
        return "rain"


def asked(prompt: str) -> list[ChatMessage]:
    return [ChatMessage(role="user", content=[{"type": "text", "text": prompt}])]


@check("generate, base and adapters")
def _() -> None:
    answers(lambda name, prompt: model(name).generate(asked(prompt)).content)


@check("generate_stream")
def _() -> None:
    same(
        "".join(part.content or "" for part in model("formats").generate_stream(asked("2024-03-05"))),
        ASKS["formats"]["answer"],
    )


@check("tools: a call that has to be one")
def _() -> None:
    answer = model("base", max_tokens=300).generate(asked("Oslo?"), tools_to_call_from=[Weather()])
    same([call.function.name for call in answer.tool_calls], ["get_weather"] * len(answer.tool_calls))
    assert answer.tool_calls
