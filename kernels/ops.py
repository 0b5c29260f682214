"""The contract: every operation of a forward pass as a typed callable. A backend is one value of `Ops`.

`reference/` is the executable spec in plain torch, `fused/` its Triton twin for GPUs, `native/` its C++ twin for CPUs.
tests/kernels/test_ops.py holds the signatures of all to those here; other tests hold their results to float64.

Shapes: T rows of a batch, those of the base first, then one run of rows per segment (an adapter and a route). A site is
n linears that share their input; R is the widest rank in a batch, k groups of t experts make a route. Sums are in fp32
whatever the type of the rows. A fused op rounds its result once; the reference's steps within an op round too, each.

A KV cache is in the rows' type, or int8 with a scale for each token and head (tables/blocks.py), which is written and
read with it; both caches of a call have one type.

Of the tables the reference reads what lies on the host (spans, factors as tensors, ranks, plans); a backend by address
reads what lies on the device (addresses, ranks, tiles, block tables), which is all that a graph's batch fills in.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tucka_runtime.kernels.tables.blocks import AttentionMetadata
from tucka_runtime.kernels.tables.routes import RoutePlan
from tucka_runtime.kernels.tables.segments import DeltaSite, SitePlan


@dataclass(frozen=True, eq=False)
class LowRank:
    """The low-rank half of one site's delta for the rows of a batch: `h` (T, n, R), in the factors' type or in fp32,
    goes from a backend's `shrink_core` to its own expands, and to nobody else's. On base rows and beyond a row's own
    ranks it is unwritten in a backend by address, and zero in the reference, whose expand multiplies whole matrices."""

    h: Tensor
    site: DeltaSite
    plan: SitePlan


class Linear(Protocol):
    """A base linear: y = x Wᵀ + b, its weight in the layout that a backend multiplies fastest. x (T, in) in the
    weight's type -> y (T, out), rounded once from sums in fp32."""

    shape: torch.Size
    """(out, in)."""
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor: ...

    def wide(self, x: Tensor) -> Tensor:
        """The same y, in fp32."""
        ...

    def dense(self) -> Tensor:
        """The weight (out, in) as it was given; it may be a copy."""
        ...


class MakeLinear(Protocol):
    """A linear of a weight (out, in) and its bias (out,), on their device. Keeps no reference to the weight where it
    lays it out anew, so that a model is not twice in memory."""

    def __call__(self, weight: Tensor, bias: Tensor | None) -> Linear: ...


class Norm(Protocol):
    """RMSNorm, or LayerNorm where there is a bias: x (..., d), weight and bias (d,)."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor: ...


class Select(Protocol):
    """The choice of a route (docs/architecture.md): logits (S, k·t) fp32, group-major -> groups (S,) int64, weights
    (S, t) fp32. Each group's t logits are divided by their L2 norm, score = sigmoid; the group with the best score
    wins, the lowest on a tie, and its t scores are the weights, not normalised. A group of zero logits scores 0.5."""

    def __call__(self, logits: Tensor, t: int) -> tuple[Tensor, Tensor]: ...


class RouteIds(Protocol):
    """Fills in the routes that a plan does not know yet, from token ids alone: exact where the router's input is a
    function of the token. Logits are linear in the mean, so the mean of table rows is the logits of the mean."""

    def __call__(self, plan: RoutePlan) -> None: ...


class RouteHidden(Protocol):
    """The route of one segment from its router's inputs: x (n, d); centroids (k·t, d) fp32 -> (1,) and (1, t)."""

    def __call__(self, x: Tensor, centroids: Tensor, t: int) -> tuple[Tensor, Tensor]: ...


class Core(Protocol):
    """out[row, linears[m], :r, :r] = Σ_j w_j G[m, group, j] with w_j = Σ_i weights[i] C[m, i, j], for each of the
    plan's segments and all M modules of its adapter. out (rows, N, R, R), R >= r."""

    def __call__(self, plan: RoutePlan, out: Tensor) -> None: ...


class ShrinkCore(Protocol):
    """h_j = (x U_jᵀ) M_j for every row by its own adapter: x (T, d_in) -> h (T, n, R), of LowRank's type.

    cores (C, n, Rc, Rc), where a segment takes its own by Segments.core_rows, the identity if its core is constant;
    None: all are. An (r, r) core with r < Rc is the upper left block of its (Rc, Rc); the blocks beside it are zero. A
    rank over Rc has no core (it is a LoRA's). A backend that takes its factors in the rows' type raises ValueError
    where x has another."""

    def __call__(self, x: Tensor, site: DeltaSite, cores: Tensor | None, plan: SitePlan) -> LowRank: ...


