"""Cosines and sines of rotary positions, with the scaling variants of `rope_parameters`."""

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tucka_runtime.errors import ModelLoadError

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
ROPE_NUMBERS = ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow")


class Rotary:
    """Angles of every position, computed once in fp32 and stored in the model's type.

    The dynamic variant stretches the base frequency with the length of the text: a token is rotated for the length that
    was known when it was first computed, max(prompt length, its position + 1). So the result depends neither on chunked
    prefill nor on preemption, and equals transformers' generate.
    """

    def __init__(self, config: Any, head_dim: int, max_len: int, dtype: torch.dtype, device: torch.device):
        parameters = config.rope_parameters
        kind = parameters.get("rope_type", "default")
        if kind not in ROPE_TYPES:
            raise ModelLoadError(f"config.json asks for rope_type {kind!r}; supported are {', '.join(ROPE_TYPES)}.")
        if parameters.get("partial_rotary_factor", 1.0) != 1.0:
            raise ModelLoadError("config.json asks for a partial rotary embedding, which is not supported.")
        for name, value in parameters.items():
            if name in ROPE_NUMBERS and not isinstance(value, int | float | None):
                raise ModelLoadError(f"config.json has {name} = {value!r} in its rope_parameters, which is no number.")
        self.base, self.head_dim, self.dtype = parameters["rope_theta"], head_dim, dtype
        scaling = 1.0
        if kind in ("default", "dynamic"):
            inv_freq = 1.0 / self.base ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        else:
            inv_freq, scaling = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
        angles = torch.arange(max_len, dtype=torch.float32)[:, None] * inv_freq.float()
        self.cos = (angles.cos() * scaling).to(device, dtype)
        self.sin = (angles.sin() * scaling).to(device, dtype)
        self.stretch_from = config.max_position_embeddings if kind == "dynamic" else None
        self.factor = parameters.get("factor", 1.0)

    def __call__(self, positions: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """positions (T,) int64 -> cos, sin (T, 1, D/2). `lengths` (T,): see the class; None where none exceeds
        the trained length."""
        if lengths is None or self.stretch_from is None:
            cos, sin = self.cos.index_select(0, positions), self.sin.index_select(0, positions)
        else:
            d, n = self.head_dim, self.stretch_from
            stretch = self.factor * lengths.clamp_min(n).float() / n - (self.factor - 1)
            base = self.base * stretch ** (d / (d - 2))
            exponents = torch.arange(0, d, 2, dtype=torch.float32, device=positions.device) / d
            angles = positions.float()[:, None] / base[:, None] ** exponents
            cos, sin = angles.cos().to(self.dtype), angles.sin().to(self.dtype)
        return cos.unsqueeze(1), sin.unsqueeze(1)
