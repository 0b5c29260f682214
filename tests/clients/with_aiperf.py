"""aiperf: synthetic prompts over base and adapter, streamed. HF_HUB_OFFLINE keeps it from tokenizers in folders."""

import json
import tempfile
from pathlib import Path

from checks import BASE, URL, check, command, same

for kind in ("chat", "completions"):

    @check(f"profile: 12 requests by {kind}, streamed, base and an adapter in turn")
    def _(kind: str = kind) -> None:
        with tempfile.TemporaryDirectory() as folder:
            command(
                "aiperf", "profile", "--model", "base,formats", "--model-selection-strategy", "round_robin",
                "--url", URL, "--endpoint-type", kind, "--streaming", "--tokenizer", BASE, "--concurrency", "3",
                "--request-count", "12", "--synthetic-input-tokens-mean", "24", "--output-tokens-mean", "12",
                "--extra-inputs", "ignore_eos:true", "--artifact-dir", folder, "--ui", "none",
                folder=Path(folder),
            )  # fmt: skip
            (found,) = Path(folder).rglob("profile_export_aiperf.json")
            figures = json.loads(found.read_text())
        same(figures["request_count"]["avg"], 12.0)
        same(figures["output_sequence_length"]["avg"], 12.0)
        assert not figures.get("error_request_count", {}).get("avg")
