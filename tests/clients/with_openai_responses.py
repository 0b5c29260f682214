"""openai's `responses`, which its newer examples use."""

import json

import openai
import pydantic
from checks import ASKS, CITIES, TOOL, URL, answers, check, same

client = openai.OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0, timeout=60)


@check("text, base and adapters")
def _() -> None:
    answers(lambda model, prompt: client.responses.create(model=model, input=prompt, temperature=0).output_text)


@check("streamed text")
def _() -> None:
    with client.responses.stream(model="formats", input="2024-03-05", temperature=0) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        same((text, stream.get_final_response().output_text), (ASKS["formats"]["answer"],) * 2)


@check("parse into a pydantic model")
def _() -> None:
    class Ticket(pydantic.BaseModel):
        kind: str
        urgent: bool

    parsed = client.responses.parse(model="base", input="x", max_output_tokens=200, text_format=Ticket, temperature=0)
    assert isinstance(parsed.output_parsed, Ticket)


@check("a tool's round trip")
def _() -> None:
    tools = [{"type": "function", **TOOL, "strict": True}]
    ask = {"model": "formats", "tools": tools, "temperature": 0}
    answer = client.responses.create(**ask, input="Weather in Oslo?", tool_choice="required")
    calls = [item for item in answer.output if item.type == "function_call"]
    assert calls and all(call.name == TOOL["name"] and json.loads(call.arguments)["city"] in CITIES for call in calls)
    results = [{"type": "function_call_output", "call_id": call.call_id, "output": "rain"} for call in calls]
    history = [{"role": "user", "content": "Weather in Oslo?"}, *answer.output, *results]
    after = client.responses.create(**ask, input=history, max_output_tokens=16)
    assert after.output or after.status == "incomplete"
