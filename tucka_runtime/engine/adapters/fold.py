"""From an adapter's files to the form that is served.

An adapter is folded once, at load, into the serving form (docs/architecture.md): y_j += ((x Uᵀ) M) E_j with U = Û and
E = α·(W Û)ᵀ, so that a TuckA and a LoRA adapter differ only in the core M between the two factors. A DoRA, and a LoRA
with biases, also scale and offset the base's y_j before that.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from tucka_runtime.adapters.format import Adapter, BankModule, BankSpec, LoRAModule, LoRASpec, TuckAModule, TuckASpec
from tucka_runtime.config import ROUTE_SCOPES
from tucka_runtime.engine.adapters.base_linears import BaseLinears
from tucka_runtime.engine.adapters.folded import BankCores, FoldedAdapter, FoldedRouter, FoldedTable, TuckACores, Where
from tucka_runtime.engine.turns import Work
from tucka_runtime.errors import InvalidAdapterError
from tucka_runtime.kernels.ops import Ops
from tucka_runtime.messages import AdapterInfo, AdapterKey, Route, RouteScope
from tucka_runtime.models.architecture import QKV, Architecture
from tucka_runtime.models.weights import Weights

TABLE_ROWS = 8192  # tokens of the vocabulary whose router inputs are computed at once: bounds the memory of a load
BATCH_BYTES = 2**24  # of tensors of many linears that one call works on: bounds it too


def locate(arch: Architecture) -> dict[str, Where]:
    """Where each linear's path is in the decoder."""
    return {
        arch.path(i, target): Where(i, s, j)
        for i in range(arch.num_layers)
        for s, site in enumerate(arch.sites)
        for j, target in enumerate(site.targets)
    }


def fold(
    key: AdapterKey,
    adapter: Adapter,
    arch: Architecture,
    weights: Weights,
    ops: Ops,
    dtype: torch.dtype,
    pinned: Route | None = None,
) -> Work[FoldedAdapter]:
    """The serving form of an adapter, its factors in `dtype`, on the weights' device. Everything is computed in fp32, a
    piece of the work about a linear's.

    With `pinned` a TuckA adapter's core is constant and folded into U: it becomes a plain low-rank delta.
    Raises InvalidAdapterError if `pinned` does not fit the adapter.
    """
    device = weights.embed.device
    where = locate(arch)
    own = {where[path]: module for path, module in adapter.modules.items() if path in where}  # the others: `_tables`
    base = BaseLinears(arch, weights)
    tucka = {at: module for at, module in own.items() if isinstance(module, TuckAModule)}
    lora = {at: module for at, module in own.items() if isinstance(module, LoRAModule)}
    banked = {at: module for at, module in own.items() if isinstance(module, BankModule)}
    factors: dict[Where, tuple[Tensor, Tensor]] = {}
    affine: dict[Where, Tensor] = {}
    saved = _saved(adapter, arch, weights)
    yield
    g, c = _normalised_cores(list(tucka.values()), device)
    yield
    if tucka:
        assert isinstance(adapter.config, TuckASpec)
        cores = None if pinned is None else dict(zip(tucka, _pinned_cores(g, c, pinned), strict=True))
        factors = yield from _tucka_factors(tucka, cores, adapter.config.alpha, base, dtype, device)
    plain = {at: module for at, module in lora.items() if not module.changes_base}
    factors |= yield from _lora_factors(plain, dtype, device)
    for at, module in lora.items():
        if module.changes_base:
            u, e, change = _lora(module, None if module.magnitude is None else base.weight(at), base.bias(at))
            factors[at] = _own(u, dtype, device), _own(e, dtype, device)
            if change is not None:
                affine[at] = change
            yield
    for at, bank_module in banked.items():
        factors[at] = _own(bank_module.u, dtype, device), _own(bank_module.e, dtype, device)
    factors = {at: factors[at] for at in own}
    routed = None
    if tucka and pinned is None and adapter.ec is not None and adapter.router is not None:
        centroids = _own(adapter.ec, torch.float32, device)
        table = yield from _table(where[adapter.router], centroids, saved, arch, weights, ops)
        router = FoldedRouter(where[adapter.router], c.shape[1], centroids, table, adapter.route_prefix_tokens)
        routed = TuckACores(_numbers(list(tucka), arch, device), g, c, router)
    bank = None
    if banked:
        stacked = torch.stack([module.core.to(device, dtype) for module in banked.values()], dim=1)
        bank = BankCores(_numbers(list(banked), arch, device), stacked)
    yield
    tables = _tables(adapter, saved, arch, weights, dtype)
    folded = FoldedAdapter(key, factors, affine, routed, saved, tables, bank, vocab_size=adapter.vocab_size)
    yield
    if not folded.is_finite():
        raise InvalidAdapterError(
            f"The adapter's values overflow when they are folded into {str(dtype).removeprefix('torch.')}: its weights "
            "or its alpha are far too large."
        )
    return folded


