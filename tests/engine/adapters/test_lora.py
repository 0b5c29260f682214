"""LoRA adapters as `peft` saves them: logits of its own forward pass, on every family, alone and beside others."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.support.driving import GREEDY, Recorder, ask, build, prompt, relative, run, save_model, save_tucka
from tucka_runtime.adapters.format import read_adapter
from tucka_runtime.engine.adapters.footprint import folded_bytes
from tucka_runtime.errors import InvalidAdapterError
from tucka_runtime.messages import AdapterKey, RouteScope

FP32 = 1e-4
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KEY = AdapterKey("lora", 1)

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qv": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "every-target": ("llama", {"target_modules": ALL, "r": 5}),
    "all-linear": ("qwen2", {"target_modules": "all-linear", "r": 2}),
    "regex": ("llama", {"target_modules": r".*layers\.1\.(self_attn\.[kv]_proj|mlp\.up_proj)"}),
    "excluded": ("llama", {"target_modules": ALL, "exclude_modules": ["k_proj", "layers.0.mlp.up_proj"]}),
    "one-layer": ("mistral", {"target_modules": ["k_proj", "down_proj"], "layers_to_transform": [1]}),
    "rank-pattern": (
        "llama",
        {"target_modules": ALL, "r": 4, "rank_pattern": {"q_proj": 9, "layers.1.mlp.gate_proj": 1}},
    ),
    "alpha-pattern": (
        "qwen3",
        {"target_modules": ALL, "lora_alpha": 3, "alpha_pattern": {"v_proj": 17, "layers.0.mlp.down_proj": 0.5}},
    ),
    "rslora": ("llama", {"target_modules": ALL, "use_rslora": True, "rank_pattern": {"o_proj": 7}}),
    "orthogonal": ("llama", {"target_modules": ["q_proj"], "r": 4, "init_lora_weights": "orthogonal"}),
    "mica": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "mica"}),
    "dropout": ("llama", {"target_modules": ["q_proj"], "lora_dropout": 0.5}),
    "no-biases-to-train": ("llama", {"target_modules": ["q_proj"], "bias": "all"}),
    "dora": ("llama", {"target_modules": ALL, "use_dora": True}),
    "dora-and-biases": ("qwen2", {"target_modules": "all-linear", "use_dora": True, "use_rslora": True, "r": 2}),
    "dora-conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "use_dora": True, "fan_in_fan_out": True}),
    "lora-bias": ("qwen2", {"target_modules": ["q_proj", "o_proj", "up_proj", "down_proj"], "lora_bias": True}),
    "own-biases": ("qwen2", {"target_modules": ALL, "bias": "lora_only"}),
    "own-biases-dora": ("qwen2", {"target_modules": ["q_proj", "v_proj"], "bias": "lora_only", "use_dora": True}),
    "own-and-lora-biases": ("qwen2", {"target_modules": ["k_proj", "o_proj"], "bias": "lora_only", "lora_bias": True}),
    "own-biases-conv1d": (
        "gpt2",
        {"target_modules": ["c_attn", "c_proj"], "bias": "lora_only", "fan_in_fan_out": True},
    ),
    "all-biases-adapted": ("qwen2", {"target_modules": ["q_proj", "k_proj", "v_proj"], "bias": "all"}),
    "no-task-type": ("llama", {"target_modules": ["q_proj"], "task_type": None}),
    "adapted-embedding": ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    "adapted-head": ("llama", {"target_modules": ["q_proj", "lm_head"], "lora_bias": True}),
    "adapted-tied-tables": ("qwen2", {"target_modules": ["embed_tokens", "lm_head"], "use_rslora": True}),
    "adapted-embedding-beside-positions": ("gpt2", {"target_modules": ["c_attn", "wte"]}),
    "dora-tables": ("llama", {"target_modules": ["v_proj", "embed_tokens", "lm_head"], "use_dora": True}),
    "tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [60, 3, 17, *range(30, 50)]}),
    "tokens-of-both": (
        "llama",
        {
            "target_modules": ["q_proj"],
            "trainable_token_indices": {"embed_tokens": [*range(3, 40)], "lm_head": [96, 5, 6]},
        },
    ),
    "tokens-tied": ("qwen2", {"target_modules": ["q_proj"], "trainable_token_indices": [*range(60, 2, -1)]}),
    "own-head": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "own-embedding": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "own-norms": (
        "qwen3",
        {"target_modules": ["v_proj"], "modules_to_save": ["q_norm", "norm", "input_layernorm", "layers.1.mlp"]},
    ),
    "own-tied-head-and-embedding": (
        "qwen2",
        {"target_modules": ["v_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    ),
    "all-conv1d": ("gpt2", {"target_modules": "all-linear"}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "conv1d-saved": (
        "gpt2",
        {"target_modules": ["c_attn"], "fan_in_fan_out": True, "modules_to_save": ["ln_1", "h.1.mlp.c_proj", "wpe"]},
    ),
}


def save_base(folder: Path, name: str) -> Any:
    """The base of a case."""
    return save_model(folder, CASES[name][0], **({"tie_word_embeddings": True} if "tied" in name else {}))


def save_peft(model: Any, folder: Path, seed: int, tables: bool = False, **settings: Any) -> None:
    """An adapter whose both factors, and whatever it saves whole, are random. `tables`: with the base's embedding and
    head, as PEFT adds them by itself where an adapter reaches either."""
    torch.manual_seed(seed)
    config = LoraConfig(**{"r": 3, "lora_alpha": 6, "task_type": "CAUSAL_LM", **settings})
    peft = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "magnitude" in name:
                parameter *= 1 + 0.3 * torch.randn_like(parameter)
            elif "lora_" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
            elif parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)
    peft.save_pretrained(folder, save_embedding_layers=tables)
    peft.unload()


def reference(base: Path, adapter: Path, ids: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=dtype), adapter, autocast_adapter_dtype=False
    ).to(dtype)
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_peft(name: str, tmp_path: Path):
    settings = CASES[name][1]
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    save_peft(save_base(base, name), adapter, 1, **settings)
    engine = build(base)
    info, runner = engine.load_adapter(KEY, adapter), engine.runner
    kept, _ = folded_bytes(read_adapter(adapter, engine.layout), runner.arch, runner.dtype, runner.factor_dtype, None)
    assert kept == info.bytes
    recorder = Recorder(engine)
    ids = prompt(21)
    sampling = replace(GREEDY, max_tokens=6)
    ((answer,), _) = run(engine, ask(ids, sampling=sampling, adapter=KEY), ask(prompt(9), id="base", sampling=sampling))
    theirs = reference(base, adapter, (*ids, *answer.token_ids[:-1]))
    assert relative(recorder.of("r"), theirs) < FP32
    plain = AutoModelForCausalLM.from_pretrained(base)
    with torch.inference_mode():
        expected = plain(torch.tensor([prompt(9)])).logits[0]
        unadapted = plain(torch.tensor([ids])).logits[0]
    assert relative(recorder.of("base")[:9], expected) < FP32
    assert relative(recorder.of("r")[:21], unadapted) > 0.05, "the adapter changes nothing: this shows nothing"


@pytest.mark.parametrize("name", ["qv", "adapted-tied-tables", "dora-tables"])
def test_tables_that_peft_saved_unasked_cost_nothing(name: str, tmp_path: Path):
    """They are the base's own; where they are not, they replace the base's, tied ones both at once."""
    settings = CASES[name][1]
    base, adapter, lean = tmp_path / "base", tmp_path / "adapter", tmp_path / "lean"
    save_peft(save_base(base, name), adapter, 1, tables=True, **settings)
    save_peft(save_base(base, name), lean, 1, **settings)
    engine = build(base)
    assert engine.load_adapter(KEY, adapter).bytes == engine.load_adapter(AdapterKey("lean", 1), lean).bytes
    weights = adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    stored = [own for own in tensors if re.search(r"(embed_tokens|lm_head)(\.base_layer)?\.weight$", own)]
    assert len(stored) == 2
    save_file(tensors | {own: tensors[own] + 0.2 for own in stored}, weights)
    changed = AdapterKey("changed", 1)
    engine.load_adapter(changed, adapter)
    recorder, ids = Recorder(engine), prompt(21)
    run(engine, ask(ids, sampling=replace(GREEDY, max_tokens=1), adapter=changed))
    assert relative(recorder.of("r"), reference(base, adapter, ids)) < FP32


@pytest.mark.parametrize("name", ["own-head", "own-embedding", "own-tied-head-and-embedding"])
def test_tables_that_peft_saved_beside_replaced_ones_change_nothing(name: str, tmp_path: Path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    save_peft(save_base(base, name), adapter, 1, tables=True, **CASES[name][1])
    assert any("original_module" in own for own in load_file(adapter / "adapter_model.safetensors"))
    engine = build(base)
    engine.load_adapter(KEY, adapter)
    recorder, ids = Recorder(engine), prompt(21)
    run(engine, ask(ids, sampling=replace(GREEDY, max_tokens=1), adapter=KEY))
    assert relative(recorder.of("r"), reference(base, adapter, ids)) < FP32


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "qalora": ("llama", {"use_qalora": True, "qalora_group_size": 8}, "merge_and_unload"),
    "activated": ("llama", {"alora_invocation_tokens": [3]}, "merge_and_unload"),
    "parameters": ("llama", {"target_parameters": ["k_proj.weight"]}, "merge_and_unload"),
    "repeated-layers": ("llama", {"layer_replication": [(0, 2), (1, 2)]}, "merge_and_unload"),
    "positions": ("gpt2", {"target_modules": ["c_attn", "wpe"]}, "modules_to_save"),
    "all-biases": ("qwen2", {"bias": "all"}, "bias='lora_only'"),
    "pissa": ("llama", {"init_lora_weights": "pissa"}, "path_initial_model_for_weight_conversion"),
    "olora": ("llama", {"init_lora_weights": "olora"}, "path_initial_model_for_weight_conversion"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_peft_has_and_is_not_served(name: str, tmp_path: Path):
    """Nothing of it loads as if it were a plain LoRA, and the refusal says what to do instead."""
    kind, settings, what_to_do = REFUSED[name]
    save_peft(
        save_model(tmp_path / "base", kind), tmp_path / "adapter", 1, **{"target_modules": ["q_proj"], **settings}
    )
    with pytest.raises(InvalidAdapterError, match=what_to_do):
        build(tmp_path / "base").load_adapter(KEY, tmp_path / "adapter")


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_an_adapter_whose_base_was_changed_is_served_once_converted(kind: str, tmp_path: Path):
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj"], init_lora_weights=kind, task_type="CAUSAL_LM")
    torch.manual_seed(1)
    trained = get_peft_model(save_model(tmp_path / "base"), config)
    config.init_lora_weights = True  # as PEFT has it: the untrained adapter is saved as a plain one
    trained.save_pretrained(tmp_path / "untrained", save_embedding_layers=False)
    config.init_lora_weights = kind
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_" in name:
                parameter += 0.3 * torch.randn_like(parameter)
    trained.save_pretrained(
        tmp_path / "adapter",
        path_initial_model_for_weight_conversion=str(tmp_path / "untrained"),
        save_embedding_layers=False,
    )
    engine = build(tmp_path / "base")
    engine.load_adapter(KEY, tmp_path / "adapter")
    recorder = Recorder(engine)
    run(engine, ask(prompt(21), sampling=replace(GREEDY, max_tokens=1), adapter=KEY))
    with torch.inference_mode():
        theirs = trained(torch.tensor([prompt(21)])).logits[0]
    assert relative(recorder.of("r"), theirs) < FP32


@pytest.mark.parametrize(
    ("kernels", "tokens"),
    [("reference", 2048), ("reference", 12), pytest.param("native", 2048, marks=pytest.mark.native)],
)
def test_many_kinds_in_one_batch(kernels: str, tokens: int, tmp_path: Path):
    """LoRAs of unequal ranks, targets and saved modules beside TuckA adapters of unequal ranks and the base: every row
    has the logits it has alone, in passes of prompts, of decodes, and of both."""
    base = tmp_path / "base"
    names = (
        "every-target", "rank-pattern", "rslora", "dora", "lora-bias", "dora-tables", "tokens-of-both", "own-head",
        "own-embedding",
    )  # fmt: skip
    for seed, name in enumerate(names):
        save_peft(save_model(base), tmp_path / name, seed, **CASES[name][1])
    layout = build(base).layout
    save_tucka(tmp_path / "wide", layout, 1, r=12)
    save_tucka(tmp_path / "inner", layout, 2, ("o_proj", "up_proj"), r=2)
    keys = [AdapterKey(name, 1) for name in (*names, "wide", "inner")]

    def engine(**settings: int) -> Any:
        engine = build(base, kernels=kernels, **settings)
        for key in keys:
            engine.load_adapter(key, tmp_path / key.name)
        return engine

    sampling = replace(GREEDY, max_tokens=7)
    requests = [
        ask(prompt(4 + 3 * i), id=str(i), sampling=sampling, adapter=key, scope=RouteScope.REQUEST)
        for i, key in enumerate((None, *keys, None, *keys[:2]))
    ]
    crowd = Recorder(full := engine(max_num_batched_tokens=tokens, max_num_seqs=12))
    answers = run(full, *requests)
    solo = Recorder(roomy := engine())
    for request, (answer,) in zip(requests, answers, strict=True):
        ((alone,),) = run(roomy, request)
        assert answer.token_ids == alone.token_ids
        assert relative(crowd.of(request.id), solo.of(request.id)) < FP32
        if request.adapter in keys[: len(names)]:
            text = (*request.prompts[0], *alone.token_ids[:-1])
            assert relative(solo.of(request.id), reference(base, tmp_path / request.adapter.name, text)) < FP32


def test_bf16_is_as_near_to_the_truth_as_peft(tmp_path: Path):
    """Relative L2 error against float64 at most 1.1 times PEFT's, over a few adapters and prompts."""
    ours, theirs, exact = [], [], []
    for seed in range(4):
        base, adapter = tmp_path / f"base{seed}", tmp_path / f"adapter{seed}"
        save_peft(save_model(base, seed=seed, dtype=torch.bfloat16), adapter, seed, target_modules=ALL, lora_alpha=2)
        engine = build(base)
        engine.load_adapter(KEY, adapter)
        recorder = Recorder(engine)
        ids = prompt(30, seed)
        sampling = replace(GREEDY, max_tokens=1)
        run(engine, ask(ids, sampling=sampling, adapter=KEY), ask(prompt(5), id="base", sampling=sampling))
        ours.append(recorder.of("r").double())
        theirs.append(reference(base, adapter, ids, torch.bfloat16).double())
        exact.append(reference(base, adapter, ids, torch.float64))
    norm = torch.linalg.vector_norm
    assert norm(torch.cat(ours) - torch.cat(exact)) <= 1.1 * norm(torch.cat(theirs) - torch.cat(exact))
