"""A base of two tiny layers, and the layouts of the golden bases."""

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open

from tucka_runtime.messages import BaseLayout

D, HIDDEN, VOCAB, LAYERS = 6, 10, 16, 2

_ORDER = {
    **{f"self_attn.{name}_proj": "llama" for name in "qkvo"},
    **{f"mlp.{name}_proj": "llama" for name in ("gate", "up", "down")},
    **dict.fromkeys(("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"), "gpt2"),
}


@pytest.fixture(scope="session")
def base() -> BaseLayout:
    linears = {}
    for layer in range(LAYERS):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            linears[f"model.layers.{layer}.self_attn.{name}"] = (D, D)
        for name in ("gate_proj", "up_proj"):
            linears[f"model.layers.{layer}.mlp.{name}"] = (D, HIDDEN)
        linears[f"model.layers.{layer}.mlp.down_proj"] = (HIDDEN, D)
    parameters = {f"{path}.weight": (d_out, d_in) for path, (d_in, d_out) in linears.items()}
    parameters |= {"model.embed_tokens.weight": (VOCAB, D), "model.norm.weight": (D,), "lm_head.weight": (VOCAB, D)}
    return BaseLayout(linears, parameters, fingerprint="this base", embed="model.embed_tokens", head="lm_head")


@pytest.fixture(scope="session")
def golden_layout() -> Callable[[Path], BaseLayout]:
    """The layout of a golden base folder."""

    def layout(folder: Path) -> BaseLayout:
        with safe_open(folder / "model.safetensors", "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        shapes.setdefault("lm_head.weight", next(s for n, s in shapes.items() if "embed" in n or "wte" in n))
        order = list(_ORDER)
        found = []
        for name in shapes:
            parts = name.removesuffix(".weight").split(".")
            if ".".join(parts[-2:]) in order:
                found.append((int(parts[2]), order.index(".".join(parts[-2:])), ".".join(parts)))
        linears = {}
        for _, kind, path in sorted(found):
            shape = shapes[f"{path}.weight"]
            linears[path] = shape if _ORDER[order[kind]] == "gpt2" else shape[::-1]
        return BaseLayout(linears, shapes, fingerprint="golden")

    return layout
