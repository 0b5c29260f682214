"""Folding into the serving form, leases, and the stacked sets of a batch."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.driving import build, prompt, relative, routed_cores, save_lora, save_model, save_tucka
from tucka_runtime.adapters.base_layout import base_layout
from tucka_runtime.adapters.format import TuckASpec, read_adapter
from tucka_runtime.engine.adapters.fold import fold, locate
from tucka_runtime.engine.adapters.folded import FoldedAdapter, Where
from tucka_runtime.engine.adapters.host_cache import moved
from tucka_runtime.engine.adapters.slots import SlotTable
from tucka_runtime.engine.adapters.store import ACTIVE_SETS, AdapterStore
from tucka_runtime.engine.engine import Engine
from tucka_runtime.engine.turns import whole
from tucka_runtime.errors import (
    AdapterCapacityError,
    AdapterConflictError,
    InvalidAdapterError,
    ModelNotFoundError,
)
from tucka_runtime.messages import AdapterKey, Route

KEY = AdapterKey("a", 1)
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CONV = ("c_attn", "c_proj", "c_fc")


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Engine, Path]:
    """(the transformers model, an engine, a TuckA adapter on every linear)."""
    folder = tmp_path_factory.mktemp(request.param)
    model = save_model(folder / "model", request.param, **({} if request.param == "gpt2" else {"mlp_bias": True}))
    engine = build(folder / "model")
    save_tucka(folder / "a", engine.layout, targets=CONV if request.param == "gpt2" else ALL)
    return model, engine, folder / "a"


def folded(engine: Engine, folder: Path, key: AdapterKey = KEY, pinned: Route | None = None) -> FoldedAdapter:
    runner = engine.runner
    adapter = read_adapter(folder, engine.layout)
    return whole(fold(key, adapter, runner.arch, runner.model.weights, runner.ops, runner.dtype, pinned))


def test_an_evicted_adapter_is_another_ones_room_and_comes_back_the_same(
    family: tuple[Any, Engine, Path], tmp_path: Path
):
    """Through the host cache, whose thread is the test's own here: the same tensors, and the same answers."""
    _, _, folder = family
    engine = build(folder.parent / "model", adapter_slots=1)
    form, info = engine.prepare_adapter(KEY, folder)
    engine.host.note(info)
    engine.add_adapter(form)
    with pytest.raises(AdapterCapacityError):
        engine.prepare_adapter(AdapterKey("b", 2), folder)
    engine.prepare_adapter(AdapterKey("b", 2), folder, resident=False)  # it needs no slot
    leased = engine.adapters.lease(KEY)
    assert engine.evict_adapter(AdapterKey("unknown", 1)) is None
    engine.adapters.release(KEY)
    gone = engine.evict_adapter(KEY)
    assert gone is form is leased
    engine.cache_adapter(gone)
    with pytest.raises(ModelNotFoundError):
        engine.adapters.lease(KEY)
    back = engine.activate_adapter(KEY)
    assert back is not None and back[1] == replace(info, load_seconds=back[1].load_seconds)
    engine.add_adapter(back[0])
    for mine, before in zip(back[0].tensors(), form.tensors(), strict=True):
        assert torch.equal(mine, before)
    assert KEY not in engine.host and engine.activate_adapter(KEY) is None
    engine.unload_adapter(KEY)
    engine.host.drop(KEY)
    engine.cache_adapter(form)
    assert KEY not in engine.host, "what was unloaded on its way to the cache stays away"


def test_an_adapter_moves_with_all_that_it_has(family: tuple[Any, Engine, Path]):
    _, engine, folder = family
    form = folded(engine, folder)
    there = moved(form, torch.device("meta"))
    assert there.key == form.key and list(there.factors) == list(form.factors)
    assert {t.device.type for t in there.tensors()} == {"meta"}
    assert [t.shape for t in there.tensors()] == [t.shape for t in form.tensors()]
    assert there.num_bytes == form.num_bytes


