"""The whole engine on the fused kernels, on a tiny model in fp32: on a GPU, or where there is none in Triton's
interpreter, which runs what a GPU would."""

import pytest
import torch
from driving import ask, build, prompt, run, save_lora, save_model, save_tucka

from tucka_runtime.engine import Engine
from tucka_runtime.sequence import AdapterKey, RouteScope, SamplingParams

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EARLY, LATE, PLAIN = (AdapterKey(name, 1) for name in ("early", "late", "plain"))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
def test_tokens_equal_the_reference_paths(tmp_path, kind):
    """Base, TuckA routed by token and inside the model, LoRA of another rank, mixed in one batch; prefill in chunks."""
    save_model(tmp_path / "model", kind)
    attention = ("c_attn",) if kind == "gpt2" else ("q_proj", "v_proj")
    output = ("c_proj",) if kind == "gpt2" else ("o_proj", "down_proj")

    def answers(fused: bool) -> list[list[int]]:
        engine: Engine = build(
            tmp_path / "model", fused=fused, device=DEVICE, max_num_batched_tokens=24, max_num_seqs=6
        )
        layout = engine.layout
        engine.load_adapter(EARLY, save_tucka(tmp_path / "early", layout, targets=attention))
        engine.load_adapter(LATE, save_tucka(tmp_path / "late", layout, seed=1, targets=output, r=6))
        engine.load_adapter(PLAIN, save_lora(tmp_path / "plain", layout, targets=attention + output, r=18))
        greedy = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
        drawn = SamplingParams(max_tokens=3, temperature=0.9, top_k=20, top_p=0.9, seed=5, ignore_eos=True)
        done = run(
            engine,
            ask(prompt(5), id="base", sampling=drawn),
            ask(prompt(7, 1), id="early", adapter=EARLY, sampling=greedy),
            ask(prompt(3, 2), id="early-request", adapter=EARLY, scope=RouteScope.REQUEST, sampling=drawn),
            ask(prompt(6, 3), id="late", adapter=LATE, sampling=greedy),
            ask(prompt(4, 4), id="plain", adapter=PLAIN, sampling=greedy),
        )
        return [answer.token_ids for sequences in done for answer in sequences]

    assert answers(fused=True) == answers(fused=False)
