"""vllm-router in front of the server."""

from checks import URL
from proxied import check_through, free_port, lists_models, started

port, figures = free_port(), free_port()
words = [
    "vllm-router", "--host", "127.0.0.1", "--port", str(port), "--worker-urls", URL, "--prometheus-port", str(figures),
]  # fmt: skip
with started(words, f"http://127.0.0.1:{port}/v1/models"):
    lists_models(f"http://127.0.0.1:{port}")
    check_through(f"http://127.0.0.1:{port}")
