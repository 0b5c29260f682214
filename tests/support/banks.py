"""Banks of random members, each of them beside it as a plain adapter too."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from tests.support.driving import matching
from tucka_runtime.adapters.format import BankSpec, LoRASpec, write_adapter
from tucka_runtime.messages import BaseLayout

MEMBERS = 5


def save_bank(
    folder: Path, base: BaseLayout, core: str, r: int = 6, targets: Sequence[str] = ("q_proj", "v_proj", "down_proj")
) -> Path:
    """A random bank, and its members as plain LoRAs: 0, 1, ... beside it."""
    make = torch.Generator().manual_seed(7)
    paths = matching(base, targets)
    tensors: dict[str, Tensor] = {}
    plain: list[dict[str, Tensor]] = [{} for _ in range(MEMBERS)]
    for path in paths:
        d_in, d_out = base.linears[path]
        u, e = torch.randn(r, d_in, generator=make) / d_in**0.5, torch.randn(r, d_out, generator=make) / r**0.5
        cores = torch.randn(MEMBERS, *([r] if core == "diagonal" else [r, r]), generator=make)
        tensors |= {f"{path}.bank_u": u, f"{path}.bank_e": e, f"{path}.bank_core": cores}
        for own, m in zip(plain, torch.diag_embed(cores) if core == "diagonal" else cores, strict=True):
            own |= {f"{path}.lora_A.weight": m.T @ u, f"{path}.lora_B.weight": e.T}
    names = [f"m{i}" for i in range(MEMBERS)]
    write_adapter(folder, BankSpec(r=r, core=core, members=names, target_modules=paths), tensors)
    for i, own in enumerate(plain):
        write_adapter(folder.parent / str(i), LoRASpec(r=r, lora_alpha=r, target_modules=list(targets)), own)
    return folder
