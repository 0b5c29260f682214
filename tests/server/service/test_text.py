"""Detokenised, cut and streamed text: the same whatever the steps, and never taken back."""

from hypothesis import given
from hypothesis import strategies as st

from tests.support.stop_strings import first_stop
from tucka_runtime.detokenizer import Detokenizer
from tucka_runtime.messages import Finish, FinishReason, SequenceOutput, TokenLogprob
from tucka_runtime.server.service.stops import stop_table
from tucka_runtime.server.service.text import SequenceText, TextDelta
from tucka_runtime.tokenizer import Tokenizer

EOS = 2
byte_tokens = st.sampled_from([3 + byte for byte in b"aab" + "é🌶".encode()]) | st.integers(0, 319)
sequences = st.lists(byte_tokens, min_size=1, max_size=30)
stop_lists = st.lists(st.text("abé🌶", min_size=1, max_size=4), max_size=3)
step_sizes = st.lists(st.integers(1, 4), min_size=30, max_size=30)


def run(text: SequenceText, ids: list[int], sizes: list[int], stop_token_id: int | None = None) -> list[TextDelta]:
    """Pushes the ids in steps of these sizes, as an engine that finishes with the last."""
    deltas = []
    position = 0
    end = FinishReason.LENGTH if stop_token_id is None else FinishReason.STOP
    for size in sizes:
        part = ids[position : position + size]
        position += size
        last = position >= len(ids)
        logprobs = [TokenLogprob(token_id, -1.0, 1, ()) for token_id in part]
        deltas.append(
            text.push(
                SequenceOutput(
                    "r",
                    0,
                    part,
                    logprobs,
                    finish=Finish(end, stop_token_id) if last else None,
                )
            )
        )
        if last or text.finished:
            break
    return deltas


def joined(deltas: list[TextDelta]) -> tuple[str, list[int]]:
    return "".join(d.text for d in deltas), [token.id for d in deltas for token in d.tokens]


@given(ids=sequences, skip=st.booleans())
def test_incremental_text_is_the_text_of_all_ids(tokenizer: Tokenizer, ids: list[int], skip: bool) -> None:
    detokenizer = Detokenizer(tokenizer, skip)
    pieces = [detokenizer.push(token_id) for token_id in ids]
    assert "".join(pieces) + detokenizer.flush() == tokenizer.decode(ids, skip)


@given(text=st.text(max_size=20))
def test_no_half_character_leaves(tokenizer: Tokenizer, text: str) -> None:
    detokenizer = Detokenizer(tokenizer, True)
    pieces = [detokenizer.push(token_id) for token_id in tokenizer.encode(text, False)]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in text


@given(ids=sequences, stops=stop_lists, sizes=step_sizes)
def test_stops_cut_where_they_are_defined_to_and_nothing_leaks(
    tokenizer: Tokenizer, ids: list[int], stops: list[str], sizes: list[int]
) -> None:
    deltas = run(SequenceText(Detokenizer(tokenizer, True), stop_table(tuple(stops))), ids, sizes)
    text, _ = joined(deltas)
    whole = tokenizer.decode(ids, True)
    found = first_stop(whole, stops)
    assert text == (whole[: found[0] - len(found[1])] if found else whole)
    assert deltas[-1].finish_reason is (FinishReason.STOP if found else FinishReason.LENGTH)
    assert deltas[-1].stop_reason == (found[1] if found else None)
    assert not any(d.finish_reason for d in deltas[:-1])


@given(ids=sequences, stops=stop_lists, sizes=step_sizes, include=st.booleans())
def test_steps_do_not_change_text_or_tokens(
    tokenizer: Tokenizer, ids: list[int], stops: list[str], sizes: list[int], include: bool
) -> None:
    def answer(steps: list[int]) -> tuple[str, list[int]]:
        text = SequenceText(Detokenizer(tokenizer, True), stop_table(tuple(stops)), include_stop=include)
        return joined(run(text, ids, steps))

    assert answer(sizes) == answer([1] * 30) == answer([30])


