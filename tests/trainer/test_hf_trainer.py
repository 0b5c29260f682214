"""Hugging Face `Trainer` as anyone would use it: kinds of models, mixed precision, checkpoints of both sorts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import (
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    SwinConfig,
    SwinForImageClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from tucka_runtime.trainer import TuckAConfig, routers

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TEXT: dict[str, Any] = {**SIZES, "vocab_size": 64, "pad_token_id": 0}


def causal(**more: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**TEXT, **more))


def llama_classifier() -> LlamaForSequenceClassification:
    return LlamaForSequenceClassification(LlamaConfig(**TEXT, num_labels=3))


def deberta() -> DebertaV2ForSequenceClassification:
    """As DeBERTa-v3: its query projection also sees the embeddings of relative positions, in the same forward."""
    config = DebertaV2Config(
        **TEXT, num_labels=3, relative_attention=True, position_buckets=8, pos_att_type=["p2c", "c2p"],
        share_att_key=True, norm_rel_ebd="layer_norm", type_vocab_size=0,
    )  # fmt: skip
    return DebertaV2ForSequenceClassification(config)


def vit() -> ViTForImageClassification:
    return ViTForImageClassification(ViTConfig(**SIZES, image_size=8, patch_size=4, num_labels=3))


def swin() -> SwinForImageClassification:
    """Checkpoints whole stages and, within them, layers again."""
    config = SwinConfig(
        image_size=16, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=2, num_labels=3
    )
    return SwinForImageClassification(config)


def text(lm: bool) -> list[dict[str, Any]]:
    """Every second record ends in padding, the first one too."""
    make = torch.Generator().manual_seed(0)
    out = []
    for i in range(32):
        first = int(torch.randint(3, 64, (1,), generator=make))
        ids, mask = torch.full((6,), first), torch.ones(6, dtype=torch.int64)
        if i % 2 == 0:
            ids[4:], mask[4:] = 0, 0
        labels = ids.where(mask.bool(), -100) if lm else first % 3
        out.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return out


def images(size: int) -> list[dict[str, Any]]:
    make = torch.Generator().manual_seed(0)
    return [
        {"pixel_values": torch.randn(3, size, size, generator=make) + i % 3 - 1, "labels": i % 3} for i in range(32)
    ]


# model, data, PEFT's task type, target modules (None: TuckA's default for the model), modules to save
KINDS: dict[str, tuple[Any, list[dict[str, Any]], str | None, Any, list[str] | None]] = {
    "causal": (causal, text(True), "CAUSAL_LM", "all-linear", ["lm_head"]),
    "llama_classifier": (llama_classifier, text(False), "SEQ_CLS", None, None),  # PEFT saves its head by itself
    "deberta": (deberta, text(False), "SEQ_CLS", None, ["pooler", "classifier"]),
    "vit": (vit, images(8), None, None, ["classifier"]),
    "swin": (swin, images(16), None, ["q_proj", "v_proj", "fc1"], ["classifier"]),
}


def fresh(kind: str, **config: Any) -> Any:
    make, _, task, targets, save = KINDS[kind]
    torch.manual_seed(0)
    fields = {"r": 4, "k": 2, "t": 2, "p": 2, "alpha": 32, "target_modules": targets, "modules_to_save": save}
    return get_peft_model(make(), TuckAConfig(**{**fields, **config}, task_type=task))


def trainer(kind: str, folder: Path, **settings: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder), **{"max_steps": 8, **settings}, per_device_train_batch_size=8, learning_rate=1e-2,
        logging_steps=2, report_to=[], disable_tqdm=True, use_cpu=True, remove_unused_columns=False,
    )  # fmt: skip
    return Trainer(model=fresh(kind), args=arguments, train_dataset=KINDS[kind][1])


def losses(done: Trainer) -> list[float]:
    return [entry["loss"] for entry in done.state.log_history if "loss" in entry]


def plain(done: Trainer) -> Any:
    """The trained model without the wrapper of mixed precision."""
    return done.accelerator.unwrap_model(done.model, keep_fp32_wrapper=False).eval()


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_kind_of_model(kind: str, tmp_path: Path) -> None:
    """In bf16: the loss falls, gradient checkpointing changes nothing, and what is saved is what was trained."""
    seen = []
    for checkpointing in (False, True):
        done = trainer(kind, tmp_path, bf16=True, gradient_checkpointing=checkpointing, save_strategy="no")
        done.train()
        seen.append(losses(done))
    assert seen[0] == seen[1]
    assert seen[0][-1] < 0.97 * seen[0][0]
    done.save_model()
    model = plain(done)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(KINDS[kind][0](), str(tmp_path)).eval()
    batch = done.data_collator(KINDS[kind][1][:4])
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)


def test_the_trainers_own_checkpoint_resumes_exactly(tmp_path: Path) -> None:
    done = trainer("deberta", tmp_path, save_steps=4)  # with dropout
    done.train()
    resumed = trainer("deberta", tmp_path, save_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    for p, q in zip(plain(done).parameters(), plain(resumed).parameters(), strict=True):
        assert torch.equal(p, q)


def gradients(model: Any, checkpointing: bool, work: Any, reentrant: bool = False) -> dict[str, torch.Tensor]:
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    torch.manual_seed(5)
    work(model).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def one(model: Any) -> torch.Tensor:
    """The first forward: it sets the centroids from a batch with padding, and moves the balancing bias."""
    batch = {name: torch.stack([row[name] for row in text(True)[:4]]) for name in ("input_ids", "attention_mask")}
    return model(**batch, labels=batch["input_ids"]).loss


def two(model: Any) -> torch.Tensor:
    """Two forwards under one backward, then one without the adapter, as for a preference loss with a reference."""
    other = torch.randint(3, 64, (3, 9), generator=torch.Generator().manual_seed(1))
    loss = one(model)
    first = routers(model)["default"].route
    loss = loss + 2 * model(input_ids=other, labels=other).loss
    second = routers(model)["default"].route
    assert first is not None and second is not None and not torch.equal(first.weights, second.weights)
    with torch.no_grad(), model.disable_adapter():
        model(input_ids=other)
    return loss


@pytest.mark.parametrize("work", [one, two])
def test_gradient_checkpointing_keeps_every_forwards_route(work: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "causal", (lambda: causal(attention_dropout=0.3), *KINDS["causal"][1:]))
    want, got = (gradients(fresh("causal", use_alb=True, alb_gamma=0.5), c, work) for c in (False, True))
    for name, gradient in want.items():  # dropout alone makes LoRA's differ in the sixth digit here
        assert (got[name] - gradient).norm() <= 1e-3 * gradient.norm(), name


def test_reentrant_checkpointing_is_refused() -> None:
    """It would train the centroids by a part of their gradient."""
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        gradients(fresh("causal"), True, one, reentrant=True)


def test_relative_positions_do_not_route() -> None:
    model = fresh("deberta").eval()
    seen: list[torch.Tensor] = []
    module = model.get_submodule(f"base_model.model.{routers(model)['default'].module}")
    module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    ids = torch.tensor([[5, 6, 7, 0]])
    with torch.no_grad():
        model(input_ids=ids, attention_mask=(ids > 0).long())
        assert len(seen) == 2 and seen[1].shape[1] != 4
        found = routers(model)["default"]
        from_tokens = found.route
        found.end()
        found.compute(seen[0][:, :3], module.tucka_ec["default"], None, False)
    assert from_tokens is not None and found.route is not None
    torch.testing.assert_close(found.route.weights, from_tokens.weights)


def test_routes_are_fp32_under_autocast() -> None:
    model = fresh("causal", ec_perturb_scale=0.02).eval()
    ids = torch.arange(3, 19).view(2, 8)
    weights = []
    with torch.no_grad():
        model(input_ids=ids)
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                model(input_ids=ids)
            weights.append(routers(model)["default"].route.weights)
    assert torch.equal(*weights)
