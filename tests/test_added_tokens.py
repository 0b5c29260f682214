"""A tokenizer to which an adapter adds tokens: the ids and the text of transformers' own with the same tokens added,
whatever kind the base's is; and what a tokenizer.json may not say."""

import functools
import json
import random
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from tests.support import GOLDEN
from tests.support.tokenizer_families import FAMILIES, as_transformers
from tests.test_tokenizer import pieces, served
from tucka_runtime.adapters.tokenizer_file import MAX_TOKENS, new_tokens
from tucka_runtime.added_tokens import ExtendedTokenizer
from tucka_runtime.errors import InvalidAdapterError
from tucka_runtime.tokenizer import Tokenizer

ADDED = [
    AddedToken("<|tool|>", special=True, normalized=False),
    AddedToken("<law>", special=False, normalized=True),
    AddedToken("[x]", special=False, normalized=False, lstrip=True, rstrip=True),
    AddedToken("ar", special=False, normalized=False, single_word=True),
    AddedToken("é", special=True, normalized=False),
]
texts = st.lists(pieces | st.sampled_from([str(t.content) for t in ADDED]), min_size=1, max_size=6).map("".join)
BASE = json.loads((GOLDEN / "bases" / "llama-tiny" / "tokenizer.json").read_text())


@functools.cache
def both(family: str) -> tuple[ExtendedTokenizer, PreTrainedTokenizerFast]:
    """An adapter's tokenizer as it is served, and as it was saved."""
    base, theirs = Tokenizer(as_transformers(family)), as_transformers(family)
    theirs.backend_tokenizer.add_tokens(ADDED)
    data = theirs.backend_tokenizer.to_str().encode()
    return ExtendedTokenizer(base, new_tokens(data, base.vocabulary, base.added_ids)), theirs


@settings(deadline=None)
@given(family=st.sampled_from(sorted(FAMILIES)), text=texts)
@example("unigram", "<|tool|>a [x] ar<law>")
def test_texts_have_the_ids_that_they_have_with_the_saved_one(family: str, text: str) -> None:
    ours, theirs = both(family)
    ids = theirs(text, add_special_tokens=False).input_ids
    assert ours.encode(text, add_special_tokens=False) == ids
    assert ours.serialised == theirs.backend_tokenizer.to_str()
    again = Tokenizer(theirs)
    assert ours.decode(ids, False) == again.decode(ids, False)
    assert served(ours, ids) == served(again, ids)
    assert [ours.token_bytes(id_) for id_ in ids] == [again.token_bytes(id_) for id_ in ids]
    assert ours.longest_token >= max(map(len, theirs.get_vocab()))


@settings(deadline=None)
@given(family=st.sampled_from(sorted(FAMILIES)), text=texts)
@example("bytes", "<|tool|>é<law>")
def test_what_messages_say_is_never_a_control_token_that_was_added(family: str, text: str) -> None:
    ours, _ = both(family)
    prompt = ours.render([{"role": "user", "content": text}], add_generation_prompt=False) + "<|tool|>"
    ids = ours.encode(prompt, add_special_tokens=False)
    controls = [ours.token(i) for i in ids if ours.is_special(i) and ours.token(i) != "<unk>"]
    assert controls == ["<s>", "<|user|>", "<|end|>", "<|tool|>"]
    split = ours.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert not [i for i in split if ours.is_special(i) and ours.token(i) != "<unk>"]


def test_a_base_is_left_as_it_is_and_two_adapters_may_give_an_id_different_texts() -> None:
    base = Tokenizer(as_transformers("bytes"))
    before, first = base.serialised, len(base.vocabulary)
    assert base.token_bytes(first) == b"", "asked for first, and remembered"
    made = {}
    for text in ("<one>", "<two>"):
        theirs = as_transformers("bytes").backend_tokenizer
        theirs.add_tokens([text])
        tokens = new_tokens(theirs.to_str().encode(), base.vocabulary, base.added_ids)
        made[text] = ExtendedTokenizer(base, tokens)
    for text, tokenizer in made.items():
        assert tokenizer.encode(f"a{text}", False)[-1] == first and served(tokenizer, [first]) == text
    assert base.serialised == before and served(base, [first]) == "" and first not in base.encode("<one>", False)


