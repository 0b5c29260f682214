"""What requests get that leave it unset, how their conversations are written, and what their text is in tokens: as the
base has it, or an adapter that brings its own (`--adapter-defaults`).

What a request says comes first, then its adapter, then the base, then the server.
"""

from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path

from tucka_runtime.adapters.defaults import AdapterDefaults, GenerationDefaults
from tucka_runtime.adapters.files import GENERATION_NAME, TOKENIZER_CONFIG_NAME, TOKENIZER_NAME
from tucka_runtime.config import ServerConfig
from tucka_runtime.conversations import call_format
from tucka_runtime.errors import InvalidAdapterError, InvalidRequestError
from tucka_runtime.server.service.chat_template import (
    TRIAL,
    ChatTemplate,
    EndedError,
    Renderer,
    Rendering,
    TooLongError,
)
from tucka_runtime.server.service.own_tokenizers import OwnTokenizers
from tucka_runtime.server.service.reasoning import thinks
from tucka_runtime.tokenizer import Tokenizer

MAX_KNOWN = 1024
"""Adapters whose defaults stay in memory: those used last."""
MAX_SAID = 200
_TRIAL_TOOL = {
    "type": "function",
    "function": {"name": "look", "description": "", "parameters": {"type": "object", "properties": {}}},
}


@dataclass(frozen=True)
class Defaults:
    """`tokenizer` and `template` are None where there is none. `call_format` is the name of the format of calls in
    answers, what is set or what the template teaches; `thinks`: answers may begin with a thought, likewise."""

    tokenizer: Tokenizer | None
    template: ChatTemplate | None
    call_format: str
    thinks: bool
    generation: GenerationDefaults

    @classmethod
    def of(
        cls,
        tokenizer: Tokenizer | None,
        template: ChatTemplate | None,
        config: ServerConfig,
        generation: GenerationDefaults | None = None,
    ) -> "Defaults":
        taught = call_format(template.with_tools) if template and template.takes_tools else "json"
        own = template is not None and thinks(template.with_tools)
        return cls(
            tokenizer,
            template,
            taught if config.tool_call_parser == "auto" else config.tool_call_parser,
            own if config.reasoning_parser == "auto" else config.reasoning_parser == "think",
            generation or GenerationDefaults(),
        )

    def text_tokenizer(self, param: str | None) -> Tokenizer:
        """The tokenizer. Raises InvalidRequestError if there is none."""
        if self.tokenizer is None:
            raise InvalidRequestError(
                "The base model's folder has no tokenizer, so only prompts of token ids can be served. Send token ids "
                "to /v1/completions, or start the server with a folder that has tokenizer files.",
                param,
            )
        return self.tokenizer

    def chat_template(self, param: str) -> ChatTemplate:
        """The chat template. Raises InvalidRequestError if there is none."""
        self.text_tokenizer(param)
        if self.template is None:
            raise InvalidRequestError(
                "The base model has no chat template. Use /v1/completions with a prompt of your own, or start the "
                "server with a folder whose tokenizer has a chat template.",
                param,
            )
        return self.template


