"""What the decoder families have in common, as data: a family is a function from its configuration to this."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

from tucka_runtime.errors import ModelLoadError

QKV, OUT, UP, DOWN = range(4)
"""Sites of a layer, as in Architecture.sites."""


@dataclass(frozen=True)
class Site:
    """Linears that share their input and are packed into one product: their paths within a layer and output widths."""

    targets: tuple[str, ...]
    d_in: int
    widths: tuple[int, ...]
    bias: bool

    @property
    def columns(self) -> tuple[int, ...]:
        """Borders of the targets in the packed output."""
        return tuple(accumulate(self.widths, initial=0))


@dataclass(frozen=True)
class Architecture:
    """A pre-norm decoder. Paths are those of the checkpoint; `layer` holds `{}` for the index."""

    model_type: str
    num_layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_len: int
    eps: float
    embed: str
    positions: str | None
    """Learned position embedding; None with rotary."""
    layer: str
    input_norm: str
    post_norm: str
    head_norms: tuple[str, str] | None
    final_norm: str
    norm_bias: bool
    head: str
    tied: bool
    sites: tuple[Site, Site, Site, Site]
    """qkv, o, up (gate and up packed where gated), down."""
    gated: bool
    """SwiGLU; else GELU (tanh)."""
    transposed: bool
    """Linears are stored (in, out), as GPT-2's Conv1D."""
    scales: tuple[float, ...]
    """Attention scale of each layer."""
    windows: tuple[int | None, ...]
    """Sliding window of each layer."""
    prefix: str
    """What base-model checkpoints (saved without the head) leave out of every name."""
    ignored: str
    """Regular expression of tensors that old checkpoints carry and nobody needs."""

    def path(self, layer: int, name: str) -> str:
        return f"{self.layer.format(layer)}.{name}"

    @property
    def num_linears(self) -> int:
        return self.num_layers * sum(len(site.targets) for site in self.sites)

    def first_linear(self, layer: int, site: int) -> int:
        """The number of a site's first linear, counted through the decoder."""
        *before, in_layer = self._targets_before
        return layer * in_layer + before[site]

    @cached_property
    def _targets_before(self) -> tuple[int, ...]:
        """How many linears of a layer lie before each site, and last, how many it has."""
        return tuple(accumulate((len(site.targets) for site in self.sites), initial=0))


def parameter_shapes(arch: Architecture) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every parameter of the checkpoint by name, in declaration order, with its stored shape."""
    yield f"{arch.embed}.weight", (arch.vocab, arch.hidden)
    if arch.positions:
        yield f"{arch.positions}.weight", (arch.max_len, arch.hidden)
    kinds = ("weight", "bias") if arch.norm_bias else ("weight",)
    for i in range(arch.num_layers):
        for norm in (arch.input_norm, arch.post_norm):
            for kind in kinds:
                yield arch.path(i, f"{norm}.{kind}"), (arch.hidden,)
        for norm in arch.head_norms or ():
            yield arch.path(i, f"{norm}.weight"), (arch.head_dim,)
        for site in arch.sites:
            for target, width in zip(site.targets, site.widths, strict=True):
                shape = (site.d_in, width) if arch.transposed else (width, site.d_in)
                yield arch.path(i, f"{target}.weight"), shape
                if site.bias:
                    yield arch.path(i, f"{target}.bias"), (width,)
    for kind in kinds:
        yield f"{arch.final_norm}.{kind}", (arch.hidden,)
    yield f"{arch.head}.weight", (arch.vocab, arch.hidden)


Family = Callable[[Any], Architecture]


def require(config: Any, **expected: Any) -> None:
    """Raises ModelLoadError for a configuration value that would change the maths and is not supported."""
    for name, values in expected.items():
        values = values if isinstance(values, tuple) else (values,)
        if (value := getattr(config, name, values[0])) not in values:
            raise ModelLoadError(
                f"config.json has {name} = {value!r}, which is not supported for {config.model_type} "
                f"(supported: {', '.join(map(repr, values))})."
            )


def rotary_decoder(
    config: Any,
    *,
    attention_bias: bool = False,
    output_bias: bool = False,
    mlp_bias: bool = False,
    head_norms: bool = False,
    windows: tuple[int | None, ...] | None = None,
) -> Architecture:
    """The layout that Llama, Mistral, Qwen2 and Qwen3 share."""
    require(config, hidden_act="silu")
    heads = config.num_attention_heads
    kv_heads = config.num_key_value_heads or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    if heads % kv_heads:
        raise ModelLoadError(f"config.json has {heads} attention heads, not a multiple of its {kv_heads} KV heads.")
    hidden, inner, q, kv = config.hidden_size, config.intermediate_size, heads * head_dim, kv_heads * head_dim
    return Architecture(
        model_type=config.model_type,
        num_layers=config.num_hidden_layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=config.vocab_size,
        max_len=config.max_position_embeddings,
        eps=config.rms_norm_eps,
        embed="model.embed_tokens",
        positions=None,
        layer="model.layers.{}",
        input_norm="input_layernorm",
        post_norm="post_attention_layernorm",
        head_norms=("self_attn.q_norm", "self_attn.k_norm") if head_norms else None,
        final_norm="model.norm",
        norm_bias=False,
        head="lm_head",
        tied=config.tie_word_embeddings,
        sites=(
            Site(
                ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                hidden,
                (q, kv, kv),
                attention_bias,
            ),
            Site(("self_attn.o_proj",), q, (hidden,), output_bias),
            Site(("mlp.gate_proj", "mlp.up_proj"), hidden, (inner, inner), mlp_bias),
            Site(("mlp.down_proj",), inner, (hidden,), mlp_bias),
        ),
        gated=True,
        transposed=False,
        scales=(head_dim**-0.5,) * config.num_hidden_layers,
        windows=windows or (None,) * config.num_hidden_layers,
        prefix="model.",
        ignored=r".*\.rotary_emb\.inv_freq",
    )


def layer_windows(config: Any) -> tuple[int | None, ...]:
    """Windows from `layer_types`, as Qwen2 and Qwen3 state them."""
    known = {"full_attention": None, "sliding_attention": config.sliding_window}
    if unknown := set(config.layer_types) - set(known):
        raise ModelLoadError(f"config.json has layer types that are not supported: {', '.join(sorted(unknown))}.")
    return tuple(known[kind] for kind in config.layer_types)
