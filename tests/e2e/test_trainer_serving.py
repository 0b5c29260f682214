"""From the data to the answers: `tucka train` publishes to a running server, which then says what training measured."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tucka_runtime.cli import train as cli
from tucka_runtime.tokenizer import Tokenizer
from tucka_runtime.trainer import set_route_scope
from tucka_runtime.trainer.data import Example, load
from tucka_runtime.trainer.experiments.base import build_model, build_tokenizer, save_base
from tucka_runtime.trainer.records import read

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "tie_word_embeddings": False, "initializer_range": 0.1,
}  # fmt: skip
ROUTED = {"request": "mixed", "prefix": "prefix", "batch": "mixed"}
TOKENIZER = build_tokenizer()


@dataclass
class Place:
    """A base, records with a held-out part, and a server of that base which may load what is below `folder`."""

    folder: Path
    url: str

    def train(self, name: str, *flags: str) -> dict[str, Any]:
        """`tucka train --publish`; returns training.json."""
        parser = argparse.ArgumentParser()
        cli.add_arguments(parser)
        names = {"--model": "base", "--data": "data.jsonl", "--eval-data": "held.jsonl", "--out": name}
        paths = [part for flag, file in names.items() for part in (flag, str(self.folder / file))]
        more = ("--batch-size", "8", "--r", "4", "--lr", "1e-2", "--publish", self.url)
        assert cli.run(parser.parse_args([*paths, *more, *flags])) == 0
        return json.loads((self.folder / name / "training.json").read_text())

    def ask(self, **fields: Any) -> dict[str, Any]:
        body = {"temperature": 0, "max_tokens": 4, **fields}
        answer = httpx.post(f"{self.url}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]

    def held(self) -> list[Example]:
        return load(read(self.folder / "held.jsonl"), Tokenizer(TOKENIZER), 64)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("serving")
    torch.manual_seed(0)
    save_base(build_model(**SIZES), TOKENIZER, folder / "base")
    for file, numbers in (("data", range(0, 40)), ("held", range(40, 60))):
        with (folder / f"{file}.jsonl").open("w") as lines:
            for i in numbers:
                prompt, answer = (f"number {i}:", "11") if i % 2 else (f"letter {i * 7}:", "ab")
                lines.write(json.dumps({"prompt": prompt, "completion": answer, "task": "ab"[i % 2]}) + "\n")
    command = (
        "-m", "tucka_runtime.cli.main", "serve", "--model", str(folder / "base"), "--port", "0", "--device", "cpu",
        "--num-threads", "1", "--kv-cache-tokens", "8192", "--adapter-root", str(folder), "--max-logprobs", "264",
    )  # fmt: skip
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, *command], stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
    deadline = time.monotonic() + 120
    while "ready at " not in (said := (folder / "log").read_text()):
        assert server.poll() is None and time.monotonic() < deadline, f"the server did not start:\n{said}"
        time.sleep(0.1)
    yield Place(folder, said.split("ready at ")[1].split(". Try")[0])
    server.send_signal(signal.SIGINT)
    assert server.wait(30) == 0


@pytest.mark.parametrize(
    ("name", "steps", "flags"),
    [
        ("tucka", 40, ()),
        ("prefix", 20, ("--route-batch", "prefix", "--route-prefix-tokens", "4")),
        ("lora", 12, ("--method", "lora")),
    ],
)
def test_published_adapter_answers_with_the_measured_accuracy(
    place: Place, name: str, steps: int, flags: tuple[str, ...]
) -> None:
    training = place.train(name, "--steps", str(steps), *flags)
    right = []
    for example in place.held():
        prompt, answer = (
            TOKENIZER.decode(list(ids)) for ids in (example.ids[: example.start], example.ids[example.start : -1])
        )
        said = place.ask(model=name, prompt=prompt)  # routed as training.json says, a route a request
        right.append(said["text"] == answer and said["finish_reason"] == "stop")
    assert sum(right) / len(right) == training["eval"]["exact_match"]
    assert 0 < sum(right) < len(right), "the figures must be able to differ"


@pytest.mark.parametrize("scope", ["request", "prefix", "batch"])
def test_server_and_plain_peft_agree(place: Place, scope: str) -> None:
    """Log-probabilities of the whole vocabulary over HTTP against the logits of `PeftModel.from_pretrained`."""
    name = f"agree-{scope}"
    place.train(name, "--steps", "6", "--route-prefix-tokens", "4", "--route-batch", ROUTED[scope])
    base = AutoModelForCausalLM.from_pretrained(place.folder / "base")
    model = PeftModel.from_pretrained(base, str(place.folder / name)).eval()
    set_route_scope(model, scope, prefix_tokens=4)
    for example in place.held()[:3]:
        prompt = list(example.ids[: example.start])
        said = place.ask(
            model=name, prompt=prompt, route=scope, echo=True, logprobs=264, return_tokens_as_token_ids=True,
            max_tokens=1,
        )  # fmt: skip
        rows = said["logprobs"]["top_logprobs"]
        assert rows[0] is None and len(rows) == len(prompt) + 1
        served = torch.tensor([[row[f"token_id:{i}"] for i in range(264)] for row in rows[1:]])
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([prompt])).logits[0].log_softmax(-1)
        torch.testing.assert_close(served, expected, atol=1e-5, rtol=0)
