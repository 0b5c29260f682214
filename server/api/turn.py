"""What every conversation's door asks, whatever its body looks like: the assistant's next turn."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tucka_runtime.errors import InvalidRequestError
from tucka_runtime.messages import Request
from tucka_runtime.server.api.bodies import SamplingBody
from tucka_runtime.server.api.door import Context
from tucka_runtime.server.api.sampling import max_tokens_for, sampling_params
from tucka_runtime.server.service.events import ParserFactory, PlainText
from tucka_runtime.tokenizer import unshielded


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A turn as it is asked for. `messages` are those that chat templates know. `max_tokens` None: all that the context
    leaves. `schema` is the JSON schema, as text, that the answer has to match. `messages_param` and `max_tokens_param`
    are what the door's body calls those."""

    body: SamplingBody
    messages: list[dict[str, Any]]
    max_tokens: int | None = None
    n: int = 1
    logprobs: int | None = None
    schema: str | None = None
    messages_param: str = "messages"
    max_tokens_param: str = "max_tokens"


@dataclass(frozen=True, slots=True)
class Asked:
    """The same, made ready: what the engine is asked, what parses its answers, and the prompt for the request log."""

    request: Request
    parser: ParserFactory
    prompt_for_log: Callable[[], str]


async def ask(context: Context, turn: Turn) -> Asked:
    """Renders, tokenises and checks a turn. Raises InvalidRequestError."""
    body, service = turn.body, context.service
    prompt = await service.render_chat(turn.messages)
    (ids,) = await service.encode([prompt], body.add_special_tokens is True, turn.messages_param)
    if not ids:
        raise InvalidRequestError("The messages have no tokens once rendered. Send some text.", turn.messages_param)
    max_tokens = max_tokens_for(
        turn.max_tokens, None, len(ids), service.info, turn.max_tokens_param, prompt_param=turn.messages_param
    )
    sampling = sampling_params(body, service.info, max_tokens, turn.logprobs, schema=turn.schema)
    return Asked(context.request(body, [ids], sampling, turn.n), PlainText, lambda: unshielded(prompt))
