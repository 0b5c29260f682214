"""The request bodies as typed models: what a field may be is said here once, for the check and for /openapi.json.

Types are strict: nothing is converted. A field that no model declares is taken. What is taken without being acted upon,
such fields and those of the classes marked `without_effect`, is named to the client (`server/api/reading.py`). Lists
stop at their first fault, so that a million invalid items cost one short error.
"""

from typing import Annotated, Any, Literal

from pydantic import Field

from tucka_runtime.server.api.conversation import (
    MAX_TOOLS,
    ChatFields,
    FunctionBody,
    Messages,
    NamedFunction,
    ToolChoiceOption,
)
from tucka_runtime.server.api.values import (
    MAX_ADAPTER_WEIGHT,
    MAX_ADAPTERS,
    MAX_CHOICES,
    MAX_EXPERTS,
    MAX_PAGE,
    MAX_STOP_CHARS,
    WHOLE,
    AdapterName,
    AllowedTokenIds,
    BadWords,
    Body,
    CacheSalt,
    Digits,
    Integer,
    LogitBias,
    NonEmpty,
    Nothing,
    Off,
    On,
    Prompts,
    Stops,
    StopTokenIds,
    Targets,
    Texts,
    TokenIds,
)

# What is asked of the model.


class JsonSchema(Body):
    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class TextFormat(Body):
    type: Literal["text"]


class JsonObjectFormat(Body):
    """Any object, or one of a schema: `value` is TGI's name for it, `schema` that of llama-server."""

    type: Literal["json_object"]
    value: dict[str, Any] | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None


class JsonSchemaFormat(Body):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


Choice = Annotated[list[NonEmpty], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)]


class StructuredOutputsUnsupported(Body, without_effect=True):
    """What vLLM's engine is told besides: how to look for a way to follow it, and blanks, which are ours to choose."""

    backend: str | None = None
    disable_any_whitespace: Off = None
    disable_fallback: bool | None = None
    disable_additional_properties: Off = None
    whitespace_pattern: None = None
    structural_tag: None = None


class StructuredOutputs(StructuredOutputsUnsupported):
    """vLLM's."""

    json_: Annotated[dict[str, Any] | str | None, Field(alias="json")] = None
    regex: NonEmpty | None = None
    choice: Choice | None = None
    grammar: NonEmpty | None = None
    json_object: bool | None = None


class StreamOptions(Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Off = None


class WithoutEffect(Body, without_effect=True):
    """Fields of OpenAI, vLLM and SGLang that change nothing about an answer of this server, whatever their value."""

    metadata: dict[str, Any] | None = None
    store: bool | None = None
    request_id: str | None = None
    rid: str | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    length_penalty: float | None = None
    """Of beam search, as is `early_stopping`."""
    early_stopping: bool | None = None
    guided_decoding_backend: str | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    stream_reasoning: bool | None = None


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
    prompt_cache_retention: Literal["in_memory", "in-memory"] | None = None
    prompt_embeds: Nothing = None
    audio: Nothing = None
    images: Nothing = None
    mm_processor_kwargs: Nothing = None
    prediction: None = None
    web_search_options: None = None
    logits_processors: Nothing = None
    kv_transfer_params: Nothing = None
    stop_regex: Nothing = None
    session_params: Nothing = None


class WeightedAdapter(Body):
    """One of several adapters whose changes are added up, each times its weight."""

    name: NonEmpty
    weight: Annotated[float, Field(ge=-MAX_ADAPTER_WEIGHT, le=MAX_ADAPTER_WEIGHT)] | None = None


Weighted = Annotated[list[WeightedAdapter], Field(min_length=1, max_length=MAX_ADAPTERS, fail_fast=True)]


def weights(adapters: list[WeightedAdapter] | None) -> list[tuple[str, float]] | None:
    """The adapters to be combined, by name, with their weights."""
    return None if adapters is None else [(one.name, 1.0 if one.weight is None else one.weight) for one in adapters]


class ModelBody(Body):
    """What is asked of the engine at every door. `adapters` are combined on the base, which `model` has to be then.
    `user` says whose requests an alias answers alike."""

    model: NonEmpty
    adapters: Weighted | None = None
    user: str | None = None
    cache_salt: CacheSalt | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31), WHOLE] | None = None
    route: Literal["batch", "request", "prefix"] | None = None


class TruncationFields(Body):
    """vLLM's: how many tokens of a prompt are kept, and which side of it is cut; -1 is as many as fit."""

    truncate_prompt_tokens: Annotated[int, Field(ge=-1), WHOLE] | None = None
    truncation_side: Literal["left", "right"] | None = None


