"""litellm's proxy before the server."""

import secrets
import tempfile
from pathlib import Path

from checks import URL
from proxied import check_through, free_port, lists_models, started

NAMES = ("base", "formats", "words")
models = "".join(
    f"  - model_name: {name}\n    litellm_params: {{model: hosted_vllm/{name}, api_base: '{URL}/v1', api_key: none}}\n"
    for name in NAMES
)
port, key = free_port(), f"sk-{secrets.token_hex(24)}"
with tempfile.TemporaryDirectory() as folder:
    config = Path(folder) / "config.yaml"
    config.write_text(f"general_settings: {{master_key: {key}}}\nmodel_list:\n{models}")
    words = ["litellm", "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
    with started(words, f"http://127.0.0.1:{port}/health/liveliness", LITELLM_LOCAL_MODEL_COST_MAP="True"):
        lists_models(f"http://127.0.0.1:{port}", key)
        check_through(f"http://127.0.0.1:{port}", key)
