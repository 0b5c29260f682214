"""Holds what an adapter was folded into, run by the kernels that serve it, to its definition in float64.

The definition (docs/architecture.md) is written down here once more, straight from the files and the base's weights:
nothing of `fold` is in it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, rms_norm

from tucka_runtime.adapters.format import Adapter, BankModule, BankSpec, LoRAModule, TuckAModule, TuckASpec
from tucka_runtime.engine.adapters.active import ActiveSet
from tucka_runtime.engine.adapters.delta import AdapterDelta, Settled
from tucka_runtime.engine.adapters.fold import fold, locate
from tucka_runtime.engine.adapters.folded import FoldedAdapter, FoldedTable
from tucka_runtime.engine.adapters.segment import Segment
from tucka_runtime.engine.turns import whole
from tucka_runtime.kernels.ops import Ops
from tucka_runtime.messages import AdapterKey, Route
from tucka_runtime.models.architecture import Architecture
from tucka_runtime.models.weights import Weights

LIMITS = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
"""The relative L2 error that is allowed, by the less precise of the factors' type and the base's. A half type rounds
both factors, the low-rank half and the result, by 2^-11 or 2^-8 each at most; the reference's factors on a CPU are
float32 whatever the base is in, which still rounds the result."""

ROWS = 16
ROUTED = 8  # sets of router inputs
KEY = AdapterKey("verified", 1)


@dataclass(frozen=True)
class Finding:
    """How far something is from its definition: a module's change by its path, or the router's weights."""

    what: str
    error: float


def verify(adapter: Adapter, arch: Architecture, weights: Weights, ops: Ops, dtype: torch.dtype) -> Iterator[Finding]:
    """Every module's change of random inputs, under a random route of each group or of each member of a bank, and the
    routes of random inputs.
    `dtype` is the factors' type. Raises InvalidAdapterError as `fold` does."""
    device, kind = weights.embed.device, weights.embed.dtype
    folded = whole(fold(KEY, adapter, arch, weights, ops, dtype))
    active = ActiveSet.stack([folded], arch, dtype, device)
    random = torch.Generator().manual_seed(0)
    where, worst = locate(arch), dict.fromkeys(adapter.modules, 0.0)
    tokens = torch.zeros(ROWS, dtype=torch.int64, device=device)  # no route comes of them
    for route, member in _choices(adapter, random):
        segment = Segment(0, ROWS, KEY, given=route, member=member)
        delta = AdapterDelta.build(tokens, [segment], [], active, ops, dtype, device, Settled())
        for layer, s in active.sites:
            site = arch.sites[s]
            x = torch.randn(ROWS, site.d_in, generator=random).to(device, kind)
            low_rank = delta.shrink(layer, s, x)
            assert low_rank is not None
            ours = ops.expand(x.new_zeros(ROWS, sum(site.widths)), low_rank).double()
            linear = weights.layers[layer].linears[s]
            dense, bias = linear.dense(), linear.bias
            for j, target in enumerate(site.targets):
                path = arch.path(layer, target)
                if path not in adapter.modules:
                    continue
                own = slice(site.columns[j], site.columns[j + 1])
                scale, want = change(
                    adapter, path, x.double(), dense[own].double(), None if bias is None else bias[own].double(), route,
                    member,
                )  # fmt: skip
                worst[path] = max(worst[path], _relative(ours[:, own], want))
                if scale is not None:
                    worst[path] = max(worst[path], _relative(folded.affine[where[path]][0].double(), scale))
    for path, table in folded.tables.items():
        worst[path] = _table(adapter, path, table, arch, weights, random)
    yield from (Finding(path, error) for path, error in worst.items())
    if folded.routed is not None:
        yield Finding(f"routes at {adapter.router}", _routing(adapter, folded, arch, weights, ops, dtype, random))


def change(
    adapter: Adapter,
    path: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    route: Route | None,
    member: int | None = None,
) -> tuple[Tensor | None, Tensor]:
    """By the definition, all in float64: the scale s (d_out,) of the base's product where a module has one, and what
    comes to s ⊙ (Wx + b) for x (n, d_in)."""
    module = adapter.modules[path]
    if isinstance(module, TuckAModule):
        assert isinstance(adapter.config, TuckASpec) and route is not None
        g, c, u = (t.to(x) for t in (module.g[route.group], module.c, module.u))
        g, c, u = g / g.norm(), c / c.norm(), u / u.norm()
        core = torch.einsum("i,ij,jab->ab", torch.tensor(route.weights).to(x), c, g)
        return None, adapter.config.alpha * (x @ u @ core @ u.T) @ weight.T
    if isinstance(module, BankModule):
        assert member is not None
        core = module.core[member].to(x)
        return None, x @ module.u.to(x).T @ (core if core.dim() == 2 else core.diag()) @ module.e.to(x)
    product = module.scale * module.b.to(x) @ module.a.to(x)
    before = 0.0 if bias is None else bias
    after = before if module.own_bias is None else module.own_bias.to(x)
    if module.magnitude is not None:
        scale = module.magnitude.to(x) / (weight + product).norm(dim=1)
        return scale, x @ product.T * scale + after - scale * before
    added = 0.0 if module.bias is None else module.scale * module.bias.to(x)
    return None, x @ product.T + after - before + added


