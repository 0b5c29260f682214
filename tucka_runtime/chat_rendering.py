"""A conversation as the prompt that a chat template makes of it."""

from collections.abc import Mapping, Sequence
from typing import Any


def render_chat(
    template: str,
    special_tokens: Mapping[str, str],
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
) -> str:
    """The prompt that a chat template, in transformers' sandbox, makes of a conversation."""
    from transformers.utils.chat_template_utils import render_jinja_template

    conversations: Any = [list(messages)]
    known: dict[str, Any] = {**special_tokens, **(variables or {})}
    rendered = render_jinja_template(
        conversations,
        tools=None if tools is None else list(map(dict, tools)),
        chat_template=template,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        **known,
    )
    return rendered[0][0] if isinstance(rendered, tuple) else rendered[0]
