"""The loop and the command: learning, bit-for-bit resume, early stop, manifest, publishing, LoRA."""

import argparse
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tucka_runtime.errors import ConfigError
from tucka_runtime.trainer import cli
from tucka_runtime.trainer.adapter import AdapterSettings, attach, router_of, seed_all
from tucka_runtime.trainer.base import build_model, build_tokenizer, save_base
from tucka_runtime.trainer.data import encode
from tucka_runtime.trainer.evaluate import evaluate
from tucka_runtime.trainer.loop import Loop, LoopConfig, learning_rate
from tucka_runtime.trainer.model import set_route_scope
from tucka_runtime.trainer.together import decode_together

TOKENIZER = build_tokenizer()
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
CPU = torch.device("cpu")


def base():
    torch.manual_seed(0)
    return build_model(**SMALL, num_key_value_heads=2)


def records(n=24):
    return [
        {"prompt": f"{'number' if i % 2 else 'letter'} {i}:", "completion": "1" if i % 2 else "a", "task": "ab"[i % 2]}
        for i in range(n)
    ]


def examples(n=24):
    return [encode(r, TOKENIZER, 64) for r in records(n)]


def make(config, folder=None, method="tucka"):
    model = attach(base(), AdapterSettings(method=method, r=4, balance=0.01 if method == "tucka" else 0.0), 0)
    seed_all(0)
    return Loop(model, examples(), examples(8), config, pad=0, device=CPU, router=router_of(model), folder=folder)


@pytest.mark.parametrize("route", ["per-sample", "batch", "mixed"])
def test_the_loss_falls(route):
    history = make(LoopConfig(steps=25, batch_size=8, lr=1e-2, route_batch=route)).run()
    assert history.loss[-1] < 0.95 * history.loss[0]  # a random tied head cannot do much better
    assert len(history.load) == 25 and all(sum(load) > 0 for load in history.load)


def test_resume_continues_bit_for_bit(tmp_path):
    config = LoopConfig(steps=9, batch_size=8, accumulate=2, route_batch="mixed", eval_every=3, checkpoint_every=4)
    whole = make(config, tmp_path)
    whole.run()
    (tmp_path / "checkpoint.pt").unlink()
    interrupted = make(config, tmp_path)

    def stop(step, loss, load):
        if step == 7:
            raise KeyboardInterrupt

    interrupted.progress = stop
    with pytest.raises(KeyboardInterrupt):
        interrupted.run()
    resumed = make(config, tmp_path)
    resumed.resume(tmp_path / "checkpoint.pt")
    assert resumed.step == 4
    resumed.run()
    assert resumed.history == whole.history
    for (name, p), (_, q) in zip(resumed.parameters, whole.parameters, strict=True):
        assert torch.equal(p, q), name


def test_resume_with_other_settings_is_refused(tmp_path):
    make(LoopConfig(steps=2, batch_size=8, checkpoint_every=1), tmp_path).run()
    with pytest.raises(ConfigError, match="lr"):
        make(LoopConfig(steps=2, batch_size=8, checkpoint_every=1, lr=1e-5)).resume(tmp_path / "checkpoint.pt")


def test_accumulation_equals_a_larger_batch():
    ends = []
    for batch_size, accumulate in ((8, 1), (4, 2)):
        loop = make(LoopConfig(steps=1, batch_size=batch_size, accumulate=accumulate), method="lora")
        loop.train = examples(8)
        loop.run()
        ends.append(loop.parameters)
    for (_, p), (_, q) in zip(*ends, strict=True):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-3)


def test_early_stop_keeps_the_best_weights():
    loop = make(LoopConfig(steps=60, batch_size=8, lr=0.5, eval_every=2, patience=2))
    history = loop.run()
    assert history.stopped_early and len(history.loss) < 60
    assert loop.evaluate().loss == pytest.approx(history.best, rel=1e-5)


def test_learning_rate_warms_up_and_falls():
    config = LoopConfig(steps=100, lr=1.0, warmup=0.1)
    rates = [learning_rate(config, s) for s in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[10] == 1.0 and rates[-1] < 0.01


@pytest.mark.parametrize("fields", [{"steps": 0}, {"steps": 1, "lr": 0}, {"steps": 1, "patience": 2}])
def test_bad_loop_settings_are_refused(fields):
    with pytest.raises(ConfigError):
        LoopConfig(**fields)


def test_teacher_forcing_agrees_with_decoding():
    """Exact match without generating is what greedy decoding gives, alone under the batch scope."""
    loop = make(LoopConfig(steps=25, batch_size=8, lr=1e-2, route_batch="mixed"))
    loop.run()
    model = loop.model.eval()
    set_route_scope(model, "batch")
    said = [decode_together(model, [list(e.ids[: e.start])], 2, 0, limit=8)[0] for e in loop.held]
    exact = sum(tuple(s) == e.ids[e.start : -1] for s, e in zip(said, loop.held, strict=True)) / len(said)
    set_route_scope(model, "decode")
    assert evaluate(model, loop.held, 0, CPU, router=loop.router).exact == exact
    assert exact > 0


@pytest.fixture
def workplace(tmp_path):
    save_base(base(), TOKENIZER, tmp_path / "base")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records()))
    return tmp_path


def train(folder, *flags):
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    required = ["--model", str(folder / "base"), "--data", str(folder / "data.jsonl"), "--out", str(folder / "out")]
    return cli.run(parser.parse_args([*required, "--batch-size", "8", "--r", "4", *flags]))


@pytest.mark.parametrize("method", ["tucka", "lora"])
def test_command_writes_an_adapter_that_loads(workplace, method, capsys):
    assert train(workplace, "--method", method, "--steps", "4") == 0
    out = workplace / "out"
    assert {p.name for p in out.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "training.json", "training.png",
    }  # fmt: skip
    training = json.loads((out / "training.json").read_text())
    assert training["data"]["train"] == 22 and training["data"]["held_out"] == 2
    assert len(training["base_fingerprint"]) == 64
    assert str(workplace) not in (out / "adapter_config.json").read_text() + (out / "training.json").read_text()
    assert "exact match" in capsys.readouterr().out
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(workplace / "base"), str(out))
    assert model(input_ids=torch.tensor([[5, 6]])).logits.isfinite().all()


def test_command_is_deterministic(workplace):
    weights = []
    for _ in range(2):
        train(workplace, "--steps", "3")
        weights.append((workplace / "out/adapter_model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_command_says_what_is_wrong(workplace, capsys):
    (workplace / "data.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    assert train(workplace) == 2
    assert "line 2: 'completion'" in capsys.readouterr().err
    assert not (workplace / "out").exists()
    assert train(workplace / "elsewhere") == 2
    assert "config.json" in capsys.readouterr().err


def test_publish_loads_the_adapter_into_a_server(workplace, capsys):
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.path, body, self.headers["Authorization"]))
            self.send_response(200 if len(seen) == 1 else 409)
            self.end_headers()
            self.wfile.write(b"taken")

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    flags = ("--steps", "1", "--publish", f"http://127.0.0.1:{server.server_port}", "--api-key", "k")
    assert train(workplace, *flags) == 0
    path, body, key = seen[0]
    assert path == "/v1/load_lora_adapter" and key == "Bearer k"
    assert body == {"lora_name": "out", "lora_path": str((workplace / "out").resolve())}
    assert train(workplace, *flags, "--name", "again") == 2
    assert "refused it (409): taken" in capsys.readouterr().err
    server.shutdown()
    assert train(workplace, "--steps", "1", "--publish", "http://127.0.0.1:9") == 2
