"""The Triton kernels as a backend: for GPUs, or in Triton's interpreter."""

from tucka_runtime.kernels.fused.attention import attention
from tucka_runtime.kernels.fused.core import core
from tucka_runtime.kernels.fused.expand import expand
from tucka_runtime.kernels.fused.expand_qkv_rope_kv import expand_qkv_rope_kv
from tucka_runtime.kernels.fused.expand_residual import expand_residual
from tucka_runtime.kernels.fused.expand_swiglu import expand_swiglu
from tucka_runtime.kernels.fused.norm import norm
from tucka_runtime.kernels.fused.route import route_hidden, route_ids, select
from tucka_runtime.kernels.fused.sample import filter_logits, sample
from tucka_runtime.kernels.fused.shrink_core import shrink_core
from tucka_runtime.kernels.ops import Ops
from tucka_runtime.kernels.reference.linear import linear
from tucka_runtime.kernels.reference.sample import finite_rows

OPS = Ops(
    name="fused",
    by_address=True,
    fp32_factors=False,
    graphs=True,
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
