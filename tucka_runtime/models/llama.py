"""Llama 1 to 3 and what shares their layout."""

from typing import Any

from tucka_runtime.models.architecture import Architecture, require, rotary_decoder


def llama(config: Any) -> Architecture:
    require(config, pretraining_tp=1)
    bias = config.attention_bias
    return rotary_decoder(config, attention_bias=bias, output_bias=bias, mlp_bias=config.mlp_bias)
