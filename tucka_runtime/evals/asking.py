"""Who answers questions: the engine in this process, or a running server."""

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from jinja2 import TemplateError

from tucka_runtime.client import Client
from tucka_runtime.conversations import Message
from tucka_runtime.errors import ConfigError, TuckaError
from tucka_runtime.evals.questions import Question
from tucka_runtime.trainer.records import DataError
from tucka_runtime.trainer.turns import Talk

TOGETHER = 16  # requests to a server at once


@dataclass(frozen=True)
class Reply:
    """The text that was said; `cut` where --max-tokens or the context ended it."""

    text: str
    cut: bool


class Respondent(Protocol):
    """`base` is what the base is called, `routed` the adapters' names, each with whether a router is in it, `ends` the
    tokens that end an answer, as they are spelled, as far as they are known."""

    base: str
    routed: dict[str, bool]
    ends: list[str]

    def ask(self, questions: Sequence[Question], model: str, route: str | None) -> list[Reply]:
        """The greedy answers of the base or an adapter, in the questions' order. Raises TuckaError."""
        ...


class Folder:
    """The base in a folder, offline, with adapters from folders."""

    def __init__(self, model: Path, adapters: dict[str, str], max_tokens: int, num_threads: int | None):
        from tucka_runtime.llm import LLM

        self.base = model.resolve().name
        if self.base in adapters:
            raise ConfigError(f"--adapter: {self.base} is the base's name. Give the adapter another.")
        self._llm = LLM(model, adapters=adapters, num_threads=num_threads)
        self._max_tokens = max_tokens
        self.routed = {name: info.router is not None for name, info in self._llm.adapters.items()}
        tokenizer = self._llm.tokenizer
        self.ends = [token for end in tokenizer.ends if (token := tokenizer.token(end))] if tokenizer else []

    def ask(self, questions: Sequence[Question], model: str, route: str | None) -> list[Reply]:
        """All at once, as a busy server would have them: under the scope batch they are routed together."""
        from tucka_runtime.messages import SamplingParams

        adapter = None if model == self.base else model
        prompts = [self._prompt(question) for question in questions]
        sampling = SamplingParams(temperature=0, max_tokens=self._max_tokens)
        outputs = self._llm.generate(prompts, sampling, adapter, route, progress=sys.stderr.isatty())
        return [Reply(o.outputs[0].text, o.outputs[0].finish_reason == "length") for o in outputs]

    def _prompt(self, question: Question) -> list[int]:
        tokenizer = self._llm.tokenizer
        if tokenizer is None:
            raise ConfigError("The base's folder has no tokenizer: texts cannot be asked.")
        try:
            if question.record.messages:
                ids = tokenizer.encode(Talk(question.record, tokenizer).last_prompt, False)
            else:
                ids = tokenizer.encode(question.record.prompt, True)
        except (ValueError, TemplateError) as error:
            raise DataError(f"{question.where}: the base's chat template refuses it: {error}") from error
        context = self._llm.engine.info.max_model_len
        if len(ids) >= context:
            raise DataError(
                f"{question.where}: the prompt's {len(ids)} tokens leave no room in a context of {context}."
            )
        return ids


class Server:
    """A running server, and those of its adapters that are named; all of them where none is."""

    def __init__(self, url: str, api_key: str | None, adapters: Sequence[str], max_tokens: int):
        self._client = Client(url, api_key)
        self._max_tokens = max_tokens
        cards = json.loads(self._client.get("/v1/models"))["data"]
        self.base = str(next(card["id"] for card in cards if not card.get("parent")))
        found = {
            card["id"]: (card.get("tucka") or {}).get("router") is not None for card in cards if card.get("parent")
        }
        if missing := [name for name in adapters if name not in found]:
            there = ", ".join(found) or "none"
            raise ConfigError(f"--adapter: {', '.join(missing)} is not loaded there. Loaded are: {there}.")
        self.routed = {name: found[name] for name in adapters or found}
        self.ends = []
        with contextlib.suppress(TuckaError, ValueError):  # a base without a tokenizer, or another kind of server
            if end := json.loads(self._client.get("/tokenizer_info")).get("eos_token"):
                self.ends.append(end)

    def ask(self, questions: Sequence[Question], model: str, route: str | None) -> list[Reply]:
        with ThreadPoolExecutor(TOGETHER) as pool:
            return list(pool.map(lambda question: self._answer(question, model, route), questions))

    def _answer(self, question: Question, model: str, route: str | None) -> Reply:
        try:
            return self._ask(question, model, route)
        except TuckaError as error:
            raise TuckaError(f"{question.where}: {error.message}") from error

    def _ask(self, question: Question, model: str, route: str | None) -> Reply:
        body: dict[str, Any] = {"model": model, "temperature": 0, "max_tokens": self._max_tokens}
        if route is not None:
            body["route"] = route
        asked = question.asked
        if isinstance(asked, str):
            choice = self._choice("/v1/completions", body | {"prompt": asked})
            return Reply(choice["text"], choice["finish_reason"] == "length")
        if question.record.tools:
            body["tools"] = list(question.record.tools)
        choice = self._choice("/v1/chat/completions", body | {"messages": [_for_api(message) for message in asked]})
        return Reply(choice["message"].get("content") or "", choice["finish_reason"] == "length")

    def _choice(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        try:
            choice: dict[str, Any] = json.loads(self._client.post(path, body))["choices"][0]
        except (ValueError, KeyError, IndexError) as error:
            raise TuckaError("The server's answer is none that OpenAI's API knows. Is --url a server's?") from error
        return choice


def plan(asked: Respondent, routes: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """(model, route scope) of every row of the report: the base, and each adapter under each scope; one that has no
    router once. Without `routes` an adapter is routed as it is served."""
    yield asked.base, None
    for name, routed in asked.routed.items():
        for route in routes if routed and routes else (None,):
            yield name, route


def _for_api(message: Message) -> Message:
    """A message as OpenAI's API has it: arguments of calls are text."""
    if "tool_calls" not in message:
        return message
    calls = [
        call | {"function": call["function"] | {"arguments": _text(call["function"]["arguments"])}}
        for call in message["tool_calls"]
    ]
    return message | {"tool_calls": calls}


def _text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments)
