"""Small random models in GGUF files, written with the package gguf as the converters of GGUF's authors write them."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import AutoConfig, AutoModelForCausalLM

from tests.support.tokenizer_families import FAMILIES, SPECIALS, TEMPLATE

LAYERS, HIDDEN, INNER, HEADS, KV_HEADS, CONTEXT, THETA, EPS = 2, 64, 96, 4, 2, 256, 5000.0, 2.0**-17
HEAD = {
    "llama": HIDDEN // HEADS,
    "qwen2": HIDDEN // HEADS,
    "qwen3": 128,
}  # the last is the only one that transformers knows


def small_model(family: str, vocab: int) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "head_dim": HEAD[family],
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "max_position_embeddings": CONTEXT,
        "rope_theta": THETA, "rms_norm_eps": EPS, "tie_word_embeddings": True,
    }  # fmt: skip
    config = AutoConfig.for_model(family, vocab_size=vocab, initializer_range=0.2, **sizes)
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():  # norms and biases too, or it would not show where they went
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def write_gguf(
    path: Path, kind: Kind = Kind.Q4_1, family: str = "llama", without: str = "", extra: str = "", **more: int | str
) -> dict[str, torch.Tensor]:
    """Writes the file, matrices as `kind`; gives the weights that it stands for, in fp32, by transformers' names.

    `without` is a tensor that is left out, `extra` one that is added, `more` are further keys of the architecture, with
    `__` for dots.
    """
    tokenizer = json.loads(FAMILIES["bytes"]().to_str())["model"]
    tokens = sorted(tokenizer["vocab"], key=lambda token: tokenizer["vocab"][token])
    model = small_model(family, len(tokens))
    writer = gguf.GGUFWriter(path, family)
    _describe(writer, family, more)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["merges"]])
    writer.add_token_types([3 if token in SPECIALS else 1 for token in tokens])
    writer.add_bos_token_id(tokens.index("<s>"))
    writer.add_eos_token_id(tokens.index("</s>"))
    writer.add_eot_token_id(tokens.index("<|end|>"))
    writer.add_chat_template(TEMPLATE)
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == family)
    names = gguf.get_tensor_name_map(arch, LAYERS)
    meant = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied
        module, _, end = name.rpartition(".")
        stored_name = f"{names.get_name(module)}.{end}"
        meant[name], values, own = _stored(name, tensor.numpy(), kind, family)
        if stored_name != without:
            writer.add_tensor(stored_name, values, raw_dtype=own)
    if extra:
        writer.add_tensor(extra, np.ones(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


def _describe(writer: gguf.GGUFWriter, family: str, more: dict[str, int | str]) -> None:
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_feed_forward_length(INNER)
    writer.add_layer_norm_rms_eps(EPS)
    writer.add_rope_freq_base(THETA)
    if family == "llama":
        writer.add_rope_dimension_count(HEAD[family])
    if family == "qwen3":
        writer.add_key_length(HEAD[family])
        writer.add_value_length(HEAD[family])
    for key, value in more.items():
        name = f"{family}.{key.replace('__', '.')}"
        if isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_uint32(name, value)


def _stored(name: str, values: np.ndarray, kind: Kind, family: str) -> tuple[torch.Tensor, np.ndarray, Kind]:
    """What a tensor is meant to be, how it is stored, and as what: vectors are fp32."""
    if values.ndim == 1:
        return torch.from_numpy(values), values, Kind.F32
    meant = gguf.dequantize(gguf.quantize(values, kind), kind)
    heads = (HEADS if "q_proj" in name else KV_HEADS if "k_proj" in name else 0) if family == "llama" else 0
    if heads:  # a GGUF turns neighbouring pairs, transformers the halves of a head
        values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
    return torch.from_numpy(meant), gguf.quantize(values, kind), kind
