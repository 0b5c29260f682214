"""sglang-router in front of the server. It answers /v1/models itself, with `unknown`: that is not checked."""

import sys

from checks import URL
from proxied import check_through, free_port, started

port, figures = free_port(), free_port()
words = [
    sys.executable, "-m", "sglang_router.launch_router", "--host", "127.0.0.1", "--port", str(port),
    "--worker-urls", URL, "--prometheus-port", str(figures),
]  # fmt: skip
with started(words, f"http://127.0.0.1:{port}/v1/models"):
    check_through(f"http://127.0.0.1:{port}")
