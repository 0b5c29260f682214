"""The optional parts of the installation (pyproject.toml's extras), what they are for, and how to get them."""

import importlib.util

EXTRAS = {
    "train": ("peft", "tucka train"),
    "loadtest": ("aiohttp", "tucka loadtest"),
    "otel": ("opentelemetry.exporter.otlp.proto.http", "traces: tucka serve --otlp-traces-endpoint"),
}
"""By name: the module that shows whether the extra is there, and what needs it."""


def installed(extra: str) -> bool:
    try:
        return importlib.util.find_spec(EXTRAS[extra][0]) is not None
    except ModuleNotFoundError:  # of a package above it
        return False


def how_to_install(extra: str) -> str:
    """The package comes from the checkout, so its extras do too."""
    return f"in the checkout run `sh deploy/install.sh {extra}`, or `pip install -e '.[{extra}]'` in your environment"
