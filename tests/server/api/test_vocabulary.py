"""An adapter with tokens that its base does not have, over a socket."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from tests.support import GOLDEN
from tests.support.servers import Server

BASE = "llama-tiny"
VOCAB, GROWN = 320, 324
IDS = [5, VOCAB + 1, 9, VOCAB + 3, 40]


def resized() -> Any:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / "bases" / BASE, dtype=torch.float32)
    model.resize_token_embeddings(GROWN)
    return model


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, roots: Path, live: Server) -> Path:
    """`grown` of the server, whose answers are of what was added."""
    model = resized()
    own = torch.Generator().manual_seed(3)
    peft = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for table in (model.get_input_embeddings(), model.get_output_embeddings()):
            table.weight[VOCAB:] = 0.6 * torch.randn(GROWN - VOCAB, table.weight.shape[1], generator=own)
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=own))
    peft.save_pretrained(roots / "grown", save_embedding_layers=True)
    live.post("/v1/adapters", {"name": "grown", "path": "grown"}).raise_for_status()
    return roots / "grown"


def ask(server: Server, **fields: Any) -> dict[str, Any]:
    body = {"model": "grown", "prompt": IDS, "max_tokens": 8, "temperature": 0, "ignore_eos": True} | fields
    return server.post("/v1/completions", body | {"return_token_ids": True}).raise_for_status().json()["choices"][0]


def test_its_answers_are_those_of_peft(live: Server, adapter: Path) -> None:
    choice = ask(live, logprobs=5, prompt_logprobs=0)
    answer = choice["token_ids"]
    assert max(answer) >= VOCAB
    peft = PeftModel.from_pretrained(resized(), adapter)
    with torch.inference_mode():
        theirs = peft(torch.tensor([IDS + answer[:-1]])).logits[0].log_softmax(-1)
    assert answer == theirs[len(IDS) - 1 :].argmax(-1).tolist()
    best = theirs.max(-1).values[len(IDS) - 1 :]
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(best.tolist(), abs=1e-3)
    scored = [entry[str(token)]["logprob"] for entry, token in zip(choice["prompt_logprobs"][1:], IDS[1:], strict=True)]
    assert scored == pytest.approx([float(row[t]) for row, t in zip(theirs, IDS[1:], strict=False)], abs=1e-3)


def test_the_ids_are_its_own(live: Server, adapter: Path) -> None:
    """Everybody else, and every id past them, gets the error that it got before."""
    fields = ({"prompt": [5, VOCAB]}, {"logit_bias": {str(VOCAB): 1}}, {"stop_token_ids": [VOCAB]},
              {"allowed_token_ids": [VOCAB, 5]})  # fmt: skip
    for own in fields:
        body = {"prompt": [5], "max_tokens": 2} | own
        assert live.post("/v1/completions", body | {"model": "grown"}).status_code == 200, own
        for model in (BASE, "one"):
            refused = live.post("/v1/completions", body | {"model": model})
            assert refused.status_code == 400 and f"0 to {VOCAB - 1}" in refused.json()["error"]["message"], own
    refused = live.post("/v1/completions", {"model": "grown", "prompt": [GROWN], "max_tokens": 1})
    assert refused.status_code == 400 and f"0 to {GROWN - 1}" in refused.json()["error"]["message"]
    assert ask(live, logit_bias={str(VOCAB): 100}, max_tokens=2)["token_ids"] == [VOCAB, VOCAB]
    assert live.post("/v1/embeddings", {"model": "grown", "input": [VOCAB, 5]}).status_code == 200
    assert live.post("/v1/embeddings", {"model": BASE, "input": [VOCAB, 5]}).status_code == 400
    spelled = {"model": "grown", "tokens": [VOCAB]}
    assert live.post("/detokenize", spelled).json() == {"prompt": ""}, "nobody knows its text"
    assert live.post("/detokenize", spelled | {"model": BASE}).status_code == 400
    card = live.get("/v1/models/grown").json()
    assert card["tucka"]["vocab_size"] == GROWN and live.get("/v1/models/one").json()["tucka"]["vocab_size"] is None


def test_what_it_is_held_to_is_of_the_bases_tokens(live: Server, adapter: Path) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["yes", "no"]}}}
    choice = ask(live, response_format=schema, max_tokens=16, ignore_eos=False, logit_bias={str(VOCAB): 100})
    assert choice["text"] in ('"yes"', '"no"') and max(choice["token_ids"]) < VOCAB


def test_none_is_combined_and_one_that_is_reloaded_has_its_own_size(live: Server, adapter: Path, roots: Path) -> None:
    mixed = {"model": BASE, "prompt": [5], "adapters": [{"name": "grown", "weight": 0.5}, {"name": "one"}]}
    refused = live.post("/v1/completions", mixed)
    assert refused.status_code == 400 and "Leave that adapter out" in refused.json()["error"]["message"]
    one = str(GOLDEN / "llama-qv-r8k3t3" / "adapter")
    live.post("/v1/adapters", {"name": "grown", "path": one, "load_inplace": True}).raise_for_status()
    assert live.post("/v1/completions", {"model": "grown", "prompt": [VOCAB]}).status_code == 400
    live.post("/v1/adapters", {"name": "grown", "path": "grown", "load_inplace": True}).raise_for_status()
    assert live.post("/v1/completions", {"model": "grown", "prompt": [VOCAB]}).status_code == 200
