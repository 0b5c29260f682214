"""The bodies of Anthropic's Messages API as typed models, beside those of `server/api/bodies.py`.

Blocks, tools and settings that ask for something this server cannot do are refused; tools that Anthropic's own servers
would run are skipped.
"""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from tucka_runtime.server.api.bodies import ModelBody, SamplingBody
from tucka_runtime.server.api.conversation import MAX_TOOLS, SkippedTool
from tucka_runtime.server.api.values import Body, EmptyList, Integer, NonEmpty, Stops

_SENTENCES = {
    "role": "A message's `role` must be user, assistant or system",
    "content": "It must be a string or a list of blocks: `text`; in a user's message `tool_result` with text; in an "
    "assistant's `tool_use`, `thinking` and `redacted_thinking`. Images, documents, search results, files and what "
    "Anthropic's own tools return are not supported",
    "system": "It must be a string or a list of text blocks",
    "messages": "It must be a non-empty list of objects, each with `role` and `content`",
    "stop_sequences": "It must be a list of at most 16 strings, of 1 to 1024 characters each",
}


class Marked(Body, without_effect=True):
    """Where Anthropic would keep a prompt's beginning: every one is kept here."""

    cache_control: dict[str, Any] | None = None


class TextBlockEchoed(Marked, without_effect=True):
    citations: list[Any] | None = None


class TextBlock(TextBlockEchoed):
    type: Literal["text"]
    text: str


TextBlocks = Annotated[list[TextBlock], Field(fail_fast=True)]


class ToolUseBlock(Marked):
    """A call that the assistant made."""

    type: Literal["tool_use"]
    id: NonEmpty
    name: NonEmpty
    input: dict[str, Any]


class ToolResultBlock(Marked):
    """What it returned."""

    type: Literal["tool_result"]
    tool_use_id: NonEmpty
    content: str | TextBlocks | None = None
    is_error: bool | None = None


class Signed(Marked, without_effect=True):
    """What Anthropic's servers know their own thoughts by."""

    signature: str | None = None


class ThinkingBlock(Signed):
    type: Literal["thinking"]
    thinking: str


class Sealed(Marked, without_effect=True):
    """A thought that only Anthropic's servers can read."""

    data: str | None = None


class RedactedThinkingBlock(Sealed):
    type: Literal["redacted_thinking"]


UserBlock = Annotated[TextBlock | ToolResultBlock, Field(discriminator="type")]
AssistantBlock = Annotated[
    TextBlock | ToolUseBlock | ThinkingBlock | RedactedThinkingBlock, Field(discriminator="type")
]


class UserTurn(Body):
    role: Literal["user"]
    content: str | Annotated[list[UserBlock], Field(fail_fast=True)]


class AssistantTurn(Body):
    role: Literal["assistant"]
    content: str | Annotated[list[AssistantBlock], Field(fail_fast=True)]


class SystemTurn(Body):
    role: Literal["system"]
    content: str | TextBlocks


Turn = Annotated[UserTurn | AssistantTurn | SystemTurn, Field(discriminator="role")]


class CustomTool(Marked):
    """A function that the client runs. `input_schema` is the JSON schema of its arguments, an object."""

    type: Literal["custom"] | None = None
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:/-]{1,128}$")]
    description: str | None = None
    input_schema: dict[str, Any]


def _kind_of_tool(tool: Any) -> str:
    kind = tool.get("type") if isinstance(tool, dict) else getattr(tool, "type", None)
    return "server" if isinstance(kind, str) and kind != "custom" else "custom"


Tool = Annotated[
    Annotated[CustomTool, Tag("custom")] | Annotated[SkippedTool, Tag("server")], Discriminator(_kind_of_tool)
]


class ToolChoice(Body):
    """`name` goes with the type `tool`, and only with it."""

    type: Literal["auto", "any", "tool", "none"]
    name: NonEmpty | None = None
    disable_parallel_tool_use: bool | None = None


class ThinkingBudget(Body, without_effect=True):
    """A thought ends where the model ends it, or at `max_tokens`."""

    budget_tokens: Integer | None = None


class Thinking(ThinkingBudget):
    """`display` "omitted": thoughts are left out of the answer."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    display: Literal["summarized", "omitted"] | None = None


class OutputEffort(Body, without_effect=True):
    effort: str | None = None


class OutputFormat(Body):
    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(OutputEffort):
    format: OutputFormat | None = None


class AnthropicWithoutEffect(Marked, without_effect=True):
    """Fields that change nothing about an answer, with the values that Anthropic knows, or that ask for nothing."""

    metadata: dict[str, Any] | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    container: None = None
    mcp_servers: EmptyList | None = None
    output_format: None = None
    """The older name of `output_config.format`."""


class ConversationBody(ModelBody, AnthropicWithoutEffect):
    """What a prompt is made of."""

    sentences = _SENTENCES

    messages: Annotated[list[Turn], Field(min_length=1, fail_fast=True)]
    system: str | TextBlocks | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: bool | None = None


class CountTokensBody(ConversationBody):
    """The same body as for an answer may be sent: what would only shape that is without effect."""


class MessagesBody(ConversationBody, SamplingBody):
    max_tokens: Integer
    stop: Annotated[Stops | None, Field(alias="stop_sequences")] = None
    output_config: OutputConfig | None = None
