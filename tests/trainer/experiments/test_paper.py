"""The parameter formulas of the paper's tables against models that were really adapted."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tucka_runtime.trainer.adapter import AdapterSettings, attach, trainable_parameters
from tucka_runtime.trainer.experiments.paper import lora_parameters, tucka_parameters

# d 32, inner 48, two layers, all linears: q k v o, gate and up, down
LAYERS = ((32, 32, 8), (32, 48, 4), (48, 32, 2))


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    return LlamaForCausalLM(config)


def test_formulas_count_what_is_trained():
    tucka = attach(llama(), AdapterSettings(r=4, k=3, t=2, p=2, alpha=64), 0)
    assert trainable_parameters(tucka) == tucka_parameters(LAYERS, 32, 4, 3, 2, 2)
    lora = attach(llama(), AdapterSettings(method="lora", r=4, alpha=8), 0)
    assert trainable_parameters(lora) == lora_parameters(LAYERS, 4)