@given(ids=sequences, stops=stop_lists, sizes=step_sizes)
def test_tokens_are_those_of_the_text(tokenizer: Tokenizer, ids: list[int], stops: list[str], sizes: list[int]) -> None:
    deltas = run(SequenceText(Detokenizer(tokenizer, True), stop_table(tuple(stops))), ids, sizes)
    text, kept = joined(deltas)
    assert kept == ids[: len(kept)]
    spelled = tokenizer.decode(kept, True)
    assert (
        spelled.startswith(text) or spelled.rstrip("\ufffd") == text.rstrip("\ufffd")[: len(spelled.rstrip("\ufffd"))]
    )
    starts = [token.start for d in deltas for token in d.tokens]
    assert starts == sorted(starts)
    assert all(start <= len(text) for start in starts)
    released = 0
    for delta in deltas:
        released += len(delta.text)
        assert all(token.start <= released for token in delta.tokens)


def test_a_stop_token_gives_no_text_but_is_a_token(tokenizer: Tokenizer) -> None:
    a = 3 + ord("a")
    text = SequenceText(Detokenizer(tokenizer, False), reasons={a: a})
    deltas = run(text, [a, a, a], [3], stop_token_id=a)
    assert joined(deltas) == ("aa", [a, a, a])
    assert deltas[-1].stop_reason == a
    text = SequenceText(Detokenizer(tokenizer, False), reasons={a: a}, include_stop=True)
    assert joined(run(text, [a, a, a], [3], stop_token_id=a))[0] == "aaa"


def test_the_models_own_end_has_no_stop_reason(tokenizer: Tokenizer) -> None:
    deltas = run(SequenceText(Detokenizer(tokenizer, True)), [100, EOS], [1, 1], stop_token_id=EOS)
    assert joined(deltas) == ("a", [100, EOS])
    assert deltas[-1].stop_reason is None


def test_stops_do_not_count_before_min_tokens(tokenizer: Tokenizer) -> None:
    text = SequenceText(Detokenizer(tokenizer, True), stop_table(("a",)), min_tokens=2)
    assert joined(run(text, [100] * 5, [1] * 5)) == ("aa", [100, 100])


def test_a_stop_may_begin_before_min_tokens(tokenizer: Tokenizer) -> None:
    text = SequenceText(Detokenizer(tokenizer, True), stop_table(("ab",)), min_tokens=3)
    ids = tokenizer.encode("abab", False)
    deltas = run(text, ids, [1] * 4)
    assert [d.text for d in deltas] == ["", "ab", "", ""]
    assert deltas[-1].stop_reason == "ab"


@given(ids=sequences, stops=stop_lists, sizes=step_sizes, least=st.integers(0, 10))
def test_nothing_leaks_with_min_tokens(
    tokenizer: Tokenizer, ids: list[int], stops: list[str], sizes: list[int], least: int
) -> None:
    def answer(steps: list[int]) -> tuple[str, list[int]]:
        table = stop_table(tuple(stops))
        return joined(run(SequenceText(Detokenizer(tokenizer, True), table, min_tokens=least), ids, steps))

    assert answer(sizes) == answer([1] * 30) == answer([30])


def test_without_tokenizer_ids_pass_at_once() -> None:
    deltas = run(SequenceText(None), [5, 6, 7], [1, 1, 1])
    assert [[token.id for token in d.tokens] for d in deltas] == [[5], [6], [7]]
    assert joined(deltas)[0] == ""


def test_text_is_held_only_while_it_may_become_a_stop(tokenizer: Tokenizer) -> None:
    text = SequenceText(Detokenizer(tokenizer, True), stop_table(("abc",)))
    ids = tokenizer.encode("xabxabc", False)
    assert [d.text for d in run(text, ids, [1] * 7)] == ["x", "", "", "abx", "", "", ""]
