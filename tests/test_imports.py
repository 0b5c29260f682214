"""Imports point down (docs/architecture.md): read from the sources, so that no import has to be run."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"tucka_runtime": ROOT / "tucka_runtime"} | {
    f"tucka_runtime.{name}": ROOT / name for name in ("kernels", "server", "loadtest")
}
OURS = "tucka_runtime"


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


def within(name: str, *packages: str) -> bool:
    return any(name == p or name.startswith(p + ".") for p in packages)


def below(*packages: str) -> list[str]:
    return [m for m in MODULES if within(m, *(f"{OURS}.{p}" for p in packages))]


def ours(module: str) -> set[str]:
    return {i for i in imports(MODULES[module]) if within(i, OURS)}


def test_every_package_is_seen():
    assert len(MODULES) > 60
    assert {"tucka_runtime.kernels.dispatch", "tucka_runtime.server.cli", "tucka_runtime.loadtest.cli"} <= set(MODULES)


@pytest.mark.parametrize("module", below("kernels"))
def test_kernels_know_torch_and_triton_only(module):
    for name in imports(MODULES[module]):
        assert within(name, f"{OURS}.kernels", "torch", "triton") or name.split(".")[0] in sys.stdlib_module_names, name


@pytest.mark.parametrize("module", below("errors", "config", "sequence", "report"))
def test_vocabulary_is_standard_library_only(module):
    for name in imports(MODULES[module]):
        top = name.split(".")[0]
        assert within(name, *below("errors", "config", "sequence", "report")) or top in sys.stdlib_module_names, name


@pytest.mark.parametrize("module", below("scheduler", "block_manager"))
def test_policy_knows_no_torch(module):
    seen, todo = set(), [module]
    while todo:  # neither directly nor by what it imports
        current = todo.pop()
        seen.add(current)
        names = imports(MODULES[current])
        assert not any(within(n, "torch", "transformers", "triton") for n in names), (current, names)
        todo += [n for n in names if n in MODULES and n not in seen]


@pytest.mark.parametrize("module", below("trainer"))
def test_trainer_shares_the_format_and_not_the_engine(module):
    engine = [
        f"{OURS}.{m}"
        for m in ("engine", "engine_client", "worker", "scheduler", "block_manager", "runner", "batch", "server")
    ]
    assert not any(within(name, *engine) for name in ours(module))


@pytest.mark.parametrize("module", below("server"))
def test_server_uses_the_public_runtime(module):
    public = [
        "endpoint",
        "errors",
        "config",
        "sequence",
        "report",
        "engine_client",
        "grammar",
        "tokenizer",
        "metrics",
        "logs",
        "adapters.registry",
    ]
    commands = ["trainer.cli", "loadtest.cli"] if module == f"{OURS}.server.cli" else []
    allowed = [OURS + ".server", *(f"{OURS}.{p}" for p in public + commands)]
    for name in ours(module):
        assert name == OURS or within(name, *allowed), name


@pytest.mark.parametrize("module", below("loadtest"))
def test_loadtest_speaks_http(module):
    for name in ours(module):
        assert name == OURS or within(name, f"{OURS}.loadtest", f"{OURS}.endpoint", f"{OURS}.errors"), name
        assert not within(name, "torch"), name


def test_nothing_imports_the_server():
    for module in MODULES:
        if not within(module, f"{OURS}.server"):
            assert not any(within(n, f"{OURS}.server") for n in ours(module)), module
