"""Delta of the packed gate/up product, then SwiGLU."""

from torch import Tensor
from torch.nn.functional import silu

from tucka_runtime.kernels.ops import LowRank
from tucka_runtime.kernels.reference.expand import expand


def expand_swiglu(gate_up: Tensor, low_rank: LowRank | None) -> Tensor:
    """ops.ExpandSwiglu."""
    if low_rank is not None:
        expand(gate_up, low_rank)
    gate, up = gate_up.float().chunk(2, dim=-1)
    return silu(gate).mul_(up).to(gate_up.dtype)
