"""Every decoder family against transformers: prefill, decode, chunks, packed batches; fp32 and, calibrated, bf16."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.support.driving import GREEDY, Recorder, ask, build, prompt, relative, run, save_model

FP32 = 1e-4  # relative L2 error of a row of logits against transformers

LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-gqa": ("llama", {}),
    "llama-mha": ("llama", {"num_key_value_heads": 4}),
    "llama-mqa": ("llama", {"num_key_value_heads": 1}),
    "llama-attention-bias": ("llama", {"attention_bias": True}),
    "llama-mlp-bias": ("llama", {"mlp_bias": True}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-head-dim-20": ("llama", {"head_dim": 20}),
    "llama-head-dim-24": ("llama", {"head_dim": 24, "num_key_value_heads": 4}),
    "llama-head-dim-implied": ("llama", {"head_dim": None, "num_attention_heads": 2, "num_key_value_heads": 1}),
    "llama-eps": ("llama", {"rms_norm_eps": 0.1}),
    "llama-theta": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}),
    "llama-linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 1e4}},
    ),
    "llama-llama3": (
        "llama",
        {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 16, "rope_theta": 1e3}, "head_dim": 16},
    ),
    "llama-yarn": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "rope_theta": 1e3,
            },
            "head_dim": 16,
        },
    ),
    "llama-yarn-options": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 8.0,
                "original_max_position_embeddings": 16,
                "attention_factor": 0.7,
                "beta_fast": 8.0,
                "beta_slow": 2.0,
                "truncate": False,
                "rope_theta": 1e4,
            },
            "head_dim": 12,
        },
    ),
    "mistral-window": ("mistral", {"sliding_window": 9}),
    "mistral-window-2": ("mistral", {"sliding_window": 2}),
    "mistral-full": ("mistral", {"sliding_window": None, "head_dim": 20}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1, "num_hidden_layers": 3},
    ),
    "qwen2-window-off": ("qwen2", {"use_sliding_window": False, "sliding_window": 7, "max_window_layers": 0}),
    "qwen3": ("qwen3", {}),
    "qwen3-bias-tied": ("qwen3", {"attention_bias": True, "tie_word_embeddings": True, "head_dim": 24}),
    "qwen3-window": ("qwen3", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "gpt2": ("gpt2", {}),
    "gpt2-inverse-layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "n_layer": 3}),
    "gpt2-inner": ("gpt2", {"n_inner": 52, "layer_norm_epsilon": 0.1}),
    "gpt2-unscaled": ("gpt2", {"scale_attn_weights": False}),
    "gpt2-untied": ("gpt2", {"tie_word_embeddings": False, "n_head": 2}),
}

PROMPTS = (prompt(37), prompt(1), prompt(20), prompt(8))
NEW = 14


def step_by_step(model: Any, ids: list[int], prefilled: int) -> Tensor:
    """Logits of every position as `generate` has them: the prompt at once, then token by token with the cache."""
    with torch.inference_mode():
        out = model(torch.tensor([ids[:prefilled]]), use_cache=True)
        rows = [out.logits[0]]
        for token in ids[prefilled:]:
            out = model(torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
            rows.append(out.logits[0])
    return torch.cat(rows)


def check_against(model: Any, folder: Path, prompts: tuple[tuple[int, ...], ...], **settings: Any) -> None:
    """All rows of a packed batch of prompts and of what is decoded from them."""
    engine = build(folder, **settings)
    recorder = Recorder(engine)
    (answers,) = run(engine, ask(*prompts, sampling=replace(GREEDY, max_tokens=NEW)))
    for i, (answer, ids) in enumerate(zip(answers, prompts, strict=True)):
        assert len(answer.token_ids) == NEW
        theirs = step_by_step(model, [*ids, *answer.token_ids[:-1]], len(ids))
        ours = recorder.of("r", i)
        assert relative(ours, theirs) < FP32
        assert answer.token_ids == ours[len(ids) - 1 :].argmax(dim=-1).tolist()


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path):
    kind, changes = VARIANTS[name]
    model = save_model(tmp_path, kind, **changes)
    check_against(model, tmp_path, PROMPTS)
    # The longest prompt in chunks of 7 (beside decodes of 6, 5, ...) over pages of 3, then one page a token.
    check_against(model, tmp_path, PROMPTS, max_num_batched_tokens=7, max_num_seqs=4, block_size=3)
    check_against(model, tmp_path, PROMPTS[:1], max_num_batched_tokens=16, max_num_seqs=4, block_size=1)


@pytest.mark.parametrize("settings", [{}, {"max_num_batched_tokens": 7, "max_num_seqs": 4, "block_size": 3}])
def test_dynamic_rope_stretches_with_the_text(tmp_path: Path, settings: dict[str, int]):
    """Prompts below, at and above the trained length, and decodes that grow past it."""
    parameters = {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 1e3}
    model = save_model(tmp_path, rope_parameters=parameters, max_position_embeddings=24, head_dim=16)
    for ids in (prompt(37), prompt(24), prompt(20), prompt(3)):
        fresh = AutoModelForCausalLM.from_pretrained(tmp_path)  # its rotary buffer remembers the longest text so far
        check_against(fresh, tmp_path, (ids,), max_model_len=72, **settings)
    engine = build(tmp_path, max_model_len=72, **settings)
    recorder = Recorder(engine)
    prompts = (prompt(37), prompt(3), prompt(20))
    (answers,) = run(engine, ask(*prompts, sampling=replace(GREEDY, max_tokens=NEW)))
    for i, (answer, ids) in enumerate(zip(answers, prompts, strict=True)):
        fresh = AutoModelForCausalLM.from_pretrained(tmp_path)
        theirs = step_by_step(fresh, [*ids, *answer.token_ids[:-1]], len(ids))
        assert relative(recorder.of("r", i), theirs) < FP32
    del model


def test_dynamic_rope_does_not_reuse_pages_of_another_stretch(tmp_path: Path):
    """A short prompt's pages hold keys that were rotated for a short text."""
    parameters = {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 1e3}
    save_model(tmp_path, rope_parameters=parameters, max_position_embeddings=24)
    long = prompt(50)
    sampling = replace(GREEDY, max_tokens=4)
    engine = build(tmp_path, max_model_len=72, block_size=4)
    recorder = Recorder(engine)
    run(engine, ask(long[:20], id="short", sampling=sampling))
    run(engine, ask(long[:30], id="longer", sampling=sampling))
    run(engine, ask(long[:40], id="long", sampling=sampling))
    for id, length in (("longer", 30), ("long", 40)):
        alone = build(tmp_path, max_model_len=72, block_size=4)
        expected = Recorder(alone)
        run(alone, ask(long[:length], sampling=sampling))
        position = length - 1
        assert relative(recorder.logits[id, 0][position], expected.logits["r", 0][position]) < FP32