def _own(tensor: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A contiguous copy: an adapter's tensors are views of one piece of memory, which each would hold whole."""
    return tensor.to(device, dtype, copy=True, memory_format=torch.contiguous_format)


def _batches(where: Iterable[Where], shape: Callable[[Where], tuple[int, ...]]) -> Iterator[list[Where]]:
    """Linears of one shape, a rank and the widths of tensors of it: so many that these take at most BATCH_BYTES in
    fp32, or one."""
    by_shape: dict[tuple[int, ...], list[Where]] = {}
    for at in where:
        by_shape.setdefault(shape(at), []).append(at)
    for (rank, *widths), group in by_shape.items():
        count = max(BATCH_BYTES // (4 * rank * sum(widths)), 1)
        yield from (group[begin : begin + count] for begin in range(0, len(group), count))


def _apart(stacked: Tensor) -> list[Tensor]:
    """The parts of a contiguous stack, each at an address that the kernels can read (check_factor)."""
    parts = list(stacked.unbind())
    return [part.clone() for part in parts] if stacked.is_cuda and parts[0].nbytes % 16 else parts


def _tucka_factors(
    modules: Mapping[Where, TuckAModule],
    cores: Mapping[Where, Tensor] | None,
    alpha: float,
    base: BaseLinears,
    dtype: torch.dtype,
    device: torch.device,
) -> Work[dict[Where, tuple[Tensor, Tensor]]]:
    """U = Ûᵀ, or (Û M)ᵀ where the cores M (r, r) are given, and E = (α W Û)ᵀ = α/‖u‖ · uᵀWᵀ.

    Many linears at once, but for the product."""
    us: dict[Where, Tensor] = {}
    es: dict[Where, Tensor] = {}
    norms: dict[Where, Tensor] = {}
    for batch in _batches(modules, lambda at: (modules[at].u.shape[1], modules[at].u.shape[0])):
        unit = torch.stack([modules[at].u for at in batch]).to(device).float()
        norm = torch.linalg.vector_norm(unit, dim=(1, 2), keepdim=True)
        unit.div_(norm)
        u = unit if cores is None else unit @ torch.stack([cores[at] for at in batch])
        us.update(zip(batch, _apart(_own(u.transpose(1, 2), dtype, device)), strict=True))
        norms.update(zip(batch, norm, strict=True))
        yield
    for batch in _batches(modules, lambda at: (modules[at].u.shape[1], base.width(at))):
        width, r = base.width(batch[0]), modules[batch[0]].u.shape[1]
        es.update(zip(batch, _apart(torch.empty(len(batch), r, width, dtype=dtype, device=device)), strict=True))
    yield
    for site in base.by_site(modules):
        # Once for what a site has of targets, each of whose rows go through all of them.
        own = [
            us[at] if cores is None and dtype == torch.float32 else (modules[at].u.to(device).float() / norms[at][0]).T
            for at in site
        ]
        for at, product in zip(site, base.products(site, own), strict=True):
            torch.mul(product, alpha, out=es[at])
        yield
    return {at: (us[at], es[at]) for at in modules}


def _lora_factors(
    modules: Mapping[Where, LoRAModule], dtype: torch.dtype, device: torch.device
) -> Work[dict[Where, tuple[Tensor, Tensor]]]:
    """U = a and E = scale · bᵀ of LoRA adapters that leave the base's own product alone, many linears at once."""
    factors: dict[Where, tuple[Tensor, Tensor]] = {}
    for batch in _batches(modules, lambda at: (*modules[at].a.shape, len(modules[at].b))):
        own = [modules[at] for at in batch]
        a = torch.stack([module.a for module in own])
        b = torch.stack([module.b for module in own]).to(device).float()
        scales = torch.tensor([module.scale for module in own]).to(device)
        e = b.mul_(scales[:, None, None]).transpose(1, 2)
        pairs = zip(_apart(a.to(device, dtype)), _apart(_own(e, dtype, device)), strict=True)
        factors.update(zip(batch, pairs, strict=True))
        yield
    return factors


def _numbers(where: list[Where], arch: Architecture, device: torch.device) -> Tensor:
    """The numbers (M,) int64 of linears among all of the model."""
    numbers = [arch.first_linear(at.layer, at.site) + at.target for at in where]
    return torch.tensor(numbers, dtype=torch.int64).to(device)


def has_table(at: Where, arch: Architecture) -> bool:
    """Whether the router's input is a function of the token alone."""
    return not (at.layer or at.site != QKV or arch.positions)


def describe(
    folded: FoldedAdapter, adapter: Adapter, pinned: Route | None, load_seconds: dict[str, float]
) -> AdapterInfo:
    """The card of an adapter that was folded."""
    config = adapter.config
    tucka = config if isinstance(config, TuckASpec) else None
    lora = config if isinstance(config, LoRASpec) else None
    bank = config if isinstance(config, BankSpec) else None
    scope = None
    if tucka is not None:
        trained = (adapter.training or {}).get("route")
        scope = RouteScope(trained) if trained in ROUTE_SCOPES else None
        scope = RouteScope.PINNED if pinned is not None else scope
    return AdapterInfo(
        key=folded.key,
        digest=adapter.digest,
        kind=adapter.kind,
        r=config.r,
        k=tucka.k if tucka else None,
        t=tucka.t if tucka else None,
        p=tucka.p if tucka else None,
        alpha=tucka.alpha if tucka else lora.lora_alpha if lora else None,
        target_modules=tuple(sorted({path.rsplit(".", 1)[-1] for path in adapter.modules})),
        num_modules=len(adapter.modules),
        router=adapter.router,
        scope=scope,
        bytes=folded.num_bytes,
        training=adapter.training,
        route_prefix_tokens=folded.routed.router.prefix_tokens if folded.routed else None,
        load_seconds=load_seconds,
        members=tuple(bank.members) if bank else (),
        vocab_size=adapter.vocab_size,
    )


def _lora(module: LoRAModule, weight: Tensor | None, bias: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """U (r, d_in), E (r, d_out), and what is changed of the base's y, (2, d_out), if anything. The base's own `weight`
    (d_out, d_in), which a DoRA needs, and `bias` (d_out,) are in fp32.

    DoRA is y = s ⊙ (W + ΔW) x + b' with s = magnitude / ‖W + ΔW‖, row by row: s ⊙ (Wx + b) + b' - s ⊙ b + s ⊙ ΔW x,
    where b' is the base's own bias b, or what replaces it.
    """
    device = bias.device
    a, b = module.a.to(device).float(), module.b.to(device).float() * module.scale
    own = bias if module.own_bias is None else module.own_bias.to(device).float()
    if module.magnitude is not None:
        assert weight is not None
        norms = torch.linalg.vector_norm(torch.addmm(weight, b, a), dim=1)
        scale = module.magnitude.to(device).float() / norms
        return a, (scale[:, None] * b).T, torch.stack([scale, own - scale * bias])
    if not module.changes_base:
        return a, b.T, None
    added = torch.zeros_like(bias) if module.bias is None else module.scale * module.bias.to(device).float()
    return a, b.T, torch.stack([torch.ones_like(bias), own - bias + added])


def _saved(adapter: Adapter, arch: Architecture, weights: Weights) -> dict[str, Tensor]:
    """The parameters that are replaced. PEFT saves the base's own embedding and head beside adapters that touch them:
    where they are what the base has, nothing is."""
    own = {f"{arch.embed}.weight": lambda: weights.embed, f"{arch.head}.weight": weights.head.dense}
    embed = weights.embed
    saved = {name: _own(value, embed.dtype, embed.device) for name, value in adapter.saved.items()}
    return {name: value for name, value in saved.items() if name not in own or not torch.equal(value, own[name]())}


def _tables(
    adapter: Adapter, saved: dict[str, Tensor], arch: Architecture, weights: Weights, dtype: torch.dtype
) -> dict[str, FoldedTable]:
    """What is changed of the embedding and of the head. A row of the embedding is W's column for its token."""
    tables = {}
    device = weights.embed.device
    for path in (arch.embed, arch.head):
        module, rows = adapter.modules.get(path), adapter.tokens.get(path)
        factors = affine = None
        if isinstance(module, LoRAModule):
            is_embed, own = path == arch.embed, saved.get(f"{path}.weight")
            weight = own if own is not None else weights.embed if is_embed else weights.head.dense()
            weight = weight.float().T if is_embed else weight.float()
            u, e, affine = _lora(module, weight, torch.zeros(len(weight), device=device))
            factors = (u.T, e) if is_embed else (e.T, u)
            factors = _own(factors[0], dtype, device), _own(factors[1], dtype, device)
        if module is not None or rows is not None:
            values = None
            if rows is not None:
                values = _own(rows[0], torch.int64, device), _own(rows[1], weights.embed.dtype, device)
            tables[path] = FoldedTable(factors, affine, values)
    return tables


def _normalised_cores(modules: list[TuckAModule], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ĝ (M, k, p, r, r) and Ĉ (M, t, p) of M linears, Frobenius-normalised, G per group."""
    if not modules:
        return torch.empty(0, device=device), torch.empty(0, device=device)
    g = torch.stack([module.g for module in modules]).to(device).float()
    c = torch.stack([module.c for module in modules]).to(device).float()
    g_norm = torch.linalg.vector_norm(g, dim=(2, 3, 4), keepdim=True)
    return g / g_norm, c / torch.linalg.vector_norm(c, dim=(1, 2), keepdim=True)


def _pinned_cores(g: Tensor, c: Tensor, route: Route) -> Tensor:
    """M (M, r, r) of M linears under one route. Raises InvalidAdapterError if it does not fit."""
    if not 0 <= route.group < g.shape[1] or len(route.weights) != c.shape[1]:
        raise InvalidAdapterError(
            f"The pinned route does not fit: the adapter has {g.shape[1]} groups of {c.shape[1]} experts."
        )
    w = torch.tensor(route.weights, device=c.device) @ c
    return torch.einsum("mp,mpab->mab", w, g[:, route.group])


def _table(
    at: Where, ec: Tensor, saved: dict[str, Tensor], arch: Architecture, weights: Weights, ops: Ops
) -> Work[Tensor | None]:
    """The router's logits of every token where its input is a function of the token alone, else None."""
    if not has_table(at, arch):
        return None
    embed = saved.get(f"{arch.embed}.weight", weights.embed)
    norm_path = arch.path(0, arch.input_norm)
    weight, bias = weights.layers[0].input_norm
    norm = (saved.get(f"{norm_path}.weight", weight), saved.get(f"{norm_path}.bias", bias) if arch.norm_bias else None)
    rows = []
    for part in embed.split(TABLE_ROWS):
        yield
        rows.append(ops.norm(part, *norm, arch.eps).float() @ ec.T)
    return torch.cat(rows)
