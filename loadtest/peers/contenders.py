"""Who is compared, and how each is started at its best."""

import json
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tucka_runtime.children import python
from tucka_runtime.loadtest.peers.cases import ADAPTERS
from tucka_runtime.loadtest.peers.processes import PeerError, ProcessGroup, StartLine, output

OURS, VLLM, VLLM_LORA = "TuckA", "vLLM", "vLLM with LoRA"
OPENVINO = "OpenVINO GenAI"
CONTEXT, SEQUENCES, KV_TOKENS = 2048, 64, 32768
KINDS = ("qv", "all")
COUNTS = {1: "1 adapter", ADAPTERS: f"{ADAPTERS} adapters"}
"""Of adapters, and what the engine's bench calls them."""
BASE = "base only"
TARGETS = {"qv": "q_proj,v_proj", "all": "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"}
RANDOM = {"small": (8, 512), "mid": (16, 1024)}
"""Layers and width of the random models."""
MODELS = (*RANDOM, "smollm2")
TCMALLOC = [
    Path("/usr/lib") / place / name
    for name in ("libtcmalloc_minimal.so.4", "libtcmalloc.so.4")
    for place in ("x86_64-linux-gnu", "aarch64-linux-gnu", "")
]
CHILD = Path(__file__).with_name("openvino_child.py")


def make(name: str, folder: Path) -> None:
    """The model's base and adapters in `folder`, as far as they are not there. Raises PeerError."""
    how = ["--smollm2"]
    if name in RANDOM:
        layers, hidden = RANDOM[name]
        how = ["--layers", str(layers), "--hidden", str(hidden)]
    output(*python("-m", "tucka_runtime.bench_models", str(folder.absolute()), *how))


def ours() -> StartLine:
    """One server for the base and all adapters, which are TuckA's."""
    return StartLine(
        [
            *python("-m", "tucka_runtime.cli.main", "serve", "--port", "{port}"),
            *("--model", "base", "--served-model-name", "base", "--max-model-len", str(CONTEXT)),
            *("--max-num-seqs", str(SEQUENCES), "--kv-cache-tokens", str(KV_TOKENS)),
            *("--engine-timeout", "600"),  # it is stopped while others are asked
            *(f"--adapter={kind}-{i}=tucka-{kind}-{i}" for kind in KINDS for i in range(ADAPTERS)),
        ]
    )


def kernels(server: ProcessGroup) -> str:
    """Which ones our server says that it runs: without the native ones the figures are not what it can do."""
    found = re.search(r"\bkernels: (.+)", server.log.read_text(errors="replace"))
    return found[1].strip() if found else "unknown"