def test_legacy_rope_scaling_is_understood(tmp_path: Path):
    """config.json as it was written before transformers 5."""
    from tests.support.driving import edit_json

    save_model(tmp_path)

    def old(config: dict[str, Any]) -> None:
        del config["rope_parameters"]
        config |= {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 3.0}}

    edit_json(tmp_path / "config.json", old)
    check_against(AutoModelForCausalLM.from_pretrained(tmp_path), tmp_path, PROMPTS[:2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("llama", {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "num_hidden_layers": 4}),
        ("mistral", {"sliding_window": 9}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("gpt2", {}),
    ],
)
def test_low_precision_is_as_near_to_the_truth_as_transformers(
    kind: str, changes: dict[str, Any], dtype: torch.dtype, tmp_path: Path
):
    """Relative L2 error against float64 at most 1.1 times that of transformers as it comes, in the same dtype on the
    same input: for prefill and for decode, each over a few models and prompts, since a single short text is noise."""
    prefill, decode = [], []
    for seed in range(3):
        folder = tmp_path / str(seed)
        save_model(folder, kind, seed, dtype=dtype, **changes)
        truth = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
        peer = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        assert peer.dtype == dtype
        prompts = (prompt(37, seed), prompt(12, seed))
        engine = build(folder)
        assert engine.runner.dtype == dtype
        recorder = Recorder(engine)
        (answers,) = run(engine, ask(*prompts, sampling=replace(GREEDY, max_tokens=16)))
        for i, (answer, ids) in enumerate(zip(answers, prompts, strict=True)):
            text = [*ids, *answer.token_ids[:-1]]
            exact = step_by_step(truth, text, len(ids))
            rows = (recorder.of("r", i).double(), step_by_step(peer, text, len(ids)).double(), exact)
            prefill.append([part[: len(ids)] for part in rows])
            decode.append([part[len(ids) :] for part in rows])
    for parts in (prefill, decode):
        ours, theirs, exact = (torch.cat(part) for part in zip(*parts, strict=True))
        norm = torch.linalg.vector_norm
        assert norm(ours - exact) <= 1.1 * norm(theirs - exact)
