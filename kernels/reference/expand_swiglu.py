"""Delta of the packed gate/up product, then SwiGLU."""

from torch import Tensor
from torch.nn.functional import silu

from tucka_runtime.kernels.reference.expand import expand
from tucka_runtime.kernels.tables.segments import DeltaSite, SitePlan


def expand_swiglu(gate_up: Tensor, h: Tensor | None, site: DeltaSite | None, plan: SitePlan | None) -> Tensor:
    """gate_up (T, 2·F) -> silu(gate) · up (T, F), in fp32 and rounded once. gate_up is used up."""
    if h is not None and site is not None and plan is not None:
        expand(gate_up, h, site, plan)
    gate, up = gate_up.float().chunk(2, dim=-1)
    return silu(gate).mul_(up).to(gate_up.dtype)
