"""What an adapter's folder sets for requests that leave it unset: a chat template of its own, and how answers are
generated. Only data: a template is text here, and nothing in this module renders it.

The files are transformers' own, as `save_pretrained` of a tokenizer and of a GenerationConfig writes them.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from tucka_runtime.adapters.config_fields import printable
from tucka_runtime.adapters.files import (
    DEFAULTS_LIMITS,
    GENERATION_NAME,
    TEMPLATE_NAME,
    TOKENIZER_CONFIG_NAME,
    TOKENIZER_NAME,
    strict_json,
)
from tucka_runtime.errors import InvalidAdapterError

MAX_ENDS = 128
MAX_TOKEN_CHARS = 256
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_IDLE = {"bos_token_id", "pad_token_id", "transformers_version", "_from_model_config"}
"""Fields of generation_config.json that say nothing about how this server answers."""


@dataclass(frozen=True)
class GenerationDefaults:
    """How answers are generated where a request does not say. `eos_token_id` end an answer beside the base's own."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    eos_token_id: tuple[int, ...] = ()


@dataclass(frozen=True)
class AdapterDefaults:
    """What a folder sets. Its own template knows `special_tokens` by their names; `eos_token` is one of them, and ends
    answers with or without a template. `ignored` are the fields of generation_config.json that change nothing here.
    `tokenizer` is the SHA-256 of its tokenizer.json: what that adds can be said beside a base alone."""

    template: str | None = None
    tool_template: str | None = None
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    generation: GenerationDefaults = GenerationDefaults()
    ignored: tuple[str, ...] = ()
    tokenizer: str | None = None

    @property
    def eos_token(self) -> str | None:
        return self.special_tokens.get("eos_token")

    @property
    def names(self) -> tuple[str, ...]:
        """What is set, by name, but for the tokenizer."""
        found = ["chat_template"] if self.template is not None else []
        found += ["eos_token"] if self.eos_token is not None else []
        found += [one.name for one in fields(self.generation) if getattr(self.generation, one.name) not in (None, ())]
        return tuple(found)


def parse_defaults(files: Mapping[str, bytes | bytearray]) -> AdapterDefaults:
    """Of the files of an adapter by their names (`read_defaults`). Raises InvalidAdapterError, which names the file and
    the field."""
    tokenizer = _table(files, TOKENIZER_CONFIG_NAME)
    template, tool_template = _templates(tokenizer.get("chat_template"))
    if TEMPLATE_NAME in files:
        try:
            template, tool_template = files[TEMPLATE_NAME].decode("utf-8-sig"), None
        except UnicodeDecodeError:
            raise InvalidAdapterError(f"the adapter's {TEMPLATE_NAME} is not valid UTF-8. Save it again.") from None
    special = {name: text for name in _SPECIAL if (text := _token(name, tokenizer.get(name))) is not None}
    generation, ignored = _generation(_table(files, GENERATION_NAME))
    own = hashlib.sha256(files[TOKENIZER_NAME]).hexdigest() if TOKENIZER_NAME in files else None
    return AdapterDefaults(template, tool_template, special, generation, ignored, own)


def _table(files: Mapping[str, bytes | bytearray], name: str) -> dict[str, Any]:
    if name not in files:
        return {}
    try:
        table = strict_json(files[name].removeprefix(b"\xef\xbb\xbf"))
    except ValueError as error:
        raise InvalidAdapterError(f"the adapter's {name} cannot be read: {error}. Save it again.") from None
    if not isinstance(table, dict):
        raise InvalidAdapterError(f"the adapter's {name} holds no JSON object. Save it again.")
    return table


def _wrong(file: str, name: str, rule: str) -> InvalidAdapterError:
    return InvalidAdapterError(
        f"the adapter's {file}: `{name}` must be {rule}. Mend it, or take the file out of the folder."
    )


def _templates(value: Any) -> tuple[str | None, str | None]:
    """The template and the one of conversations with tools, of a text or of a list of named ones."""
    if value is None or isinstance(value, str):
        named = {"default": value}
    else:
        rule = "a text, or a list of objects with a `name` and a `template`"
        if not isinstance(value, list) or not all(
            isinstance(one, dict) and isinstance(one.get("name"), str) and isinstance(one.get("template"), str)
            for one in value
        ):
            raise _wrong(TOKENIZER_CONFIG_NAME, "chat_template", rule)
        named = {one["name"]: one["template"] for one in value}
    found = named.get("default"), named.get("tool_use")
    most = DEFAULTS_LIMITS[TEMPLATE_NAME]
    if any(text is not None and len(text.encode()) > most for text in found):
        raise _wrong(TOKENIZER_CONFIG_NAME, "chat_template", f"at most {most} bytes")
    return found if found[0] is not None else (None, None)


def _token(name: str, value: Any) -> str | None:
    text = value.get("content") if isinstance(value, dict) else value
    if text is not None and not (isinstance(text, str) and len(text) <= MAX_TOKEN_CHARS):
        raise _wrong(
            TOKENIZER_CONFIG_NAME, name, f"a token: a text of at most {MAX_TOKEN_CHARS} characters, or an object"
        )
    return text or None


def _generation(table: Mapping[str, Any]) -> tuple[GenerationDefaults, tuple[str, ...]]:
    """The ranges are those that requests' fields of the same names have."""
    values = {
        name: table[name]
        for name, (_, allowed) in _RULES.items()
        if table.get(name) is not None and _allowed(name, table[name], allowed)
    }
    if table.get("do_sample") is False:
        values["temperature"] = 0.0
    ends = values.pop("eos_token_id", ())
    values.pop("do_sample", None)
    ignored = [name for name, value in table.items() if name not in _RULES and name not in _IDLE and value is not None]
    return (
        GenerationDefaults(**values, eos_token_id=(ends,) if isinstance(ends, int) else tuple(ends)),
        tuple(printable(name) for name in sorted(ignored)),
    )


def _allowed(name: str, value: Any, allowed: Callable[[Any], bool]) -> bool:
    if not allowed(value):
        raise _wrong(GENERATION_NAME, name, _RULES[name][0])
    return True


def _number(least: float, most: float) -> tuple[str, Callable[[Any], bool]]:
    return f"a number from {least:g} to {most:g}", lambda value: type(value) in (int, float) and least <= value <= most


def _integer(least: int) -> tuple[str, Callable[[Any], bool]]:
    return f"an integer from {least} to 2^31", lambda value: type(value) is int and least <= value <= 2**31


def _is_token(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "temperature": _number(0, 2),
    "top_p": _number(0, 1),
    "top_k": _integer(-1),
    "min_p": _number(0, 1),
    "repetition_penalty": _number(0.01, 100),
    "max_new_tokens": _integer(1),
    "min_new_tokens": _integer(0),
    "do_sample": ("true or false", lambda value: type(value) is bool),
    "eos_token_id": (
        f"a token id, or a list of up to {MAX_ENDS}",
        lambda value: (
            _is_token(value) or (type(value) is list and len(value) <= MAX_ENDS and all(map(_is_token, value)))
        ),
    ),
}
