"""What stands between the packed qkv product and attention, in one pass: delta, head norms, rotary, KV write."""

from torch import Tensor

from tucka_runtime.kernels.ops import LowRank
from tucka_runtime.kernels.reference.expand import expand
from tucka_runtime.kernels.reference.int8 import write
from tucka_runtime.kernels.reference.norm import rms_norm
from tucka_runtime.kernels.reference.rotary import rotate


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
    if low_rank is not None:
        expand(qkv, low_rank)
    kv_heads, d = k_cache.shape[1:]
    heads = qkv.shape[1] // d - 2 * kv_heads
    x = qkv.view(qkv.shape[0], -1, d)
    q, k, v = x[:, :heads], x[:, heads : heads + kv_heads], x[:, heads + kv_heads :]
    if head_norms is not None:
        q, k = rms_norm(q, head_norms[0], eps), rms_norm(k, head_norms[1], eps)
        if cos is not None and sin is not None:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    elif cos is not None and sin is not None:
        q, k = rotate(x[:, : heads + kv_heads], cos, sin).split([heads, kv_heads], dim=1)
    written = slot_mapping >= 0
    if not written.all():
        slot_mapping, k, v = slot_mapping[written], k[written], v[written]
    write(k_cache, slot_mapping, k)
    write(v_cache, slot_mapping, v)
    return q.contiguous()
