"""Frames of a stream: what is prepared once per stream says what is encoded piece by piece."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tucka_runtime.messages import FinishReason, Request, SamplingParams
from tucka_runtime.server.api.answer import OpenAIAnswer
from tucka_runtime.server.api.bodies import ChatBody, CompletionBody, StreamOptions
from tucka_runtime.server.api.chat import ChatAnswer
from tucka_runtime.server.api.completions import CompletionAnswer
from tucka_runtime.server.service.events import Text
from tucka_runtime.server.service.generation import ChoiceDelta, Usage

BODIES: list[tuple[type[OpenAIAnswer[Any]], Any]] = [
    (ChatAnswer, ChatBody.model_validate({"model": "m", "messages": [{"role": "user", "content": "a"}]})),
    (CompletionAnswer, CompletionBody.model_validate({"model": "m", "prompt": "a"})),
]
OPTIONS = [StreamOptions(), StreamOptions(include_usage=True)]
OPTIONS.append(StreamOptions(include_usage=True, continuous_usage_stats=True))


def answer_of(kind: type[OpenAIAnswer[Any]], body: Any, options: StreamOptions) -> OpenAIAnswer[Any]:
    return kind(body, options, Request("answer-1", ((1,), (2,)), SamplingParams()), None, None, "digest")


@pytest.mark.parametrize("options", OPTIONS, ids=["no usage", "usage", "usage so far"])
@pytest.mark.parametrize(("kind", "body"), BODIES, ids=["chat", "completions"])
@given(text=st.text(min_size=1) | st.sampled_from(['"\\\x00\x7f\x85', "\u2028\u2029", "answer-1", "%s{}"]))
def test_prepared_frames_are_the_same(
    kind: type[OpenAIAnswer[Any]], body: Any, options: StreamOptions, text: str
) -> None:
    prepared, general = answer_of(kind, body, options), answer_of(kind, body, options)
    prepared.head["created"] = general.head["created"]
    general._before, general._plain = prepared._before, False
    for index in (0, 1):
        delta = ChoiceDelta(index, False, text, [Text(text)], usage=Usage(3, 4, 5))
        frame = prepared.frame(delta)
        assert index in prepared._prepared and not general._prepared
        assert frame == general.frame(delta)
        if options.continuous_usage_stats:
            assert json.loads(frame.removeprefix(b"data: "))["usage"]["completion_tokens"] == 4
        (choice,) = json.loads(frame.removeprefix(b"data: "))["choices"]
        assert (choice["text"] if kind is CompletionAnswer else choice["delta"]["content"]) == text


@pytest.mark.parametrize(("kind", "body"), BODIES, ids=["chat", "completions"])
@pytest.mark.parametrize("more", [{"first": True}, {"finish_reason": FinishReason.STOP, "stop_reason": "x"}])
def test_a_chunk_that_says_more_is_not_prepared(kind: type[OpenAIAnswer[Any]], body: Any, more: dict[str, Any]) -> None:
    answer = answer_of(kind, body, StreamOptions())
    delta = ChoiceDelta(**{"index": 0, "first": False, "text": "a", "events": [Text("a")]} | more)
    (choice,) = json.loads(answer.frame(delta).removeprefix(b"data: "))["choices"]
    assert not answer._prepared
    assert choice["finish_reason"] == more.get("finish_reason") and choice["stop_reason"] == more.get("stop_reason")
