"""Functions that a model may call or has to: what templates are told of them, and the grammar of calls."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from tucka_runtime import grammars
from tucka_runtime.errors import InvalidRequestError
from tucka_runtime.server.api.conversation import AllowedTools, FunctionBody, NamedTool, ToolBody, ToolChoiceOption
from tucka_runtime.server.api.structured import MAX_GRAMMAR_CHARS
from tucka_runtime.server.service.calls import CallFormat
from tucka_runtime.server.service.service import Service
from tucka_runtime.tokenizer import Tokenizer

MOST_CALLS = 16  # of one answer that has to call
_NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True, slots=True)
class Function:
    """`parameters` is the JSON schema of the arguments, an object."""

    name: str
    description: str | None
    parameters: dict[str, Any] | None

    @classmethod
    def of(cls, body: FunctionBody) -> "Function":
        return cls(body.name, body.description, body.parameters)

    @property
    def for_template(self) -> dict[str, Any]:
        found = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {key: value for key, value in found.items() if value is not None}


Mode = Literal["auto", "none", "required"]


@dataclass(frozen=True, slots=True)
class CallChoice:
    """What a request says of calls, by the names of functions; `param` is the field that says it."""

    mode: Mode = "auto"
    named: str | None = None
    allowed: frozenset[str] | None = None
    param: str = "tool_choice"


@dataclass(frozen=True, slots=True)
class Tools:
    """What may be called, and whether something has to be: any of the functions where `choice` is "required", the one
    that is `named`, if any. `allowed`: the names of those that may be called, if not all. `parallel`: several at once.
    `param` is the field that the functions came in."""

    functions: tuple[Function, ...]
    choice: Mode = "auto"
    named: str | None = None
    allowed: frozenset[str] | None = None
    parallel: bool = True
    param: str = "tools"

    @property
    def callable(self) -> tuple[Function, ...]:
        """The functions that may be called."""
        if self.choice == "none":
            return ()
        return tuple(f for f in self.functions if self.allowed is None or f.name in self.allowed)

    @property
    def forced(self) -> tuple[Function, ...]:
        """The functions of which one has to be called."""
        if self.named is not None:
            return tuple(function for function in self.functions if function.name == self.named)
        return self.callable if self.choice == "required" else ()

    def for_template(self) -> list[dict[str, Any]] | None:
        """What chat templates know as `tools`. None where nothing may be called: a model that is not told of functions
        calls none."""
        return [{"type": "function", "function": function.for_template} for function in self.callable] or None


def tools_of(functions: Iterable[Function], choice: CallChoice, parallel: bool | None, param: str = "tools") -> Tools:
    """What may be called of the functions, which came in the field `param`. Raises InvalidRequestError."""
    known = tuple(functions)
    names = {function.name for function in known}
    if len(names) < len(known):
        raise InvalidRequestError(f"Two of the `{param}` have the same name.", param)
    wanted = {choice.named} if choice.named is not None else choice.allowed or frozenset()
    if wanted - names:
        raise InvalidRequestError(f"`{choice.param}` names a function that is not among the `{param}`.", choice.param)
    if choice.mode == "required" and not known:
        raise InvalidRequestError(
            f"`{choice.param}` asks for a call, but there are no `{param}` to call.", choice.param
        )
    at_once = parallel is not False and choice.named is None
    return Tools(known, choice.mode, choice.named, choice.allowed, at_once, param)


def chat_tools(tools: list[ToolBody] | None, choice: ToolChoiceOption, parallel: bool | None) -> Tools:
    """What chat's three fields ask for. Raises InvalidRequestError."""
    match choice:
        case NamedTool():
            chosen = CallChoice(named=choice.function.name)
        case AllowedTools():
            allowed = choice.allowed_tools
            chosen = CallChoice(allowed.mode, allowed=frozenset(tool.function.name for tool in allowed.tools))
        case _:
            chosen = CallChoice(choice or "auto")
    return tools_of((Function.of(tool.function) for tool in tools or ()), chosen, parallel)


async def calls_grammar(tools: Tools, form: CallFormat, service: Service) -> str | None:
    """The grammar of an answer that has to call functions, as its template would have it; None where it has not to.
    Raises InvalidRequestError."""
    if not (forced := tools.forced):
        return None
    texts = [json.dumps(_NO_PARAMETERS if f.parameters is None else f.parameters) for f in forced]
    if sum(map(len, texts)) > MAX_GRAMMAR_CHARS:
        raise InvalidRequestError(
            f"The functions one of which has to be called have schemas of more than {MAX_GRAMMAR_CHARS} characters. "
            "Name the one to call, or leave the choice to the model.",
            tools.param,
        )
    rules = []
    for i, (function, text) in enumerate(zip(forced, texts, strict=True)):
        try:
            schema = await service.grammars.get(grammars.followed, text)
        except grammars.UnusableError as error:
            place = tools.functions.index(function)
            raise InvalidRequestError(
                f"The schema of function {place + 1} of the `{tools.param}` cannot be followed: {error}.", tools.param
            ) from None
        head = json.dumps(f'{{"name": {json.dumps(function.name)}, "{form.key}": ')
        rules += [f'f{i}: {head} a{i} "}}"', f"a{i}: %json {schema}"]
    body = " | ".join(f"f{i}" for i in range(len(forced)))
    start = _calls(form, tools.parallel, service.base_defaults.text_tokenizer("tools"))
    return "\n".join([f"start: {start}", f"body: {body}", *rules])


def _calls(form: CallFormat, parallel: bool, tokenizer: Tokenizer) -> str:
    """How calls follow each other, as terms of Lark."""
    more = MOST_CALLS - 1 if parallel else 0

    def mark(text: str, blank: str = "") -> str:
        if found := list(tokenizer.special_ids([text])):
            return f"<[{found[0]}]>" + (f" {json.dumps(blank)}" if blank else "")
        return json.dumps(text + blank)

    if form.end:
        one = f'{mark(form.begin, chr(10))} body "\\n" {mark(form.end)}'
        return f'{one} ("\\n" {one}){{0,{more}}}' if more else one
    if form.begin and not form.bare:
        return (
            f'{mark(form.begin)} "[" body (", " body){{0,{more}}} "]"' if more else f'{mark(form.begin)} "[" body "]"'
        )
    if form.begin:
        return f'body ("; " body){{0,{more}}}' if more else "body"
    return f'body | "[" body (", " body){{0,{more}}} "]"' if more else "body"
