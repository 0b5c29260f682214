"""guidellm: synthetic prompts at a fixed concurrency, by completions and by chat."""

import json
import tempfile
from pathlib import Path

from checks import BASE, URL, check, command, same

for api in ("/v1/completions", "/v1/chat/completions"):

    @check(f"run: 12 requests by {api}, streamed, of an adapter")
    def _(api: str = api) -> None:
        with tempfile.TemporaryDirectory() as folder:
            command(
                "guidellm", "run", "--disable-console",
                "--backend", f"kind=openai_http,target={URL},model=formats,request_format={api}",
                "--profile", "kind=concurrent,streams=3", "--constraint", "kind=max_requests,count=12",
                "--tokenizer", f"kind=huggingface_auto,model={BASE}",
                "--data", "kind=synthetic_text,prompt_tokens=24,output_tokens=12",
                "--output", f"kind=json,path={folder}/out.json", folder=Path(folder), HF_HUB_OFFLINE="1",
            )  # fmt: skip
            (run,) = json.loads((Path(folder) / "out.json").read_text())["benchmarks"]
        totals = run["metrics"]["request_totals"]
        same((totals["successful"], totals["errored"]), (12, 0))
        same(run["metrics"]["output_token_count"]["successful"]["mean"], 12.0)
