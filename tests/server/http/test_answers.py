"""A frame is one line for every client, and says the same."""

import json

import pytest

from tucka_runtime.server.http.answers import JSONAnswer, encode_json

TEXT = "a\u2028b\u2029c\x85d\x0b\x0c\x1c\r\n\\u2028 é 魔"


def test_no_character_splits_a_frame() -> None:
    for made in (encode_json({TEXT: [TEXT]}), JSONAnswer({TEXT: [TEXT]}).body):
        assert json.loads(made) == {TEXT: [TEXT]} and "魔" in made.decode()
        assert len(made.decode().splitlines()) == 1


def test_a_prompt_with_separators_comes_back_in_frames_that_are_whole(start_fake) -> None:
    ask = {"model": "base", "prompt": TEXT, "max_tokens": 1, "echo": True}
    server = start_fake()
    events = [line for line in server.post("/v1/completions", ask | {"stream": True}).text.splitlines() if line]
    assert events.pop() == "data: [DONE]"
    assert "".join(json.loads(line.removeprefix("data: "))["choices"][0]["text"] for line in events).startswith(TEXT)
    assert len(server.post("/v1/completions", ask).text.splitlines()) == 1


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_not_sent(number: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        encode_json(number)
