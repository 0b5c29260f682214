"""The decoder: one forward pass of a batch of packed rows, with the batch's adapters applied on the way."""

from typing import Any

from torch import Tensor, float32
from torch.nn.functional import gelu, linear

from tucka_runtime.engine.adapters.delta import AdapterDelta
from tucka_runtime.kernels.ops import Ops
from tucka_runtime.kernels.tables.blocks import AttentionMetadata
from tucka_runtime.models.architecture import DOWN, OUT, QKV, UP, Architecture
from tucka_runtime.models.rotary import Rotary
from tucka_runtime.models.weights import Weights


class Decoder:
    """Weights, kernels and how they are put together. `ops` is the backend that kernels.dispatch chose."""

    def __init__(self, config: Any, arch: Architecture, weights: Weights, max_len: int, ops: Ops):
        self.arch = arch
        self.weights = weights
        self.ops = ops
        embed = weights.embed
        self.rotary = None if arch.positions else Rotary(config, arch.head_dim, max_len, embed.dtype, embed.device)

    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        lengths: Tensor | None,
        metadata: AttentionMetadata,
        caches: list[tuple[Tensor, Tensor]],
        delta: AdapterDelta,
    ) -> Tensor:
        """Final hidden states (T, d), normalised, of the packed rows `ids` (T,) int64 at `positions` (T,) int64.

        `lengths` is for dynamic rotary scaling (models/rotary.py). Writes the rows' keys and values to `caches`.
        """
        arch, ops, eps = self.arch, self.ops, self.arch.eps
        layers = self.weights.layers
        x = self._embed(ids, positions, delta)
        cos, sin = self.rotary(positions, lengths) if self.rotary else (None, None)
        y = ops.norm(x, *layers[0].input_norm, eps)
        self._norm_overrides(y, x, arch.path(0, arch.input_norm), delta)
        for i, layer in enumerate(layers):
            low_rank = delta.shrink(i, QKV, y)
            qkv = self._linear(i, QKV, y, delta)
            q = ops.expand_qkv_rope_kv(
                qkv, low_rank, cos, sin, self._head_norms(i, delta), eps, *caches[i], metadata.slot_mapping
            )
            attended = ops.attention(q, *caches[i], metadata, arch.scales[i], arch.windows[i]).flatten(1)
            low_rank = delta.shrink(i, OUT, attended)
            y = self._linear(i, OUT, attended, delta)
            y, x = ops.expand_residual(y, low_rank, x, *layer.post_norm, eps)
            self._norm_overrides(y, x, arch.path(i, arch.post_norm), delta)
            low_rank = delta.shrink(i, UP, y)
            up = self._linear(i, UP, y, delta)
            if arch.gated:
                inner = ops.expand_swiglu(up, low_rank)
            else:
                if low_rank is not None:
                    ops.expand(up, low_rank)
                inner = gelu(up, approximate="tanh")
            low_rank = delta.shrink(i, DOWN, inner)
            y = self._linear(i, DOWN, inner, delta)
            last = i + 1 == len(layers)
            norm = self.weights.final_norm if last else layers[i + 1].input_norm
            y, x = ops.expand_residual(y, low_rank, x, *norm, eps)
            self._norm_overrides(y, x, arch.final_norm if last else arch.path(i + 1, arch.input_norm), delta)
        return y

    def logits(self, hidden: Tensor, rows: Tensor, delta: AdapterDelta, vocab_size: int | None = None) -> Tensor:
        """Logits (N, vocab) fp32 of the batch's rows `rows` (N,) int64, of which all have the base's vocabulary or all
        one of another size, whose adapters replace the head."""
        chosen = hidden.index_select(0, rows)
        if vocab_size is None:
            out = self.weights.head.wide(chosen)
        else:
            out = chosen.new_empty(len(chosen), vocab_size, dtype=float32)
        # An adapter without a row here may have another vocabulary.
        for own, head in delta.replaced(f"{self.arch.head}.weight"):
            if len(mine := _among(rows, own)):
                out[mine] = linear(chosen[mine], head).float()
        for own, table in delta.tables.get(self.arch.head, ()):
            if len(mine := _among(rows, own)):
                out[mine] = table.logits(out[mine], chosen[mine])
        return out

    def _embed(self, ids: Tensor, positions: Tensor, delta: AdapterDelta) -> Tensor:
        embed = self.weights.embed
        x = embed.index_select(0, ids.clamp(max=len(embed) - 1) if delta.own_vocabularies else ids)
        for rows, table in delta.replaced(f"{self.arch.embed}.weight"):
            x[rows] = table.index_select(0, ids[rows])
        for rows, change in delta.tables.get(self.arch.embed, ()):
            x[rows] = change.embed(x[rows], ids[rows])
        if self.weights.positions is not None:
            own = self.weights.positions.index_select(0, positions)
            for rows, table in delta.replaced(f"{self.arch.positions}.weight"):
                own[rows] = table.index_select(0, positions[rows])
            x = x + own
        return x

    def _linear(self, layer: int, site: int, x: Tensor, delta: AdapterDelta) -> Tensor:
        """The base's product, with what adapters replace of it; after it, what `shrink` gave for the site may be
        read."""
        base = self.weights.layers[layer].linears[site]
        y = base(x)
        delta.join()
        if delta.replaces:
            spec = self.arch.sites[site]
            first = 0
            for target, width in zip(spec.targets, spec.widths, strict=True):
                path = self.arch.path(layer, target)
                bias = base.bias
                biases = {rows.start: b for rows, b in delta.replaced(f"{path}.bias")}
                for rows, weight in delta.replaced(f"{path}.weight"):
                    own = biases.get(rows.start, None if bias is None else bias[first : first + width])
                    y[rows, first : first + width] = linear(x[rows], weight.T if self.arch.transposed else weight, own)
                first += width
        return y

    def _head_norms(self, layer: int, delta: AdapterDelta) -> tuple[Tensor, Tensor] | None:
        """Query and key head norms: (D,) each, or (T, 1, D) where an adapter of the batch brings its own."""
        norms = self.weights.layers[layer].head_norms
        if norms is None or not delta.replaces or self.arch.head_norms is None:
            return norms
        out = []
        for name, weight in zip(self.arch.head_norms, norms, strict=True):
            for rows, own in delta.replaced(f"{self.arch.path(layer, name)}.weight"):
                if weight.dim() == 1:
                    weight = weight.expand(delta.num_rows, 1, -1).clone()
                weight[rows] = own
            out.append(weight)
        return out[0], out[1]

    def _norm_overrides(self, y: Tensor, x: Tensor, path: str, delta: AdapterDelta) -> None:
        if not delta.replaces:
            return
        biases = {rows.start: b for rows, b in delta.replaced(f"{path}.bias")}
        for rows, weight in delta.replaced(f"{path}.weight"):
            bias = biases.get(rows.start) if self.arch.norm_bias else None
            y[rows] = self.ops.norm(x[rows], weight, bias, self.arch.eps)


def _among(rows: Tensor, own: slice) -> Tensor:
    """Where in `rows` those of a slice are."""
    found: Tensor = ((rows >= own.start) & (rows < own.stop)).nonzero().squeeze(1)
    return found