def vllm(interpreter: Path, lora: bool) -> StartLine:
    """As its documentation asks on a CPU: all cores bound, tcmalloc and libiomp5 preloaded. torch.compile is its
    default; with LoRA it compiles nothing, so the base has a server without. One slot more than adapters: with as many
    the base is answered with the last one's (docs/loadtest.md)."""
    words = [
        *(str(interpreter), "-m", "vllm.entrypoints.cli.main", "serve", "base", "--served-model-name", "base"),
        *("--host", "127.0.0.1", "--port", "{port}", "--dtype", "bfloat16", "--max-model-len", str(CONTEXT)),
        *("--max-num-seqs", str(SEQUENCES)),
    ]
    if lora:
        slots = str(len(KINDS) * ADAPTERS + 1)
        words += ["--enable-lora", "--max-lora-rank", "16", "--max-loras", slots, "--max-cpu-loras", slots]
        words += ["--lora-modules", *(f"{kind}-{i}=lora-{kind}-{i}" for kind in KINDS for i in range(ADAPTERS))]
    cores = sorted(os.sched_getaffinity(0))
    environment = {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "LD_PRELOAD": ":".join(map(str, preloads(interpreter))),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    return StartLine(words, environment)


def preloads(interpreter: Path) -> list[Path]:
    """tcmalloc of the system and libiomp5 of the interpreter's environment. Raises PeerError: without them vLLM is not
    at its best."""
    iomp = interpreter.parent.parent / "lib" / "libiomp5.so"
    found = [path for path in TCMALLOC if path.exists()][:1] + [path for path in (iomp,) if path.exists()]
    if len(found) < 2:
        raise PeerError(
            f"vLLM asks for tcmalloc and libiomp5, and of {TCMALLOC[0].name} and {iomp} only {len(found)} are there: "
            "install Debian's libtcmalloc-minimal4, and intel-openmp beside vLLM"
        )
    return found


def versions(interpreter: Path, packages: Sequence[str]) -> dict[str, str]:
    """Of packages that the interpreter has. Raises PeerError if one is not there."""
    asked = f"import importlib.metadata as m, json; print(json.dumps({{p: m.version(p) for p in {list(packages)!r}}}))"
    found: dict[str, str] = json.loads(output(str(interpreter), "-c", asked))
    return found


def adapted(kind: str, count: int) -> str:
    """What the case of an engine alone is called in the result."""
    return f"{kind}, {count}"


def bench(name: str, at_once: int, prompt: int, new: int) -> dict[str, float]:
    """Our engine alone and the floors: tokens per second by case, of one round after one that warms up."""
    layers, hidden = RANDOM[name]
    found: dict[str, float] = {}
    for kind in KINDS:
        words = ["-m", "tucka_runtime.bench", "--json", "--rounds", "1", "--adapters", f"1,{ADAPTERS}"]
        words += ["--layers", str(layers), "--hidden", str(hidden), "--targets", TARGETS[kind]]
        words += ["--concurrency", str(at_once), "--prompt", str(prompt), "--new", str(new)]
        speeds: dict[str, float] = json.loads(output(*python(*words)))["tokens_per_second"]
        own = {adapted(kind, count): speeds.pop(name) for count, name in COUNTS.items()}
        found = speeds | found | own
    return found


def export(interpreter: Path, folder: Path) -> None:
    """The base as OpenVINO reads it, in `folder/openvino`, once. Raises PeerError."""
    made, begun = folder / "openvino", folder / "openvino.part"
    if not made.exists():
        tool = str(interpreter.parent / "optimum-cli")
        task = ("--task", "text-generation-with-past", "--weight-format", "fp16")
        output(tool, "export", "openvino", "--model", str(folder / "base"), *task, str(begun))
        begun.rename(made)


def openvino(interpreter: Path) -> StartLine:
    return StartLine([str(interpreter), "-P", str(CHILD), "openvino"])


class Child:
    """OpenVINO GenAI in its process. Raises PeerError when that ends."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group
        self.about: dict[str, Any] = self._read()

    def speeds(self, at_once: int, prompt: int, new: int) -> dict[str, float]:
        """As `bench`, of LoRAs: tokens per second by case."""
        found = {BASE: self.speed(at_once, prompt, new)}
        for kind in KINDS:
            for count in COUNTS:
                names = [f"lora-{kind}-{i}" for i in range(count)]
                found[adapted(kind, count)] = self.speed(at_once, prompt, new, names)
        return found

    def speed(self, at_once: int, prompt: int, new: int, adapters: Sequence[str] = ()) -> float:
        """Tokens per second of so many answers at once; of several adapters one after another."""
        stdin = self.group.process.stdin
        assert stdin is not None
        try:
            asked = {"sequences": at_once, "prompt": prompt, "new": new, "adapters": list(adapters)}
            stdin.write(json.dumps(asked) + "\n")
            stdin.flush()
        except OSError:
            raise PeerError(f"it ended: {self.group.last_words()}") from None
        answer = self._read()
        if answer["tokens"] != at_once * new:
            raise PeerError(f"it made {answer['tokens']} tokens where {at_once * new} were asked")
        return float(answer["tokens"] / answer["seconds"])

    def _read(self) -> dict[str, Any]:
        assert self.group.process.stdout is not None
        line = self.group.process.stdout.readline()
        if not line:
            time.sleep(0.5)  # its last words may still be on their way to the log
            raise PeerError(f"it ended: {self.group.last_words()}")
        found: dict[str, Any] = json.loads(line)
        return found
