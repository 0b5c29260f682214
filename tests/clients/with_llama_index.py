"""llama-index: OpenAILike, its class for such servers."""

from typing import Literal

from checks import ASKS, CITIES, URL, answers, check, fits, same
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel


def llm(model: str, **more: object) -> OpenAILike:
    return OpenAILike(
        api_base=f"{URL}/v1", api_key="none", model=model, temperature=0, is_chat_model=True,
        is_function_calling_model=True, context_window=2048, max_retries=0, timeout=60, **more,
    )  # fmt: skip


class Ticket(BaseModel):
    """A customer's ticket."""

    kind: Literal["bug", "wish"]
    urgent: bool


def get_weather(city: Literal["Oslo", "Paris"]) -> str:
    """Weather of a city."""
    return "rain"


def asked(prompt: str) -> list[ChatMessage]:
    return [ChatMessage(role="user", content=prompt)]


@check("chat, base and adapters")
def _() -> None:
    answers(lambda model, prompt: llm(model).chat(asked(prompt)).message.content)


@check("stream_chat")
def _() -> None:
    text = "".join(part.delta or "" for part in llm("formats").stream_chat(asked("2024-03-05")))
    same(text, ASKS["formats"]["answer"])


@check("complete")
def _() -> None:
    same(llm("words").complete(ASKS["words"]["prompt"]).text, ASKS["words"]["answer"])


@check("as_structured_llm")
def _() -> None:
    answer = llm("base", max_tokens=200).as_structured_llm(Ticket).chat(asked("x"))
    fits(answer.raw.model_dump())


@check("as_structured_llm with should_use_structured_outputs")
def _() -> None:
    model = llm("base", max_tokens=200, should_use_structured_outputs=True)
    fits(model.as_structured_llm(Ticket).chat(asked("x")).raw.model_dump())


@check("chat_with_tools")
def _() -> None:
    model = llm("formats", max_tokens=200)
    tool = FunctionTool.from_defaults(get_weather)
    answer = model.chat_with_tools([tool], user_msg="Weather in Oslo?", tool_required=True)
    calls = model.get_tool_calls_from_response(answer)
    assert calls and all(call.tool_name == "get_weather" and call.tool_kwargs["city"] in CITIES for call in calls)
    results = [
        ChatMessage(role="tool", content="rain", additional_kwargs={"tool_call_id": call.tool_id}) for call in calls
    ]
    after = model.chat_with_tools([tool], chat_history=[*asked("Weather in Oslo?"), answer.message, *results])
    assert after.message.role == "assistant"


@check("embeddings")
def _() -> None:
    one, other = (
        OpenAILikeEmbedding(api_base=f"{URL}/v1", api_key="none", model_name=name).get_text_embedding("2024")
        for name in ("base", "formats")
    )
    assert len(one) == len(other) and one != other
