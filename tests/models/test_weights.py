"""Base model folders: what is read is exactly what was saved, and what cannot be served is refused by name."""

import errno
import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.support.driving import GREEDY, Recorder, ask, build, edit_json, prompt, relative, run, save_model
from tucka_runtime.errors import ModelLoadError
from tucka_runtime.models.weights import fingerprint

Tensors = dict[str, torch.Tensor]


def logits(folder: Path, **settings: Any) -> torch.Tensor:
    engine = build(folder, **settings)
    recorder = Recorder(engine)
    run(engine, ask(prompt(19), sampling=replace(GREEDY, max_tokens=1)))
    return recorder.of("r")


def reference(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        return model(torch.tensor([prompt(19)])).logits[0]


def edit(folder: Path, change: Callable[[Tensors], Any]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def refused(folder: Path, *words: str, **settings: Any) -> None:
    with pytest.raises(ModelLoadError) as caught:
        build(folder, **settings)
    for word in words:
        assert word in caught.value.message


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_sharded_checkpoint_is_read_whole(kind: str, tmp_path: Path):
    save_model(tmp_path, kind, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert relative(logits(tmp_path), reference(tmp_path)) < 1e-4


@pytest.mark.parametrize(("kind", "prefix"), [("gpt2", "transformer."), ("llama", "model."), ("qwen2", "model.")])
def test_a_checkpoint_of_the_bare_model_is_read(kind: str, prefix: str, tmp_path: Path):
    """Saved without the head: no name has the prefix, and the head is the embedding."""
    save_model(tmp_path, kind, tie_word_embeddings=True)
    expected = logits(tmp_path)

    def strip(tensors: Tensors) -> None:
        for name in list(tensors):
            assert name.startswith(prefix)
            tensors[name.removeprefix(prefix)] = tensors.pop(name)

    edit(tmp_path, strip)
    assert torch.equal(logits(tmp_path), expected)


def test_masks_of_old_gpt2_checkpoints_are_ignored(tmp_path: Path):
    save_model(tmp_path, "gpt2")
    expected = logits(tmp_path)
    masks = {f"transformer.h.{i}.attn.{n}": torch.ones(1) for i in range(2) for n in ("bias", "masked_bias")}
    edit(tmp_path, lambda tensors: tensors.update(masks))
    assert torch.equal(logits(tmp_path), expected)


@pytest.mark.parametrize("same", [True, False])
def test_a_head_that_is_saved_beside_tied_embeddings(same: bool, tmp_path: Path):
    """As in transformers: where both are there and differ, they are not tied."""
    save_model(tmp_path, tie_word_embeddings=True)

    def add_head(tensors: Tensors) -> None:
        head = tensors["model.embed_tokens.weight"].clone()
        tensors["lm_head.weight"] = head if same else head.flip(0).contiguous()

    edit(tmp_path, add_head)
    assert relative(logits(tmp_path), reference(tmp_path)) < 1e-4


def test_tied_embeddings_that_are_saved_as_the_head(tmp_path: Path):
    save_model(tmp_path, tie_word_embeddings=True)
    edit(tmp_path, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    assert relative(logits(tmp_path), reference(tmp_path)) < 1e-4


@pytest.mark.parametrize(
    ("dtype", "setting", "expected"),
    [
        (torch.float16, "auto", torch.float16),
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.bfloat16, "float32", torch.float32),
        (torch.float32, "bfloat16", torch.bfloat16),
        (torch.float64, "auto", torch.float32),
    ],
)
def test_dtype(dtype: torch.dtype, setting: str, expected: torch.dtype, tmp_path: Path):
    save_model(tmp_path, dtype=dtype)
    engine = build(tmp_path, dtype=setting)
    assert engine.runner.dtype == expected
    weights = engine.runner.model.weights
    assert {w.dense().dtype for layer in weights.layers for w in layer.linears} == {expected}
    assert {cache.dtype for pair in engine.runner.caches for cache in pair} == {expected}
    assert f"torch.{engine.info.dtype}" == str(expected)


def test_missing_tensors_are_named(tmp_path: Path):
    save_model(tmp_path)
    edit(tmp_path, lambda t: (t.pop("model.layers.1.mlp.up_proj.weight"), t.pop("model.norm.weight")))
    refused(tmp_path, "lacks", "model.layers.1.mlp.up_proj.weight", "model.norm.weight")


def test_a_missing_untied_head_is_named(tmp_path: Path):
    save_model(tmp_path)
    edit(tmp_path, lambda t: t.pop("lm_head.weight"))
    refused(tmp_path, "lacks", "lm_head.weight")


def test_unexpected_tensors_are_named(tmp_path: Path):
    """A bias that the configuration does not ask for would be lost without a word."""
    save_model(tmp_path, attention_bias=True)
    edit_json(tmp_path / "config.json", lambda config: config.update(attention_bias=False))
    refused(tmp_path, "unexpected", "model.layers.0.self_attn.k_proj.bias")


def test_wrong_shapes_are_named(tmp_path: Path):
    save_model(tmp_path)
    edit(tmp_path, lambda t: t.update({"model.layers.0.self_attn.o_proj.weight": torch.zeros(32, 31)}))
    refused(tmp_path, "model.layers.0.self_attn.o_proj.weight", "(32, 31)", "(32, 32)")


def test_a_tied_head_of_the_wrong_shape_is_named(tmp_path: Path):
    save_model(tmp_path, tie_word_embeddings=True)
    edit(tmp_path, lambda t: t.update({"lm_head.weight": torch.zeros(96, 32)}))
    refused(tmp_path, "lm_head.weight", "(96, 32)")


def test_integers_are_not_weights(tmp_path: Path):
    save_model(tmp_path)
    edit(tmp_path, lambda t: t.update({"model.norm.weight": torch.zeros(32, dtype=torch.int8)}))
    refused(tmp_path, "model.norm.weight", "I8")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "bert"}, ["'bert'", "gpt2, llama"]),
        ({"model_type": "no_such_thing"}, ["'no_such_thing'"]),
        ({"model_type": None}, ["None"]),
        ({"model_type": ["llama"]}, ["config.json"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "'gelu'", "silu"]),
        ({"pretraining_tp": 2}, ["pretraining_tp"]),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, ["heads"]),
        ({"hidden_size": "large"}, ["hidden_size"]),
        ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, ["'spiral'", "llama3, yarn"]),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0}}, ["longrope"]),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, ["low_freq_factor"]),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, ["factor"]),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": "x"}}, ["factor"]),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, ["factor"]),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": "x"}}, ["factor"]),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            ["partial rotary"],
        ),
    ],
    ids=str,
)
def test_what_config_json_cannot_have(changes: dict[str, Any], words: list[str], tmp_path: Path):
    save_model(tmp_path)
    edit_json(tmp_path / "config.json", lambda config: config.update(changes))
    refused(tmp_path, *words)


