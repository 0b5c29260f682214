"""Drafts: what followed the longest known end of a text, against a search of the whole text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tucka_runtime.config import EngineConfig
from tucka_runtime.engine.ngram import NgramIndex
from tucka_runtime.errors import ConfigError


def searched(text: list[int], least: int, most: int, count: int) -> list[int]:
    """The same from the definition."""
    for length in range(most, least - 1, -1):
        for start in range(len(text) - 1, length - 1, -1):
            if text[start - length : start] == text[len(text) - length :]:
                out = list(text)
                for i in range(count):
                    out.append(out[start + i])
                return out[len(text) :]
    return []


@given(
    text=st.lists(st.integers(0, 2), min_size=1, max_size=60),
    least=st.integers(1, 3),
    more=st.integers(0, 3),
    steps=st.lists(st.integers(1, 9), max_size=12),
)
def test_what_followed_last_time(text: list[int], least: int, more: int, steps: list[int]) -> None:
    """However many tokens came since the last draft."""
    index, end = NgramIndex(least, least + more, 5), 0
    for step in [*steps, len(text)]:
        end = min(end + step, len(text))
        assert index.draft(text[:end], 5) == searched(text[:end], least, least + more, 5)


def test_a_draft_goes_round_where_it_meets_its_own_beginning() -> None:
    assert NgramIndex(2, 4, 8).draft([9, 1, 2, 3, 1, 2, 3], 8) == [1, 2, 3, 1, 2, 3, 1, 2]
    assert NgramIndex(1, 4, 3).draft([5, 5], 8) == [5, 5, 5]


@pytest.mark.parametrize(("text", "most"), [([], 5), ([1], 5), ([1, 2, 3, 4], 5), ([1, 1, 1], 0), ([1, 1, 1], -2)])
def test_there_is_no_draft(text: list[int], most: int) -> None:
    assert NgramIndex(1, 3, 5).draft(text, most) == []


def test_drafts_shrink_to_what_was_right_and_grow_again() -> None:
    index, text = NgramIndex(1, 1, 8), [7, 7]
    assert len(index.draft(text, 99)) == 8
    for drafted, right, following in ((8, 3, 3), (3, 0, 1), (1, 1, 2), (2, 2, 4), (4, 4, 8), (8, 8, 8)):
        index.verified(drafted, right)
        assert len(index.draft(text, 99)) == following


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"speculate": "eagle"}, "speculate"),
        ({"speculate_tokens": 0}, "speculate_tokens"),
        ({"speculate_min_ngram": 0}, "speculate_min_ngram"),
        ({"speculate_min_ngram": 5, "speculate_max_ngram": 4}, "speculate_max_ngram"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        EngineConfig(**settings)
