"""What every conversation's door asks, whatever its body looks like: the assistant's next turn."""

import secrets
import string
from collections.abc import Callable
from dataclasses import dataclass, replace

from tucka_runtime import grammars
from tucka_runtime.conversations import CLOSE, OPEN, with_short_ids, without_tools
from tucka_runtime.errors import InvalidRequestError
from tucka_runtime.messages import Request
from tucka_runtime.server.api.bodies import SamplingBody
from tucka_runtime.server.api.door import Context
from tucka_runtime.server.api.rendering import ChatPrompt
from tucka_runtime.server.api.sampling import max_tokens_for, sampling_params
from tucka_runtime.server.api.tools import Tools, calls_grammar
from tucka_runtime.server.service.calls import FORMATS, CallParser
from tucka_runtime.server.service.defaults import Defaults
from tucka_runtime.server.service.events import OutputParser, ParserFactory, PlainText
from tucka_runtime.server.service.leases import Served
from tucka_runtime.server.service.reasoning import ThinkParser
from tucka_runtime.server.service.service import Service
from tucka_runtime.server.service.truncation import Truncation
from tucka_runtime.tokenizer import unshielded


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatTurn:
    """A turn as it is asked for. `max_tokens` None: all that the context leaves. `grammar` is what the answer has to
    match; not with forced calls. `thoughts`: they are told apart from the answer. `max_tokens_param` is what the door's
    body calls that."""

    body: SamplingBody
    conversation: ChatPrompt
    max_tokens: int | None = None
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: str | None = None
    thoughts: bool = True
    truncation: Truncation | None = None
    max_tokens_param: str = "max_tokens"


@dataclass(frozen=True, slots=True)
class Asked:
    """The same, made ready: what the engine is asked, what parses its answers, and the prompt for the request log."""

    request: Request
    parser: ParserFactory
    prompt_for_log: Callable[[], str]


async def render(service: Service, defaults: Defaults, conversation: ChatPrompt) -> str:
    """The prompt of a conversation. A template that knows no functions is told of them as text. Raises
    InvalidRequestError."""
    messages, tools, param = conversation.messages, conversation.tools.for_template(), conversation.param
    template = defaults.chat_template(param)
    if not template.takes_tools:
        messages, tools = without_tools(messages, tools or ()), None
    elif defaults.call_format == "mistral":
        messages = with_short_ids(messages)
    return await service.render_chat(defaults, messages, replace(conversation.rendering, tools=tools), param)


async def prompt_ids(
    service: Service, adapter: Served | None, conversation: ChatPrompt, add_special_tokens: bool | None
) -> list[int]:
    """The same as token ids; the template writes the special tokens, unless the tokenizer is to add its own."""
    defaults, special = await service.defaults(adapter), add_special_tokens is True
    prompt = await render(service, defaults, conversation)
    (ids,) = await service.encode(defaults, [prompt], special, conversation.param, service.vocab_size(adapter))
    return ids


async def ask(context: Context, turn: ChatTurn) -> Asked:
    """Renders, tokenises and checks a turn. Raises InvalidRequestError."""
    body, service, conversation, defaults = turn.body, context.service, turn.conversation, context.defaults
    grammar = await _grammar(service, defaults, turn)
    prompt, param = await render(service, defaults, conversation), conversation.param
    (ids,) = await service.encode(
        defaults, [prompt], body.add_special_tokens is True, param, context.vocab_size, truncation=turn.truncation
    )
    if not ids:
        raise InvalidRequestError("The messages have no tokens once rendered. Send some text.", param)
    max_tokens = max_tokens_for(
        turn.max_tokens,
        defaults.generation.max_new_tokens,
        len(ids),
        service.info,
        turn.max_tokens_param,
        prompt_param=param,
    )
    begun = prompt.rstrip().endswith(OPEN)
    thinks = turn.thoughts and defaults.thinks
    if grammar is not None and defaults.thinks:
        grammar = grammars.after_thought(grammar, begun, OPEN, CLOSE)
    sampling = await sampling_params(body, context, max_tokens, turn.logprobs, turn.prompt_logprobs, grammar)
    parser = _parser(defaults, conversation.tools, begun if thinks else None)
    return Asked(context.request(body, [ids], sampling, turn.n), parser, lambda: unshielded(prompt))


async def _grammar(service: Service, defaults: Defaults, turn: ChatTurn) -> str | None:
    calls = await calls_grammar(turn.conversation.tools, FORMATS[defaults.call_format], service)
    if calls is not None and turn.grammar is not None:
        raise InvalidRequestError(
            "The answer is to match a format and to call a function: it can do one of them only. Leave out what it has "
            "to match, or `tool_choice`.",
            "tool_choice",
        )
    return turn.grammar if calls is None else calls


def _parser(defaults: Defaults, tools: Tools, begun: bool | None) -> ParserFactory:
    """What parses an answer. `begun` is whether its prompt has opened a thought; None: none is told apart."""
    functions = frozenset(function.name for function in tools.callable)
    form = FORMATS[defaults.call_format]
    new_id = _short_id if defaults.call_format == "mistral" else _call_id

    def make() -> OutputParser:
        inner: OutputParser = CallParser(form, functions, new_id) if functions else PlainText()
        return inner if begun is None else ThinkParser(inner, begun)

    return make


def _call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def _short_id() -> str:
    """Nine letters and digits: Mistral's templates take no other."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))
