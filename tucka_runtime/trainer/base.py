"""The embedded base: a byte-level Llama of about 1.7 million parameters, pre-trained on the project's general mix."""

import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tucka_runtime.trainer.skills import SKILLS, Pair, general

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
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": user}], tokenize=False, add_generation_prompt=True
    )


def encode_pair(tokenizer: Any, pair: Pair) -> tuple[list[int], int]:
    """(ids of prompt, answer and <|end|>; length of the prompt)."""
    prompt = tokenizer(render(tokenizer, pair[0]), add_special_tokens=False).input_ids
    return prompt + tokenizer(pair[1], add_special_tokens=False).input_ids + [END], len(prompt)


def _batches(tokenizer: Any, seed: int, tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (input_ids, labels), both (B, S), B·S about `tokens`: examples of similar length go together."""
    rng = random.Random(seed)
    while True:
        pool = sorted((encode_pair(tokenizer, general(rng)) for _ in range(4096)), key=lambda e: len(e[0]))
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
            yield ids, labels


def pretrain(
    tokenizer: Any, *, seconds: float, max_steps: int, seed: int = 0, lr: float = 2e-3, tokens: int = 2048, log: Any = print
) -> LlamaForCausalLM:
    """Pre-train for `max_steps` steps of about `tokens` tokens with warm-up and cosine.

    `seconds` is a guard, not a schedule: the outcome depends on the seed and `max_steps` alone, and running past the
    guard raises, so that a slow machine never ships another model.
    """
    torch.manual_seed(seed)
    model = build_model()
    model.train()
    matrices = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}], lr=lr, betas=(0.9, 0.98)
    )
    warmup = max(1, max_steps // 40)
    start = time.monotonic()
    batches = _batches(tokenizer, seed, tokens)
    for step in range(max_steps):
        scale = (step + 1) / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * (step - warmup) / (max_steps - warmup)))
        for group in optimizer.param_groups:
            group["lr"] = lr * max(scale, 0.01)
        ids, labels = next(batches)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0 or step == max_steps - 1:
            log(f"base step {step}/{max_steps} loss {loss.item():.4f} {time.monotonic() - start:.0f} s")
        if time.monotonic() - start > seconds:
            raise TimeoutError(f"pre-training took over {seconds:.0f} s at step {step} of {max_steps}")
    return model.eval()


def save_base(model: LlamaForCausalLM, tokenizer: Any, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(pad_token_id=PAD, bos_token_id=BOS, eos_token_id=END)
    model.save_pretrained(folder)
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
        full = model.generate(
            input_ids=x, attention_mask=torch.ones_like(x), max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=PAD
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
