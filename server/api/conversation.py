"""What a conversation is made of, as typed models: messages, functions that may be called, what templates are told."""

from typing import Annotated, Any, Literal

from pydantic import Field

from tucka_runtime.server.api.values import Body, EmptyList, Integer, NonEmpty

MAX_TOOLS = 128


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
    audio: None = None


class Unspoken(Echoed, without_effect=True):
    """What only the assistant's messages hold."""

    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: EmptyList | None = None
    function_call: None = None


class UserMessage(Unspoken):
    role: Literal["system", "developer", "user"]
    content: str | Parts
    name: str | None = None


class CalledFunction(Body):
    """`arguments` is JSON as text."""

    name: NonEmpty
    arguments: str


class ToolCall(Body):
    id: str | None = None
    type: Literal["function"] | None = None
    index: Integer | None = None
    function: CalledFunction


class AssistantMessage(Echoed):
    """Without content where there was nothing to say but a call or a refusal. `function_call` is the older name of one
    call."""

    role: Literal["assistant"]
    content: str | Parts | None = None
    name: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    function_call: CalledFunction | None = None


class ToolMessage(Unspoken):
    """What a function returned."""

    role: Literal["tool"]
    content: str | Parts | None = None
    tool_call_id: str | None = None
    name: str | None = None


class FunctionMessage(Unspoken):
    """The older form of the same, of the function `name`."""

    role: Literal["function"]
    content: str | Parts | None = None
    name: NonEmpty


ChatMessage = Annotated[UserMessage | AssistantMessage | ToolMessage | FunctionMessage, Field(discriminator="role")]
Messages = Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]


class FunctionBody(Body):
    """A function: `parameters` is the JSON schema of its arguments, an object; without it there are none. `strict` asks
    for what required calls always have: arguments of that schema."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:/-]{1,128}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolBody(Body):
    type: Literal["function"]
    function: FunctionBody


class SkippedTool(Body):
    """A tool that is no function of the client's, as those that OpenAI or Anthropic run: the model is not told of it,
    and the client is told that by its `type`."""

    named_by = "type"

    type: str


class NamedFunction(Body):
    name: NonEmpty


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction


class AllowedFunctions(Body):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, fail_fast=True)]


class AllowedTools(Body):
    """Of the functions of a conversation those that may be called now."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedFunctions


ToolChoiceOption = (
    Literal["auto", "none", "required"] | Annotated[NamedTool | AllowedTools, Field(discriminator="type")] | None
)


class TemplateFields(Body, without_effect=True):
    """What would change how messages are rendered and cannot be chosen."""

    chat_template: None = None
    documents: EmptyList | None = None


class RenderingFields(TemplateFields):
    """What messages are rendered with. `chat_template_kwargs` are further variables of the template."""

    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class ChatFields(RenderingFields):
    """The same with the functions that the model is told of."""

    tools: Annotated[list[ToolBody], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
