"""Makes the folder of a Hugging Face model of a GGUF file, through transformers, in a process of its own.

`base_gguf.gguf_folder` starts `python -m tucka_runtime.models.dequantise PARENT FILE FOLDER DTYPE`. What a GGUF says
and transformers does not read would make another model of it, without a word: so all of its tensors have to arrive, and
what it says of the architecture has to be known, or the file is refused.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from tucka_runtime.base_gguf import SOURCE
from tucka_runtime.children import end_with_parent
from tucka_runtime.errors import ModelLoadError, TuckaError

ARCHITECTURES = ("llama", "qwen2", "qwen3")
FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
WIDTHS = {"float32": 4, "float16": 2, "bfloat16": 2}
READ = frozenset(
    "context_length embedding_length block_count feed_forward_length rope.dimension_count rope.freq_base vocab_size "
    "attention.head_count attention.head_count_kv attention.layer_norm_rms_epsilon".split()
)
"""What transformers reads of an architecture's keys."""
IMPLIED = ("attention.key_length", "attention.value_length")
"""Keys that say again what the shapes of the tensors say: the size of a head."""
ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
"""Tokens that end a text, a turn, or a message: each ends what the model says."""
SPARE_BYTES = 64 * 2**20


class Header:
    """What a GGUF file says of itself. Raises ModelLoadError, and what the package gguf raises of a damaged file."""

    def __init__(self, file: Path):
        from gguf import GGUFReader

        reader = GGUFReader(file)
        self.fields = reader.fields
        self.sizes = {tensor.name: int(tensor.n_elements) for tensor in reader.tensors}
        counts: dict[str, int] = {}
        for tensor in reader.tensors:
            kind = tensor.tensor_type.name
            counts[kind] = counts.get(kind, 0) + int(tensor.n_elements)
        if not counts:
            raise ModelLoadError("it holds no tensors. Give the file with the model's weights.")
        self.type = max(counts, key=lambda kind: counts[kind])
        self.auto = FLOATS.get(self.type, "bfloat16")
        self.architecture = self.get("general.architecture")

    def get(self, key: str) -> Any:
        """A value, None where there is none of that name."""
        field = self.fields.get(key)
        return None if field is None else field.contents()

    def check(self) -> None:
        """Raises ModelLoadError for what would be served as another model than it is."""
        if (self.get("split.count") or 1) > 1:
            raise ModelLoadError(
                "it is one part of several. Join them first: llama-gguf-split --merge FIRST-PART OUT.gguf."
            )
        if self.architecture not in ARCHITECTURES:
            raise ModelLoadError(
                f"its architecture is {self.architecture!r}; supported are {', '.join(ARCHITECTURES)}."
            )
        prefix = f"{self.architecture}."
        for key in (key for key in self.fields if key.startswith(prefix)):
            name, value = key.removeprefix(prefix), self.get(key)
            if name not in (*READ, *IMPLIED) and value not in (0, "none", "", None):
                raise ModelLoadError(
                    f"it says {key} = {value}, which transformers does not read: its answers would be wrong. Give the "
                    "folder of the model that it was made of."
                )


def convert(file: Path, folder: Path, dtype: str) -> None:
    """Fills the folder. `file` is to be alone in its own: transformers looks at what lies beside it. Raises
    ModelLoadError, and whatever the libraries raise of a damaged file."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from tucka_runtime.models.families import FAMILIES

    header = Header(file)
    header.check()
    kind = header.auto if dtype == "auto" else dtype
    _check_disk(folder, sum(header.sizes.values()) * WIDTHS[kind])
    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    FAMILIES[config.model_type](config)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        file.parent, config=config, gguf_file=file.name, dtype=getattr(torch, kind), local_files_only=True,
        ignore_mismatched_sizes=True, quantization_config=GgufConfig(dequantize=True), output_loading_info=True,
    )  # fmt: skip
    model, info = loaded
    _check_all_arrived(header, model, info)
    for saved in (model.config, model.generation_config):
        saved.eos_token_id = _ends(header)
        saved.bos_token_id, saved.pad_token_id = (
            header.get(f"tokenizer.ggml.{name}") for name in ("bos_token_id", "padding_token_id")
        )
    model.save_pretrained(folder)
    if "tokenizer.ggml.tokens" in header.fields:
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    written = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    about = {"type": header.type, "quantised": header.type not in FLOATS, "dtype": kind, "auto": header.auto}
    (folder / SOURCE).write_text(json.dumps(about | {"bytes": written}))


def _check_disk(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed + SPARE_BYTES:
        raise ModelLoadError(
            f"the model takes {needed / 1e6:.0f} MB in {folder.parent}, and {free / 1e6:.0f} MB are free there. Make "
            "room, or let another folder keep it: --state-dir, or XDG_CACHE_HOME."
        )


def _check_all_arrived(header: Header, model: Any, info: Any) -> None:
    """Every tensor of the file is in the model, and every parameter is of the file. Raises ModelLoadError."""
    if missing := sorted(info["missing_keys"]):
        raise ModelLoadError(f"it lacks tensors of the model: {', '.join(missing[:5])}. Is it whole?")
    if info["mismatched_keys"]:
        name, *shapes = min(info["mismatched_keys"])
        stored, made = map(tuple, shapes)
        raise ModelLoadError(
            f"{name} has the shape {stored}, and transformers makes {made} of what the file says. Give the folder "
            "of the model that it was made of."
        )
    read = {parameter.data_ptr(): parameter.numel() for parameter in model.parameters()}
    if len(read) != len(header.sizes) or sum(read.values()) != sum(header.sizes.values()):
        raise ModelLoadError(
            f"transformers read {len(read)} of its {len(header.sizes)} tensors, so its answers would be wrong (Llama "
            "3.1 keeps its rotary factors in one, rope_freqs.weight). Give the folder of the model that it was made of."
        )


def _ends(header: Header) -> int | list[int] | None:
    ids = [header.get(f"tokenizer.ggml.{name}") for name in ENDS]
    found = list(dict.fromkeys(i for i in ids if i is not None))
    return found if len(found) > 1 else found[0] if found else None


def main() -> int:
    """Prints why it comes to nothing, in one line; returns the exit status."""
    parent, file, folder, dtype = sys.argv[1:]
    end_with_parent(int(parent))
    try:
        with tempfile.TemporaryDirectory() as alone:
            link = Path(alone) / "model.gguf"
            link.symlink_to(file)
            convert(link, Path(folder), dtype)
    except TuckaError as error:
        print(error.message)
        return 1
    except OSError as error:
        print(f"{error.filename or folder}: {(error.strerror or str(error)).lower()}.")
        return 1
    except Exception as error:  # gguf's, numpy's and transformers' own: each knows a damaged file by another
        print(f"it cannot be read ({type(error).__name__}: {error}). Is it whole? Compare its size, or fetch it again.")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
