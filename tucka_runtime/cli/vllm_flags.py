"""`vllm serve`'s command line as `tucka serve` takes it: what KServe, AIBrix and others render for vLLM starts this
server as meant. What is vLLM's alone is translated here and nowhere else, and each of it leaves a line that says what
it became.

KServe's are in addLoRAVLLMArgs of its controller and in its LLMInferenceServiceConfig, AIBrix's in its samples. vLLM's
own rules are those of its LoRAParserAction and FlexibleArgumentParser.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence

from tucka_runtime.errors import ConfigError

Translation = tuple[list[str], str]
"""What a flag becomes here, and the line that says so."""

_WITHOUT_EFFECT: dict[str, tuple[int, str]] = {
    "--enable-lora": (0, "adapters are always served"),
    "--max-lora-rank": (1, "adapters of every rank are served"),
    "--max-cpu-loras": (1, "--adapter-host-bytes bounds the adapters in the host's memory, by their size"),
    "--enable-prefix-caching": (0, "prompts' KV is always kept for reuse"),
    "--enable-chunked-prefill": (0, "long prompts always go in chunks"),
    "--enable-auto-tool-choice": (0, "tools are always called where the model chooses to"),
    "--trust-remote-code": (0, "no code of a model is ever run"),
    "--disable-log-requests": (0, "a request's line in the log has no prompt"),
    "--uvicorn-log-level": (1, "the log has one level"),
    "--disable-uvicorn-access-log": (0, "probes and scrapes leave no line, all others one"),
    "--disable-access-log-for-endpoints": (1, "probes and scrapes leave no line"),
    "--gpu-memory-utilization": (1, "--kv-cache-tokens sets the size of the KV cache"),
}
"""Flags that ask for what holds here anyway, or for what there is nothing of: how many values each takes, and why."""

_HINTS = {
    "--speculative-config": "For --speculative-config with the method ngram write --speculate ngram; its numbers are "
    "--speculate-tokens, --speculate-min-ngram and --speculate-max-ngram. There is no other method.",
    "--ssl-certfile": "There is no TLS here: leave --ssl-certfile out and put a proxy in front.",
    "--kv-transfer-config": "KV is not moved between servers: leave --kv-transfer-config out.",
}


def translate(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """What stands after `tucka serve` in this server's words, and a line for each part that was vLLM's. Flags may have
    underscores, and their value behind `=`. Raises ConfigError for a value that vLLM would refuse too, or that asks
    for what there is not."""
    ours: list[str] = []
    lines: list[str] = []
    for written, flag, values in _groups(arguments):
        if flag in _WITHOUT_EFFECT:
            count, why = _WITHOUT_EFFECT[flag]
            if not count and "=" in written[0]:
                raise ConfigError(f"{flag} takes no value. Leave it out: {why}.")
            ours += values[count:]
            lines.append(f"{flag} has no effect: {why}")
        elif flag in _TRANSLATIONS and values and (translated := _TRANSLATIONS[flag](values)) is not None:
            ours += translated[0]
            lines.append(translated[1])
        else:
            ours += written
    return ours, lines


def hints(unknown: Sequence[str]) -> list[str]:
    """What to write instead of what `vllm serve` takes and this server cannot."""
    return [hint for flag, hint in _HINTS.items() if any(argument.startswith(flag) for argument in unknown)]


def _groups(arguments: Sequence[str]) -> Iterator[tuple[list[str], str, list[str]]]:
    """Each flag as it is written, its name as vLLM's documentation has it, and what follows up to the next. What stands
    before the first flag has the name ""."""
    starts = [i for i, argument in enumerate(arguments) if re.match(r"--?[A-Za-z]", argument)]
    for start, end in zip([0, *starts], [*starts, len(arguments)], strict=True):
        written = list(arguments[start:end])
        if start not in starts:
            if written:
                yield written, "", written
        elif start != end:
            name, equals, value = written[0].partition("=")
            yield written, name.replace("_", "-"), [value, *written[1:]] if equals else written[1:]


def _model(values: list[str]) -> Translation:
    return ["--model", *values], "the model that stands before the flags became --model"


def _slots(values: list[str]) -> Translation:
    return [
        "--adapter-slots",
        *values,
    ], f"--max-loras became --adapter-slots {values[0]}: other adapters wait their turn"


def _names(values: list[str]) -> Translation | None:
    if len(values) == 1:
        return None
    flags = [part for name in values for part in ("--served-model-name", name)]
    return flags, f"--served-model-name became one for each of {', '.join(values)}"


def _dtype(values: list[str]) -> Translation | None:
    name = {"half": "float16", "float": "float32"}.get(values[0])
    return None if name is None else (["--dtype", name, *values[1:]], f"--dtype {values[0]} became {name}")


def _parallel(values: list[str]) -> Translation:
    if values[0] != "1":
        raise ConfigError("--tensor-parallel-size: a server runs on one device. Leave it out, or say 1.")
    return values[1:], "--tensor-parallel-size has no effect: a server runs on one device"


def _modules(values: list[str]) -> Translation:
    adapters = [_module(value) for value in values]
    names = ", ".join(adapter.partition("=")[0] for adapter in adapters)
    flags = [part for adapter in adapters for part in ("--adapter", adapter)]
    return flags, f"--lora-modules became --adapter, once for each of {names}"


def _module(text: str) -> str:
    """NAME=PATH of vLLM's NAME=PATH, or of its JSON object, whose `base_model_name` says nothing new. KServe puts
    single quotes around that for a shell; where none reads it they are still there."""
    if text[:1] == text[-1:] == "'":
        text = text[1:-1]
    if "{" not in text:
        if not all(text.partition("=")):
            raise ConfigError(
                "--lora-modules takes NAME=PATH, or a JSON object with name and path, once or several times."
            )
        return text
    try:
        module = json.loads(text)
        extra = set(module) - {"name", "path", "base_model_name"}
        name, path = module["name"], module["path"]
    except (ValueError, TypeError, KeyError):
        raise ConfigError(
            '--lora-modules: an adapter must be an object as {"name": "law", "path": "/a/law"}.'
        ) from None
    if extra or not (isinstance(name, str) and isinstance(path, str)):
        raise ConfigError("--lora-modules: an adapter is its name and path, as texts; base_model_name may stand there.")
    return f"{name}={path}"


_TRANSLATIONS: dict[str, Callable[[list[str]], Translation | None]] = {
    "": _model,
    "--max-loras": _slots,
    "--served-model-name": _names,
    "--dtype": _dtype,
    "--tensor-parallel-size": _parallel,
    "--lora-modules": _modules,
}
