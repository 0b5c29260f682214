"""Conversations to token ids: what a request for each of the assistant's turns sends, and what answers it.

A turn is what the chat template writes behind the prompt that asks for it, up to the end token. Templates that write
history otherwise than they ask for it (they leave thoughts of earlier turns out, or open one in the prompt) have no
such rest; then the turn is what the message says.
"""

import re
from collections.abc import Iterator
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from tucka_runtime.conversations import CLOSE, OPEN, Message, call_format, takes_tools, with_short_ids, without_tools
from tucka_runtime.tokenizer import Tokenizer
from tucka_runtime.trainer.records import DataError, TrainingRecord

_MARKED = re.compile(r"\{%-?\s*generation\b")


class Talk:
    """One record's conversation as its template is given it."""

    def __init__(self, record: TrainingRecord, tokenizer: Tokenizer):
        """Raises DataError where the base has no chat template."""
        if tokenizer.chat_template is None:
            raise DataError(
                "The records are conversations, which need a chat template, and this base's tokenizer has none. Use "
                "records with prompt/completion, or the base's chat version; nothing was trained."
            )
        self._tokenizer = tokenizer
        self._learnt = record.learnt
        messages, tools = list(record.messages), list(record.tools)
        template = tokenizer.tool_template or tokenizer.chat_template
        if not takes_tools(template):
            messages, tools = without_tools(messages, tools), []
        elif call_format(template) == "mistral":
            messages = with_short_ids(messages)
        self._messages, self._tools = messages, tools
        self._template = template if tools else tokenizer.chat_template

    def turns(self) -> Iterator[tuple[str, str, int]]:
        """(prompt, answer, end token) of every turn that is learnt, what people wrote in them marked by
        `Tokenizer.shield`. Raises ValueError with the reason where one cannot be."""
        for i, learnt in enumerate(self._learnt):
            if learnt:
                prompt = self._prompt(i)
                yield prompt, *self._said(prompt, i)

    @property
    def last_prompt(self) -> str:
        """The prompt of the last turn that is learnt. Raises what the template raises."""
        return self._prompt(max(i for i, learnt in enumerate(self._learnt) if learnt))

    def _prompt(self, i: int) -> str:
        return self._render(self._messages[:i], asks=True)

    def marked(self) -> list[tuple[str, bool]]:
        """The whole conversation in pieces, and which of them are learnt: those that the template puts between
        {% generation %} and {% endgeneration %}. Raises DataError where it marks none."""
        if not _MARKED.search(self._template):
            raise DataError(
                "--learn generation: this base's chat template marks nothing with {% generation %}. Use --learn all, "
                "which learns the same turns one by one; nothing was trained."
            )
        shield, known = self._tokenizer.shield, {**self._tokenizer.special_tokens}
        made: Any = render_jinja_template(
            [shield(self._messages)], shield(self._tools) or None, None, self._template, True, False, False, **known
        )
        (text,), (spans,) = made
        said = [m["role"] == "assistant" for m in self._messages]
        wanted = [learnt for learnt, own in zip(self._learnt, said, strict=True) if own]
        if not all(wanted) and len(spans) != len(wanted):
            raise ValueError("the template does not mark each turn by itself, so those of weight 0 cannot be left out")
        pieces, at = [], 0
        for i, (begin, end) in enumerate(spans):
            pieces += [(text[at:begin], False), (text[begin:end], len(spans) != len(wanted) or wanted[i])]
            at = end
        return [*pieces, (text[at:], False)]

    def _render(self, messages: list[Message], asks: bool) -> str:
        return self._tokenizer.render(messages, self._tools or None, add_generation_prompt=asks)

    def _said(self, prompt: str, i: int) -> tuple[str, int]:
        """What the assistant says in message `i`, and the token that ends it."""
        message, end = self._messages[i], self._tokenizer.ends[0]
        whole = self._render(self._messages[: i + 1], asks=False)
        thought = message.get("reasoning_content")
        if not whole.startswith(prompt):
            if "tool_calls" in message:
                raise ValueError(
                    f"message {i + 1} calls a function, and this base's chat template does not begin its history with "
                    "what it asks with, so it is not known how the call is to be written"
                )
            return self._tokenizer.shield(self._spelled(prompt, message["content"], thought)), end
        rest = whole[len(prompt) :]
        places = {token: rest.find(self._tokenizer.token(token) or "\0") for token in self._tokenizer.ends}
        if found := {token: place for token, place in places.items() if place >= 0}:
            end = min(found, key=found.__getitem__)
            rest = rest[: found[end]]
        if thought and self._tokenizer.shield(thought).strip() not in rest:
            raise ValueError(
                f"message {i + 1} has a reasoning, which this base's chat template leaves out. Write it into the "
                "content, or take the key out"
            )
        content = self._tokenizer.shield(message["content"])
        plain = not thought and "tool_calls" not in message
        # Blanks that a template puts around a text are not what an answer is compared with; and where it names no end,
        # what stands behind a text may be the next prompt's.
        if plain and (not found or rest.strip() == content.strip()):
            return content, end
        return rest if found else rest.rstrip(), end

    def _spelled(self, prompt: str, content: str, thought: str | None) -> str:
        """A turn as the message says it; a thought that the prompt has opened is closed, if need be an empty one."""
        opened = prompt.rstrip().endswith(OPEN)
        if thought:
            content = f"{OPEN}\n{thought}\n{CLOSE}\n\n{content}"
        elif opened and CLOSE not in content:
            content = f"{OPEN}\n\n{CLOSE}\n\n{content}"
        if opened:
            content = content.removeprefix(OPEN)
        return content.removeprefix("\n") if opened and prompt.endswith("\n") else content


def piecewise(pieces: list[tuple[str, bool]], tokenizer: Tokenizer) -> tuple[list[int], list[tuple[int, int]]]:
    """The ids of pieces that follow each other, and where those that are learnt stand. An end token that follows such
    a piece is learnt with it. Raises DataError where none would be learnt: the model would never stop."""
    ids: list[int] = []
    learnt: list[tuple[int, int]] = []
    before = ""
    for text, own in pieces:
        begin = len(ids)
        ids += tokenizer.encode_completion(before, text, False) if before else tokenizer.encode(text, False)
        before += text
        if own and len(ids) > begin:
            learnt.append((begin, len(ids)))
        elif learnt and learnt[-1][1] == begin and ids[begin : begin + 1] and ids[begin] in tokenizer.ends:
            learnt[-1] = (learnt[-1][0], begin + 1)
    if learnt and not any(id_ in tokenizer.ends for first, last in learnt for id_ in ids[first:last]):
        raise DataError(
            "--learn generation: no end token stands in or behind what this base's chat template marks with "
            "{% generation %}, so that answers would never end. Use --learn all; nothing was trained."
        )
    return ids, learnt
