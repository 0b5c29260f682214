"""The recorded training vectors of the official code: gradients, six AdamW steps, the first batch's centroids."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tucka_runtime.trainer import TuckAConfig, centroids, routers, set_route_scope

CASE = "train-llama-qv-r8k3t3"


def _base(golden: Path, case: str):
    folder = golden / case / json.loads((golden / case / "expected.json").read_text())["base"]
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)


def _load(golden: Path, case: str, trainable: bool = False):
    return PeftModel.from_pretrained(_base(golden, case), str(golden / case / "adapter"), is_trainable=trainable)


def _parameter(model, key: str):
    return model.get_parameter(f"{key}.default")


@pytest.fixture
def expected(golden):
    return load_file(golden / CASE / "expected.safetensors")


def _gradients(golden: Path, expected: dict[str, Tensor], dtype: torch.dtype):
    """The model after one backward pass over the recorded batch, its output and its recorded parameters' gradients."""
    model = _load(golden, CASE, trainable=True).train().to(dtype)
    out = model(input_ids=expected["train.input_ids"], labels=expected["train.labels"])
    out.loss.backward()
    keys = [k.removeprefix("grad.") for k in expected if k.startswith("grad.")]
    return model, out, {key: _parameter(model, key).grad for key in keys}


def _relative(ours: Tensor, theirs: Tensor) -> float:
    ours, theirs = ours.double(), theirs.double()
    return float(torch.linalg.vector_norm(ours - theirs) / torch.linalg.vector_norm(theirs))


def test_loss_and_gradients(golden, expected):
    """Gradients of the router and of its module's c are small differences of large sums: in fp32 their relative error
    is up to 3e-5, and which bits differ is the processor's. So the recorded ones are held to float64."""
    model, out, gradients = _gradients(golden, expected, torch.float32)
    torch.testing.assert_close(out.loss.detach().view(1), expected["train.loss"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.logits.detach(), expected["train.logits"], atol=1e-4, rtol=1e-4)
    route = routers(model)["default"].route
    assert route.group.tolist() == expected["train.group"].tolist()
    torch.testing.assert_close(route.weights.detach()[0], expected["train.weights"], atol=1e-6, rtol=1e-6)
    _, _, exact = _gradients(golden, expected, torch.float64)
    assert len(exact) == 25
    for key, gradient in exact.items():
        assert _relative(expected[f"grad.{key}"], gradient) < 5e-5, key
        assert _relative(gradients[key], gradient) < 5e-5, key


def test_adamw_steps(golden, expected):
    steps = json.loads((golden / CASE / "expected.json").read_text())["adamw"]
    model = _load(golden, CASE, trainable=True).train()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=steps["lr"], betas=tuple(steps["betas"]), eps=steps["eps"], weight_decay=steps["weight_decay"],
    )  # fmt: skip
    losses, groups = [], []
    for step in range(steps["steps"]):
        even = step % 2 == 0
        ids = expected["train.input_ids" if even else "train.input_ids_b"]
        loss = model(input_ids=ids, labels=expected["train.labels"] if even else ids).loss
        losses.append(loss.item())
        groups.append(int(routers(model)["default"].route.group))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert groups == expected["adamw.groups"].tolist()
    torch.testing.assert_close(torch.tensor(losses), expected["adamw.losses"], atol=1e-4, rtol=1e-5)
    for key in [k.removeprefix("adamw.final.") for k in expected if k.startswith("adamw.final.")]:
        torch.testing.assert_close(
            _parameter(model, key).detach(), expected[f"adamw.final.{key}"], atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("case", ["scale0", "seeded"])
def test_first_batch_sets_the_centroids(golden, expected, case):
    scale = json.loads((golden / CASE / "expected.json").read_text())["ecinit"]["scales"][case]
    config = TuckAConfig(
        r=8, k=3, t=3, p=2, alpha=16, target_modules=["q_proj", "v_proj"], ec_perturb_scale=scale, task_type="CAUSAL_LM"
    )
    model = get_peft_model(_base(golden, CASE), config).train()
    for key, value in load_file(golden / CASE / "fresh_init.safetensors").items():
        if not key.endswith("tucka_ec"):
            _parameter(model, key).data.copy_(value)
    torch.manual_seed(99)
    loss = model(input_ids=expected["train.input_ids"], labels=expected["train.labels"]).loss
    torch.testing.assert_close(centroids(model, "default"), expected[f"ecinit.{case}.ec"], atol=1e-6, rtol=1e-5)
    if case == "seeded":  # with scale 0 all groups tie
        torch.testing.assert_close(loss.detach().view(1), expected["ecinit.seeded.loss"], atol=1e-4, rtol=1e-5)
        route = routers(model)["default"].route
        assert route.group.tolist() == expected["ecinit.seeded.group"].tolist()
        torch.testing.assert_close(route.weights.detach()[0], expected["ecinit.seeded.weights"], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "case",
    ["gpt2-all-r8k2t2", "gpt2-cattn-r8k3t3", "llama-all7-r4k2t2", "llama-layers13-r8k3t2", "llama-modules-to-save",
     "llama-odown-r6k3t2p3", "llama-odown-r8k1t1", "llama-qv-r16k4t2-a512", "llama-routername", "qwen2-all7-r4k4t2"],
)  # fmt: skip
def test_forward_of_official_files(golden, case):
    model = _load(golden, case).eval()
    want = load_file(golden / case / "expected.safetensors")
    before = centroids(model, "default").clone()
    with torch.no_grad():
        for name in ("single", "batch3", "solo2"):
            out = model(input_ids=want[f"fwd.{name}.input_ids"])
            torch.testing.assert_close(out.logits, want[f"fwd.{name}.logits"], atol=1e-3, rtol=1e-3)
            assert routers(model)["default"].route.group.tolist() == want[f"fwd.{name}.group"].tolist()
    assert torch.equal(before, centroids(model, "default")), "loading must not re-initialise trained centroids"


def test_request_scope_equals_rows_alone(golden):
    case = "llama-qv-r8k3t3"
    model = _load(golden, case).eval()
    want = load_file(golden / case / "expected.safetensors")
    set_route_scope(model, "request")
    with torch.no_grad():
        out = model(input_ids=want["fwd.batch3.input_ids"])
    for row in range(3):
        torch.testing.assert_close(out.logits[row], want[f"fwd.batch3_row{row}.logits"][0], atol=1e-3, rtol=1e-3)


def test_router_that_runs_late_is_refused(golden):
    model = _load(golden, "llama-routername-late-k1").eval()
    with pytest.raises(RuntimeError, match="router_name"):
        model(input_ids=torch.tensor([[5, 6, 7]]))