def test_gpt2_options_that_change_the_maths_are_named(tmp_path: Path):
    save_model(tmp_path, "gpt2")
    edit_json(tmp_path / "config.json", lambda config: config.update(activation_function="relu"))
    refused(tmp_path, "activation_function", "'relu'")
    edit_json(tmp_path / "config.json", lambda c: c.update(activation_function="gelu_new", add_cross_attention=True))
    refused(tmp_path, "add_cross_attention")


def test_layer_types_that_are_unknown_are_named(tmp_path: Path):
    save_model(tmp_path, "qwen3")
    edit_json(tmp_path / "config.json", lambda c: c.update(layer_types=["full_attention", "chunked_attention"]))
    refused(tmp_path, "chunked_attention")


@pytest.mark.parametrize("content", ["", "[]", "{", '"llama"', "\0"])
def test_config_json_that_is_no_object(content: str, tmp_path: Path):
    save_model(tmp_path)
    (tmp_path / "config.json").write_text(content)
    refused(tmp_path, "config.json")


def test_a_folder_that_is_not_there(tmp_path: Path):
    refused(tmp_path / "nowhere", "nowhere", "config.json")


def test_a_folder_without_weights(tmp_path: Path):
    save_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    refused(tmp_path, "model.safetensors")


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "model.safetensors.index.json", "shard.safetensors"]
)
def test_a_folder_of_another_user(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Opening is what is denied here, since no mode of a file keeps root out."""
    save_model(tmp_path)
    if "index" in name or "shard" in name:
        (tmp_path / "model.safetensors").rename(tmp_path / "shard.safetensors")
        (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "shard.safetensors"}}')
    opened = io.open

    def denied(file: Any, *args: Any, **kwargs: Any) -> Any:
        if file == tmp_path / name:
            raise PermissionError(errno.EACCES, "Permission denied", str(file))
        return opened(file, *args, **kwargs)

    monkeypatch.setattr(io, "open", denied)
    refused(tmp_path, f"{name} cannot be read: permission denied", "read access")
    if name != "config.json":
        with pytest.raises(ModelLoadError, match="permission denied"):
            fingerprint(tmp_path)


def test_what_is_no_safetensors_file_has_no_fingerprint(tmp_path: Path):
    """Its first bytes as a length lead past its end, and past any file's."""
    save_model(tmp_path, max_shard_size="10KB")
    index = {"weight_map": {"a": "config.json"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelLoadError, match="shorter than its header"):
        fingerprint(tmp_path)


@pytest.mark.parametrize("size", [0, 4, 100, -40])
def test_a_truncated_checkpoint(size: int, tmp_path: Path):
    save_model(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    refused(tmp_path, "model.safetensors")


@pytest.mark.parametrize(
    "index",
    [
        "{}",
        "[]",
        "nonsense",
        '{"weight_map": []}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": "../outside.safetensors"}}',
        '{"weight_map": {"a": "missing.safetensors"}}',
    ],
)
def test_an_index_that_names_no_files(index: str, tmp_path: Path):
    folder = tmp_path / "model"
    save_model(folder)
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(index)
    refused(folder, "model.safetensors.index.json")


def test_an_index_whose_files_repeat_a_tensor(tmp_path: Path):
    save_model(tmp_path)
    first = tmp_path / "model.safetensors"
    tensors = load_file(first)
    first.unlink()
    save_file(tensors, tmp_path / "a.safetensors")
    save_file({"lm_head.weight": tensors["lm_head.weight"]}, tmp_path / "b.safetensors")
    index = {"weight_map": {"model.norm.weight": "a.safetensors", "lm_head.weight": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(tmp_path, "lm_head.weight")


def test_the_context_is_the_models_unless_it_is_made_shorter(tmp_path: Path):
    save_model(tmp_path)
    assert build(tmp_path).info.max_model_len == 128
    assert build(tmp_path, max_model_len=50).info.max_model_len == 50
    refused(tmp_path, "129", "128", max_model_len=129)
    scaled = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    edit_json(tmp_path / "config.json", lambda config: config.update(rope_parameters=scaled))
    assert build(tmp_path, max_model_len=256).info.max_model_len == 256
    refused(tmp_path, "256", max_model_len=257)


def test_a_cache_that_holds_no_whole_sequence(tmp_path: Path):
    save_model(tmp_path)
    refused(tmp_path, "127", "128", "--kv-cache-tokens", kv_cache_tokens=127)
    assert build(tmp_path, kv_cache_tokens=128, block_size=100).info.kv_cache_tokens == 200


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({"eos_token_id": 2}, {"eos_token_id": [5, 7]}, (2, 5, 7)),
        ({"eos_token_id": 2}, {}, (2,)),
        ({"eos_token_id": [2, 4]}, None, (2, 4)),
        ({"eos_token_id": None}, None, ()),
        ({"eos_token_id": 2}, {"eos_token_id": [5, 97, -1]}, (2, 5)),
    ],
)
def test_tokens_that_end_a_text(config: dict[str, Any], generation: Any, expected: tuple[int, ...], tmp_path: Path):
    """Those of generation_config.json and of config.json, and none that the model cannot produce."""
    save_model(tmp_path)
    edit_json(tmp_path / "config.json", lambda c: c.update(config))
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    engine = build(tmp_path)
    assert engine.info.eos_token_ids == expected
    run(engine, ask(prompt(5), sampling=replace(GREEDY, ignore_eos=False, max_tokens=3, min_tokens=2)))


def test_a_broken_generation_config_is_named(tmp_path: Path):
    save_model(tmp_path)
    (tmp_path / "generation_config.json").write_text("{")
    refused(tmp_path, "generation_config.json")


def test_the_fingerprint_tells_weights_apart_and_not_folders(tmp_path: Path):
    save_model(tmp_path / "a")
    save_model(tmp_path / "b")
    save_model(tmp_path / "c", seed=1)
    save_model(tmp_path / "d", dtype=torch.bfloat16)
    a, b, c, d = (fingerprint(tmp_path / name) for name in "abcd")
    assert re.fullmatch("[0-9a-f]{64}", a)
    assert a == b
    assert len({a, c, d}) == 3
