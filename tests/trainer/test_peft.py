"""TuckA inside peft: injection, several adapters, saving and loading, families of models."""

import json
import math

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from tucka_runtime.trainer import TuckAConfig, centroids, routers, set_route_scope

IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])


def llama(**overrides):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **{**sizes, **overrides})).eval()


def tucka(**overrides):
    fields = {
        "r": 4,
        "k": 2,
        "t": 2,
        "p": 2,
        "alpha": 16,
        "target_modules": ["q_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
    }
    return TuckAConfig(**{**fields, **overrides})


def logits(model, ids=IDS, **kwargs):
    with torch.no_grad():
        return model(input_ids=ids, **kwargs).logits


def test_save_and_load_give_the_same_logits(tmp_path):
    model = get_peft_model(llama(), tucka()).eval()
    want = logits(model)
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(llama(), str(tmp_path))
    torch.testing.assert_close(logits(again), want, atol=1e-6, rtol=0)
    assert torch.equal(centroids(again, "default"), centroids(model, "default"))


def test_files_are_the_official_format(tmp_path, golden):
    model = get_peft_model(llama(), tucka())
    logits(model)
    model.save_pretrained(str(tmp_path))
    official = json.loads((golden / "llama-qv-r8k3t3/adapter/adapter_config.json").read_text())
    assert json.loads((tmp_path / "adapter_config.json").read_text()).keys() == official.keys()
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    path = "base_model.model.model.layers.0.self_attn.q_proj"
    assert tensors[f"{path}.tucka_ec"].shape == (4, 32)
    assert {k.rsplit(".", 1)[1] for k in tensors} == {"tucka_g", "tucka_c", "tucka_u", "tucka_ec"}
    assert sum(k.endswith("tucka_ec") for k in tensors) == 1


def test_official_file_survives_a_round_trip(tmp_path, golden):
    base = AutoModelForCausalLM.from_pretrained(golden / "bases/llama-tiny")
    PeftModel.from_pretrained(base, str(golden / "llama-modules-to-save/adapter")).save_pretrained(str(tmp_path))
    before = load_file(golden / "llama-modules-to-save/adapter/adapter_model.safetensors")
    after = load_file(tmp_path / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_several_adapters_switch_disable_and_delete():
    model = get_peft_model(llama(), tucka()).eval()
    base = logits(llama())
    first = logits(model)
    model.add_adapter("second", tucka(k=3, r=2, target_modules=["k_proj", "v_proj"]))
    torch.testing.assert_close(logits(model), first)
    model.set_adapter("second")
    second = logits(model)
    assert not torch.allclose(second, first)
    assert routers(model)["second"].module == "model.layers.0.self_attn.k_proj"
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), base)
    torch.testing.assert_close(logits(model), second)
    model.set_adapter("default")
    torch.testing.assert_close(logits(model), first)
    model.delete_adapter("second")
    assert list(routers(model)) == ["default"]
    torch.testing.assert_close(logits(model.unload()), base)


def test_only_the_adapter_is_trained():
    model = get_peft_model(llama(), tucka(modules_to_save=["lm_head"]))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if "tucka_" in n or "modules_to_save" in n}
    r, k, t, p, d = 4, 2, 2, 2, 32
    count = sum(p.numel() for n, p in model.named_parameters() if "tucka_" in n)
    assert count == 4 * (k * p * r * r + t * p + d * r) + k * t * d


def test_all_linear_takes_every_layer_but_the_head():
    model = get_peft_model(llama(), tucka(target_modules="all-linear"))
    assert len(model.base_model.targeted_module_names) == 14
    assert routers(model)["default"].module == "model.layers.0.self_attn.q_proj"


def test_padding_does_not_change_the_route():
    model = get_peft_model(llama(), tucka()).eval()
    logits(model)
    ids = torch.tensor([[3, 4, 5, 6], [0, 0, 9, 10]])
    logits(model, ids, attention_mask=torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]]))
    padded = routers(model)["default"].route.weights
    logits(model, torch.tensor([[3, 4, 5, 6, 9, 10]]))
    torch.testing.assert_close(routers(model)["default"].route.weights, padded)


@pytest.mark.parametrize("scope", ["request", "prefix"])
def test_a_requests_own_route_is_kept_while_decoding(scope):
    model = get_peft_model(llama(), tucka(ec_perturb_scale=5)).eval()
    logits(model)
    set_route_scope(model, scope, prefix_tokens=2)
    both = model.generate(input_ids=IDS, max_new_tokens=6, do_sample=False)
    for row in range(2):
        alone = model.generate(input_ids=IDS[row : row + 1], max_new_tokens=6, do_sample=False)
        assert alone.tolist() == both[row : row + 1].tolist()


