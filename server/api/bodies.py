"""The request bodies as typed models: what a field may be is said here once, for the check and for /openapi.json.

Types are strict: nothing is converted. A field that no model declares is taken. What is taken without being acted upon,
such fields and those of the classes marked `without_effect`, is named to the client (`server/api/reading.py`). Lists
stop at their first fault, so that a million invalid items cost one short error.
"""

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

MAX_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIAS = 1024
MAX_EXPERTS = 4096  # weights of a pinned route


class Body(BaseModel):
    """`ignored` are the declared fields that change nothing about an answer, whatever value they are allowed."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True, protected_namespaces=())

    ignored: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls, without_effect: bool = False, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)

    @classmethod
    def __pydantic_init_subclass__(cls, without_effect: bool = False, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        bases = [base for base in cls.__bases__ if issubclass(base, Body)]
        inherited = frozenset[str]().union(*(base.ignored for base in bases))
        known = {name for base in bases for name in base.model_fields}
        cls.ignored = inherited | (cls.model_fields.keys() - known) if without_effect else inherited


def _at_most(size: int) -> Callable[[Any], Any]:
    """Pydantic checks every item of an object before it counts them, and makes an error of each."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > size:
            raise PydanticCustomError("too_long", "It has more entries than this server takes")
        return value

    return check


NonEmpty = Annotated[str, Field(min_length=1)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, fail_fast=True)]
Texts = Annotated[list[NonEmpty], Field(min_length=1, fail_fast=True)]
Prompts = Annotated[list[TokenIds], Field(min_length=1, fail_fast=True)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Stops = Annotated[list[Stop], Field(max_length=MAX_STOPS, fail_fast=True)]
StopTokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=MAX_STOP_TOKEN_IDS, fail_fast=True)]
LogitBias = Annotated[
    dict[str, Annotated[float, Field(ge=-100, le=100)]],
    BeforeValidator(_at_most(MAX_LOGIT_BIAS)),
    Field(max_length=MAX_LOGIT_BIAS),
]
EmptyList = Annotated[list[Any], Field(max_length=0)]
EmptyObject = Annotated[dict[str, Any], Field(max_length=0)]
Nothing = EmptyList | EmptyObject | Literal[False, ""] | None
"""What a field holds that a client spells out without asking for anything."""
Off = Literal[False] | None
On = Literal[True] | None


# What a conversation is made of.


class ForeignPart(Body, without_effect=True):
    """What a part of another kind would hold."""

    image_url: None = None
    input_audio: None = None
    video_url: None = None
    file: None = None


class TextPart(ForeignPart):
    type: Literal["text"]
    text: str


class RefusalPart(ForeignPart):
    """What OpenAI's models answer instead of a text, echoed in a history."""

    type: Literal["refusal"]
    refusal: str


Parts = Annotated[list[Annotated[TextPart | RefusalPart, Field(discriminator="type")]], Field(fail_fast=True)]


class Echoed(Body, without_effect=True):
    """Fields of answers, ours or others', that clients send back with the message."""

    refusal: str | None = None
    annotations: list[Any] | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    audio: None = None
    tool_calls: EmptyList | None = None
    function_call: None = None


class UserMessage(Echoed):
    role: Literal["system", "developer", "user"]
    content: str | Parts
    name: str | None = None


class AssistantMessage(Echoed):
    """Without content where there was nothing to say but a call or a refusal."""

    role: Literal["assistant"]
    content: str | Parts | None = None
    name: str | None = None


ChatMessage = Annotated[UserMessage | AssistantMessage, Field(discriminator="role")]
Messages = Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]


class TemplateFields(Body, without_effect=True):
    """What would change how messages are rendered."""

    add_generation_prompt: On = None
    chat_template: None = None
    chat_template_kwargs: EmptyObject | None = None
    continue_final_message: Off = None
    documents: EmptyList | None = None
    tools: EmptyList | None = None


# What is asked of the model.


class JsonSchema(Body):
    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class TextFormat(Body):
    type: Literal["text"]


class JsonObjectFormat(Body):
    type: Literal["json_object"]


