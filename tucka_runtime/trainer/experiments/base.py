"""The embedded base: a byte-level Llama of about 1.7 million parameters, pre-trained on the project's general mix."""

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tucka_runtime.trainer.experiments.skills import SKILLS, Pair, copies, general
from tucka_runtime.trainer.muon import Muon

SPECIALS = ("<|pad|>", "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
PAD, BOS, END = 0, 1, 2
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
CONTEXT = 2048


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, after six special ones; the vocabulary is 264 with two ids unused."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate((*SPECIALS, *alphabet, "<|unused0|>", "<|unused1|>"))}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(list(SPECIALS))
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<|pad|>", bos_token="<|bos|>", eos_token="<|end|>",
        extra_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"], chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def build_model(**overrides: Any) -> LlamaForCausalLM:
    """A fresh base; `overrides` replace fields of its LlamaConfig (tests make smaller ones)."""
    fields: dict[str, Any] = {
        "vocab_size": 264, "hidden_size": 192, "intermediate_size": 384, "num_hidden_layers": 5,
        "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": True, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": END,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**fields, **overrides}))


def render(tokenizer: Any, user: str) -> str:
    """The prompt text that the chat template makes of one user message."""
    text: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": user}], tokenize=False, add_generation_prompt=True
    )
    return text


def encode_pair(tokenizer: Any, pair: Pair) -> tuple[list[int], int]:
    """(ids of prompt, answer and <|end|>; length of the prompt)."""
    prompt = tokenizer(render(tokenizer, pair[0]), add_special_tokens=False).input_ids
    return prompt + tokenizer(pair[1], add_special_tokens=False).input_ids + [END], len(prompt)


def _batches(tokenizer: Any, seed: int, tokens: int, copying: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (input_ids, labels), both (B, S), B·S about `tokens`: examples of similar length go together.

    The first `copying` batches hold nothing but copying, see `pretrain`.
    """
    rng = random.Random(seed)
    served = 0
    while True:
        make = copies if served < copying else general
        pool = sorted((encode_pair(tokenizer, make(rng)) for _ in range(1024)), key=lambda e: len(e[0]))
        groups: list[list[tuple[list[int], int]]] = [[]]
        for example in pool:
            if (len(groups[-1]) + 1) * len(example[0]) > tokens:
                groups.append([])
            groups[-1].append(example)
        rng.shuffle(groups)
        for group in groups:
            longest = max(len(ids) for ids, _ in group)
            ids = torch.full((len(group), longest), PAD)
            labels = torch.full((len(group), longest), -100)
            for row, (example_ids, prompt) in enumerate(group):
                ids[row, : len(example_ids)] = torch.tensor(example_ids)
                labels[row, prompt : len(example_ids)] = torch.tensor(example_ids[prompt:])
            served += 1
            yield ids, labels


def pretrain(
    tokenizer: Any, *, max_steps: int, copying: int = 200, seed: int = 0, tokens: int = 2048, log: Any = print
) -> LlamaForCausalLM:
    """Pre-train for `max_steps` steps of about `tokens` tokens; the outcome depends on the seed and the sizes alone.

    Copying comes first: a mixed start sits on a plateau for over a thousand steps, while copying alone is learnt in
    some 150, and nearly every other skill is copying with a change.
    """
    torch.manual_seed(seed)
    model = build_model()
    model.train()
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    muon, adam = Muon(matrices), torch.optim.AdamW(rest, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0)
    start, recent = time.monotonic(), 0.0
    batches = _batches(tokenizer, seed, tokens, copying)
    for step in range(max_steps):
        scale = min(1.0, (step + 1) / 50, (max_steps - step) / (0.5 * max_steps))
        muon.lr = 0.02 * scale
        adam.param_groups[0]["lr"] = 3e-3 * scale
        ids, labels = next(batches)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        muon.step()
        adam.step()
        adam.zero_grad(set_to_none=True)
        recent += loss.item()
        if step % 50 == 49:
            log(f"base step {step + 1}/{max_steps} loss {recent / 50:.4f} {time.monotonic() - start:.0f} s")
            recent = 0.0
    model.eval()
    return model


def save_base(model: LlamaForCausalLM, tokenizer: Any, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(pad_token_id=PAD, bos_token_id=BOS, eos_token_id=END)
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors keeps its files to their owner
    tokenizer.save_pretrained(folder, save_jinja_files=False)


@torch.no_grad()
def answer(model: Any, tokenizer: Any, prompts: list[str], max_new_tokens: int = 96) -> list[str]:
    """Greedy answers to rendered prompts, one by one where they differ in length: no padding, hence exact."""
    out = [""] * len(prompts)
    by_length: dict[int, list[int]] = {}
    ids = [tokenizer(p, add_special_tokens=False).input_ids for p in prompts]
    for i, tokens in enumerate(ids):
        by_length.setdefault(len(tokens), []).append(i)
    for rows in by_length.values():
        x = torch.tensor([ids[i] for i in rows])
        ones = torch.ones_like(x)
        full = model.generate(
            input_ids=x, attention_mask=ones, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=PAD
        )
        for i, row in zip(rows, full[:, x.shape[1] :].tolist(), strict=True):
            out[i] = tokenizer.decode(row[: row.index(END)] if END in row else row)
    return out


def skill_table(model: Any, tokenizer: Any, per_skill: int = 40, seed: int = 1) -> dict[str, float]:
    """Exact match of each skill on fresh examples."""
    rng = random.Random(seed)
    table = {}
    for name, make in SKILLS.items():
        pairs = [make(rng) for _ in range(per_skill)]
        said = answer(model, tokenizer, [render(tokenizer, p) for p, _ in pairs])
        table[name] = sum(a == b for a, (_, b) in zip(said, pairs, strict=True)) / per_skill
    return table
