"""The optional parts of the installation (pyproject.toml's extras), what they are for, and how to get them."""

import importlib.util
from dataclasses import dataclass


@dataclass(frozen=True)
class Extra:
    """`modules` are those that show whether the extra is there; `used_by` says what needs it."""

    modules: tuple[str, ...]
    used_by: str


EXTRAS = {
    "train": Extra(("peft", "matplotlib"), "tucka train, tucka eval"),
    "data": Extra(("datasets",), "Parquet files and datasets' folders: tucka train --data"),
    "report": Extra(("tensorboard",), "tucka train --report-to tensorboard"),
    "quant": Extra(("bitsandbytes", "accelerate"), "bases in 4 or 8 bits: tucka train --load-in"),
    "harness": Extra(("lm_eval", "peft"), "tucka eval --tasks"),
    "loadtest": Extra(("aiohttp",), "tucka loadtest, tucka plan --measure"),
    "gguf": Extra(("gguf", "accelerate"), "bases in a GGUF file: --model FILE.gguf"),
    "demo": Extra(("gguf", "accelerate", "peft", "matplotlib"), "python -m tucka_runtime.trainer.experiments.smollm2"),
    "s3": Extra(("s3fs",), "adapters in S3: tucka serve --adapter-source NAME=s3://..."),
    "gs": Extra(("gcsfs",), "adapters in Google Cloud Storage: tucka serve --adapter-source NAME=gs://..."),
    "ray": Extra(("ray.serve",), "many servers: tucka serve --ray"),
    "otel": Extra(("opentelemetry.exporter.otlp.proto.http",), "traces: tucka serve --otlp-traces-endpoint"),
}


def installed(extra: str) -> bool:
    try:
        return all(importlib.util.find_spec(module) is not None for module in EXTRAS[extra].modules)
    except ModuleNotFoundError:  # of a package above it
        return False


def how_to_install(extra: str) -> str:
    """The package comes from the checkout, so its extras do too."""
    return f"in the checkout run `sh deploy/install.sh {extra}`, or `pip install -e '.[{extra}]'` in your environment"
