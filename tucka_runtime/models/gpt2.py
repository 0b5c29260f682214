"""GPT-2: learned positions, LayerNorm, Conv1D linears, tied head."""

from typing import Any

from tucka_runtime.errors import ModelLoadError
from tucka_runtime.models.architecture import Architecture, Site, require


def gpt2(config: Any) -> Architecture:
    require(config, activation_function=("gelu_new", "gelu_pytorch_tanh"), add_cross_attention=False)
    hidden, heads = config.n_embd, config.n_head
    if hidden % heads:
        raise ModelLoadError(f"config.json has n_embd = {hidden}, not a multiple of n_head = {heads}.")
    inner = config.n_inner or 4 * hidden
    head_dim = hidden // heads
    scale = head_dim**-0.5 if config.scale_attn_weights else 1.0
    by_layer = config.scale_attn_by_inverse_layer_idx
    return Architecture(
        model_type=config.model_type,
        num_layers=config.n_layer,
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        vocab=config.vocab_size,
        max_len=config.n_positions,
        eps=config.layer_norm_epsilon,
        embed="transformer.wte",
        positions="transformer.wpe",
        layer="transformer.h.{}",
        input_norm="ln_1",
        post_norm="ln_2",
        head_norms=None,
        final_norm="transformer.ln_f",
        norm_bias=True,
        head="lm_head",
        tied=config.tie_word_embeddings,
        sites=(
            Site(("attn.c_attn",), hidden, (3 * hidden,), True),
            Site(("attn.c_proj",), hidden, (hidden,), True),
            Site(("mlp.c_fc",), hidden, (inner,), True),
            Site(("mlp.c_proj",), inner, (hidden,), True),
        ),
        gated=False,
        transposed=True,
        scales=tuple(scale / (i + 1) if by_layer else scale for i in range(config.n_layer)),
        windows=(None,) * config.n_layer,
        prefix="transformer.",
        ignored=r".*\.attn\.(bias|masked_bias)",
    )
