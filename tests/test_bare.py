"""A machine with torch, triton, transformers and safetensors alone, and a checkout that is not installed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

ABSENT = (
    "fastapi starlette pydantic uvicorn uvloop msgspec prometheus_client llguidance opentelemetry aiohttp peft "
    "matplotlib"
)
"""What the project needs besides, which none of the four brings along."""

BLOCK = f"""
import sys

for name in {ABSENT.split()!r}:
    sys.modules[name] = None  # importing it raises ModuleNotFoundError
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in str(finder)]
"""


def run(code: str, folder: Path) -> str:
    """What a Python process prints whose only way to the project is the checkout's own folder."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", BLOCK + code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "module",
    ["kernels.bench.__main__", "kernels.fused.backend", "engine.process", "engine.model_runner", "llm", "bench"],
)
def test_kernels_and_engine_import(module: str, tmp_path: Path) -> None:
    run(f"import tucka_runtime.{module}", tmp_path)


def test_the_kernels_bench_runs(tmp_path: Path) -> None:
    code = "from tucka_runtime.kernels.bench.__main__ import main; sys.exit(main(['--model']))"
    assert "Llama-3-8B" in run(code, tmp_path)


def test_the_kernels_tests_are_collected(tmp_path: Path) -> None:
    """A fixture that needs the server is not loaded where there is none."""
    code = f"""
import importlib.util

real = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in {ABSENT.split()!r} else real(name, package)
import pytest

sys.exit(pytest.main(["--collect-only", "-p", "no:cacheprovider", "{ROOT}/tests/kernels/test_graphs.py"]))
"""
    assert "test_graphs" in run(code, tmp_path)
