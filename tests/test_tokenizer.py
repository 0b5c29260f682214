"""What is trained on, what is served, what people write: the same ids and the same text for every kind of tokenizer."""

import functools
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from tests.support import GOLDEN
from tests.support.tokenizer_families import FAMILIES, SPECIALS, make
from tucka_runtime.chat_rendering import render_chat
from tucka_runtime.detokenizer import Detokenizer
from tucka_runtime.tokenizer import Tokenizer, unshielded
from tucka_runtime.trainer.data import encode

families = st.sampled_from(sorted(FAMILIES))
# SentencePiece writes a space as ▁, so that it cannot spell ▁ itself: no text has it here.
pieces = st.sampled_from([*SPECIALS, "<|END|>", "<|en", "d|>", " ", "  ", "\n", "a", "ar", "5", "é", "你", "[answer]"])
texts = (
    st.lists(pieces | st.text(max_size=3), min_size=1, max_size=6)
    .map("".join)
    .filter(lambda text: text and "▁" not in text)
)
made = functools.cache(make)


def served(tokenizer: Tokenizer, ids: list[int]) -> str:
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=False)
    return "".join([detokenizer.push(token_id) for token_id in ids]) + detokenizer.flush()


@settings(deadline=None)
@given(family=families, prompt=texts, completion=texts, chat=st.booleans())
@example("metaspace first", "date:", "5 March 2024", True)
@example("prepend (Llama 2)", "date:", "5 March 2024", False)
@example("unigram", "date:", "5 March </s> 2024", True)
@example("unigram", "date:", "5 March</s>", False)
def test_the_tokens_trained_on_are_the_tokens_served(family: str, prompt: str, completion: str, chat: bool) -> None:
    """The prompt's ids are those of a request of the same text; the completion's, detokenised as a server does it, are
    the completion to the letter; an end token follows, which the completion may have spelled itself."""
    tokenizer = made(family, before="<s>")
    if chat:
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        example = encode({"messages": messages}, tokenizer, 10_000)
        request = tokenizer.encode(tokenizer.render(messages[:1]), add_special_tokens=False)
    else:
        example = encode({"prompt": prompt, "completion": completion}, tokenizer, 10_000)
        request = tokenizer.encode(prompt, add_special_tokens=True)
    assert list(example.ids[: example.start]) == request
    *answer, end = example.ids[example.start :]
    assert end in tokenizer.ends
    said = served(tokenizer, answer)
    if not chat and any(special in completion for special in SPECIALS):  # control tokens, after which some put a space
        said, completion = said.replace(" ", ""), completion.replace(" ", "").removesuffix(tokenizer.token(end) or "")
    assert said == completion


@settings(deadline=None)
@given(family=families, first=texts, second=texts)
@example("unigram", "</s>", "<s>")
def test_what_messages_say_is_never_a_control_token(family: str, first: str, second: str) -> None:
    """The template's own control tokens are there, in order, and nothing else is; the text stays what it was."""
    tokenizer = made(family)
    messages = [{"role": "user", "content": first}, {"role": "user", "content": second}]
    prompt = tokenizer.render(messages)
    plain = render_chat(tokenizer.chat_template or "", tokenizer.special_tokens, messages)
    assert unshielded(prompt) == plain
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    controls = [tokenizer.token(i) for i in ids if tokenizer.is_special(i) and tokenizer.token(i) != "<unk>"]
    assert controls == ["<s>", "<|user|>", "<|end|>", "<|user|>", "<|end|>"]
    assert served(tokenizer, ids).replace(" ", "") == plain.replace(" ", "")


@settings(deadline=None)
@given(family=families, text=texts)
def test_a_text_that_spells_no_control_token_has_the_ids_that_it_always_had(family: str, text: str) -> None:
    tokenizer = made(family)
    spells = any(special.lower() in text.lower() for special in SPECIALS)
    assert (tokenizer.shield(text) != text) == spells
    assert spells or tokenizer.encode(text, False) == tokenizer._backend.encode(text, add_special_tokens=False).ids


@settings(deadline=None)
@given(family=families, text=texts)
def test_a_completions_prompt_may_be_plain_text(family: str, text: str) -> None:
    tokenizer = made(family, before="<s>")
    ids = tokenizer.encode(text, add_special_tokens=True, split_special_tokens=True)
    assert ids[0] == tokenizer.encode("<s>", False)[0]
    assert not [i for i in ids[1:] if tokenizer.is_special(i) and tokenizer.token(i) != "<unk>"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_start_token_comes_once_and_an_end_token_never(family: str) -> None:
    tokenizer = made(family, before="<s>", after="</s>")
    start, end = (tokenizer.encode(text, False)[0] for text in ("<s>", "</s>"))
    for text in ("a b", "<s>a b"):
        ids = tokenizer.encode(text, add_special_tokens=True)
        assert ids.count(start) == 1 and ids[0] == start and end not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == "a b"
    assert tokenizer.encode("a</s>", add_special_tokens=True)[-1] == end, "what the text itself says stays"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("special", [True, False])
def test_added_tokens_come_back_whole(family: str, special: bool) -> None:
    tokenizer = make(family)
    tokenizer._backend.add_tokens([AddedToken("<|fräge 你好|>", special=special, normalized=False)])
    again = _again(tokenizer)
    ids = again.encode("a<|fräge 你好|>a", add_special_tokens=False)
    for text in (served(again, ids), again.decode(ids, False), b"".join(map(again.token_bytes, ids)).decode()):
        assert text.replace(" ", "") == "a<|fräge你好|>a" and "<|fräge 你好|>" in text


def _again(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer as one would be that has its backend from the start."""
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast

    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=Backend.from_str(tokenizer.serialised), eos_token="</s>"))


def test_what_training_left_in_the_files_is_switched_off(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(GOLDEN / "bases" / "llama-tiny", folder)
    state = json.loads((folder / "tokenizer.json").read_text())
    state["padding"] = {
        "strategy": {"Fixed": 16}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "<pad>",
    }  # fmt: skip
    state["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(state))
    tokenizer, plain = Tokenizer.load(folder), Tokenizer.load(GOLDEN / "bases" / "llama-tiny")
    assert tokenizer is not None and plain is not None
    assert tokenizer.encode("a long text", True) == plain.encode("a long text", True)
    kept = json.loads(tokenizer.serialised)
    assert kept["padding"] is None and kept["truncation"] is None