@pytest.mark.parametrize("count", [1, 3, 9])
def test_prefix_scope_is_request_scope_of_the_first_tokens(count):
    """Padding on either side, and labels, which end a prompt before its text."""
    model = get_peft_model(llama(), tucka(ec_perturb_scale=5)).eval()
    logits(model)
    row = [3, 4, 5, 6, 7, 9, 10]
    set_route_scope(model, "request")
    logits(model, torch.tensor([row[:count]]))
    first = routers(model)["default"].route.weights
    logits(model, torch.tensor([row[: min(count, 4)]]))
    of_prompt = routers(model)["default"].route.weights
    set_route_scope(model, "prefix", prefix_tokens=count)
    for left, right in ((0, 0), (2, 0), (0, 2)):
        ids = torch.tensor([[0] * left + row + [0] * right])
        mask = torch.tensor([[0] * left + [1] * len(row) + [0] * right])
        logits(model, ids, attention_mask=mask)
        torch.testing.assert_close(routers(model)["default"].route.weights, first)
        labels = ids.clone()
        labels[:, : left + 4] = -100
        logits(model, ids, attention_mask=mask, labels=labels)
        torch.testing.assert_close(routers(model)["default"].route.weights, of_prompt)


def test_decode_scope_is_batch_scope_alone():
    """Teacher forcing under "decode" gives the logits of generating alone under "batch"."""
    model = get_peft_model(llama(), tucka(ec_perturb_scale=5)).eval()
    logits(model)
    prompt = IDS[:1]
    out = model.generate(
        input_ids=prompt, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    set_route_scope(model, "decode")
    labels = out.sequences.clone()
    labels[:, : prompt.shape[1]] = -100
    forced = logits(model, out.sequences, labels=labels)[:, prompt.shape[1] - 1 : -1]
    torch.testing.assert_close(forced, torch.stack(out.logits, 1), atol=1e-5, rtol=1e-5)


def test_gradient_checkpointing_gives_the_same_gradients():
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        model = get_peft_model(llama(), tucka(use_kaiming_init_ec=True)).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        model(input_ids=IDS, labels=IDS).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
        assert routers(model)["default"].forwards == 1
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-6, rtol=1e-5)


def test_balancing_spreads_the_load():
    def load(balance):
        torch.manual_seed(3)
        model = get_peft_model(llama(), tucka(k=4, use_alb=balance, alb_gamma=0.02)).train()
        for step in range(60):
            ids = torch.randint(0, 64, (2, 5), generator=torch.Generator().manual_seed(step))
            model(input_ids=ids)
        return routers(model)["default"].counts

    assert load(True).max() < load(False).max()
    assert (load(True) > 5).all()


def test_statistics_count_selections_and_changes():
    model = get_peft_model(llama(), tucka()).train()
    for _ in range(3):
        model(input_ids=IDS)
    found = routers(model)["default"].statistics()
    assert sum(found["counts"]) == found["forwards"] == 3
    assert found["changes"] == 0


def test_padding_counts_neither_in_the_load_nor_in_its_balance():
    """Under "decode" every token has a route, that of padding too: nobody chose it."""
    mask = torch.ones_like(IDS)
    mask[0, 2:] = 0
    model = get_peft_model(llama(), tucka(use_alb=True, use_kaiming_init_ec=True)).train()
    set_route_scope(model, "decode")
    router = routers(model)["default"]
    found = []
    for ids in (IDS, IDS.clone().masked_fill_(mask == 0, 9)):
        router.reset_statistics()
        router.bias = torch.zeros_like(router.bias)
        model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
        found.append((router.counts.tolist(), router.bias.tolist()))
    assert found[0] == found[1] and sum(found[0][0]) == int(mask.sum())


