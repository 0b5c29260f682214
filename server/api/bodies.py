"""The request bodies: every field that is understood, with its type and range. Nothing is coerced, nothing ignored.

Fields that hold lists or objects of the client's making are read by `fields.py`, which stops at the first fault: a
million invalid items cost one short error.
"""

import re
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tucka_runtime.errors import InvalidRequestError
from tucka_runtime.messages import RouteScope

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")

# Fields that change nothing about an answer: any value of the type is fine.
_WITHOUT_EFFECT: dict[str, type] = {
    "user": str,
    "metadata": dict,
    "prompt_cache_key": str,
    "safety_identifier": str,
    "parallel_tool_calls": bool,
}

# Fields of other servers for what has another name here.
_ELSEWHERE = {"adapter_id": "Name the adapter in `model`."}

# Fields of OpenAI's API (and vLLM's) that are not supported here, with the values that ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "modalities": (["text"],),
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "use_beam_search": (False,),
    "detokenize": (True,),
} | dict.fromkeys(
    (
        "add_generation_prompt allowed_token_ids audio bad_words cache_salt chat_template chat_template_kwargs "
        "continue_final_message documents guided_choice guided_decoding_backend guided_grammar guided_json "
        "guided_regex images kv_transfer_params length_penalty logits_processors mm_processor_kwargs prediction "
        "priority prompt_cache_retention prompt_embeds prompt_logprobs reasoning_effort structured_outputs "
        "truncate_prompt_tokens verbosity web_search_options"
    ).split(),
    (),
)


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, protected_namespaces=())


class GenerationBody(Body):
    """What completions and chat have in common."""

    model: Annotated[str, Field(min_length=1)]
    n: Annotated[int, Field(ge=1)] | None = None
    best_of: int | None = None
    max_tokens: int | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Any = None
    response_format: Any = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Any = None
    stop_token_ids: Any = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    stream: bool | None = None
    stream_options: Any = None
    route: str | None = None
    include_route: bool | None = None


class CompletionBody(GenerationBody):
    prompt: Any = None
    split_special_tokens: bool | None = None
    echo: bool | None = None
    logprobs: int | None = None


class ChatBody(GenerationBody):
    messages: Any = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


class TokenizeBody(Body):
    model: str | None = None
    prompt: str | None = None
    messages: Any = None
    add_special_tokens: bool | None = None
    split_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(Body):
    model: str | None = None
    tokens: Any = None


class LoadLoraBody(Body):
    lora_name: str
    lora_path: str
    load_inplace: bool | None = None


class UnloadLoraBody(Body):
    """`lora_int_id` is vLLM's own number for the adapter; the name says all."""

    lora_name: str
    lora_int_id: int | None = None


class LoadAdapterBody(Body):
    name: str
    path: str
    load_inplace: bool | None = None
    pinned: Any = None


B = TypeVar("B", bound=Body)


def parse(kind: type[B], body: dict[str, Any]) -> B:
    """The body as `kind`. Raises InvalidRequestError naming the first field that is wrong."""
    known = {}
    for name, value in body.items():
        if name in kind.model_fields:
            known[name] = value
        elif issubclass(kind, GenerationBody):
            _check_foreign(name, value)
        else:
            raise _unknown(name)
    try:
        return kind.model_validate(known)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        name = str(first["loc"][0])
        if first["type"] == "missing":
            raise InvalidRequestError(f"The field `{name}` is required.", name) from None
        if first["type"] == "string_too_short":
            raise InvalidRequestError(f"`{name}` is empty. GET /v1/models lists what it can be.", name) from None
        raise InvalidRequestError(f"`{name}`: {first['msg']}.", name) from None


def route_scope(value: str | None) -> RouteScope | None:
    if value is None:
        return None
    if value not in (RouteScope.BATCH, RouteScope.REQUEST):
        raise InvalidRequestError('`route` must be "batch" or "request".', "route")
    return RouteScope(value)


def _check_foreign(name: str, value: Any) -> None:
    """A field that no model declares: fine if it asks for nothing, else an error that says why."""
    if name in _WITHOUT_EFFECT:
        if value is not None and type(value) is not _WITHOUT_EFFECT[name]:
            raise InvalidRequestError(f"`{name}` has the wrong type.", name)
    elif name in _NEUTRAL:
        if value is not None and not any(type(value) is type(v) and value == v for v in _NEUTRAL[name]):
            raise InvalidRequestError(f"`{name}` is not supported by this server. Leave it out.", name)
    elif name in _ELSEWHERE:
        raise InvalidRequestError(f"`{name}` is not a field of this server. {_ELSEWHERE[name]}", name)
    else:
        raise _unknown(name)


def _unknown(name: str) -> InvalidRequestError:
    if _NAME.fullmatch(name):
        return InvalidRequestError(f"The field `{name}` is unknown. Check its spelling or leave it out.", name)
    return InvalidRequestError("A field of the body is unknown (its name is not printable here).")
