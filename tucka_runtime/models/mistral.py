"""Mistral: Llama's layout with a sliding window in every layer."""

from typing import Any

from tucka_runtime.models.architecture import Architecture, rotary_decoder


def mistral(config: Any) -> Architecture:
    return rotary_decoder(config, windows=(config.sliding_window,) * config.num_hidden_layers)