class OwnDefaults:
    """Checks what adapters bring, and makes it ready for their requests. Their templates are rendered by the `renderer`
    of the base's; what is new is tried out in a process beside it, so that no request waits for that."""

    def __init__(self, config: ServerConfig, tokenizer: Tokenizer | None, base: ChatTemplate | None, vocab_size: int):
        self._config, self._tokenizer, self._base = config, tokenizer, base
        self._vocab_size = vocab_size
        self._tokenizers = OwnTokenizers(tokenizer) if tokenizer is not None else None
        self._renderer = base.renderer if base is not None else Renderer()
        self._trials = Renderer()
        self._tried: set[int] = set()
        self._known: OrderedDict[str, Defaults] = OrderedDict()

    async def check(self, found: AdapterDefaults, folder: Path) -> tuple[str, ...]:
        """What the files in a folder set, by name. Raises InvalidAdapterError for what cannot be served, TuckaError
        where it cannot be tried out."""
        tokenizer = await self._tokenizer_of(found, folder)
        adds = tokenizer is not self._tokenizer
        own = tokenizer.added_ids if tokenizer is not None and adds else ()
        if any(token >= self._vocab_size and token not in own for token in found.generation.eos_token_id):
            raise InvalidAdapterError(
                f"the adapter's {GENERATION_NAME}: `eos_token_id` goes past this base's vocabulary of "
                f"{self._vocab_size}, and is no token that the adapter's {TOKENIZER_NAME} adds. Mend it, or take the "
                "file out of the folder."
            )
        if found.eos_token is not None and tokenizer and tokenizer.id_of(found.eos_token) is None:
            raise InvalidAdapterError(
                f"the adapter's {TOKENIZER_CONFIG_NAME}: `eos_token` is no token of this base's tokenizer, nor added "
                f"by the adapter's {TOKENIZER_NAME}. Mend it, or take the file out of the folder."
            )
        if found.template is not None:
            await self._try_out(found.template, found, Rendering())
            tools = Rendering(tools=[_TRIAL_TOOL])
            await self._try_out(found.tool_template or found.template, found, tools)
        return ("tokenizer", *found.names) if adds else found.names

    def known(self, blob: str) -> Defaults | None:
        """What was made of that content, if it is still at hand."""
        if (made := self._known.get(blob)) is not None:
            self._known.move_to_end(blob)
        return made

    async def make(self, folder: Path, found: AdapterDefaults, vocab_size: int | None) -> Defaults:
        """What is read of the copy in a folder, made ready and kept. `vocab_size` is that of its own vocabulary, if it
        has one: end tokens past it have no row there, and are never written. Raises what `check` does."""
        tokenizer = await self._tokenizer_of(found, folder)
        template = self._base
        if found.template is not None:
            special = self._special_tokens | dict(found.special_tokens)
            template = ChatTemplate(found.template, special, found.tool_template, self._renderer, "adapter")
        ends = found.generation.eos_token_id
        if found.eos_token is not None and tokenizer is not None:
            own = tokenizer.id_of(found.eos_token)
            ends = ends if own is None or own in ends else (*ends, own)
        ends = tuple(token for token in ends if token < (vocab_size or self._vocab_size))
        made = Defaults.of(tokenizer, template, self._config, replace(found.generation, eos_token_id=ends))
        self._known[folder.name] = made
        while len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)
        return made

    async def stop(self) -> None:
        """Ends the processes that render."""
        await self._renderer.stop()
        await self._trials.stop()

    async def _tokenizer_of(self, found: AdapterDefaults, folder: Path) -> Tokenizer | None:
        if found.tokenizer is None or self._tokenizers is None:
            return self._tokenizer
        return await self._tokenizers.of(folder, found.tokenizer)

    @property
    def _special_tokens(self) -> dict[str, str]:
        return self._tokenizer.special_tokens if self._tokenizer is not None else {}

    async def _try_out(self, template: str, found: AdapterDefaults, rendering: Rendering) -> None:
        """Renders one small conversation. What the template itself says against that is its right."""
        special = self._special_tokens | dict(found.special_tokens)
        about = hash((template, tuple(sorted(special.items())), rendering.tools is None))
        if about in self._tried:
            return
        try:
            answer = await self._trials.render(template, special, TRIAL, rendering)
        except TooLongError:
            raise _unusable("a conversation of one message takes it longer than any may take") from None
        except EndedError:
            raise _unusable("the process that renders it ends under it") from None
        if "text" not in answer and not answer["refused"]:
            said = "".join(c for c in answer["error"][:MAX_SAID] if c.isprintable())
            raise _unusable(said or "it fails on a conversation of one message, or makes too much of it")
        self._tried.add(about)


def _unusable(why: str) -> InvalidAdapterError:
    return InvalidAdapterError(
        f"the adapter's chat template cannot be used: {why}. Mend it, or take it out of the folder."
    )