def test_gpt2_conv1d():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    model = get_peft_model(GPT2LMHeadModel(config), tucka(target_modules=["c_attn", "c_proj"]))
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert model.get_parameter("base_model.model.transformer.h.1.mlp.c_proj.tucka_u.default").shape == (128, 4)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_an_attention_that_has_its_query_last_is_routed_by_it(tmp_path):
    def opt():
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 2}
        return OPTForCausalLM(
            OPTConfig(vocab_size=64, num_attention_heads=4, max_position_embeddings=32, **sizes)
        ).eval()

    model = get_peft_model(opt(), tucka(target_modules=None))
    want = logits(model)
    query = "model.decoder.layers.0.self_attn.q_proj"
    assert routers(model)["default"].module == model.peft_config["default"].router_name == query
    assert [n for n, _ in model.named_parameters() if "tucka_ec" in n] == [f"base_model.model.{query}.tucka_ec.default"]
    model.save_pretrained(str(tmp_path))
    assert torch.equal(logits(PeftModel.from_pretrained(opt(), str(tmp_path))), want)


def test_sequence_classification_with_the_hugging_face_trainer(tmp_path):
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=40, num_labels=2,
    )  # fmt: skip
    model = get_peft_model(RobertaForSequenceClassification(config), tucka(target_modules=None, task_type="SEQ_CLS"))
    data = [{"input_ids": [5 + i % 2, 6, 7], "attention_mask": [1, 1, 1], "labels": i % 2} for i in range(8)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[],
        disable_tqdm=True, use_cpu=True, save_strategy="no",
    )  # fmt: skip
    out = Trainer(model=model, args=arguments, train_dataset=data).train()
    assert math.isfinite(out.training_loss)
    model.save_pretrained(str(tmp_path / "a"))
    again = PeftModel.from_pretrained(RobertaForSequenceClassification(config), str(tmp_path / "a"))
    assert again.peft_config["default"].peft_type == "TUCKA"


def test_image_classification():
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=8, patch_size=4,
        num_labels=3,
    )  # fmt: skip
    base = ViTForImageClassification(config)
    names = sorted({n.rsplit(".", 1)[-1] for n, m in base.named_modules() if isinstance(m, torch.nn.Linear)})
    targets = [n for n in names if n in ("query", "value", "q_proj", "v_proj")]
    model = get_peft_model(base, tucka(target_modules=targets, task_type=None, modules_to_save=["classifier"]))
    model(pixel_values=torch.randn(2, 3, 8, 8), labels=torch.tensor([0, 2])).loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "tucka_" in n)


def test_bfloat16_base_keeps_fp32_factors(tmp_path):
    model = get_peft_model(llama().bfloat16(), tucka()).train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if "tucka_" in n)
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(llama().bfloat16(), str(tmp_path), low_cpu_mem_usage=True)
    name = "base_model.model.model.layers.0.self_attn.q_proj.tucka_u.default"
    assert torch.equal(again.get_parameter(name), model.get_parameter(name))
    model = get_peft_model(llama().bfloat16(), tucka(), autocast_adapter_dtype=False)
    assert model.get_parameter(name).dtype == torch.bfloat16 and logits(model).isfinite().all()


def test_biases_that_were_trained_are_saved(tmp_path):
    model = get_peft_model(llama(attention_bias=True), tucka(bias="tucka_only"))
    assert sum(n.endswith("bias") and p.requires_grad for n, p in model.named_parameters()) == 4  # q and v, two layers
    with torch.no_grad():
        for name, p in model.named_parameters():
            p += p.requires_grad * name.endswith("bias")
    want = logits(model)
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(llama(attention_bias=True), str(tmp_path))
    torch.testing.assert_close(logits(again), want)


def test_centroids_that_no_batch_has_set_are_saved_as_such(tmp_path):
    model = get_peft_model(llama(), tucka())
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(llama(), str(tmp_path))
    assert not centroids(again, "default").any()
    logits(again)
    assert centroids(again, "default").any()


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"r": 0}, "at least 1"), ({"t": 1}, "groups tie"), ({"k": 0}, "at least 1")],
)
def test_bad_settings_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        tucka(**fields)


def test_bad_use_is_refused():
    with pytest.raises(ValueError, match="router_name"):
        get_peft_model(llama(), tucka(router_name="model.layers.0.mlp.up_proj"))
    with pytest.raises(ValueError, match="only Linear and Conv1D"):
        get_peft_model(llama(), tucka(target_modules=["embed_tokens"]))
    model = get_peft_model(llama(), tucka())
    with pytest.raises(NotImplementedError, match="route"):
        model.merge_and_unload()
    with pytest.raises(ValueError, match="scope"):
        set_route_scope(model, "whatever")
    with pytest.raises(ValueError, match="no TuckA adapter"):
        routers(llama())


def test_registration_leaves_the_other_methods_alone():
    model = get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert model.peft_config["default"].peft_type == "LORA"
    assert peft.PeftType("TUCKA") is peft.PeftType.TUCKA
