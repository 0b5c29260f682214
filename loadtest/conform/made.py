"""Small adapters with visibly different answers, written as PEFT writes them, for a base in a local folder.

Their matrices are random, and as large as the base's own: an adapted linear adds to its output about as much as its
weight gives for an input without structure. So the answers of two such adapters soon differ, on any base. The base's
weights are looked at for their names, shapes and spread alone.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tucka_runtime.errors import ConfigError

RANK = 8
TARGETS = ("q_proj", "v_proj", "o_proj")
GROUPS, EXPERTS, SLICES = 2, 2, 2  # k, t and p of a TuckA adapter
SAMPLE = 65536  # numbers of a weight that its spread is taken from
Tensors = dict[str, np.ndarray]


@dataclass(frozen=True)
class BaseLinear:
    """A weight of the base: its module's path, its sizes and the standard deviation of its numbers."""

    path: str
    d_in: int
    d_out: int
    spread: float


def make(base: Path, folder: Path, count: int, tucka: bool) -> list[Path]:
    """`count` adapters in folders below `folder`; with `tucka` every second one is a TuckA adapter, else all are LoRA.

    Raises ConfigError for a base whose linears are not called as Llama's, and where nothing can be written.
    """
    linears = read_linears(base)
    made = []
    for number in range(1, count + 1):
        kind = "tucka" if tucka and number % 2 == 0 else "lora"
        rng = np.random.default_rng(number)
        write: Callable[[list[BaseLinear], np.random.Generator], tuple[dict[str, object], Tensors]]
        write = tucka_adapter if kind == "tucka" else lora_adapter
        config, tensors = write(linears, rng)
        path = folder / f"{kind}-{number}"
        try:
            path.mkdir(parents=True, exist_ok=True)
            (path / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base.name}))
            save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
            (path / "adapter_model.safetensors").chmod(0o644)  # safetensors writes 0600: the server may be another user
        except OSError as error:
            raise ConfigError(f"--folder: {path} cannot be written: {error.strerror}") from None
        made.append(path)
    return made


def lora_adapter(linears: list[BaseLinear], rng: np.random.Generator) -> tuple[dict[str, object], Tensors]:
    """A of unit variance, B so that B A has the weight's own spread; lora_alpha is the rank, so nothing scales it."""
    tensors = {}
    for linear in linears:
        a = rng.standard_normal((RANK, linear.d_in))
        b = rng.standard_normal((linear.d_out, RANK)) * linear.spread / math.sqrt(RANK)
        tensors[f"base_model.model.{linear.path}.lora_A.weight"] = a.astype(np.float32)
        tensors[f"base_model.model.{linear.path}.lora_B.weight"] = b.astype(np.float32)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": list(TARGETS)}
    return config | {"task_type": "CAUSAL_LM", "bias": "none"}, tensors


def tucka_adapter(linears: list[BaseLinear], rng: np.random.Generator) -> tuple[dict[str, object], Tensors]:
    """Every block is divided by its norm, so that alpha alone says how much is added (docs/architecture.md has the
    formula): for random blocks the change is a share 1 / (r √(p d_in)) of the input."""
    tensors = {}
    for number, linear in enumerate(linears):
        name = f"base_model.model.{linear.path}"
        if number == 0:
            tensors[f"{name}.tucka_ec"] = rng.standard_normal((GROUPS * EXPERTS, linear.d_in)).astype(np.float32)
        tensors[f"{name}.tucka_g"] = rng.standard_normal((GROUPS, SLICES, RANK, RANK)).astype(np.float32)
        tensors[f"{name}.tucka_c"] = rng.standard_normal((EXPERTS, SLICES)).astype(np.float32)
        tensors[f"{name}.tucka_u"] = rng.standard_normal((linear.d_in, RANK)).astype(np.float32)
    alpha = round(2 * RANK * math.sqrt(SLICES * linears[0].d_in))
    config = {"peft_type": "TUCKA", "r": RANK, "k": GROUPS, "t": EXPERTS, "p": SLICES, "alpha": alpha}
    return config | {"task_type": "CAUSAL_LM", "target_modules": list(TARGETS)}, tensors


def read_linears(base: Path) -> list[BaseLinear]:
    """The linears of a base that the adapters adapt, in the order in which they run."""
    found = []
    for file in sorted(base.glob("*.safetensors")):
        found += _of_file(file)
    if not found:
        raise ConfigError(
            f"--base {base} has no safetensors files with linears called {', '.join(TARGETS)}, as Llama, Mistral and "
            "Qwen have them. Give adapters of your own with --adapter."
        )
    layer = {name: place for place, name in enumerate(TARGETS)}
    return sorted(found, key=lambda linear: (int(linear.path.split(".")[2]), layer[linear.path.rpartition(".")[2]]))


def _of_file(file: Path) -> list[BaseLinear]:
    """Reads the header (8 bytes of length, then JSON) and a sample of each weight; numpy has no bfloat16, which is the
    upper half of a float32."""
    found = []
    try:
        with file.open("rb") as data:
            length = int.from_bytes(data.read(8), "little")
            table = json.loads(data.read(length))
            for name, entry in table.items():
                path = name.removesuffix(".weight")
                if path.rpartition(".")[2] not in TARGETS or not path.startswith("model.layers.") or path == name:
                    continue
                data.seek(8 + length + entry["data_offsets"][0])
                width = 4 if entry["dtype"] == "F32" else 2
                raw = data.read(min(SAMPLE * width, entry["data_offsets"][1] - entry["data_offsets"][0]))
                if entry["dtype"] == "BF16":
                    numbers = (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)
                else:
                    numbers = np.frombuffer(raw, {"F32": np.float32, "F16": np.float16}[entry["dtype"]])
                d_out, d_in = entry["shape"]
                found.append(BaseLinear(path, d_in, d_out, float(numbers.astype(np.float32).std())))
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"--base: {file} is no safetensors file with weights in F32, F16 or BF16") from None
    return found