class SamplingBody(ModelBody):
    """What is asked of it at every door that generates."""

    min_tokens: Annotated[int, Field(ge=0), WHOLE] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1), WHOLE] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: LogitBias | None = None
    allowed_token_ids: AllowedTokenIds | None = None
    bad_words: BadWords | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63), WHOLE] | None = None
    stop: Annotated[str, Field(max_length=MAX_STOP_CHARS)] | Stops | None = None
    stop_token_ids: StopTokenIds | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    stream: bool | None = None
    include_route: bool | None = None


class FormatFields(Body):
    """What an answer has to match, by vLLM's and SGLang's names."""

    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: NonEmpty | None = None
    guided_choice: Choice | None = None
    guided_grammar: NonEmpty | None = None
    json_schema: dict[str, Any] | str | None = None
    regex: NonEmpty | None = None
    ebnf: NonEmpty | None = None


class GenerationBody(SamplingBody, TruncationFields, FormatFields, WithoutEffect, Unsupported):
    """What completions and chat have in common."""

    n: Annotated[int, Field(ge=1), WHOLE] | None = None
    best_of: Integer | None = None
    max_tokens: Integer | None = None
    response_format: ResponseFormat | None = None
    prompt_logprobs: Annotated[int, Field(ge=-1), WHOLE] | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    stream_options: StreamOptions | None = None


class CompletionBody(GenerationBody):
    prompt: NonEmpty | Texts | TokenIds | Prompts
    split_special_tokens: bool | None = None
    echo: bool | None = None
    logprobs: Integer | None = None


class ChatUnsupported(Body, without_effect=True):
    """The same for what only chat has."""

    echo: Off = None


class ChatBody(GenerationBody, ChatFields, ChatUnsupported):
    messages: Messages
    tool_choice: ToolChoiceOption = None
    parallel_tool_calls: bool | None = None
    functions: Annotated[list[FunctionBody], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    function_call: Literal["auto", "none"] | NamedFunction | None = None
    include_reasoning: bool | None = None
    separate_reasoning: bool | None = None
    max_completion_tokens: Integer | None = None
    logprobs: bool | None = None
    top_logprobs: Integer | None = None


class EmbeddingUnsupported(Body, without_effect=True):
    """What an embedding could be asked for and is not, with the values that ask for nothing."""

    normalize: On = None


class EmbeddingBody(ModelBody, TruncationFields, EmbeddingUnsupported):
    input: NonEmpty | Texts | TokenIds | Prompts
    pooling: Literal["mean", "last"] | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Integer | None = None
    add_special_tokens: bool | None = None
    split_special_tokens: bool | None = None


class TokenizeFields(Body):
    """What a prompt and messages have in common."""

    model: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class TokenizePromptBody(TokenizeFields):
    prompt: str
    messages: None = None
    split_special_tokens: bool | None = None


class TokenizeMessagesBody(TokenizeFields, ChatFields):
    messages: Messages
    prompt: None = None


class DetokenizeBody(Body):
    model: str | None = None
    tokens: TokenIds


# What is asked of the adapters' routes.


class VllmLoadFields(Body, without_effect=True):
    """What vLLM is told of an adapter that is read from its files here; the Gateway API's syncer sends the first."""

    base_model_name: str | None = None
    is_3d_lora_weight: Off = None
    lora_int_id: Integer | None = None


class LoadLoraBody(VllmLoadFields):
    lora_name: AdapterName
    lora_path: str
    load_inplace: bool | None = None
    pinned: bool | None = None


class UnloadLoraBody(VllmLoadFields):
    lora_name: str


class PinnedRoute(Body):
    group: Annotated[int, Field(ge=0, lt=2**31), WHOLE]
    weights: Annotated[
        list[Annotated[float, Field(ge=0, le=1)]], Field(min_length=1, max_length=MAX_EXPERTS, fail_fast=True)
    ]


class LoadAdapterBody(Body):
    name: AdapterName
    path: str
    load_inplace: bool | None = None
    pinned: PinnedRoute | None = None
    keep_resident: bool | None = None


class RollbackBody(Body):
    to: Digits | None = None


class AliasBody(Body):
    name: AdapterName
    targets: Targets


class ListQuery(Body):
    """What the query of a list may say: no more than so many cards, beginning behind the one with that `id`."""

    limit: Annotated[int, Field(ge=1, le=MAX_PAGE), WHOLE] | None = None
    after: NonEmpty | None = None


class UploadQuery(Body):
    """What the query of an upload may say: its body is the adapter."""

    load_inplace: bool | None = None
    keep_resident: bool | None = None
