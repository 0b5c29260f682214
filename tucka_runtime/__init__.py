"""TuckA runtime: one base model, many adapters, every request picks its own.

`tucka serve` serves them over HTTP; `LLM` is the same engine in this process, offline. `kernels/`, `server/` and
`loadtest/` of the repository are installed as `tucka_runtime.kernels`, `.server` and `.loadtest`: a top-level package
named `kernels` would break Hugging Face's package of that name. In a checkout that is not installed they are found
where they lie.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tucka_runtime.errors import AdapterError, ConfigError, InvalidRequestError, ModelLoadError, TuckaError
from tucka_runtime.messages import Route, RouteScope, SamplingParams

if TYPE_CHECKING:
    from tucka_runtime.llm import LLM

__version__ = "0.1.0"

if not (Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(Path(__file__).parents[1]))

__all__ = [
    "LLM",
    "AdapterError",
    "ConfigError",
    "InvalidRequestError",
    "ModelLoadError",
    "Route",
    "RouteScope",
    "SamplingParams",
    "TuckaError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    """`LLM` brings torch along, which the API's process and the command line do without."""
    if name == "LLM":
        from tucka_runtime.llm import LLM

        return LLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