class JsonSchemaFormat(Body):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: Off = None


class WithoutEffect(Body, without_effect=True):
    """Fields of OpenAI, vLLM and SGLang that change nothing about an answer of this server, whatever their value."""

    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    request_id: str | None = None
    rid: str | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    length_penalty: float | None = None
    """Of beam search, as is `early_stopping`."""
    early_stopping: bool | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    include_reasoning: bool | None = None
    separate_reasoning: bool | None = None
    stream_reasoning: bool | None = None
    parallel_tool_calls: bool | None = None


class Unsupported(Body, without_effect=True):
    """Fields of OpenAI, vLLM and SGLang for what this server cannot do, with the values that ask for nothing."""

    adapter_id: None = None
    lora_path: None = None
    suffix: Nothing = None
    service_tier: Literal["auto", "default"] | None = None
    modalities: list[Literal["text"]] | None = None
    use_beam_search: Off = None
    detokenize: On = None
    spaces_between_special_tokens: On = None
    no_stop_trim: Off = None
    return_hidden_states: Off = None
    priority: Annotated[int, Field(ge=0, le=0)] | None = None
    allowed_token_ids: None = None
    bad_words: Nothing = None
    prompt_logprobs: None = None
    truncate_prompt_tokens: None = None
    cache_salt: None = None
    prompt_cache_retention: Literal["in_memory"] | None = None
    prompt_embeds: Nothing = None
    audio: Nothing = None
    images: Nothing = None
    mm_processor_kwargs: Nothing = None
    prediction: None = None
    web_search_options: None = None
    logits_processors: Nothing = None
    kv_transfer_params: Nothing = None
    structured_outputs: None = None
    guided_json: None = None
    guided_regex: None = None
    guided_choice: None = None
    guided_grammar: None = None
    guided_decoding_backend: None = None
    regex: None = None
    ebnf: None = None
    json_schema: None = None
    stop_regex: Nothing = None
    session_params: Nothing = None


class GenerationBody(WithoutEffect, Unsupported):
    """What completions and chat have in common."""

    model: NonEmpty
    n: Annotated[int, Field(ge=1)] | None = None
    best_of: int | None = None
    max_tokens: int | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: LogitBias | None = None
    response_format: ResponseFormat | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[str, Field(max_length=MAX_STOP_CHARS)] | Stops | None = None
    stop_token_ids: StopTokenIds | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    route: Literal["batch", "request"] | None = None
    include_route: bool | None = None


class CompletionBody(GenerationBody):
    prompt: NonEmpty | Texts | TokenIds | Prompts
    split_special_tokens: bool | None = None
    echo: bool | None = None
    logprobs: int | None = None


class ChatUnsupported(Body, without_effect=True):
    """The same for what only chat has."""

    echo: Off = None
    tool_choice: Literal["auto", "none"] | None = None
    functions: EmptyList | None = None
    function_call: Literal["auto", "none"] | None = None


class ChatBody(GenerationBody, TemplateFields, ChatUnsupported):
    messages: Messages
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


class TokenizeBody(TemplateFields):
    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    split_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(Body):
    model: str | None = None
    tokens: TokenIds


# What is asked of the adapters' routes.


class VllmLoadFields(Body, without_effect=True):
    """What vLLM is told of an adapter that is read from its files here; the Gateway API's syncer sends the first."""

    base_model_name: str | None = None
    is_3d_lora_weight: Off = None
    lora_int_id: int | None = None


class LoadLoraBody(VllmLoadFields):
    lora_name: str
    lora_path: str
    load_inplace: bool | None = None


class UnloadLoraBody(VllmLoadFields):
    lora_name: str


class PinnedRoute(Body):
    group: Annotated[int, Field(ge=0, lt=2**31)]
    weights: Annotated[
        list[Annotated[float, Field(ge=0, le=1)]], Field(min_length=1, max_length=MAX_EXPERTS, fail_fast=True)
    ]


class LoadAdapterBody(Body):
    name: str
    path: str
    load_inplace: bool | None = None
    pinned: PinnedRoute | None = None
