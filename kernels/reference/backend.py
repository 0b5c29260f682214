"""The reference as a backend: plain torch, on any device."""

from tucka_runtime.kernels.ops import Ops
from tucka_runtime.kernels.reference.attention import attention
from tucka_runtime.kernels.reference.core import core
from tucka_runtime.kernels.reference.expand import expand
from tucka_runtime.kernels.reference.expand_qkv_rope_kv import expand_qkv_rope_kv
from tucka_runtime.kernels.reference.expand_residual import expand_residual
from tucka_runtime.kernels.reference.expand_swiglu import expand_swiglu
from tucka_runtime.kernels.reference.linear import linear
from tucka_runtime.kernels.reference.norm import norm
from tucka_runtime.kernels.reference.route import route_hidden, route_ids, select
from tucka_runtime.kernels.reference.sample import filter_logits, finite_rows, sample
from tucka_runtime.kernels.reference.shrink_core import shrink_core

OPS = Ops(
    name="reference",
    by_address=False,
    # Torch's bf16 products of a delta cost 15 us each on a CPU, however small (d 512, one adapter on q and v: 105 us a
    # site against 38 in fp32).
    fp32_factors=True,
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
