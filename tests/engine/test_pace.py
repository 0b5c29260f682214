"""The pace of prompts beside streams: learnt from steps, bounded on both sides, refreshed while the batch grows."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tucka_runtime.config import EngineConfig
from tucka_runtime.engine.pace import AIM, DECODES, LEAST, PROBE, Pace
from tucka_runtime.errors import ConfigError


def learnt(decode: float, token: float, stretch: float = 1.8) -> Pace:
    """A pace that knows a machine: seconds of a decoding step, and of a prompt's token."""
    pace = Pace(stretch)
    pace.note(decode, 0, 8)
    pace.note(token * 100, 100, 0)
    return pace


def test_nothing_is_limited_before_anything_is_known_or_without_a_stretch() -> None:
    assert Pace(1.8).prompt_tokens() is None
    assert learnt(0.02, 0.0005, stretch=0).prompt_tokens() is None


def test_prompts_get_what_is_left_of_the_stretched_step() -> None:
    assert learnt(0.02, 0.0001).prompt_tokens() == pytest.approx(AIM * 160, abs=1)
    assert learnt(0.02, 0.5).prompt_tokens() == LEAST


@given(decode=st.floats(0.001, 0.1), token=st.floats(0.00001, 0.01), guess=st.floats(0.00001, 0.01))
def test_steps_come_to_last_as_long_as_they_may(decode: float, token: float, guess: float) -> None:
    """A machine that takes decode + token * n for n tokens of prompts, whatever was believed of it at first."""
    pace = learnt(decode, guess)
    took = decode
    for _ in range(200):
        tokens = pace.prompt_tokens()
        assert tokens is not None
        took = decode + token * tokens
        pace.note(took, tokens, 8)
    if tokens > LEAST:
        assert took <= (1.05 + 0.8 * AIM) * decode
        assert took >= (0.9 + 0.8 * AIM) * decode - token


def test_a_step_without_prompts_comes_by_and_by() -> None:
    """Decoding becomes ten times as slow while prompts keep coming."""
    pace = learnt(0.002, 0.0001)
    plan = []
    for _ in range(10 * PROBE):
        tokens = pace.prompt_tokens()
        assert tokens is not None
        plan.append(tokens)
        pace.note(0.02 + 0.0001 * tokens, tokens, 64)
    assert plan[:PROBE].count(0) == 0
    assert 5 <= plan.count(0) <= 10
    assert max(plan[-PROBE:]) >= AIM * 100, "the budget follows the slower steps"


def test_a_step_that_was_held_up_says_nothing() -> None:
    """One decoding step in five takes fifty times as long, as where another process has the cores."""
    pace = learnt(0.02, 0.0001)
    usual = pace.prompt_tokens()
    for number in range(4 * DECODES):
        pace.note(1.0 if number % DECODES == 1 else 0.02, 0, 8)
        assert pace.prompt_tokens() == usual


@pytest.mark.parametrize("stretch", [1.0, 0.5, -2.0])
def test_a_stretch_that_lets_nothing_in_is_refused(stretch: float) -> None:
    with pytest.raises(ConfigError, match="over 1"):
        EngineConfig(decode_stretch=stretch)