class Expand(Protocol):
    """y_j = s_j ⊙ y_j + o_j + h_j E_j for every target j of a site: y (T, columns[-1]), in place, and returned.

    s_j, o_j are a row's adapter's DeltaSite.affine, 1 and 0 where it has none. The other ops that add a delta do the
    same, whatever else they do."""

    def __call__(self, y: Tensor, low_rank: LowRank) -> Tensor: ...


class ExpandQkvRopeKv(Protocol):
    """What stands between the packed qkv product and attention: the delta, head norms, rotary positions, the KV write.

    qkv (T, (H + 2·KV)·D), used up -> rotated queries (T, H, D); keys and values go to their slots of the caches (slots,
    KV, D) by slot_mapping (T,) int64, of which a negative one is not written (rows that fill up a graph's batch). An
    int8 cache gets them rounded to the nearest of 127 steps to either side, of the largest of a head's sizes.
    cos, sin (T, 1, D/2) or None without rotary positions; head_norms are q's and k's RMSNorm weights, (D,) or (T, 1,
    D), or None; low_rank None: no adapter in the batch. Raises ValueError where a head lies in two targets."""

    def __call__(
        self,
        qkv: Tensor,
        low_rank: LowRank | None,
        cos: Tensor | None,
        sin: Tensor | None,
        head_norms: tuple[Tensor, Tensor] | None,
        eps: float,
        k_cache: Tensor,
        v_cache: Tensor,
        slot_mapping: Tensor,
    ) -> Tensor: ...


class ExpandResidual(Protocol):
    """residual' = residual + y + delta, all (T, d) -> (norm(residual'), residual'). y is used up."""

    def __call__(
        self,
        y: Tensor,
        low_rank: LowRank | None,
        residual: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
    ) -> tuple[Tensor, Tensor]: ...


class ExpandSwiglu(Protocol):
    """silu(gate + delta) · (up + delta): gate_up (T, 2·F), used up -> (T, F). Gate and up are two targets or one."""

    def __call__(self, gate_up: Tensor, low_rank: LowRank | None) -> Tensor: ...


class Attention(Protocol):
    """Causal attention over KV blocks with grouped queries: q (T, H, D) -> (T, H, D).

    Caches (slots, KV, D) already hold this step's keys and values. A query at position i sees the keys at j <= i, and
    with a window only those with i - j < window. Rows of sequences without a context (length 0: they fill up a graph's
    batch) are left unwritten."""

    def __call__(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        metadata: AttentionMetadata,
        scale: float,
        window: int | None = None,
    ) -> Tensor: ...


class FiniteRows(Protocol):
    """Whether all logits of a row are finite: (B, V) fp32 -> (B,) bool; no, perhaps, where their sum alone is not."""

    def __call__(self, logits: Tensor) -> Tensor: ...


class Sample(Protocol):
    """Token ids (B,) int64: the argmax of logits / temperature + Gumbel noise, which is hashed from (seed, position,
    token) and so depends on nothing else in the batch.

    logits (B, V) fp32 before temperature; temperature (B,) fp32, 0 is greedy (lowest id wins); seed, position (B,)
    int64."""

    def __call__(self, logits: Tensor, temperature: Tensor, seed: Tensor, position: Tensor) -> Tensor: ...


class FilterLogits(Protocol):
    """Sets to -inf what top-k, then top-p, then min-p leave out. logits (B, V) fp32 after temperature.

    top_k (B,) int64, V for off; top_p (B,), 1 for off; min_p (B,), 0 for off. Ties at the border stay in for top-k."""

    def __call__(self, logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Ops:
    """One backend, and what it wants of its caller. A backend by address, or with graphs, reads of the tables only
    what they keep on the device, whatever the batch; the reference reads both halves."""

    name: str
    by_address: bool
    """Its delta ops read adapters' factors where they lie, by DeltaSite's addresses; else they read them stacked."""
    fp32_factors: bool
    """It takes the factors in fp32, whatever the rows' type; else in the rows' own."""
    graphs: bool
    """Every op runs on tables of fixed places and sizes, so that a decode step can be one CUDA graph."""
    linear: MakeLinear
    norm: Norm
    select: Select
    route_ids: RouteIds
    route_hidden: RouteHidden
    core: Core
    shrink_core: ShrinkCore
    expand: Expand
    expand_qkv_rope_kv: ExpandQkvRopeKv
    expand_residual: ExpandResidual
    expand_swiglu: ExpandSwiglu
    attention: Attention
    finite_rows: FiniteRows
    sample: Sample
    filter_logits: FilterLogits
