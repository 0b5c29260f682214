"""What an adapter will take in memory, known before it is folded."""

import torch

from tucka_runtime.adapters.format import Adapter, BankModule, LoRAModule
from tucka_runtime.engine.adapters.fold import BATCH_BYTES, has_table, locate
from tucka_runtime.messages import Route
from tucka_runtime.models.architecture import Architecture


def folded_bytes(
    adapter: Adapter, arch: Architecture, base: torch.dtype, dtype: torch.dtype, pinned: Route | None
) -> tuple[int, int]:
    """The bytes that `fold` will keep (FoldedAdapter.num_bytes; less where the file has the base's own tables), and the
    most that it takes beside them for a moment: a site's weights, of type `base`, as a copy and a linear's of it in
    fp32, the check of the largest tensor, or two copies in fp32 of what one call works on."""
    where, kept, passing, largest = locate(arch), 0, 0, 0
    widest = batched = 0
    routed = adapter.ec is not None and pinned is None
    vocab = adapter.vocab_size or arch.vocab
    for path, module in adapter.modules.items():
        if path in where:
            at = where[path]
            site = arch.sites[at.site]
            d_in, width = site.d_in, site.widths[at.target]
            copied = d_in * sum(site.widths) * base.itemsize
        else:
            d_in, width = (vocab, arch.hidden) if path == arch.embed else (arch.hidden, vocab)
            copied = vocab * arch.hidden * base.itemsize
        if isinstance(module, BankModule):
            r, core = module.u.shape[0], module.core.numel() * dtype.itemsize
            kept += 8 + core
            passing += core  # until they are stacked
        elif isinstance(module, LoRAModule):
            r = module.a.shape[0]
            kept += 8 * width if module.changes_base else 0
            if module.magnitude is not None:  # the base's own and its sum with the change
                passing = max(passing, copied + 2 * d_in * width * 4)
        else:
            r = module.u.shape[1]
            products = len(site.widths) * r * (d_in + sum(site.widths)) * 4  # of a whole site, and their rows
            passing = max(passing, copied + d_in * width * 4, products)
            # Each linear's number is int64, its parts are fp32.
            kept += 8 + 4 * (module.g.numel() + module.c.numel()) if routed else 0
        kept += r * (d_in + width) * dtype.itemsize
        largest = max(largest, r * max(d_in, width) * dtype.itemsize)
        widest, batched = max(widest, 4 * r * (d_in + width)), batched + 4 * r * (d_in + width)
    for ids, values in adapter.tokens.values():
        kept += ids.nbytes + values.numel() * base.itemsize
    for value in adapter.saved.values():
        kept += value.numel() * base.itemsize
        largest = max(largest, value.numel() * base.itemsize)
    if routed and adapter.ec is not None and adapter.router is not None:
        kept += adapter.ec.numel() * 4
        if has_table(where[adapter.router], arch):
            kept += vocab * adapter.ec.shape[0] * 4
    return kept, max(passing, 2 * largest, 2 * max(widest, min(batched, BATCH_BYTES)))
