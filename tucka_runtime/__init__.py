"""TuckA runtime: one base model, many adapters, every request picks its own.

`kernels/`, `server/` and `loadtest/` of the repository are installed as `tucka_runtime.kernels`, `.server` and
`.loadtest`: a top-level package named `kernels` would break Hugging Face's package of that name.
"""

__version__ = "0.1.0"