def _choices(adapter: Adapter, random: torch.Generator) -> list[tuple[Route | None, int | None]]:
    """The routes and the members that its changes depend on."""
    config = adapter.config
    if isinstance(config, BankSpec):
        return [(None, member) for member in range(len(config.members))]
    if not isinstance(config, TuckASpec):
        return [(None, None)]
    # As fp32 has them, in which routes are kept.
    return [(Route(group, tuple(torch.rand(config.t, generator=random).tolist())), None) for group in range(config.k)]


def _table(
    adapter: Adapter, path: str, table: FoldedTable, arch: Architecture, weights: Weights, random: torch.Generator
) -> float:
    """The error of an adapted embedding's rows, or of an adapted head's logits, of random tokens and hidden states."""
    is_embed, module, rows = path == arch.embed, adapter.modules.get(path), adapter.tokens.get(path)
    own = adapter.saved.get(f"{path}.weight", weights.embed if is_embed else weights.head.dense()).to(weights.embed)
    want = own.double()
    offset: float | Tensor = 0.0
    if isinstance(module, LoRAModule):
        product = (module.scale * module.b.double() @ module.a.double()).to(want)
        moved = (want.T if is_embed else want) + product
        if module.magnitude is not None:
            moved = moved * (module.magnitude.to(want) / moved.norm(dim=1))[:, None]
        want = moved.T if is_embed else moved
        offset = 0.0 if module.bias is None else module.scale * module.bias.to(want)
    if rows is not None:
        want = want.index_copy(0, rows[0].to(want.device), rows[1].to(want))
    if is_embed:
        ids = torch.randint(len(own), (ROWS,), generator=random)
        ids = torch.cat([ids, *([rows[0][:ROWS]] if rows is not None else [])]).to(want.device)
        return _relative(table.embed(own[ids], ids).double(), want[ids])
    hidden = torch.randn(ROWS, arch.hidden, generator=random).to(own)
    return _relative(table.logits((hidden @ own.T).float(), hidden).double(), hidden.double() @ want.T + offset)


def _routing(
    adapter: Adapter,
    folded: FoldedAdapter,
    arch: Architecture,
    weights: Weights,
    ops: Ops,
    dtype: torch.dtype,
    random: torch.Generator,
) -> float:
    """The largest error of the weights that a router gives, and of the best group's lead where it chose another."""
    assert folded.routed is not None and isinstance(adapter.config, TuckASpec) and adapter.ec is not None
    router, config, device = folded.routed.router, adapter.config, weights.embed.device
    worst = 0.0
    for _ in range(ROUTED):
        if router.table is None:
            x = torch.randn(ROWS, router.centroids.shape[1], generator=random).to(weights.embed)
            groups, found = ops.route_hidden(x, router.centroids, router.t)
        else:
            ids = torch.randint(adapter.vocab_size or arch.vocab, (ROWS,), generator=random).to(device)
            active = ActiveSet.stack([folded], arch, dtype, device)
            delta = AdapterDelta.build(ids, [Segment(0, ROWS, KEY)], [], active, ops, dtype, device, Settled())
            groups, found = delta.routes[0].groups, delta.routes[0].weights
            x = _router_input(adapter, arch, weights, ids)
        logits = (adapter.ec.to(device).double() @ x.double().mean(0)).view(config.k, config.t)
        score = torch.sigmoid(logits / logits.norm(dim=1, keepdim=True))
        group = int(groups[0])
        lead = float(score.max() - score[group].max())
        worst = max(worst, lead, _relative(found[0, : config.t].double(), score[group]))
    return worst


def _router_input(adapter: Adapter, arch: Architecture, weights: Weights, ids: Tensor) -> Tensor:
    """What comes to the first layer's q, k and v of some tokens, (n, d) float64."""
    path = arch.path(0, arch.input_norm)
    own, (weight, bias) = adapter.saved, weights.layers[0].input_norm
    x = own.get(f"{arch.embed}.weight", weights.embed).to(weights.embed)[ids].double()
    weight = own.get(f"{path}.weight", weight).to(x)
    if bias is None:
        return rms_norm(x, (x.shape[1],), weight, arch.eps)
    return layer_norm(x, (x.shape[1],), weight, own.get(f"{path}.bias", bias).to(x), arch.eps)


def _relative(ours: Tensor, want: Tensor) -> float:
    """The relative L2 error; infinite where it is no number, which a maximum would pass over."""
    size = want.norm()
    error = float((ours - want).norm() / size) if size else float(ours.norm())
    return error if math.isfinite(error) else math.inf
