"""Small tokenizers of every kind that real bases have, as transformers loads them."""

import json

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from tucka_runtime.tokenizer import Tokenizer

SPECIALS = ["<unk>", "<s>", "</s>", "<|user|>", "<|end|>", "☃"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}[answer]{% endif %}"
)
TEXTS = [
    "The date is 5 March 2024, and not 2024-03-05.",
    "a b c d e f g h i j k l m n o p q r s t u v w x y z 0 1 2 3 4 5 6 7 8 9",
    "[answer]yes [answer] no <|end|> </s> <s> <|user|> {json} one\ntwo  three",
    "Grüße aus Köln, 你好",
] * 3
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _spelled(kind: str) -> Backend:
    """SentencePiece's own: bytes where a character has no token."""
    backend = Backend(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if kind == "prepend":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=kind, split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=600, special_tokens=[*SPECIALS, *BYTES], show_progress=False)
    )
    state = json.loads(backend.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in SPECIALS]
    return Backend.from_str(json.dumps(state))


def _byte_level(prefix_space: bool) -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=420,
            special_tokens=SPECIALS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return backend


def _unigram() -> Backend:
    """A vocabulary that holds the control tokens' spellings as pieces of their own."""
    pieces = [(piece, 0.0) for piece in SPECIALS] + [(piece, -20.0) for piece in BYTES]
    letters = sorted({char for text in TEXTS for char in text.replace(" ", "▁")})
    pieces += [(letter, -5.0) for letter in letters] + [("▁a", -4.0), ("▁5", -4.0), ("ar", -4.0)]
    backend = Backend(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in SPECIALS])
    return backend


FAMILIES = {
    "bytes": lambda: _byte_level(False),
    "bytes, prefix space": lambda: _byte_level(True),
    "metaspace first": lambda: _spelled("first"),
    "metaspace always": lambda: _spelled("always"),
    "metaspace never": lambda: _spelled("never"),
    "prepend (Llama 2)": lambda: _spelled("prepend"),
    "unigram": _unigram,
}


def as_transformers(family: str, before: str | None = None, after: str | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer of a family; `before` and `after` are tokens that its post-processor puts around every text."""
    backend = FAMILIES[family]()
    if before or after:
        around = [token for token in (before, after) if token]
        backend.post_processor = processors.TemplateProcessing(
            single=" ".join(filter(None, (before, "$A", after))),
            special_tokens=[(token, backend.token_to_id(token)) for token in around],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=TEMPLATE
    )


def make(family: str, before: str | None = None, after: str | None = None) -> Tokenizer:
    """The same as the server and the trainer know it."""
    return Tokenizer(as_transformers(family, before, after))
