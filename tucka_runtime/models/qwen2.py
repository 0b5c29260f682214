"""Qwen2 and Qwen2.5: biases on q, k and v; a sliding window in some layers."""

from typing import Any

from tucka_runtime.models.architecture import Architecture, layer_windows, rotary_decoder


def qwen2(config: Any) -> Architecture:
    return rotary_decoder(config, attention_bias=True, windows=layer_windows(config))
