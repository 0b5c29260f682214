"""The machine and this installation, as a table of figures has to say them."""

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

FLAGS = re.compile(r"(avx|amx|f16c|fma|sve|asimd|bf16|i8mm).*")
"""The CPU's features that decide about matrix products."""


def describe(proc: Path = Path("/proc")) -> dict[str, Any]:
    text = (proc / "cpuinfo").read_text()
    memory = re.search(r"MemTotal:\s+(\d+) kB", (proc / "meminfo").read_text())
    return {
        "cpu": field(text, "model name") or platform.machine(),
        "flags": [flag for flag in (field(text, "flags") or field(text, "Features")).split() if FLAGS.fullmatch(flag)],
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(int(memory[1]) / 2**20, 1) if memory else None,
        "kernel": platform.release(),
    }


def field(text: str, name: str) -> str:
    found = re.search(rf"^{name}\s*: (.*)$", text, re.MULTILINE)
    return found[1] if found else ""


def own_versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    found |= {name: importlib.metadata.version(name) for name in ("tucka-runtime", "torch", "transformers")}
    return found | commit()


def commit() -> dict[str, str]:
    """Of the checkout, where this is one."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:
        return {}
    return {"commit": done.stdout.strip()} if done.returncode == 0 else {}
