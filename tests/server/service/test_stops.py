"""Stop strings against their definition, one character after the other."""

from hypothesis import given
from hypothesis import strategies as st

from tests.support.stop_strings import first_stop
from tucka_runtime.server.service.stops import StopStrings, stop_table

texts = st.text("ab", max_size=40)
stop_lists = st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=4)


@given(st.lists(texts, max_size=5), stop_lists)
def test_pieces_match_as_the_whole_text_does(pieces: list[str], stops: list[str]) -> None:
    matcher = StopStrings(stop_table(tuple(stops)))
    found = None
    consumed = 0
    for piece in pieces:
        if match := matcher.feed(piece):
            found = consumed + match[0], match[1]
            break
        consumed += len(piece)
    assert found == first_stop("".join(pieces), stops)


@given(texts, stop_lists)
def test_held_back_is_the_longest_end_that_may_become_a_stop(text: str, stops: list[str]) -> None:
    matcher = StopStrings(stop_table(tuple(stops)))
    if matcher.feed(text):
        return
    beginnings = {stop[:size] for stop in stops for size in range(1, len(stop))}
    ends = [size for size in range(1, len(text) + 1) if text[-size:] in beginnings]
    assert matcher.held == max(ends, default=0)


@given(texts, texts, stop_lists)
def test_a_stop_may_begin_but_not_end_in_text_that_does_not_count(before: str, after: str, stops: list[str]) -> None:
    matcher = StopStrings(stop_table(tuple(stops)))
    assert matcher.feed(before, counts=False) is None
    ends = [
        (end, max(found, key=len))
        for end in range(1, len(after) + 1)
        if (found := [stop for stop in stops if (before + after[:end]).endswith(stop)])
    ]
    assert matcher.feed(after) == (ends[0] if ends else None)


def test_without_stops_nothing_is_held() -> None:
    matcher = StopStrings(())
    assert matcher.feed("anything") is None
    assert matcher.held == 0
