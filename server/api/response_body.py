"""The body of POST /v1/responses: OpenAI's newer shape of a conversation, as items in place of messages."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from tucka_runtime.server.api.bodies import (
    FormatFields,
    JsonObjectFormat,
    JsonSchema,
    SamplingBody,
    TextFormat,
    Unsupported,
    WithoutEffect,
)
from tucka_runtime.server.api.conversation import MAX_TOOLS, FunctionBody, RefusalPart, RenderingFields, SkippedTool
from tucka_runtime.server.api.values import WHOLE, Body, Integer, NonEmpty, Nothing, Off, On

LOGPROBS = "message.output_text.logprobs"


class InputText(Body):
    type: Literal["input_text"]
    text: str


class EchoedText(Body, without_effect=True):
    """What an answer's text has beside itself."""

    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class OutputText(EchoedText):
    type: Literal["output_text"]
    text: str


Part = Annotated[InputText | OutputText | RefusalPart, Field(discriminator="type")]


class EchoedItem(Body, without_effect=True):
    """What items of an answer have, and clients send back."""

    id: str | None = None
    status: str | None = None
    phase: str | None = None


class MessageItem(EchoedItem):
    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Field(fail_fast=True)]


class CallItem(EchoedItem):
    """A call of a function; `arguments` is JSON as text."""

    type: Literal["function_call"]
    call_id: NonEmpty
    name: NonEmpty
    arguments: str


class CallOutputItem(EchoedItem):
    """What a function returned."""

    type: Literal["function_call_output"]
    call_id: NonEmpty
    output: str | Annotated[list[InputText], Field(fail_fast=True)]


class SummaryText(Body):
    type: Literal["summary_text"]
    text: str


class ReasoningText(Body):
    type: Literal["reasoning_text"]
    text: str


class EchoedThought(EchoedItem, without_effect=True):
    encrypted_content: str | None = None


class ReasoningItem(EchoedThought):
    """A thought. Its summary counts where that is all there is."""

    type: Literal["reasoning"]
    content: Annotated[list[ReasoningText], Field(fail_fast=True)] | None = None
    summary: Annotated[list[SummaryText], Field(fail_fast=True)] | None = None


def _item_kind(value: Any) -> str | None:
    if not isinstance(value, dict):
        return None
    kind = value.get("type")
    if kind is None and "role" in value:
        return "message"
    return kind if isinstance(kind, str) else None


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[CallOutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(_item_kind),
]


class FunctionTool(FunctionBody):
    type: Literal["function"]


class OtherTool(SkippedTool):
    type: Annotated[str, Field(json_schema_extra={"not": {"const": "function"}})]


def _tool_kind(value: Any) -> str:
    return "function" if isinstance(value, dict) and value.get("type") == "function" else "other"


ResponseTool = Annotated[
    Annotated[FunctionTool, Tag("function")] | Annotated[OtherTool, Tag("other")], Discriminator(_tool_kind)
]


class FunctionChoice(Body):
    type: Literal["function"]
    name: NonEmpty


class AllowedChoice(Body):
    """Of the functions those that may be called now."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[FunctionChoice], Field(min_length=1, fail_fast=True)]


class SchemaFormat(JsonSchema):
    type: Literal["json_schema"]


class TextWithoutEffect(Body, without_effect=True):
    verbosity: str | None = None


class TextConfig(TextWithoutEffect):
    format: Annotated[TextFormat | JsonObjectFormat | SchemaFormat, Field(discriminator="type")] | None = None


class ResponseStreamOptions(Body, without_effect=True):
    include_obfuscation: Off = None


class ResponseWithoutEffect(Body, without_effect=True):
    """Further fields that change nothing about an answer of this server. No tool is run here, so that there are no
    calls of such to be counted."""

    reasoning: dict[str, Any] | None = None
    max_tool_calls: Integer | None = None
    prompt_cache_options: dict[str, Any] | None = None
    stream_options: ResponseStreamOptions | None = None


class ResponseUnsupported(Body, without_effect=True):
    """Further fields for what this server cannot do, and chat's for what has another name or no place here, with the
    values that ask for nothing."""

    previous_response_id: None = None
    conversation: None = None
    prompt: None = None
    background: Off = None
    truncation: Literal["disabled"] | None = None
    context_management: Nothing = None
    moderation: None = None
    n: Annotated[int, Field(ge=1, le=1), WHOLE] | None = None
    best_of: Annotated[int, Field(ge=1, le=1), WHOLE] | None = None
    max_tokens: None = None
    max_completion_tokens: None = None
    response_format: None = None
    logprobs: Off = None
    return_token_ids: Off = None
    return_tokens_as_token_ids: Off = None
    include_reasoning: On = None
    separate_reasoning: On = None


class ResponseBody(
    SamplingBody,
    FormatFields,
    RenderingFields,
    WithoutEffect,
    Unsupported,
    ResponseWithoutEffect,
    ResponseUnsupported,
):
    """`include` are further things that an answer may have: of those the log-probabilities exist here."""

    input: NonEmpty | Annotated[list[Item], Field(min_length=1, fail_fast=True)]
    instructions: str | None = None
    max_output_tokens: Integer | None = None
    tools: Annotated[list[ResponseTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: (
        Literal["auto", "none", "required"]
        | Annotated[FunctionChoice | AllowedChoice, Field(discriminator="type")]
        | None
    ) = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    include: (
        Annotated[
            list[
                Literal[
                    "message.output_text.logprobs",
                    "reasoning.encrypted_content",
                    "message.input_image.image_url",
                    "file_search_call.results",
                    "web_search_call.results",
                    "web_search_call.action.sources",
                    "computer_call_output.output.image_url",
                    "code_interpreter_call.outputs",
                ]
            ],
            Field(fail_fast=True),
        ]
        | None
    ) = None
    top_logprobs: Integer | None = None
    metadata: dict[str, Any] | None = None