def test_a_token_of_the_base_that_becomes_an_added_one_keeps_its_id() -> None:
    base, theirs = Tokenizer(as_transformers("bytes")), as_transformers("bytes").backend_tokenizer
    (id_,) = base.encode("5", False)
    theirs.add_special_tokens([AddedToken("5", normalized=False)])
    (token,) = new_tokens(theirs.to_str().encode(), base.vocabulary, base.added_ids)
    assert token.id == id_ and token.special
    ours = ExtendedTokenizer(base, [token])
    assert ours.is_special(id_) and ours.encode("a5", False)[-1] == id_ and not base.is_special(id_)


def added(**fields: Any) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"id": 320, "content": "<law>", **flags, **fields}


def with_vocab(**pieces: int) -> dict[str, Any]:
    return BASE | {"model": BASE["model"] | {"vocab": BASE["model"]["vocab"] | pieces}}


def with_added(*tokens: object) -> dict[str, Any]:
    return BASE | {"added_tokens": [*BASE["added_tokens"], *tokens]}


REFUSED = {
    "no JSON": ("{", "cannot be read"),
    "twice the same key": ('{"added_tokens": [], "added_tokens": []}', "duplicate key"),
    "deep": ('{"a": ' * 900 + "1" + "}" * 900, "nested too deeply"),
    "no object": ([1], "no list of `added_tokens`"),
    "no list": ({"added_tokens": {"a": 1}}, "no list of `added_tokens`"),
    "no vocabulary": ({"added_tokens": []}, "no `vocab`"),
    "another vocabulary": (BASE | {"model": {"vocab": {"a": 7}}}, "contradicts"),
    "an id of another token": (with_added(added(id=5)), "of which the token 5 is another"),
    "a token of another id": (BASE | {"added_tokens": [added(content="<x260>")]}, "contradicts"),
    "pieces of its own": (with_vocab(lawful=320), "1 tokens that are no added ones"),
    "an id twice": (with_added(added(), added(content="<tax>")), "twice"),
    "a token twice": (with_added(added(), added(id=321)), "twice"),
    "an id that is true": (with_added(added(id=True)), "no list of `added_tokens`"),
    "a long token": (with_added(added(content="<" * 257)), "no list of `added_tokens`"),
    "an empty token": (with_added(added(content="")), "no list of `added_tokens`"),
    "no flag": (with_added({"id": 320, "content": "<law>"}), "no list of `added_tokens`"),
    "many": (with_added(*(added(id=320 + i, content=f"<{i}>") for i in range(MAX_TOKENS + 1))), "adds more than"),
    "much": (with_added(*(added(id=320 + i, content=f"{i:0250}") for i in range(600))), "adds more than"),
    "a gap": (with_added(added(id=322)), "has the id 322, and would be 320"),
}


@pytest.fixture(scope="module")
def base() -> Tokenizer:
    loaded = Tokenizer.load(GOLDEN / "bases" / "llama-tiny")
    assert loaded is not None
    return loaded


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_is_refused_with_its_reason(name: str, base: Tokenizer) -> None:
    content, reason = REFUSED[name]
    data = (content if isinstance(content, str) else json.dumps(content)).encode()
    with pytest.raises(InvalidAdapterError) as refused:
        ExtendedTokenizer(base, new_tokens(data, base.vocabulary, base.added_ids))
    assert reason in refused.value.message and "out of the folder" in refused.value.message
    assert "law" not in refused.value.message


def test_a_mutated_file_is_used_or_refused(base: Tokenizer) -> None:
    data = bytearray(json.dumps(with_added(added(), added(id=321, content="<tax>", special=True))).encode())
    choose, taken = random.Random(1), 0
    for _ in range(300):
        mutated = bytearray(data)
        for _ in range(choose.randint(1, 3)):
            at = choose.randrange(len(mutated))
            mutated[at : at + choose.choice((0, 1, 1, 8))] = bytes(
                choose.choices(b'{}[]",:0019a\xff\\-e', k=choose.randint(0, 3))
            )
        try:
            tokens = new_tokens(bytes(mutated), base.vocabulary, base.added_ids)
            ExtendedTokenizer(base, tokens).encode("a<law>b<tax>", True)
            taken += 1
        except InvalidAdapterError:
            continue
    assert 0 < taken < 300
