"""The C++ kernels as a backend: for CPUs. `library.load` must have found a library for this one.

Every op hands its tensors, and of a batch's tables what lies on the device, to the function of its name in `<op>.cpp`.
"""

from typing import Any

from torch import Tensor

from tucka_runtime.kernels.native import library
from tucka_runtime.kernels.native.linear import linear
from tucka_runtime.kernels.ops import LowRank, Ops
from tucka_runtime.kernels.tables.blocks import AttentionMetadata
from tucka_runtime.kernels.tables.routes import RoutePlan
from tucka_runtime.kernels.tables.segments import DeltaSite, SitePlan

_NATIVE: Any = library.module()

NO_WINDOW = 2**31 - 1
"""Longer than any context."""

_Parts = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _parts(low_rank: LowRank | None) -> _Parts:
    """What the expands read of the low-rank half."""
    if low_rank is None:
        return None, None, None, None, None, None
    site = low_rank.site
    return low_rank.h, site.e_ptr, site.affine_ptr, site.rank, site.borders, low_rank.plan.segments.tiles


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """ops.Norm."""
    out: Tensor = _NATIVE.norm(x, weight, bias, eps)
    return out


def select(logits: Tensor, t: int) -> tuple[Tensor, Tensor]:
    """ops.Select."""
    groups, weights = _NATIVE.select(logits, t)
    return groups, weights


def route_ids(plan: RoutePlan) -> None:
    """ops.RouteIds."""
    _NATIVE.route_ids(plan.records, plan.groups, plan.weights)


def route_hidden(x: Tensor, centroids: Tensor, t: int) -> tuple[Tensor, Tensor]:
    """ops.RouteHidden."""
    groups, weights = _NATIVE.route_hidden(x, centroids, t)
    return groups, weights


def core(plan: RoutePlan, out: Tensor) -> None:
    """ops.Core."""
    _NATIVE.core(plan.records, plan.groups, plan.weights, plan.limits.modules, out)


def shrink_core(x: Tensor, site: DeltaSite, cores: Tensor | None, plan: SitePlan) -> LowRank:
    """ops.ShrinkCore. Here h is in fp32."""
    if x.dtype != site.dtype:
        raise ValueError(f"the native kernels take factors in the rows' type: rows {x.dtype}, factors {site.dtype}")
    segments = plan.segments
    h = _NATIVE.shrink_core(x, site.u_ptr, site.rank, segments.tiles, segments.row_cores, cores, plan.max_rank)
    return LowRank(h, site, plan)


def expand(y: Tensor, low_rank: LowRank) -> Tensor:
    """ops.Expand."""
    _NATIVE.expand(y, *_parts(low_rank))
    return y


def expand_qkv_rope_kv(
    qkv: Tensor,
    low_rank: LowRank | None,
    cos: Tensor | None,
    sin: Tensor | None,
    head_norms: tuple[Tensor, Tensor] | None,
    eps: float,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
) -> Tensor:
    """ops.ExpandQkvRopeKv."""
    q_norm, k_norm = head_norms or (None, None)
    out: Tensor = _NATIVE.expand_qkv_rope_kv(
        qkv, cos, sin, q_norm, k_norm, eps, k_cache, v_cache, slot_mapping, *_parts(low_rank)
    )
    return out


def expand_residual(
    y: Tensor,
    low_rank: LowRank | None,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """ops.ExpandResidual."""
    out, total = _NATIVE.expand_residual(y, residual, weight, bias, eps, *_parts(low_rank))
    return out, total


def expand_swiglu(gate_up: Tensor, low_rank: LowRank | None) -> Tensor:
    """ops.ExpandSwiglu."""
    out: Tensor = _NATIVE.expand_swiglu(gate_up, *_parts(low_rank))
    return out


def attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, metadata: AttentionMetadata, scale: float, window: int | None = None
) -> Tensor:
    """ops.Attention."""
    out: Tensor = _NATIVE.attention(
        q,
        k_cache,
        v_cache,
        metadata.query_start,
        metadata.seq_lens,
        metadata.block_table,
        metadata.first_block,
        metadata.singles,
        metadata.tiles,
        metadata.block_size,
        scale,
        NO_WINDOW if window is None else window,
    )
    return out


def finite_rows(logits: Tensor) -> Tensor:
    """ops.FiniteRows."""
    out: Tensor = _NATIVE.finite_rows(logits)
    return out


def sample(logits: Tensor, temperature: Tensor, seed: Tensor, position: Tensor) -> Tensor:
    """ops.Sample."""
    out: Tensor = _NATIVE.sample(logits, temperature, seed, position)
    return out


def filter_logits(logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """ops.FilterLogits. Equal logits stay or go together."""
    out: Tensor = _NATIVE.filter_logits(logits, top_k, top_p, min_p)
    return out


OPS = Ops(
    name="native",
    by_address=True,
    fp32_factors=False,
    graphs=False,
    linear=linear,
    norm=norm,
    select=select,
    route_ids=route_ids,
    route_hidden=route_hidden,
    core=core,
    shrink_core=shrink_core,
    expand=expand,
    expand_qkv_rope_kv=expand_qkv_rope_kv,
    expand_residual=expand_residual,
    expand_swiglu=expand_swiglu,
    attention=attention,
    finite_rows=finite_rows,
    sample=sample,
    filter_logits=filter_logits,
)
