"""Imports point down (docs/architecture.md): read from the sources, so that no import has to be run.

`python -m tests.test_imports` prints the rules.
"""

import ast
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

OURS = "tucka_runtime"
PACKAGES = {OURS: ROOT / OURS} | {f"{OURS}.{name}": ROOT / name for name in ("kernels", "server", "loadtest")}

SHARED = (
    "errors config messages channel_messages channel logs grammars schemas schema_objects schema_values base_files "
    "base_hub base_gguf bases durable tokenizer detokenizer chat_rendering added_tokens client extras embedded "
    "machine children progress terminal conversations names"
)
"""What both processes may know."""

CLIENT = "engine.client engine.child engine.output_stream engine.queue_wait"
POLICY = (
    "engine.scheduler engine.flows engine.block_manager engine.route_cache engine.sequence engine.pace engine.ngram"
)
TRAIN = "cli.train cli.train_flags cli.train_files cli.train_plan cli.train_end cli.train_jobs"

BENCHES = "bench bench_reuse bench_json bench_ngram bench_tiers bench_banks"

# Who may import what of ours, a package standing for all that is in it. The first row that names a module is its own.
RULES = {
    "kernels": "kernels",
    SHARED: SHARED,
    "affinity": "affinity",
    "models": f"{SHARED} models kernels.ops",
    "adapters": f"{SHARED} models adapters",
    CLIENT: f"{SHARED} {CLIENT}",
    POLICY: f"{SHARED} {POLICY}",
    "engine": f"{SHARED} models adapters kernels engine",
    "server.http": f"{SHARED} server.http",
    "server.metrics": f"{SHARED} server.http server.metrics",
    "server.service": f"{SHARED} engine.client adapters server.http server.metrics server.service",
    "server.api": f"{SHARED} adapters.files server.http server.metrics server.service server.api",
    "server.ray": f"{SHARED} affinity server.api.app server.http server.parts server.settings_check server.ray",
    "server": f"{SHARED} engine.client adapters.registry adapters.remote server",
    "trainer": f"{SHARED} models adapters trainer",
    "loadtest.peers": "errors client children loadtest",
    "loadtest": "errors client loadtest",
    "planning": "errors config client loadtest affinity engine.pace planning",
    TRAIN: f"{SHARED} models adapters trainer {TRAIN}",
    "cli.adapter_files": f"{SHARED} models adapters kernels engine.adapters engine.turns cli",
    "cli.compress": f"{SHARED} models adapters kernels engine.adapters engine.turns llm cli",
    "evals": f"{SHARED} llm trainer evals",
    "cli.eval": f"{SHARED} evals",
    "cli.plan": f"{SHARED} planning loadtest.lengths cli",
    "cli.doctor": f"{SHARED} kernels.dispatch cli",
    "cli": f"{SHARED} adapters.files server.serve server.batch server.ray server.http.key_file cli loadtest.cli",
    "llm_adapters": f"{SHARED} adapters.files engine",
    "llm": f"{SHARED} llm_adapters engine server.service.text server.service.stops",
    BENCHES: f"{SHARED} llm adapters engine.environment bench",
    "bench_kv": f"{SHARED} llm engine.environment trainer",
    "bench_models": f"{SHARED} models adapters engine.environment trainer bench bench_banks",
}

# Neither these nor anything that they import may name torch.
NO_TORCH = f"{SHARED} {CLIENT} {POLICY} server loadtest planning"


def modules() -> dict[str, Path]:
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            name = ".".join([package, *path.relative_to(folder).with_suffix("").parts]).removesuffix(".__init__")
            found[name] = path
    return found


MODULES = modules()


def imports(path: Path) -> set[str]:
    """Everything a file imports, lazily or not, as dotted names."""
    out = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            out |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            base = node.module or ""
            out |= {f"{base}.{a.name}" if f"{base}.{a.name}" in MODULES else base for a in node.names}
    return out


def within(name: str, packages: str) -> bool:
    """Whether a module is one of `packages`, named without the first part, or in one."""
    return any(name == f"{OURS}.{p}" or name.startswith(f"{OURS}.{p}.") for p in packages.split())


def rule(module: str) -> str:
    """What a module may import of ours."""
    if module == OURS:
        return f"{SHARED} llm"  # the public face
    return next(allowed for who, allowed in RULES.items() if within(module, who))


def test_every_package_is_seen():
    assert len(MODULES) > 100
    assert {f"{OURS}.kernels.dispatch", f"{OURS}.server.serve", f"{OURS}.loadtest.cli"} <= set(MODULES)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_down(module):
    for name in imports(MODULES[module]):
        if name.split(".")[0] == OURS and name != OURS:
            assert within(name, rule(module)), name


@pytest.mark.parametrize("module", [m for m in MODULES if within(m, "kernels")])
def test_kernels_know_torch_and_triton_only(module):
    for name in imports(MODULES[module]):
        top = name.split(".")[0]
        assert top in (OURS, "torch", "triton") or top in sys.stdlib_module_names, name


@pytest.mark.parametrize("module", [m for m in MODULES if within(m, NO_TORCH)])
def test_no_torch_neither_directly_nor_by_what_is_imported(module):
    seen, todo = set(), [module]
    while todo:
        current = todo.pop()
        seen.add(current)
        names = imports(MODULES[current])
        assert not any(name.split(".")[0] in ("torch", "triton") for name in names), (current, names)
        todo += [n for n in names if n in MODULES and n not in seen and n != OURS]  # whose face is lazy


if __name__ == "__main__":
    print("what both processes may know (SHARED):", SHARED, "\n")
    for who, allowed in RULES.items():
        print(f"{who.replace(SHARED, 'SHARED'):60} may import  {allowed.replace(SHARED, 'SHARED')}")
    print(f"\nnever torch, nor by what they import: {NO_TORCH.replace(SHARED, 'SHARED')}")