def test_the_layout_is_that_of_the_model(family: tuple[Any, Engine, Path]):
    """Every parameter by transformers' name and shape; linears in the order in which they run."""
    model, engine, _ = family
    arch = engine.runner.arch
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    shapes["lm_head.weight"] = tuple(model.lm_head.weight.shape)
    assert dict(engine.layout.parameters) == shapes
    order: list[str] = []
    hooks = [
        module.register_forward_hook(lambda *_, name=name: order.append(name))
        for name, module in model.named_modules()
        if name in engine.layout.linears
    ]
    model(torch.tensor([prompt(3)]))
    for hook in hooks:
        hook.remove()
    assert order == list(engine.layout.linears)
    for path, (d_in, d_out) in engine.layout.linears.items():
        weight = model.get_submodule(path).weight
        assert (d_in, d_out) == tuple(weight.shape if arch.transposed else weight.T.shape)
    assert list(locate(arch)) == order
    assert base_layout(arch, "x").fingerprint == "x"


def test_the_serving_form_is_the_official_one(family: tuple[Any, Engine, Path]):
    """base(x + α x Û M Ûᵀ) in float64 from the raw tensors, against base(x) + ((x Uᵀ) M) E."""
    model, engine, folder = family
    adapter = read_adapter(folder, engine.layout)
    assert isinstance(adapter.config, TuckASpec)
    form = folded(engine, folder)
    assert form.routed is not None
    group, s = 2, (0.3, 0.65)
    cores = routed_cores(form, Route(group, s))
    where = locate(engine.runner.arch)
    arch = engine.runner.arch
    own = [where[path] for path in adapter.modules]
    assert form.routed.linears.tolist() == [arch.first_linear(at.layer, at.site) + at.target for at in own]
    for path, raw in adapter.modules.items():
        linear = model.get_submodule(path).double()
        x = torch.randn(5, raw.u.shape[0], dtype=torch.float64)
        g, c, u = raw.g[group].double(), raw.c.double(), raw.u.double()
        g, c, u = g / g.norm(), c / c.norm(), u / u.norm()
        m = torch.einsum("i,ij,jab->ab", torch.tensor(s, dtype=torch.float64), c, g)
        with torch.no_grad():
            expected = linear(x + adapter.config.alpha * x @ u @ m @ u.T) - linear(x)
        low_in, low_out = form.factors[where[path]]
        mine = x @ low_in.double().T @ cores[where[path]].double() @ low_out.double()
        assert relative(mine, expected) < 1e-4
        linear.float()


def test_a_pinned_adapter_is_a_plain_delta(family: tuple[Any, Engine, Path]):
    _, engine, folder = family
    route = Route(1, (0.4, 0.7))
    free, fixed = folded(engine, folder), folded(engine, folder, pinned=route)
    assert fixed.routed is None and free.routed is not None
    for at, m in routed_cores(free, route).items():
        (u, e), (u_fixed, e_fixed) = free.factors[at], fixed.factors[at]
        assert torch.equal(e, e_fixed)
        assert relative(u_fixed.T, u.T @ m) < 1e-5
    for bad in (Route(3, (0.4, 0.7)), Route(-1, (0.4, 0.7)), Route(0, (0.4,)), Route(0, (0.4, 0.5, 0.6))):
        with pytest.raises(InvalidAdapterError, match="3 groups of 2 experts"):
            folded(engine, folder, pinned=bad)


def test_a_lora_keeps_its_factors_and_scale(family: tuple[Any, Engine, Path], tmp_path: Path):
    _, engine, _ = family
    targets = ("c_attn", "c_fc") if engine.runner.arch.transposed else ("q_proj", "down_proj")
    save_lora(tmp_path, engine.layout, targets=targets)
    adapter = read_adapter(tmp_path, engine.layout)
    form = folded(engine, tmp_path)
    assert form.routed is None
    where = locate(engine.runner.arch)
    assert set(form.factors) == {where[path] for path in adapter.modules}
    for path, raw in adapter.modules.items():
        u, e = form.factors[where[path]]
        assert torch.equal(u, raw.a)
        assert torch.allclose(e, 2.0 * raw.b.T)


@pytest.mark.parametrize(
    ("kind", "targets", "layers", "table"),
    [
        ("llama", ("q_proj", "v_proj"), None, True),
        ("qwen3", ("k_proj", "o_proj"), None, True),
        ("llama", ("o_proj",), None, False),
        ("llama", ("gate_proj",), None, False),
        ("llama", ("q_proj",), [1], False),
        ("gpt2", ("c_attn",), None, False),  # its input holds the position
    ],
)
def test_routes_come_from_token_ids_where_they_can(
    kind: str, targets: tuple[str, ...], layers: list[int] | None, table: bool, tmp_path: Path
):
    model = save_model(tmp_path / "model", kind)
    engine = build(tmp_path / "model")
    save_tucka(tmp_path / "a", engine.layout, targets=targets, layers=layers)
    router = folded(engine, tmp_path / "a").routed.router
    assert (router.table is not None) == table
    if table:
        layer = model.model.layers[0]
        with torch.no_grad():
            inputs = layer.input_layernorm(model.model.embed_tokens.weight)
        assert relative(router.table, inputs @ router.centroids.T) < 1e-4


