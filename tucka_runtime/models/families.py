"""The table of decoder families by `model_type`. Adding one is one file and one line here."""

from tucka_runtime.models.architecture import Family
from tucka_runtime.models.gpt2 import gpt2
from tucka_runtime.models.llama import llama
from tucka_runtime.models.mistral import mistral
from tucka_runtime.models.qwen2 import qwen2
from tucka_runtime.models.qwen3 import qwen3

FAMILIES: dict[str, Family] = {
    "gpt2": gpt2,
    "llama": llama,
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
}
