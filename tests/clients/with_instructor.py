"""instructor: pydantic models by tools (its default), JSON schemas and JSON objects."""

from typing import Literal

import instructor
import openai
from checks import URL, check, fits, same
from pydantic import BaseModel

client = openai.OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0, timeout=60)


class Ticket(BaseModel, extra="forbid"):
    """A customer's ticket. Without `forbid` its schema allows other fields too, of which a small model finds no end."""

    kind: Literal["bug", "wish"]
    urgent: bool


def asked(model: str) -> dict[str, object]:
    messages = [{"role": "user", "content": "the app crashes"}]
    return {"model": model, "messages": messages, "temperature": 0, "max_tokens": 300, "max_retries": 0}


for mode in (None, "TOOLS_STRICT", "JSON_SCHEMA"):

    @check(f"create by {mode or 'its default mode'}")
    def _(mode: str | None = mode) -> None:
        wrapped = instructor.from_openai(client, **({"mode": instructor.Mode[mode]} if mode else {}))
        for model in ("base", "formats"):
            fits(wrapped.chat.completions.create(**asked(model), response_model=Ticket).model_dump())


@check("create_partial")
def _() -> None:
    parts = list(instructor.from_openai(client).chat.completions.create_partial(**asked("base"), response_model=Ticket))
    assert len(parts) > 1
    fits(parts[-1].model_dump())


@check("create_with_completion")
def _() -> None:
    ticket, raw = instructor.from_openai(client).chat.completions.create_with_completion(
        **asked("formats"), response_model=Ticket
    )
    fits(ticket.model_dump())
    same(raw.model, "formats")
