"""What a response is made of: items that grow while the model writes, and the events that tell of it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from tucka_runtime.messages import FinishReason
from tucka_runtime.server.service.events import (
    CallArguments,
    CallBegun,
    CallEnded,
    Event,
    Reasoning,
    ReasoningEnded,
    Text,
)
from tucka_runtime.server.service.generation import ChoiceDelta
from tucka_runtime.server.service.text import Token

JSON = dict[str, Any]
Scores = Callable[[Sequence[Token]], list[JSON]]
"""The log-probabilities of tokens as JSON."""


class OutputItem(ABC):
    """One item. `index` counts the response's items from 0."""

    id_prefix: str

    def __init__(self, response_id: str, index: int):
        self.id = f"{self.id_prefix}_{response_id.partition('_')[2]}{index}"
        self.index = index
        self.status = "in_progress"
        self.text = ""

    @property
    def place(self) -> JSON:
        """What events say of where they belong."""
        return {"item_id": self.id, "output_index": self.index}

    def event(self, kind: str) -> JSON:
        """That the item is `added` or `done`."""
        return {"type": f"response.output_item.{kind}", "output_index": self.index, "item": self.as_json()}

    @abstractmethod
    def as_json(self) -> JSON: ...

    @abstractmethod
    def begun(self) -> list[JSON]: ...

    @abstractmethod
    def grown(self, text: str, scores: list[JSON]) -> JSON:
        """Adds text, with the log-probabilities of its tokens where those are asked for."""

    @abstractmethod
    def ended(self) -> list[JSON]:
        """The events of an item that has its last status."""


class SpokenItem(OutputItem):
    """A text, or a thought: an item with one part."""

    text_event: str

    def __init__(self, response_id: str, index: int):
        super().__init__(response_id, index)
        self.scores: list[JSON] = []

    @property
    def place(self) -> JSON:
        return {**super().place, "content_index": 0}

    @abstractmethod
    def part(self) -> JSON: ...

    @abstractmethod
    def scored(self, scores: list[JSON]) -> JSON:
        """The log-probabilities as a text's events have them."""

    def begun(self) -> list[JSON]:
        added = self.event("added")
        added["item"]["content"] = []
        return [added, {"type": "response.content_part.added", **self.place, "part": self.part()}]

    def grown(self, text: str, scores: list[JSON]) -> JSON:
        self.text += text
        self.scores += scores
        return {"type": f"{self.text_event}.delta", **self.place, "delta": text, **self.scored(scores)}

    def ended(self) -> list[JSON]:
        return [
            {"type": f"{self.text_event}.done", **self.place, "text": self.text, **self.scored(self.scores)},
            {"type": "response.content_part.done", **self.place, "part": self.part()},
            self.event("done"),
        ]


class MessageOutput(SpokenItem):
    id_prefix = "msg"
    text_event = "response.output_text"

    def part(self) -> JSON:
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": self.scores.copy()}

    def scored(self, scores: list[JSON]) -> JSON:
        return {"logprobs": scores.copy()}

    def as_json(self) -> JSON:
        return {
            "id": self.id,
            "type": "message",
            "status": self.status,
            "role": "assistant",
            "content": [self.part()],
        }


class ReasoningOutput(SpokenItem):
    """A thought, in the open: there is no summary of it, and nothing encrypted."""

    id_prefix = "rs"
    text_event = "response.reasoning_text"

    def part(self) -> JSON:
        return {"type": "reasoning_text", "text": self.text}

    def scored(self, scores: list[JSON]) -> JSON:
        return {}

    def as_json(self) -> JSON:
        return {
            "id": self.id,
            "type": "reasoning",
            "status": self.status,
            "summary": [],
            "content": [self.part()],
            "encrypted_content": None,
        }


class CallOutput(OutputItem):
    """A call of a function."""

    id_prefix = "fc"

    def __init__(self, response_id: str, index: int, call: CallBegun):
        super().__init__(response_id, index)
        self._call = call

    def as_json(self) -> JSON:
        return {
            "id": self.id,
            "type": "function_call",
            "status": self.status,
            "call_id": self._call.id,
            "name": self._call.name,
            "arguments": self.text,
        }

    def begun(self) -> list[JSON]:
        return [self.event("added")]

    def grown(self, text: str, scores: list[JSON]) -> JSON:
        self.text += text
        return {"type": "response.function_call_arguments.delta", **self.place, "delta": text}

    def ended(self) -> list[JSON]:
        done = {
            "type": "response.function_call_arguments.done",
            **self.place,
            "name": self._call.name,
            "arguments": self.text,
        }
        return [done, self.event("done")]


class ResponseOutput:
    """All items of one response. `scores` makes the log-probabilities, where they are asked for: of an answer that can
    be nothing but text."""

    def __init__(self, response_id: str, scores: Scores | None):
        self._response_id = response_id
        self._scores = scores
        self._items: list[OutputItem] = []

    def as_json(self) -> list[JSON]:
        return [item.as_json() for item in self._items]

    def take(self, delta: ChoiceDelta) -> list[JSON]:
        """The events of what is new."""
        said: list[Event] = delta.events
        scores: list[JSON] = []
        if self._scores is not None and delta.tokens:
            scores = self._scores(delta.tokens)
            said = said or [Text("")]
        made: list[JSON] = []
        for event in said:
            match event:
                case Text():
                    made += self._spoken(MessageOutput, event.text, scores)
                    scores = []
                case Reasoning():
                    made += self._spoken(ReasoningOutput, event.text, [])
                case ReasoningEnded():
                    made += self._end("completed")
                case CallBegun():
                    made += self._begin(CallOutput(self._response_id, len(self._items), event))
                case CallArguments():
                    made.append(self._items[-1].grown(event.text, []))
                case CallEnded():
                    made += self._end("completed")
        if delta.finish_reason is not None:
            made += self._finish(delta.finish_reason)
        return made

    def cut_off(self) -> list[JSON]:
        """The events of an answer that cannot go on."""
        return self._end("incomplete")

    def _spoken(self, kind: type[SpokenItem], text: str, scores: list[JSON]) -> list[JSON]:
        item, made = self._open, []
        if not isinstance(item, kind):
            item = kind(self._response_id, len(self._items))
            made = self._begin(item)
        return [*made, item.grown(text, scores)]

    @property
    def _open(self) -> OutputItem | None:
        return self._items[-1] if self._items and self._items[-1].status == "in_progress" else None

    def _begin(self, item: OutputItem) -> list[JSON]:
        """A call that another item follows, and that has not come to its end, never will."""
        ended = self._end("incomplete" if isinstance(self._open, CallOutput) else "completed")
        self._items.append(item)
        return [*ended, *item.begun()]

    def _end(self, status: str) -> list[JSON]:
        if (item := self._open) is None:
            return []
        item.status = status
        return item.ended()

    def _finish(self, reason: FinishReason) -> list[JSON]:
        """An answer that was not cut off has a message or a call, if an empty one: clients look for it."""
        cut = reason == FinishReason.LENGTH or isinstance(self._open, CallOutput)
        made = self._end("incomplete" if cut else "completed")
        if not self._items or (not cut and all(isinstance(item, ReasoningOutput) for item in self._items)):
            made += self._begin(MessageOutput(self._response_id, len(self._items)))
            made += self._end("incomplete" if cut else "completed")
        return made