def test_a_table_is_made_of_the_adapters_own_embedding_and_norm(tmp_path: Path):
    model = save_model(tmp_path / "model")
    engine = build(tmp_path / "model")
    own = {
        "model.embed_tokens.weight": torch.randn(97, 32),
        "model.layers.0.input_layernorm.weight": torch.randn(32),
        "model.layers.1.input_layernorm.weight": torch.randn(32),
    }
    names = ["embed_tokens", "input_layernorm"]
    save_tucka(tmp_path / "a", engine.layout, saved=own, modules_to_save=names)
    router = folded(engine, tmp_path / "a").routed.router
    norm = model.model.layers[0].input_layernorm
    with torch.no_grad():
        norm.weight.copy_(own["model.layers.0.input_layernorm.weight"])
        inputs = norm(own["model.embed_tokens.weight"])
    assert relative(router.table, inputs @ router.centroids.T) < 1e-4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_folding_is_fp32_and_rounds_once(dtype: str, tmp_path: Path):
    """Routes and cores stay fp32, factors take the model's type."""
    save_model(tmp_path / "model", dtype=getattr(torch, dtype))
    low, high = build(tmp_path / "model"), build(tmp_path / "model", dtype="float32")
    save_tucka(tmp_path / "a", low.layout, targets=ALL)
    mine, exact = folded(low, tmp_path / "a"), folded(high, tmp_path / "a")
    for at, pair in mine.factors.items():
        for a, b in zip(pair, exact.factors[at], strict=True):
            assert a.dtype == low.runner.dtype
            assert torch.equal(a, b.to(a.dtype))
    assert mine.routed.g.dtype == mine.routed.c.dtype == mine.routed.router.table.dtype == torch.float32
    assert torch.equal(mine.routed.g, exact.routed.g)


def test_bytes_are_those_of_the_exact_ranks(tmp_path: Path):
    save_model(tmp_path / "model")
    engine = build(tmp_path / "model")
    save_tucka(tmp_path / "a", engine.layout, r=3, k=2, t=2, p=1)
    shapes = [engine.layout.linears[f"model.layers.{i}.self_attn.{n}_proj"] for i in range(2) for n in "qv"]
    factors = sum(3 * (d_in + d_out) for d_in, d_out in shapes)
    routed = len(shapes) * (2 * 1 * 9 + 2 * 1 + 2) + 4 * 32 + 4 * 97  # the 2: an int64 of its place
    assert folded(engine, tmp_path / "a").num_bytes == 4 * (factors + routed)


# ---- leases --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> tuple[Engine, dict[str, FoldedAdapter]]:
    folder = tmp_path_factory.mktemp("store")
    save_model(folder / "model")
    engine = build(folder / "model")
    out = {}
    for i, name in enumerate("abcdef"):
        save_tucka(folder / name, engine.layout, i, r=2 + i, targets=(("q_proj",), ("q_proj", "up_proj"))[i % 2])
        out[name] = folded(engine, folder / name, AdapterKey(name, 1))
    save_lora(folder / "lora", engine.layout)
    out["lora"] = folded(engine, folder / "lora", AdapterKey("lora", 1))
    return engine, out


@pytest.fixture
def store(pieces: tuple[Engine, dict[str, FoldedAdapter]]) -> AdapterStore:
    runner = pieces[0].runner
    store = AdapterStore(runner.arch, runner.device, runner.dtype, 7, by_address=False)
    for adapter in pieces[1].values():
        store.add(adapter)
    return store


def test_places_are_counted(store: AdapterStore, pieces: tuple[Engine, dict[str, FoldedAdapter]]):
    a = pieces[1]["a"]
    with pytest.raises(AdapterCapacityError, match="All 7"):
        store.add(a)
    store.capacity = 8
    with pytest.raises(AdapterConflictError):
        store.add(a)
    assert len(store.loaded) == 7


