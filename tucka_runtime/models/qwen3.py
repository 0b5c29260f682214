"""Qwen3 (dense): an RMSNorm on every query and key head."""

from typing import Any

from tucka_runtime.models.architecture import Architecture, layer_windows, rotary_decoder


def qwen3(config: Any) -> Architecture:
    bias = config.attention_bias
    return rotary_decoder(config, attention_bias=bias, output_bias=bias, head_norms=True, windows=layer_windows(config))