def test_an_unloaded_adapter_stays_until_its_last_lease_ends(store: AdapterStore):
    key = AdapterKey("a", 1)
    assert store.lease(key) is store.lease(key)
    store.activate([key])
    store.unload(key)
    store.unload(key)
    with pytest.raises(ModelNotFoundError):
        store.lease(key)
    assert list(store.activate([key]).folded) == [key]
    store.release(key)
    assert key in store.loaded
    store.release(key)
    assert key not in store.loaded
    assert not store.active
    with pytest.raises(ModelNotFoundError):
        store.lease(key)
    store.unload(key)
    store.unload(AdapterKey("b", 2))
    store.unload(AdapterKey("b", 1))
    assert AdapterKey("b", 1) not in store.loaded


def test_stacked_sets_are_kept_within_reason(store: AdapterStore):
    keys = {name: AdapterKey(name, 1) for name in ("a", "b", "c", "d", "e", "f", "lora")}
    four = store.activate(keys[n] for n in "abcd")
    assert store.activate(keys[n] for n in "dcba") is four
    assert store.activate([keys["a"], keys["c"]]) is four, "half of it is in use"
    one = store.activate([keys["a"]])
    assert one is not four, "a quarter is not"
    for names in ("ef", "bf", "ce", "df"):
        store.activate(keys[n] for n in names)
    assert len(store.active) == ACTIVE_SETS
    assert store.activate([keys["a"]]) is not one, "the set that was not used longest is gone"
    store.unload(keys["f"])
    assert not any(keys["f"] in members for members in store.active)


def test_a_stacked_set_holds_each_adapters_own_factors(store: AdapterStore):
    active = store.activate(AdapterKey(name, 1) for name in ("f", "lora", "a"))
    adapters = list(active.folded.values())
    assert [a.key.name for a in adapters] == ["a", "f", "lora"]
    assert active.index == {a.key: i for i, a in enumerate(adapters)}
    assert active.core_rank == 7
    for (layer, site), stacked in active.sites.items():
        for i, adapter in enumerate(adapters):
            for j, (u, e) in enumerate(zip(stacked.u[i], stacked.e[i], strict=True)):
                expected = adapter.factors.get(Where(layer, site, j))
                assert (u is None) == (e is None) == (expected is None)
                if expected is not None:
                    assert u is expected[0] and e is expected[1], "stacked without a copy"
                assert stacked.ranks[i][j] == (0 if u is None else u.shape[0])


def test_a_slot_table_holds_the_addresses_of_what_is_loaded(store: AdapterStore):
    """Also after others came and went; a slot that is free again has no rank."""
    arch = store.arch
    table = SlotTable(arch, 3, store.dtype, store.device)
    a, f, lora = (store[AdapterKey(name, 1)] for name in ("a", "f", "lora"))
    table.add(a)
    table.add(f)
    table.remove(a.key)
    table.add(lora)
    active = table.active([f, lora])
    assert set(active.sites) == f.sites | lora.sites
    for slot in range(table.capacity):
        owner = next((x for x in (f, lora) if table.slot[x.key] == slot), None)
        for layer in range(arch.num_layers):
            for s, site in enumerate(arch.sites):
                for j in range(len(site.targets)):
                    own = owner.factors.get(Where(layer, s, j)) if owner else None
                    u, e = (0, 0) if own is None else (own[0].data_ptr(), own[1].data_ptr())
                    here = table.sites(affine=True)[layer, s]
                    assert (here.u_ptr[slot, j], here.e_ptr[slot, j]) == (u, e)
                    assert here.rank[slot, j] == (0 if own is None else len(own[0]))
                assert here.columns == site.columns and here.d_in == site.d_in


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 3e38), (torch.float16, 7e4)])
def test_values_that_overflow_when_folded_are_refused(family: tuple[Any, Engine, Path], tmp_path: Path, dtype, size):
    """They are finite on disk; in a batch they would turn the rows of others into NaN."""
    _, engine, _ = family
    folder = save_lora(tmp_path / "lora", engine.layout, targets=("c_attn",) if engine.runner.arch.positions else ALL)
    adapter = read_adapter(folder, engine.layout)
    for module in adapter.modules.values():
        module.b.fill_(size)
    with pytest.raises(InvalidAdapterError, match="overflow"):
        whole(fold(KEY, adapter, engine.runner.arch, engine.runner.model.weights, engine.runner.ops, dtype))
